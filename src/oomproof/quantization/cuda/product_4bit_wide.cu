// Products of 5 to 64 tokens with 4-bit weights on Hopper: out [tokens, rows] = x [tokens, columns] · Wᵀ.
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
// steps several warpgroups have meet in shared memory. They go to `partials`, as lanes have them. Blocks
// with the same units count who is done, wait for each other and add up their splits, each a share of
// the results: all blocks run at once, for the grid is not larger than the GPU, and the next kernel does
// not begin before the last of them has. Without counters finish_4bit_wide adds up. All is added in one
// order: results repeat bit for bit.
//
// A result can be an update of the hidden states: with `hidden_out` it is added to `hidden` there, and
// the squares of the sums go to `squares`. What is multiplied next are these states, normalised, and no
// kernel between does that: with `norm_weight` x are hidden states, and `squares` says their scales.
//
// Params are those of product_4bit.cu, with other meanings: `steps` are of 256 columns, and
// `units_per_block` are of 64 rows; `partials` are [units, splits, 64 · TOKENS]. The grid is
// blocks · splits wide, splits first.
//
// Macros: TOKENS 8, 16, 32, 64; INPUT, SCALES as in product_4bit.cuh; WARPGROUPS of a block; DEPTH
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
#define SUMS_8 "%0,%1,%2,%3"
#define SUMS_16 SUMS_8 ",%4,%5,%6,%7"
#define SUMS_32 SUMS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SUMS_64 SUMS_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#if TOKENS == 8
#define ALL_SUMS(c) FOUR(c, 0)
#define MULTIPLY WGMMA("8", SUMS_8, "4", "5", "6", "7", "8", "9")
#elif TOKENS == 16
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

