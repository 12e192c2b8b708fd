// What kernels for products of a few tokens with tiled 4-bit weights share: their parameters, stored
// scales, how sums are written, and the kernel that adds up splits of the columns.
//
// Macros: INPUT 0 bfloat16, 1 float16; SCALES 0 float32, 1 double quantized, 2 in 16 bits (bfloat16).
#ifndef OOMPROOF_PRODUCT_4BIT
#define OOMPROOF_PRODUCT_4BIT

#define SIXTEEN_BITS INPUT
#include "sixteen_bits.cuh"

struct Segment {
  const float* nested_absmax;  // [blocks / 256], in bitsandbytes' order
  const float* offset;         // added to what they scale
  const uint16* bias;          // [rows], or null
  int first_tile;              // in the stream; of both, where gate and up alternate
  int unused;
};

struct Params {
  const uint8* codes;          // of the whole stream
  const void* scales;
  const float* nested_map;     // 256 values, with double quantization
  const uint16* x;             // [tokens, columns]; null where it is the normalised hidden states
  const uint16* hidden;        // [tokens, columns]
  const uint16* update;        // added to them, or null
  const uint16* norm_weight;   // [columns]
  uint16* hidden_out;          // their sum, somewhere else than hidden
  uint16* out;                 // [tokens, rows]
  float* partials;             // [splits, tokens, rows of the stream], where columns are split
  uint32* counters;            // of blocks that are done with a split, 0 between launches; or null
  float* squares;              // of hidden states, summed: [64 columns each, tokens of the kernel]
  Segment segments[3];
  int num_segments;
  int tokens;
  int columns;
  int tiles;                   // of the stream
  int x_stride;                // elements
  int out_stride;
  int splits;                  // of the columns, grid.y
  int steps;                   // of a split
  int tile_unit;               // 2 where gate and up tiles alternate
  int gated;                   // whether silu(gate) * up is written, and not both
  int writers;                 // blocks that write hidden_out, a power of two, less one
  int slots;                   // tiles that a warp touches at most
  int most_tiles;              // of a block, rounded up to a multiple of 4
  int units_per_block;         // units (tiles, or pairs of them) of a block; the first
  int blocks_with_more;        // so many have one more
  uint32 per_step;             // 2^32 / steps, rounded up, 0 for one: what divides by steps
  uint32 per_last_step;        // the same for the last split
  uint16 levels[16];           // the values of codes, in the type of x
  float level_scale;           // that they were divided by
  float eps;
  float multiplier;            // of the update
};

__device__ __forceinline__ float rounded(float value) { return low(pack(value, 0.0f)); }
__device__ __forceinline__ float number(uint16 bits) { return low(bits); }

// A sum as it is written: rounded, and with its bias.
__device__ __forceinline__ float finished(const Params& p, int segment, int row, float value) {
  const uint16* bias = p.segments[segment].bias;
  value = rounded(value);
  return bias == nullptr ? value : rounded(value + number(bias[row]));
}

// Writes a row of a token: of a linear, or of gate and up (with `up` beside `value`).
__device__ __forceinline__ void write(const Params& p, uint16* out, int tile, int row, int segment,
                                      int within, float value, float up) {
  value = finished(p, segment, within, value);
  if (p.tile_unit == 2) {
    up = finished(p, 1, within, up);
    if (p.gated) value = __fdividef(value, 1.0f + __expf(-value)) * up;
    else out[p.tiles * 8 + within] = (uint16)pack(up, 0.0f);
    out[within] = (uint16)pack(value, 0.0f);
  } else {
    out[tile * 16 + row] = (uint16)pack(value, 0.0f);
  }
}

// The stored scales of two neighbouring blocks, of rows g and g + 8: [half][block].
struct Quad {
#if SCALES == 0
  float4 v;
  __device__ __forceinline__ float get(int half, int block) const {
    return half ? (block ? v.w : v.z) : (block ? v.y : v.x);
  }
  __device__ __forceinline__ void clear() { v = make_float4(0, 0, 0, 0); }
#elif SCALES == 1
  uint32 v;
  __device__ __forceinline__ uint32 get(int half, int block) const {
    return (v >> (16 * half + 8 * block)) & 255u;
  }
  __device__ __forceinline__ void clear() { v = 0; }
#else
  uint2 v;
  __device__ __forceinline__ float get(int half, int block) const {
    uint32 pair = half ? v.y : v.x;
    return block ? __uint_as_float(pair & 0xffff0000u) : __uint_as_float(pair << 16);
  }
  __device__ __forceinline__ void clear() { v = make_uint2(0, 0); }
#endif
  __device__ __forceinline__ void load(const uint8* base, int element) {
#if SCALES == 0
    uint4 raw = stream16(base + 4ll * element);
    v = make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                    __uint_as_float(raw.w));
#elif SCALES == 1
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(base + element));
#else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];"
                 : "=r"(v.x), "=r"(v.y) : "l"(base + 2ll * element));
#endif
  }
};

constexpr int SCALE_BYTES = SCALES == 0 ? 4 : SCALES == 1 ? 1 : 2;

// Adds up the splits of the columns, in order, and finishes as product_4bit does without them.
extern "C" __global__ void __launch_bounds__(256) finish_4bit(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int width = p.tiles * 16, token = blockIdx.y;
  const int row = blockIdx.x * 256 + threadIdx.x;
  if (row >= width / p.tile_unit) return;
  auto total_of = [&](int at) {
    float total = 0.0f;
    for (int s = 0; s < p.splits; s++)
      total += __ldcg(p.partials + ((size_t)s * p.tokens + token) * width + at);
    return total;
  };
  const bool paired = p.tile_unit == 2;
  const int at = paired ? (row >> 4) * 32 + (row & 15) : row, tile = at >> 4;
  int segment = 0;
  while (!paired && segment + 1 < p.num_segments && tile >= p.segments[segment + 1].first_tile) segment++;
  const int within = paired ? row : row - p.segments[segment].first_tile * 16;
  write(p, p.out + (size_t)token * p.out_stride, tile, row & 15, segment, within, total_of(at),
        paired ? total_of(at + 16) : 0.0f);
}

#endif
