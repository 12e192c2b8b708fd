// Products of 9 to 64 tokens with 4-bit weights on Hopper: out [tokens, rows] = x [tokens, columns] · Wᵀ.
//
// As product_4bit.cu: lanes hold fragments of the left side in the order of mma.m16n8k16, and a byte
// (two codes) indexes a table of value pairs in shared memory. Here four warps multiply 64 rows at
// once with wgmma: the left side comes from registers, and x from shared memory, where the tensor
// cores read it by themselves. So a weight is decoded once, however many tokens there are.
//
// wgmma takes k-step j of a block of 64 columns from 16 neighbours in shared memory, and lane t of
// four has its columns 2t, 2t + 1, 2t + 8 and 2t + 9. In a fragment these are columns 16t + 4j and the
// three behind it, so x is stored in that order: words (pairs of columns) of a block change places,
// by a transposition of 4 × 4 words for every half of it.
//
// The work is a grid of units (4 tiles, 64 rows) × splits of the columns, small enough that x of a
// split fits into shared memory beside the table. A block of threads has a range of units and one
// split; its warpgroups share the steps (64 rows × 256 columns) of them evenly. Sums of a unit whose
// steps several warpgroups have meet in shared memory. They go to `partials`, and finish_4bit adds up
// the splits, even where there is one. All is added in one order: results repeat bit for bit.
//
// Params are those of product_4bit.cu, with other meanings: `steps` are of 256 columns, and
// `units_per_block` are of 64 rows. The grid is blocks · splits wide, splits first.
//
// Macros: TOKENS 16, 32, 64; INPUT, SCALES as in product_4bit.cuh; WARPGROUPS of a block; DEPTH
// steps that are fetched ahead.

#include "product_4bit.cuh"

typedef unsigned long long uint64;

constexpr int THREADS = WARPGROUPS * 128;
constexpr int EIGHTS = TOKENS / 8;                 // of tokens
constexpr int SUMS = 4 * EIGHTS;                   // of a lane
constexpr int STEP = 4;                            // blocks of 64 columns
constexpr int ROW_BYTES = 256;                     // of the table: 128 for pairs, 128 for a scale
constexpr int TABLE_BYTES = 256 * ROW_BYTES;
constexpr int TABLE_AT = 1024;                     // in the block's shared memory, see lookup()
constexpr int X_AT = TABLE_AT + TABLE_BYTES;       // a multiple of 1024, as the swizzle wants it
constexpr int X_BLOCK_BYTES = TOKENS * 128;        // 64 columns of all tokens
constexpr uint32 X_PLACE = X_AT >> 4 | 1u << 16;   // see x_of()
constexpr int UNIT_FLOATS = 64 * TOKENS;

extern __shared__ __align__(1024) uint8 shared[];

// The pair of values that a byte of codes stands for; `selector` says which of a word's.
//
// One PRMT makes the address (row, lane's copy), since the table begins at a fixed place, whose offset
// is part of the load. Volatile, so that it stays among the tensor cores' work where it is written.
__device__ __forceinline__ uint32 lookup(uint32 word, uint32 lane4, uint32 selector) {
  uint32 value;
  asm volatile("ld.shared.b32 %0, [%1+1024];" : "=r"(value) : "r"(__byte_perm(word, lane4, selector)));
  return value;
}

// What a code of absmax stands for: it lies behind the pairs, with a copy for every lane as well.
__device__ __forceinline__ float lookup_scale(uint32 word, uint32 lane4, uint32 selector) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1+1152];" : "=f"(value) : "r"(__byte_perm(word, lane4, selector)));
  return value;
}

// Into registers whose values have been used, where there is something to load.
__device__ __forceinline__ void refill(uint4& v, const void* address, bool some) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(address), "r"((int)some));
}

// -- Tensor cores --------------------------------------------------------------------------------

#if INPUT == 0
#define WGMMA_TYPES "k16.f32.bf16.bf16 "
#else
#define WGMMA_TYPES "k16.f32.f16.f16 "
#endif
#define WGMMA(tokens, sums, a0, a1, a2, a3, b, keep)                                              \
  "{.reg .pred p; setp.ne.b32 p, %" keep ", 0; wgmma.mma_async.sync.aligned.m64n" tokens           \
  WGMMA_TYPES "{" sums "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 "}, %" b ", p, 1, 1, 0;}"
