// Products of a few tokens with 4-bit weights: out [tokens, rows] = x [tokens, columns] · Wᵀ.
//
// Weights lie in tiles (quantization/tiles.py): a fragment is 16 rows × 64 columns in 512 bytes, in
// the order in which lanes of a warp hold the left side of mma.m16n8k16. A byte (two codes) indexes
// a table of value pairs in shared memory, of which every lane has its own copy in its own bank, and
// the tensor cores multiply. The table is in the input's type and scaled by a constant that makes
// its rounding smallest; absmax scales the float32 sum over a block of 64 and is never rounded.
//
// A block of threads has a range of tiles, and its warps share their steps (16 rows × 512 columns)
// evenly: each streams contiguous memory, so many bytes ahead that memory does not wait for
// arithmetic. Sums of a tile's warps meet in shared memory, and are added in one order: results
// repeat bit for bit. Weights are fetched before the previous kernel has ended, where GPUs can.
//
// With few tokens the matrix product has columns to spare (8, at TOKENS tokens): they take other
// blocks of 64 columns. TOKENS = 1: eight blocks at once, each with its own x in its own column; the
// cross terms are thrown away, and a lane scales only what is its own.
//
// Macros: TOKENS 1, 2, 4, 8, 16; INPUT 0 bfloat16, 1 float16; SCALES 0 float32, 1 double
// quantized, 2 in 16 bits (bfloat16); WARPS of a block; DEPTH steps that are fetched ahead; BLOCKS
// that a multiprocessor has room for.

#include "product_4bit.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int COLUMNS = TOKENS < 8 ? TOKENS : 8;   // of a matrix product that are tokens
constexpr int SHARED = 8 / COLUMNS;                // blocks that share a matrix product's columns
constexpr int TILES = TOKENS <= 8 ? 1 : TOKENS / 8;  // matrix products beside each other
constexpr int SUMS = TOKENS == 1 ? 2 : 4 * TILES;  // of a lane
constexpr int QUADS = TOKENS == 1 ? 1 : TOKENS == 2 ? 2 : 4;  // pairs of blocks whose scales it needs
constexpr int NESTED = SCALES == 1 ? (TOKENS == 1 ? 2 : 4) : 1;
constexpr int ROW_BYTES = 256;                     // of the table: 128 for lanes, 128 for x
constexpr int TABLE_BYTES = 256 * ROW_BYTES;
constexpr int TABLE_AT = 1024;                     // in the block's shared memory, see lookup()
constexpr int MAP_BYTES = 1024;
constexpr int NORM_BYTES = 16 * WARPS * 4;