// They begin, as a group; nothing that they read or write is touched until it is waited for.
__device__ __forceinline__ void multiplies() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until no more than so many groups are in flight.
template <int in_flight>
__device__ __forceinline__ void wait_for(float (&c)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
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

// -- Sums of the splits --------------------------------------------------------------------------

// A lane's quad of a unit's sums over all splits, added up in order. They are asked for eight at a time.
__device__ __forceinline__ void add_splits(const Params& p, const float4* place, float (&total)[4]) {
  constexpr int AHEAD = 8;
  #pragma unroll 1
  for (int first = 0; first < p.splits; first += AHEAD, place += AHEAD * (UNIT_FLOATS / 4)) {
    float4 more[AHEAD];
    #pragma unroll
    for (int s = 0; s < AHEAD; s++)
      more[s] = first + s < p.splits ? __ldcg(place + s * (UNIT_FLOATS / 4)) : make_float4(0, 0, 0, 0);
    #pragma unroll
    for (int s = 0; s < AHEAD; s++) {
      total[0] += more[s].x; total[1] += more[s].y; total[2] += more[s].z; total[3] += more[s].w;
    }
  }
}

// Where that of a tile of a unit is, of eight tokens.
__device__ __forceinline__ const float4* sums_of(const Params& p, int unit, int tile, int n, int lane) {
  return (const float4*)p.partials + (size_t)unit * p.splits * (UNIT_FLOATS / 4) + (tile * EIGHTS + n) * 32 + lane;
}

// Adds up the splits of units and writes what they are: every `stride`-th quad from `first` on.
__device__ __forceinline__ void finish(const Params& p, int unit_begin, int units, int first, int stride) {
  const bool paired = p.tile_unit == 2;
  const int tiles = paired ? 2 : 4;                       // of a unit, or pairs of them
  #pragma unroll 1
  for (int item = first; item < units * tiles * EIGHTS * 32; item += stride) {
    const int lane = item & 31, n = (item >> 5) % EIGHTS, part = (item >> 5) / EIGHTS;
    const int unit = unit_begin + (paired ? part >> 1 : part >> 2);
    const int of_unit = paired ? (part & 1) * 2 : part & 3, tile = unit * 4 + of_unit;
    if (tile >= p.tiles) continue;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, up[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    add_splits(p, sums_of(p, unit, of_unit, n, lane), total);
    if (paired) add_splits(p, sums_of(p, unit, of_unit + 1, n, lane), up);
    int segment = 0;
    while (!paired && segment + 1 < p.num_segments && tile >= p.segments[segment + 1].first_tile) segment++;
    const int before = paired ? tile * 8 : (tile - p.segments[segment].first_tile) * 16;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
      const int row = (lane >> 2) + 8 * (k >> 1), token = n * 8 + 2 * (lane & 3) + (k & 1);
      if (token < p.tokens)
        write(p, p.out + (size_t)token * p.out_stride, tile, row, segment, before + row,
              total[k] * p.level_scale, up[k] * p.level_scale);
    }
  }
}

// As `finish`, for an update of the hidden states, by the blocks of the same units: a warpgroup takes a
// unit and eight tokens, a warp one of its tiles. `sums` is shared memory: 128 bytes for each of the
// block's.
__device__ __forceinline__ void finish_update(const Params& p, int unit_begin, int units, int split, float* sums) {
  const int thread = threadIdx.x, lane = thread & 31, of_unit = thread >> 5 & 3, group = thread >> 7;
  const int all = units * EIGHTS, own = split < all ? (all - split + p.splits - 1) / p.splits : 0;
  #pragma unroll 1
  for (int turn = group; turn < own; turn += WARPGROUPS) {
    const int item = split + turn * p.splits, n = item % EIGHTS, unit = unit_begin + item / EIGHTS;
    const int token = n * 8 + 2 * (lane & 3), row = unit * 64 + of_unit * 16 + (lane >> 2);
    const bool real = unit * 4 + of_unit < p.tiles;
    auto at = [&](int k) { return (size_t)(token + (k & 1)) * p.out_stride + row + 8 * (k >> 1); };
    auto some = [&](int k) { return real && token + (k & 1) < p.tokens; };
    uint16 before[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) before[k] = some(k) ? __ldcg(p.hidden + at(k)) : 0;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
    add_splits(p, sums_of(p, unit, of_unit, n, lane), total);
    #pragma unroll
    for (int k = 0; k < 4; k++) {
      if (!some(k)) continue;
      const float update = finished(p, 0, row + 8 * (k >> 1), total[k] * p.level_scale);
      const uint16 state = (uint16)pack(number(before[k]) + update * p.multiplier, 0.0f);
      p.hidden_out[at(k)] = state;
      squares[k & 1] += number(state) * number(state);
    }
    #pragma unroll
    for (int distance = 4; distance < 32; distance <<= 1) {
      squares[0] += __shfl_xor_sync(0xffffffffu, squares[0], distance);
      squares[1] += __shfl_xor_sync(0xffffffffu, squares[1], distance);
    }
    if (lane < 4) *(float2*)(sums + (turn * 4 + of_unit) * 8 + 2 * lane) = make_float2(squares[0], squares[1]);
  }
  __syncthreads();
  for (int i = thread; i < own * 8; i += THREADS) {
    const float* const of = sums + (i >> 3) * 32 + (i & 7);
    const int item = split + (i >> 3) * p.splits;
    p.squares[(unit_begin + item / EIGHTS) * TOKENS + item % EIGHTS * 8 + (i & 7)] = of[0] + of[8] + of[16] + of[24];
  }
}

// Of launches without counters.
extern "C" __global__ void __launch_bounds__(256) finish_4bit_wide(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  finish(p, 0, (p.tiles + 3) / 4, blockIdx.x * 256 + threadIdx.x, gridDim.x * 256);
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

  // The norm's weights, of the split's columns.
  uint4* const norm_weight = (uint4*)(added + (WARPGROUPS - 1) * UNIT_FLOATS);
  const bool normed = p.norm_weight != nullptr;
  if (normed)
    #pragma unroll 1
    for (int i = thread; i < split_blocks * 8; i += THREADS)
      norm_weight[i] = __ldg((const uint4*)(p.norm_weight + first_block * 64) + i);

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
  uint4 v[ITEMS][4];
  auto ask = [&](int base) {
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
  };
  ask(thread);
  // Scales of the tokens' norms: sums of squares by the columns that a thread asks for, then of all.
  float* const norms = added + THREADS;
  if (normed) {
    static_assert(THREADS % TOKENS == 0 && THREADS + TOKENS <= (WARPGROUPS - 1) * UNIT_FLOATS);
    constexpr int TURNS = THREADS / TOKENS, PARTS = TOKENS == 64 ? 16 : 6;  // asked for at once
    const int parts = (p.columns + 63) / 64;
    float sum = 0.0f;
    #pragma unroll 1
    for (int first = thread / TOKENS; first < parts; first += TURNS * PARTS) {
      float more[PARTS];
      #pragma unroll
      for (int k = 0; k < PARTS; k++) {
        const int part = first + k * TURNS;
        more[k] = part < parts ? __ldcg(p.squares + part * TOKENS + thread % TOKENS) : 0.0f;
      }
      #pragma unroll
      for (int k = 0; k < PARTS; k++) sum += more[k];
    }
    added[thread] = sum;
    __syncthreads();
    if (thread < TOKENS) {
      sum = 0.0f;
      #pragma unroll
      for (int other = 0; other < TURNS; other++) sum += added[other * TOKENS + thread];
      norms[thread] = rsqrtf(__fdividef(sum, (float)p.columns) + p.eps);
    }
    __syncthreads();
  }
  #pragma unroll 1
  for (int base = thread;;) {
    #pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      const int item = base + k * THREADS;
      if (item >= items) break;
      const int half = item & 1, token = (item >> 1) % TOKENS, block = (item >> 1) / TOKENS;
      if (normed && item < real_items) {
        const uint4* const weights = norm_weight + block * 8 + half;
        const float scale = norms[token];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint4 w = weights[i * 2];
          auto by = [&](uint32 states, uint32 weight) {
            const uint32 scaled = pack(low(states) * scale, high(states) * scale);
            return pack(low(scaled) * low(weight), high(scaled) * high(weight));
          };
          v[k][i] = make_uint4(by(v[k][i].x, w.x), by(v[k][i].y, w.y), by(v[k][i].z, w.z), by(v[k][i].w, w.w));
        }
      }
      uint8* const row = x_rows + block * X_BLOCK_BYTES + token * 128;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        auto word = [&](const uint4& from) { return i == 0 ? from.x : i == 1 ? from.y : i == 2 ? from.z : from.w; };
        *(uint4*)(row + (((half * 4 + i) ^ (token & 7)) * 16)) =
            make_uint4(word(v[k][0]), word(v[k][1]), word(v[k][2]), word(v[k][3]));
      }
    }
    base += THREADS * ITEMS;
    if (base - thread >= items) break;
    ask(base);
  }
  // The tensor cores read shared memory past the path that it was written through.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  // ---- the stream --------------------------------------------------------------------------------
  // With more tokens the sums of a block are scaled while the tensor cores have the next one.
  constexpr int SETS = TOKENS >= 32 ? 2 : 1;
  float acc[SUMS], c[SETS][SUMS];
  #pragma unroll
  for (int k = 0; k < SUMS; k++) acc[k] = c[0][k] = c[SETS - 1][k] = 0.0f;
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
    store(p.partials + ((size_t)(unit_begin + unit) * p.splits + split) * UNIT_FLOATS);
  };

  auto take = [&](const float (&sums)[SUMS], float upper, float lower) {
    #pragma unroll
    for (int k = 0; k < SUMS; k++) acc[k] = fmaf(sums[k], k >> 1 & 1 ? lower : upper, acc[k]);
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
        multiply<0>(c[b % SETS], pairs[b & 1][0], x);
        multiply<1>(c[b % SETS], pairs[b & 1][1], x + 2);
        multiply<1>(c[b % SETS], pairs[b & 1][2], x + 4);
        multiply<1>(c[b % SETS], pairs[b & 1][3], x + 6);
        multiplies();
        if (SETS == 2 && b > 0) {
          wait_for<1>(c[(b - 1) % SETS]);
          take(c[(b - 1) % SETS], scale[0][b - 1], scale[1][b - 1]);
        }
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
        if (SETS == 1 || b == STEP - 1) {
          wait_for<0>(c[b % SETS]);
          take(c[b % SETS], scale[0][b], scale[1][b]);
        }
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

  // ---- the splits --------------------------------------------------------------------------------
  if (p.counters == nullptr) return;
  // Each unit range has a counter of blocks that have written their sums, and then of those that have
  // seen it full: the last one makes it 0 again.
  uint32* const counter = p.counters + row_block;
  __syncthreads();
  if (p.splits > 1) {
    if (thread_again() == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      atomicAdd(counter, 1);
      uint32 seen;
      do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      while (seen < p.splits);
    }
    __syncthreads();
  }
  if (p.hidden_out != nullptr) finish_update(p, unit_begin, units, split, (float*)x_rows);
  else finish(p, unit_begin, units, split * THREADS + thread_again(), THREADS * p.splits);
  if (p.splits > 1 && thread_again() == 0 && atomicAdd(counter, 1) == 2 * p.splits - 1) *counter = 0;
}