#define FOUR(c, n) "+f"(c[4 * n]), "+f"(c[4 * n + 1]), "+f"(c[4 * n + 2]), "+f"(c[4 * n + 3])
#define SUMS_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUMS_32 SUMS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SUMS_64 SUMS_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#if TOKENS == 16
#define ALL_SUMS(c) FOUR(c, 0), FOUR(c, 1)
#define MULTIPLY WGMMA("16", SUMS_16, "8", "9", "10", "11", "12", "13")
#elif TOKENS == 32
#define ALL_SUMS(c) FOUR(c, 0), FOUR(c, 1), FOUR(c, 2), FOUR(c, 3)
#define MULTIPLY WGMMA("32", SUMS_32, "16", "17", "18", "19", "20", "21")
#else
#define ALL_SUMS(c)                                                                               \
  FOUR(c, 0), FOUR(c, 1), FOUR(c, 2), FOUR(c, 3), FOUR(c, 4), FOUR(c, 5), FOUR(c, 6), FOUR(c, 7)
#define MULTIPLY WGMMA("64", SUMS_64, "32", "33", "34", "35", "36", "37")
#endif

// c [64 rows, TOKENS] = (keep ? c : 0) + a [64, 16] · x [16, TOKENS], later.
template <int keep>
__device__ __forceinline__ void multiply(float (&c)[SUMS], const uint32 (&a)[4], uint64 x) {
  asm volatile(MULTIPLY
               : ALL_SUMS(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "n"(keep));
}

// Registers that were written before are seen by multiplications behind it.
__device__ __forceinline__ void before_multiplying() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// They begin; nothing that they read or write is touched until they are waited for.
__device__ __forceinline__ void multiplies() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for(float (&c)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  // Not before: where the compiler copied a sum in front of the wait, it would wait for each product.
  asm volatile("" : ALL_SUMS(c)::"memory");
}

// Where x of a k-step lies, for the tensor cores: rows of 128 bytes (64 columns of a token), whose
// chunks of 16 bytes are swizzled within eight rows, and eight rows behind each other. Bits 0–13 of the
// descriptor are the place / 16, 16–29 a number that this layout ignores and is 1 (see X_PLACE).
__device__ __forceinline__ uint64 x_of(uint32 place) {
  constexpr uint32 SWIZZLE_128 = 1u << 30, EIGHT_ROWS = 1024 >> 4;
  uint64 descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(place), "r"(SWIZZLE_128 | EIGHT_ROWS));
  return descriptor;
}

