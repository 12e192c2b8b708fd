// Rows of a tiled 4-bit weight in 16 bits, row by row: what a prompt's matrix product takes.
//
// A warp takes a tile's step, 16 rows × 256 columns, and fetches the next one meanwhile. Every lane has
// its own copy of the codebook in its own bank of shared memory. A value is codebook × scale in float32,
// rounded once. Weights are fetched before the previous kernel has ended, where GPUs can.
//
// Macros: OUTPUT 0 bfloat16, 1 float16; SCALES 0 float32, 1 double quantized, 2 bfloat16.

#define SIXTEEN_BITS OUTPUT
#include "sixteen_bits.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

struct DequantizeParams {
  const uint8* codes;           // of the whole stream
  const void* scales;
  const float* nested_map;      // 256 values, with double quantization
  const float* nested_absmax;   // of the linear, in row-major order
  const float* offset;
  uint16* out;                  // [16 · tiles, columns], contiguous
  int blocks;                   // of 64 columns, in a row
  int steps;                    // of 4 blocks
  int units;                    // tiles · steps
  int first_tile;               // in the stream, of the first row
  int tile_stride;
  int first_row;                // in the linear
  uint32 per_steps;             // 2^32 / steps, rounded up; 0 for one step
  float levels[16];
};

constexpr int STEP = 4;           // blocks
constexpr int SCALE_BYTES = SCALES == 0 ? 4 : SCALES == 1 ? 1 : 2;

// The stored scales of two neighbouring blocks, of rows g and g + 8.
struct Quad {
#if SCALES == 0
  uint4 v;
#elif SCALES == 1
  uint32 v;
#else
  uint2 v;
#endif
  __device__ __forceinline__ void load(const uint8* place) { v = __ldg((const decltype(v)*)place); }
  // As it is stored: a number, or the place of one.
  __device__ __forceinline__ uint32 get(int half, int block) const {
#if SCALES == 0
    return half ? (block ? v.w : v.z) : (block ? v.y : v.x);
#elif SCALES == 1
    return (v >> (16 * half + 8 * block)) & 255u;
#else
    const uint32 pair = half ? v.y : v.x;
    return block ? pair & 0xffff0000u : pair << 16;
#endif
  }
};

struct Fetched {
  uint4 words[STEP];
  Quad quads[STEP / 2];
#if SCALES == 1
  float nested[2][2];             // of either row: of the first block and the last
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
dequantize_tiles(const __grid_constant__ DequantizeParams p) {
  __shared__ float book[16 * 32];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int first_unit = blockIdx.x * WARPS + (threadIdx.x >> 5);
  auto tile_of = [&](int unit) { return p.steps == 1 ? unit : (int)__umulhi(unit, p.per_steps); };
  auto fetch = [&](Fetched& f, int unit) {
    const int tile = tile_of(unit), block = (unit - tile * p.steps) * STEP;
    const size_t place = (size_t)(p.first_tile + tile * p.tile_stride) * p.blocks;
    const int count = min(STEP, p.blocks - block);
    const uint8* const codes = p.codes + (place + block) * 512 + lane * 16;
    #pragma unroll
    for (int b = 0; b < STEP; b++) if (b < count) f.words[b] = stream16(codes + b * 512);
    // Scales lie in groups of eight blocks, the last of which may be smaller.
    const int group = block & ~7, of_group = min(8, p.blocks - group);
    const int element = 16 * group + g * 2 * of_group + (block - group) * 2;
    const uint8* const scales = (const uint8*)p.scales + (place * 16 + element) * SCALE_BYTES;
    #pragma unroll
    for (int q = 0; q < STEP / 2; q++) if (2 * q < count) f.quads[q].load(scales + q * 4 * SCALE_BYTES);
#if SCALES == 1
    #pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = (p.first_row + tile * 16 + g + 8 * half) * p.blocks + block;
      f.nested[half][0] = __ldg(p.nested_absmax + (at >> 8));
      f.nested[half][1] = __ldg(p.nested_absmax + ((at + count - 1) >> 8));
    }
#endif
  };
  Fetched next;
  if (first_unit < p.units) fetch(next, first_unit);
#if SCALES == 1
  __shared__ float map[256];
  for (int i = threadIdx.x; i < 256; i += THREADS) map[i] = __ldg(p.nested_map + i);
  const float offset = __ldg(p.offset);
#endif
  for (int i = threadIdx.x; i < 16 * 32; i += THREADS) book[i] = p.levels[i >> 5];
  __syncthreads();
  wait_for_previous_kernel();
  const char* const own = (const char*)(book + lane);
  for (int unit = first_unit; unit < p.units; unit += gridDim.x * WARPS) {
    if (unit != first_unit) fetch(next, unit);
    const Fetched& f = next;
    const int tile = tile_of(unit), block = (unit - tile * p.steps) * STEP;
    const int count = min(STEP, p.blocks - block), row = tile * 16 + g;
    uint16* const out = p.out + ((size_t)row * p.blocks + block) * 64 + (t & 2) * 16 + (t & 1) * 8;
    #pragma unroll
    for (int b = 0; b < STEP; b++) {
      if (b >= count) break;
      const uint32 word[4] = {f.words[b].x, f.words[b].y, f.words[b].z, f.words[b].w};
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32 stored = f.quads[b >> 1].get(half, b & 1);
#if SCALES == 1
        const int at = (p.first_row + row + 8 * half) * p.blocks + block;
        const float nested = b < 256 - (at & 255) ? f.nested[half][0] : f.nested[half][1];
        const float scale = fmaf(map[stored], nested, offset);
#else
        const float scale = __uint_as_float(stored);
#endif
        uint32 pairs[8];
        #pragma unroll
        for (int j = 0; j < 4; j++) {
          #pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            // The byte's high half is the first column. A code's copies are 128 bytes apart.
            const int low = 16 * pair + 8 * half, high = low + 4;
            const uint32 first = high >= 7 ? word[j] >> (high - 7) : word[j] << (7 - high);
            const uint32 second = low >= 7 ? word[j] >> (low - 7) : word[j] << (7 - low);
            pairs[2 * j + pair] = pack(*(const float*)(own + (first & 0x780u)) * scale,
                                       *(const float*)(own + (second & 0x780u)) * scale);
          }
        }
        // Lanes beside each other write a sector of 32 bytes together: first the even one's, then the other's.
        const bool odd = t & 1;
        uint4 mine[2] = {make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]),
                         make_uint4(pairs[4], pairs[5], pairs[6], pairs[7])};
        const uint4 give = odd ? mine[0] : mine[1];
        uint4 got;
        got.x = __shfl_xor_sync(0xffffffffu, give.x, 1);
        got.y = __shfl_xor_sync(0xffffffffu, give.y, 1);
        got.z = __shfl_xor_sync(0xffffffffu, give.z, 1);
        got.w = __shfl_xor_sync(0xffffffffu, give.w, 1);
        uint4* const to = (uint4*)(out + (size_t)half * 8 * p.blocks * 64 + b * 64);
        to[0] = odd ? got : mine[0];
        to[2] = odd ? mine[1] : got;
      }
    }
  }
}