__device__ __forceinline__ void multiply(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                         uint32 b0, uint32 b1) {
  asm(
#if INPUT == 0
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern __shared__ __align__(256) uint8 shared[];

// The pair of values that a byte of codes stands for; `selector` says which of a word's.
//
// One PRMT makes the address (row, lane's copy), since the table begins at a fixed place, whose offset
// is part of the load: an address that had to be added would cost as much as the load itself.
__device__ __forceinline__ uint32 lookup(uint32 word, uint32 lane4, uint32 selector) {
  uint32 value;
  asm("ld.shared.b32 %0, [%1+1024];" : "=r"(value) : "r"(__byte_perm(word, lane4, selector)));
  return value;
}

struct Fetched {
  uint4 codes[8];
  Quad quads[QUADS];
#if SCALES == 1
  float nested[NESTED];  // of rows g and g + 8; with several tokens, of the first and the last block
#endif
};

// Walks a warp's steps. One walks ahead and fetches, one follows and computes.
struct Cursor {
  int tile;
  int step;   // within the tile
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
product_4bit(const __grid_constant__ Params p) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int blocks = p.columns >> 6;                      // of a row
  const int first_block = blockIdx.y * p.steps * 8;       // of this split
  const int split_blocks = min(blocks - first_block, p.steps * 8);
  const int steps = (split_blocks + 7) >> 3;              // of a tile
  const int x_block = blockIdx.x;
  const int tile_begin = (x_block * p.units_per_block + min(x_block, p.blocks_with_more)) * p.tile_unit;
  const int tile_end =
      tile_begin + (p.units_per_block + (x_block < p.blocks_with_more)) * p.tile_unit;
  const int all = (tile_end - tile_begin) * steps;
  const int begin = all * warp / WARPS, end = all * (warp + 1) / WARPS;
  // Divides a number of steps by the steps of a tile; by 1 it would overflow.
  const uint32 per_step = blockIdx.y + 1 < gridDim.y ? p.per_step : p.per_last_step;
  const uint32 by_one = steps == 1 ? 0xffffffffu : 0u;
  auto tile_of = [&](int step) { return (int)(__umulhi(step, per_step) + (step & by_one)); };
  const int first_tile = tile_of(begin);

  // Dynamic shared memory begins behind what the system keeps for itself, 1024 bytes at most.
  const uint32 shared_at = (uint32)__cvta_generic_to_shared(shared) & 0xffffffu;
  if (shared_at > TABLE_AT) __trap();
  uint8* const table = shared + (TABLE_AT - shared_at);
  uint8* const map = table + TABLE_BYTES;
  float* const norms = (float*)(map + MAP_BYTES);
  float* const sums = (float*)(map + MAP_BYTES + NORM_BYTES);
  uint32* const owners = (uint32*)(sums + WARPS * p.slots * 16 * TOKENS);
  uint8* const beyond = (uint8*)(owners + p.most_tiles);

#if SCALES == 1
  const float map_value = THREADS >= 256 && thread < 256 ? __ldg(p.nested_map + thread) : 0.0f;
  float offsets[3];
  #pragma unroll
  for (int i = 0; i < 3; i++) offsets[i] = i < p.num_segments ? __ldg(p.segments[i].offset) : 0.0f;
#endif
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

  // ---- fetching -------------------------------------------------------------------------------
  Fetched fetched[DEPTH];
  Cursor ahead;
  ahead.tile = tile_begin + first_tile;
  ahead.step = begin - first_tile * steps;
  const uint8* codes = p.codes + ((size_t)ahead.tile * blocks + first_block + ahead.step * 8) * 512 + lane * 16;
  const uint8* scales = (const uint8*)p.scales + ((size_t)ahead.tile * blocks + first_block + ahead.step * 8) * 16 * SCALE_BYTES;
  const size_t skip = (size_t)(blocks - split_blocks);    // blocks of other splits, at a tile's end
  int left = end - begin;

#if SCALES == 1
  const float* nested_absmax = p.segments[0].nested_absmax;
  int nested_row = 0;                                      // of the tile's row g, in its own weight
#endif
  auto enter_tile = [&](int tile) {
#if SCALES == 1
    const int segment = segment_of(tile);
    nested_absmax = p.segments[segment].nested_absmax;
    nested_row = (tile_within(tile, segment) * 16 + g) * blocks + first_block;
#endif
  };

  auto fetch_scales = [&](Fetched& f, int count) {
    if constexpr (TOKENS == 1) {
      if (2 * t < count) f.quads[0].load(scales, g * 2 * count + t * 4);
    } else if constexpr (TOKENS == 2) {
      #pragma unroll
      for (int q = 0; q < 2; q++)
        if (4 * q + (t & 2) < count) f.quads[q].load(scales, g * 2 * count + (2 * q + (t >> 1)) * 4);
    } else {
      #pragma unroll
      for (int q = 0; q < 4; q++)
        if (2 * q < count) f.quads[q].load(scales, g * 2 * count + q * 4);
    }
#if SCALES == 1
    int at = nested_row + ahead.step * 8;
    if constexpr (TOKENS == 1) {
      if (2 * t < count) {
        f.nested[0] = __ldg(nested_absmax + ((at + 2 * t) >> 8));
        f.nested[1] = __ldg(nested_absmax + ((at + 8 * blocks + 2 * t) >> 8));
      }
    } else {
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = at + half * 8 * blocks;
        f.nested[2 * half] = __ldg(nested_absmax + (row >> 8));
        f.nested[2 * half + 1] = __ldg(nested_absmax + ((row + count - 1) >> 8));
      }
    }
#endif
  };
  auto advance = [&](int count) {
    codes += (size_t)count * 512;
    scales += (size_t)count * 16 * SCALE_BYTES;
    left--;
    if (++ahead.step == steps) {
      ahead.step = 0;
      ahead.tile++;
      codes += skip * 512;
      scales += skip * 16 * SCALE_BYTES;
      if (left > 0) enter_tile(ahead.tile);
    }
  };
  auto blocks_ahead = [&]() { return min(8, split_blocks - ahead.step * 8); };

  if (left > 0) enter_tile(ahead.tile);
  #pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    #pragma unroll
    for (int q = 0; q < QUADS; q++) fetched[d].quads[q].clear();
#if SCALES == 1
    #pragma unroll
    for (int n = 0; n < NESTED; n++) fetched[d].nested[n] = 0.0f;
#endif
    int count = left > 0 ? blocks_ahead() : 0;
    #pragma unroll
    for (int b = 0; b < 8; b++)
      fetched[d].codes[b] = b < count ? stream16(codes + b * 512) : make_uint4(0, 0, 0, 0);
    if (left > 0) {
      fetch_scales(fetched[d], count);
      advance(count);
    }
  }

  // ---- x, once the previous kernel has written it, and the table while it is on its way ----------
  const int rows_of_token = steps * 8;                     // of x_place; beyond the end they are zero
  const int chunks = rows_of_token * 8;
  const int real_chunks = split_blocks * 8;
  constexpr int BATCH = TOKENS < 8 ? TOKENS : 8;           // tokens at a time
  constexpr int CHUNKS = BATCH == 1 ? 5 : BATCH < 4 ? 4 / BATCH : 1;  // 16 bytes of each at a time
  // Rows of x are blocks of 64 columns of a token; a lane has 16 of them, in two halves. Few rows lie
  // in the gaps of the table. Halves of every other row change places, so that eight lanes never
  // meet in a bank.
  const bool in_gaps = TOKENS <= 2 && TOKENS * rows_of_token <= 256;
  const int row_bytes = in_gaps ? ROW_BYTES : 128;
  uint8* const x_rows = in_gaps ? table + 128 : beyond;
  auto place_of = [&](int m, int c) {
    const int block = c >> 3, half = (c ^ m ^ block) & 1;
    return (uint4*)(x_rows + (m * rows_of_token + block) * row_bytes + (half * 4 + ((c & 7) >> 1)) * 16);
  };
  // Where this lane's column is: a token, and which of the blocks that share the product.
  const int column_token = g % COLUMNS, column_block = g / COLUMNS;
  const uint8* const x_column = x_rows + (column_token * rows_of_token + column_block) * row_bytes + t * 16;
  const int swapped = (column_token + column_block) & 1;
  const uint8* const x_first = x_column + swapped * 64;
  const uint8* const x_second = x_column + (swapped ^ 1) * 64;
  const int next_tokens = 8 * rows_of_token * row_bytes;
  const bool norm = TOKENS <= 8 && p.x == nullptr;
  const uint16* const source = norm ? p.hidden : p.x + first_block * 64;
  const int source_stride = norm ? p.columns : p.x_stride;
  // Of the norm's weight what is sure to be needed is there before the hidden states are.
  constexpr int KEPT = 2;
  uint4 kept[KEPT];
  #pragma unroll
  for (int k = 0; k < KEPT; k++)
    kept[k] = norm && thread + k * THREADS < real_chunks
                  ? __ldg((const uint4*)(p.norm_weight + (thread + k * THREADS) * 8))
                  : make_uint4(0, 0, 0, 0);
  let_next_kernel_start();
  wait_for_previous_kernel();
  #pragma unroll 1
  for (int first = 0; first < TOKENS; first += BATCH) {
    float squares[BATCH];
    #pragma unroll
    for (int m = 0; m < BATCH; m++) squares[m] = 0.0f;
    #pragma unroll 1
    for (int base = thread; base - thread < chunks; base += THREADS * CHUNKS) {
      uint4 v[CHUNKS][BATCH], added[CHUNKS][BATCH];
      #pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        const int c = base + k * THREADS;
        #pragma unroll
        for (int m = 0; m < BATCH; m++) {
          v[k][m] = added[k][m] = make_uint4(0, 0, 0, 0);
          if (first + m < p.tokens && c < real_chunks) {
            v[k][m] = fresh16(source + (size_t)(first + m) * source_stride + c * 8);
            if (norm && p.update != nullptr)
              added[k][m] = fresh16(p.update + (size_t)(first + m) * p.x_stride + c * 8);
          }
        }
      }
      if (first == 0 && base == thread) {
        #pragma unroll
        for (int i = 0; i < (2048 + THREADS - 1) / THREADS; i++) {
          const int index = i * THREADS + thread, row = index >> 3;
          if (2048 % THREADS != 0 && index >= 2048) break;
          const uint32 pair = p.levels[row >> 4] | (uint32)p.levels[row & 15] << 16;
          *(uint4*)(table + row * ROW_BYTES + (index & 7) * 16) = make_uint4(pair, pair, pair, pair);
        }
#if SCALES == 1
        if (THREADS >= 256) {
          if (thread < 256) ((float*)map)[thread] = map_value;
        } else {
          for (int i = thread; i < 256; i += THREADS) ((float*)map)[i] = __ldg(p.nested_map + i);
        }
#endif
      }
      #pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        const int c = base + k * THREADS;
        if (c >= chunks) break;
        #pragma unroll
        for (int m = 0; m < BATCH; m++) {
          if (norm) {
            // RMSNorm of hidden + multiplier * update. Every block has whole rows (splits is 1).
            uint32* h = (uint32*)&v[k][m];
            const uint32* u = (const uint32*)&added[k][m];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
              h[i] = pack(low(h[i]) + low(u[i]) * p.multiplier, high(h[i]) + high(u[i]) * p.multiplier);
              squares[m] += low(h[i]) * low(h[i]) + high(h[i]) * high(h[i]);
            }
            if ((c & p.writers) == x_block && first + m < p.tokens && c < real_chunks)
              *(uint4*)(p.hidden_out + (size_t)(first + m) * p.columns + c * 8) = v[k][m];
          }
          *place_of(first + m, c) = v[k][m];
        }
      }
    }
    if (norm) {
      #pragma unroll
      for (int m = 0; m < BATCH; m++) {
        #pragma unroll
        for (int distance = 16; distance > 0; distance >>= 1)
          squares[m] += __shfl_xor_sync(0xffffffffu, squares[m], distance);
        if (lane == 0) norms[(first + m) * WARPS + warp] = squares[m];
      }
    }
  }
  if (norm) {
    __syncthreads();
    #pragma unroll 1
    for (int m = 0; m < TOKENS; m++) {
      float total = 0.0f;
      #pragma unroll
      for (int k = 0; k < WARPS; k += 4) {
        float4 four = *(const float4*)(norms + m * WARPS + k);
        total += four.x + four.y + four.z + four.w;
      }
      const float scale = rsqrtf(__fdividef(total, (float)p.columns) + p.eps);
      #pragma unroll 1
      for (int k = 0, c = thread; c < real_chunks; k++, c += THREADS) {
        const uint4 weights = k < KEPT ? (k == 0 ? kept[0] : kept[1]) : __ldg((const uint4*)(p.norm_weight + c * 8));
        const uint32* w = (const uint32*)&weights;
        uint4* place = place_of(m, c);
        uint4 v = *place;
        uint32* h = (uint32*)&v;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32 normed = pack(low(h[i]) * scale, high(h[i]) * scale);
          h[i] = pack(low(normed) * low(w[i]), high(normed) * high(w[i]));
        }
        *place = v;
      }
    }
  }
  __syncthreads();

  // ---- the stream --------------------------------------------------------------------------------
  float acc[SUMS];
  #pragma unroll
  for (int i = 0; i < SUMS; i++) acc[i] = 0.0f;
  Cursor now;
  now.tile = tile_begin + first_tile;
  now.step = begin - first_tile * steps;
  uint32 lane4;  // opaque, so that no lookup moves in front of the barrier
  asm volatile("shl.b32 %0, %1, 2;" : "=r"(lane4) : "r"(lane) : "memory");
  float* slot = sums + warp * p.slots * 16 * TOKENS;