struct Fetched {
  uint4 codes[STEP];
  Quad quads[STEP / 2];
#if SCALES == 1
  float nested[2][STEP / 2];  // of rows g and g + 8
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
product_4bit_wide(const __grid_constant__ Params p) {
  const int thread = threadIdx.x, lane = thread & 31, warp = (thread >> 5) & 3;  // of its warpgroup
  const int g = lane >> 2;
  // The same in all lanes, and the compiler knows it: what is made of it need not be a lane's own.
  const int group = __shfl_sync(0xffffffffu, thread >> 7, 0);
  const int row_block = blockIdx.x / p.splits, split = blockIdx.x - row_block * p.splits;
  const int blocks = p.columns >> 6;                      // of a row
  const int first_block = split * p.steps * STEP;         // of this split
  const int split_blocks = min(blocks - first_block, p.steps * STEP);
  const int steps = (split_blocks + STEP - 1) / STEP;     // of a unit
  const int unit_begin = row_block * p.units_per_block + min(row_block, p.blocks_with_more);
  const int units = p.units_per_block + (row_block < p.blocks_with_more);
  const int all = units * steps;
  auto begin_of = [&](int group) { return all * group / WARPGROUPS; };
  const int begin = begin_of(group), end = begin_of(group + 1);

  // Dynamic shared memory begins behind what the system keeps for itself, 1024 bytes at most.
  const uint32 shared_at = (uint32)__cvta_generic_to_shared(shared);
  if (shared_at > TABLE_AT) __trap();
  uint8* const table = shared + (TABLE_AT - shared_at);
  uint8* const x_rows = table + TABLE_BYTES;
  // What a warpgroup adds to a unit that another has begun.
  float* const added = (float*)(x_rows + p.steps * STEP * X_BLOCK_BYTES);

  // Which linear of the set a tile belongs to.
  auto segment_of = [&](int tile) {
    if (p.tile_unit == 2) return tile & 1;
    return (p.num_segments > 1 && tile >= p.segments[1].first_tile) +
           (p.num_segments > 2 && tile >= p.segments[2].first_tile);
  };
  // Its place among the tiles of that linear.
  auto tile_within = [&](int tile, int segment) {
    return p.tile_unit == 2 ? tile >> 1 : tile - p.segments[segment].first_tile;
  };
  // This warp's tile of a unit; the last one may have fewer than four, and then it is read again.
  auto tile_of = [&](int unit) { return min((unit_begin + unit) * 4 + warp, p.tiles - 1); };

  // ---- fetching -------------------------------------------------------------------------------
  Fetched fetched[DEPTH];
  int ahead_unit = begin / steps, ahead_step = begin - ahead_unit * steps;
  int left = end - begin;
  const uint8* codes = p.codes;
  const uint8* scales = (const uint8*)p.scales;
#if SCALES == 1
  const float* nested_absmax = p.segments[0].nested_absmax;
  int nested_row = 0;                                     // of row g, in its own weight
  const bool straddles = (blocks & 3) != 0;               // a step's blocks may have two of them
#endif
  auto enter_unit = [&]() {
    const int tile = tile_of(ahead_unit);
    codes = p.codes + ((size_t)tile * blocks + first_block + ahead_step * STEP) * 512 + lane * 16;
    scales = (const uint8*)p.scales + (size_t)tile * blocks * 16 * SCALE_BYTES;
#if SCALES == 1
    const int segment = segment_of(tile);
    nested_absmax = p.segments[segment].nested_absmax;
    nested_row = (tile_within(tile, segment) * 16 + g) * blocks;
#endif
  };
  auto blocks_ahead = [&]() { return split_blocks - ahead_step * STEP; };
  // Of the step ahead; behind the last one, of some step again.
  auto fetch_scales = [&](Fetched& f, bool whole) {
    const int block = first_block + ahead_step * STEP;
    const int of_eight = min(8, blocks - (block & ~7));
    const int element = 16 * (block & ~7) + g * 2 * of_eight + 2 * (block & 4);
    f.quads[0].load(scales, element);
    f.quads[1].load(scales, whole ? element + 4 : element);
#if SCALES == 1
    const int at = nested_row + block, below = at + 8 * blocks;
    f.nested[0][0] = __ldg(nested_absmax + (at >> 8));
    f.nested[1][0] = __ldg(nested_absmax + (below >> 8));
    if (straddles && whole) {
      f.nested[0][1] = __ldg(nested_absmax + ((at + 2) >> 8));
      f.nested[1][1] = __ldg(nested_absmax + ((below + 2) >> 8));
    }
#endif
  };
  auto advance = [&]() {
    codes += STEP * 512;
    left--;
    if (++ahead_step == steps) {
      ahead_step = 0;
      ahead_unit++;
      if (left > 0) enter_unit();
    }
  };

  if (left > 0) enter_unit();
  #pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    #pragma unroll
    for (int q = 0; q < STEP / 2; q++) fetched[d].quads[q].clear();
#if SCALES == 1
    #pragma unroll
    for (int n = 0; n < 4; n++) fetched[d].nested[n >> 1][n & 1] = 0.0f;
#endif
    const bool some = left > 0, whole = some && blocks_ahead() >= STEP;
    #pragma unroll
    for (int b = 0; b < STEP; b++) {
      fetched[d].codes[b] = make_uint4(0, 0, 0, 0);
      refill(fetched[d].codes[b], codes + b * 512, b < 2 ? some : whole);
    }
    fetch_scales(fetched[d], whole);
    if (some) advance();
  }

  // ---- the table, and x once the previous kernel has written it ----------------------------------
  for (int index = thread; index < 2048; index += THREADS) {
    const int row = index >> 3;
    uint8* const place = table + row * ROW_BYTES + (index & 7) * 16;
    const uint32 pair = p.levels[row >> 4] | (uint32)p.levels[row & 15] << 16;
    *(uint4*)place = make_uint4(pair, pair, pair, pair);
#if SCALES == 1
    const float value = __ldg(p.nested_map + row);
    *(float4*)(place + 128) = make_float4(value, value, value, value);
#endif
  }
#if SCALES == 1
  float offsets[3];
  #pragma unroll
  for (int i = 0; i < 3; i++) offsets[i] = i < p.num_segments ? __ldg(p.segments[i].offset) : 0.0f;
#endif
  let_next_kernel_start();
  wait_for_previous_kernel();
  // An item is a half of a token's block: chunks of 8 columns, every other one, of which each has a
  // word of four neighbouring chunks of x as it is stored.
  constexpr int ITEMS = TOKENS == 64 || WARPGROUPS == 4 ? 2 : 4;  // on their way at a time
  const int items = steps * STEP * TOKENS * 2, real_items = split_blocks * TOKENS * 2;
  #pragma unroll 1
  for (int base = thread; base - thread < items; base += THREADS * ITEMS) {
    uint4 v[ITEMS][4];
    #pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int item = base + k * THREADS;
      const int half = item & 1, token = (item >> 1) % TOKENS, block = (item >> 1) / TOKENS;
      const uint16* const source =
          p.x + (size_t)token * p.x_stride + (first_block + block) * 64 + half * 8;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        v[k][i] = make_uint4(0, 0, 0, 0);
        if (item < real_items && token < p.tokens) v[k][i] = fresh16(source + i * 16);
      }
    }
    #pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int item = base + k * THREADS;
      if (item >= items) break;
      const int half = item & 1, token = (item >> 1) % TOKENS, block = (item >> 1) / TOKENS;
      uint8* const row = x_rows + block * X_BLOCK_BYTES + token * 128;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        auto word = [&](const uint4& from) { return i == 0 ? from.x : i == 1 ? from.y : i == 2 ? from.z : from.w; };
        *(uint4*)(row + (((half * 4 + i) ^ (token & 7)) * 16)) =
            make_uint4(word(v[k][0]), word(v[k][1]), word(v[k][2]), word(v[k][3]));
      }
    }
  }
  // The tensor cores read shared memory past the path that it was written through.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  // ---- the stream --------------------------------------------------------------------------------
  float acc[SUMS], c[SUMS];
  #pragma unroll
  for (int k = 0; k < SUMS; k++) acc[k] = c[k] = 0.0f;
  int unit = begin / steps, step = begin - unit * steps;
  bool begun = step == 0;                                 // whether this warpgroup has the unit's first step
  uint32 lane4;  // opaque, so that no lookup moves in front of the barrier
  asm volatile("shl.b32 %0, %1, 2;" : "=r"(lane4) : "r"(lane) : "memory");

#if SCALES == 1
  float offset = 0.0f;
  auto enter_offset = [&]() {
    const int segment = segment_of(tile_of(unit));
    offset = segment == 0 ? offsets[0] : segment == 1 ? offsets[1] : offsets[2];
  };
  enter_offset();