#if SCALES == 1
  float offset = 0.0f;
  auto enter_offset = [&](int tile) {
    int segment = segment_of(tile);
    offset = segment == 0 ? offsets[0] : segment == 1 ? offsets[1] : offsets[2];
  };
  enter_offset(now.tile);
#endif

  for (int i = begin; i < end; i += DEPTH) {
    #pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (i + d >= end) break;
      Fetched& f = fetched[d];
      // Scales that this lane applies, by row half.
      constexpr int OWN = TOKENS <= 2 ? 2 : TOKENS == 4 ? 4 : 8;
#if SCALES == 1
      int groups[2] = {0, 0};
      if constexpr (TOKENS > 1) {
        // Eight blocks lie in two groups of 256 at most: so many of them are in the first.
        const int at = (tile_within(now.tile, segment_of(now.tile)) * 16 + g) * blocks + first_block + now.step * 8;
        groups[0] = 256 - (at & 255);
        groups[1] = 256 - ((at + 8 * blocks) & 255);
      }
      auto scale_of = [&](int half, int o) {
        // Block within the step, and where its scale is.
        const int quad = TOKENS == 1 ? 0 : TOKENS <= 4 ? o : o >> 1;
        const int parity = TOKENS == 1 ? o : TOKENS == 2 ? t & 1 : TOKENS == 4 ? t >> 1 : o & 1;
        const int block = TOKENS == 1 ? 2 * t + o : TOKENS == 2 ? 4 * o + t : TOKENS == 4 ? 2 * o + (t >> 1) : o;
        const float outer = TOKENS == 1 ? f.nested[half]
                            : block < groups[half] ? f.nested[2 * half] : f.nested[2 * half + 1];
        return fmaf(((const float*)map)[f.quads[quad].get(half, parity)], outer, offset);
      };
#else
      auto scale_of = [&](int half, int o) {
        const int quad = TOKENS == 1 ? 0 : TOKENS <= 4 ? o : o >> 1;
        const int parity = TOKENS == 1 ? o : TOKENS == 2 ? t & 1 : TOKENS == 4 ? t >> 1 : o & 1;
        return f.quads[quad].get(half, parity);
      };
#endif
      float scale[2][OWN];
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        #pragma unroll
        for (int o = 0; o < OWN; o++) scale[half][o] = scale_of(half, o);
      }
      const int count = left > 0 ? blocks_ahead() : 0;
      if (left > 0) fetch_scales(f, count);

      const int step_at = now.step * 8 * row_bytes;
      uint32 x[8];
      #pragma unroll
      for (int b = 0; b < 8; b++) {
        const uint32 words[4] = {f.codes[b].x, f.codes[b].y, f.codes[b].z, f.codes[b].w};
        uint32 pairs[4][4];
        #pragma unroll
        for (int j = 0; j < 4; j++) {
          pairs[j][0] = lookup(words[j], lane4, 0x5504);
          pairs[j][1] = lookup(words[j], lane4, 0x5514);
          pairs[j][2] = lookup(words[j], lane4, 0x5524);
          pairs[j][3] = lookup(words[j], lane4, 0x5534);
        }
        if (b < count) f.codes[b] = stream16(codes + b * 512);
        #pragma unroll
        for (int n = 0; n < TILES; n++) {
          if (b % SHARED == 0) {
            const int at = step_at + b * row_bytes + n * next_tokens;
            const uint4 first = *(const uint4*)((b & 1 ? x_second : x_first) + at);
            const uint4 second = *(const uint4*)((b & 1 ? x_first : x_second) + at);
            x[0] = first.x; x[1] = first.y; x[2] = first.z; x[3] = first.w;
            x[4] = second.x; x[5] = second.y; x[6] = second.z; x[7] = second.w;
          }
          float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          #pragma unroll
          for (int j = 0; j < 4; j++)
            multiply(c, pairs[j][0], pairs[j][1], pairs[j][2], pairs[j][3], x[2 * j], x[2 * j + 1]);
          if constexpr (TOKENS == 1) {
            if (t == b >> 1) {
              acc[0] = fmaf(c[b & 1], scale[0][b & 1], acc[0]);
              acc[1] = fmaf(c[2 + (b & 1)], scale[1][b & 1], acc[1]);
            }
          } else {
            constexpr int LANES = TOKENS >= 8 ? 4 : TOKENS / 2;   // of the four that hold a block's columns
            if (TOKENS >= 8 || t / LANES == b % SHARED) {
              const int o = TOKENS == 2 ? b >> 2 : TOKENS == 4 ? b >> 1 : b;
              acc[4 * n + 0] = fmaf(c[0], scale[0][o], acc[4 * n + 0]);
              acc[4 * n + 1] = fmaf(c[1], scale[0][o], acc[4 * n + 1]);
              acc[4 * n + 2] = fmaf(c[2], scale[1][o], acc[4 * n + 2]);
              acc[4 * n + 3] = fmaf(c[3], scale[1][o], acc[4 * n + 3]);
            }
          }
        }
      }
      if (left > 0) advance(count);

      if (now.step == 0 && lane == 0) owners[now.tile - tile_begin] = warp | (uint32)(now.tile - tile_begin - first_tile) << 8;
      if (++now.step == steps || i + d + 1 == end) {
        // A tile's end, or the warp's: its sums [16 rows][TOKENS].
        if constexpr (TOKENS == 1) {
          #pragma unroll
          for (int half = 0; half < 2; half++) {
            float total = acc[half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (t == 0) slot[g + 8 * half] = total * p.level_scale;
          }
        } else {
          #pragma unroll
          for (int k = 0; k < SUMS; k++) {
            float total = acc[k];
            if constexpr (TOKENS == 2) {
              total += __shfl_xor_sync(0xffffffffu, total, 1);
              total += __shfl_xor_sync(0xffffffffu, total, 2);
            } else if constexpr (TOKENS == 4) {
              total += __shfl_xor_sync(0xffffffffu, total, 2);
            }
            int n = k >> 2, half = (k >> 1) & 1, token = 8 * n + 2 * t + (k & 1);
            if (TOKENS >= 8 || t < TOKENS / 2) slot[(g + 8 * half) * TOKENS + token] = total * p.level_scale;
          }
        }
        #pragma unroll
        for (int k = 0; k < SUMS; k++) acc[k] = 0.0f;
        slot += 16 * TOKENS;
        if (now.step == steps) {
          now.step = 0;
          now.tile++;
#if SCALES == 1
          if (i + d + 1 < end) enter_offset(now.tile);
#endif
        }
      }
    }
  }
  __syncthreads();

  // ---- sums over warps ---------------------------------------------------------------------------
  // The warp that began a tile has it in some slot; those that follow began in the midst of it, and
  // have it in their first.
  auto total_of = [&](int tile, int row, int token) {
    const int local = tile - tile_begin, tile_last = (local + 1) * steps;
    const uint32 owner = owners[local];
    int w = owner & 255;
    const int at = row * TOKENS + token, size = 16 * TOKENS;
    float total = sums[(w * p.slots + (owner >> 8)) * size + at];
    for (w++; w < WARPS && all * w / WARPS < tile_last; w++)
      if (all * w / WARPS < all * (w + 1) / WARPS) total += sums[w * p.slots * size + at];
    return total;
  };
  const int rows_here = (tile_end - tile_begin) / p.tile_unit * 16;
  for (int i = thread; i < rows_here * TOKENS; i += THREADS) {
    // Tokens are neighbours in `sums`, rows are in `out`.
    const int token = TOKENS == 1 ? 0 : i / rows_here, at = i - token * rows_here;
    if (token >= p.tokens) break;
    const int row = at & 15, unit = at >> 4;
    const int tile = tile_begin + unit * p.tile_unit;
    const bool paired = p.tile_unit == 2;
    float value = total_of(tile, row, token), up = paired ? total_of(tile + 1, row, token) : 0.0f;
    if (p.splits > 1) {
      float* place = p.partials + ((size_t)blockIdx.y * p.tokens + token) * p.tiles * 16 + tile * 16 + row;
      place[0] = value;
      if (paired) place[16] = up;
      continue;
    }
    const int segment = paired ? 0 : segment_of(tile);
    write(p, p.out + (size_t)token * p.out_stride, tile, row, segment, tile_within(tile, segment) * 16 + row,
          value, up);
  }
}