#endif
  auto scale_of = [&](const Fetched& f, int half, int b) -> float {
#if SCALES == 1
    const float code = lookup_scale(f.quads[b >> 1].v, lane4, 0x5504 | (2 * half + (b & 1)) << 4);
    const float outer = b >= 2 && straddles ? f.nested[half][1] : f.nested[half][0];
    return fmaf(code, outer, offset);
#else
    return f.quads[b >> 1].get(half, b & 1);
#endif
  };
  uint32 pairs[2][4][4];
  auto decode = [&](uint32 (&out)[4][4], const uint4& from) {
    const uint32 words[4] = {from.x, from.y, from.z, from.w};
    #pragma unroll
    for (int j = 0; j < 4; j++) {
      out[j][0] = lookup(words[j], lane4, 0x5504);
      out[j][1] = lookup(words[j], lane4, 0x5514);
      out[j][2] = lookup(words[j], lane4, 0x5524);
      out[j][3] = lookup(words[j], lane4, 0x5534);
    }
  };

  // What a thread is, read again: addresses made of it are not held in registers all the time.
  auto thread_again = [&]() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  };
  // Sums lie in the order [tile of the unit][eight tokens][lane][4].
  auto store = [&](float* sums) {
    const int thread = thread_again();
    float4* const place = (float4*)sums + (thread & 96) * EIGHTS + (thread & 31);
    #pragma unroll
    for (int n = 0; n < EIGHTS; n++)
      place[n * 32] = make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]);
  };
  // A unit's sums over this split.
  auto emit = [&](int unit) {
    const int thread = thread_again(), first = 2 * (thread & 3);
    const int tile = (unit_begin + unit) * 4 + (thread >> 5 & 3);
    if (tile >= p.tiles) return;
    const int width = p.tiles * 16;
    float* const place =
        p.partials + ((size_t)split * p.tokens + first) * width + tile * 16 + (thread >> 2 & 7);
    #pragma unroll
    for (int k = 0; k < SUMS; k++) {
      const int token = (k >> 2) * 8 + (k & 1);
      if (first + token < p.tokens) place[(size_t)token * width + 8 * (k >> 1 & 1)] = acc[k] * p.level_scale;
    }
  };

  decode(pairs[0], fetched[0].codes[0]);
  refill(fetched[0].codes[0], codes, left > 0);
  #pragma unroll 1
  for (int i = begin; i < end; i += DEPTH) {
    #pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (i + d >= end) break;
      Fetched& f = fetched[d];
      float scale[2][STEP];
      const bool some = left > 0, whole = some && blocks_ahead() >= STEP;
      const uint32 x_place = X_PLACE + step * (STEP * X_BLOCK_BYTES >> 4);
      #pragma unroll
      for (int b = 0; b < STEP; b++) {
        before_multiplying();
        const uint64 x = x_of(x_place) + b * (X_BLOCK_BYTES >> 4);
        multiply<0>(c, pairs[b & 1][0], x);
        multiply<1>(c, pairs[b & 1][1], x + 2);
        multiply<1>(c, pairs[b & 1][2], x + 4);
        multiply<1>(c, pairs[b & 1][3], x + 6);
        multiplies();
        // While the tensor cores multiply: the next block.
        if (b + 1 < STEP) {
          decode(pairs[(b + 1) & 1], f.codes[b + 1]);
          if (b == 0) {
            #pragma unroll
            for (int k = 0; k < 2 * STEP; k++) scale[k & 1][k >> 1] = scale_of(f, k & 1, k >> 1);
            fetch_scales(f, whole);
          }
          refill(f.codes[b + 1], codes + (b + 1) * 512, b + 1 < 2 ? some : whole);
        } else {
          Fetched& next = fetched[(d + 1) % DEPTH];
          decode(pairs[0], next.codes[0]);
          advance();
          refill(next.codes[0], codes, left > 0);
        }
        wait_for(c);
        #pragma unroll
        for (int k = 0; k < SUMS; k++) acc[k] = fmaf(c[k], scale[(k >> 1) & 1][b], acc[k]);
      }
      if (++step == steps) {
        if (begun) emit(unit);
        else store(added + (group - 1) * UNIT_FLOATS);
        #pragma unroll
        for (int k = 0; k < SUMS; k++) acc[k] = 0.0f;
        begun = true;
        step = 0;
        unit++;
#if SCALES == 1
        if (i + d + 1 < end) enter_offset();
#endif
      }
    }
  }

  // ---- units of several warpgroups ---------------------------------------------------------------
  const bool unfinished = begin < end && step > 0;
  if (unfinished && !begun) store(added + (group - 1) * UNIT_FLOATS);
  __syncthreads();
  if (unfinished && begun) {
    #pragma unroll 1
    for (int other = group + 1; other < WARPGROUPS && begin_of(other) < (unit + 1) * steps; other++) {
      if (begin_of(other) == begin_of(other + 1)) continue;
      #pragma unroll
      for (int n = 0; n < EIGHTS; n++) {
        const float4 more =
            ((const float4*)(added + (other - 1) * UNIT_FLOATS))[(warp * EIGHTS + n) * 32 + lane];
        acc[4 * n] += more.x; acc[4 * n + 1] += more.y; acc[4 * n + 2] += more.z; acc[4 * n + 3] += more.w;
      }
    }
    emit(unit);
  }
}
