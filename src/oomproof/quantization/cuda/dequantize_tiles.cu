// Rows of a tiled 4-bit weight in 16 bits, row by row: what a prompt's matrix product takes.
//
// A warp takes a tile's step, 16 rows × 512 columns. Every lane has its own copy of the codebook in
// its own bank of shared memory. A value is codebook × scale in float32, rounded once.
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
  int steps;                    // of 8 blocks
  int units;                    // tiles · steps
  int first_tile;               // in the stream, of the first row
  int tile_stride;
  int first_row;                // in the linear
  uint32 per_steps;             // 2^32 / steps, rounded up; 0 for one step
  float levels[16];
};

#if SCALES == 0
constexpr int SCALE_BYTES = 4;
#elif SCALES == 1
constexpr int SCALE_BYTES = 1;
#else
constexpr int SCALE_BYTES = 2;
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize_tiles(const __grid_constant__ DequantizeParams p) {
  __shared__ float book[16 * 32];
#if SCALES == 1
  __shared__ float map[256];
  for (int i = threadIdx.x; i < 256; i += THREADS) map[i] = __ldg(p.nested_map + i);
  const float offset = __ldg(p.offset);
#endif
  for (int i = threadIdx.x; i < 16 * 32; i += THREADS) book[i] = p.levels[i >> 5];
  __syncthreads();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const char* const own = (const char*)(book + lane);
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < p.units; unit += gridDim.x * WARPS) {
    const int tile = p.steps == 1 ? unit : (int)__umulhi(unit, p.per_steps), step = unit - tile * p.steps;
    const size_t place = (size_t)(p.first_tile + tile * p.tile_stride) * p.blocks + step * 8;
    const int count = min(8, p.blocks - step * 8);
    const uint8* const codes = p.codes + place * 512 + lane * 16;
    const uint8* const scales = (const uint8*)p.scales + place * 16 * SCALE_BYTES;
    uint4 words[8];
    #pragma unroll
    for (int b = 0; b < 8; b++) words[b] = b < count ? stream16(codes + b * 512) : make_uint4(0, 0, 0, 0);
    const int row = tile * 16 + g;
    uint16* const out = p.out + (size_t)row * p.blocks * 64 + step * 512 + t * 16;
    #pragma unroll
    for (int b = 0; b < 8; b++) {
      if (b >= count) break;
      float scale[2];
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        const int at = g * 2 * count + (b >> 1) * 4 + half * 2 + (b & 1);
#if SCALES == 0
        scale[half] = __ldg((const float*)scales + at);
#elif SCALES == 1
        const int block = (p.first_row + row + 8 * half) * p.blocks + step * 8 + b;
        scale[half] = fmaf(map[__ldg(scales + at)], __ldg(p.nested_absmax + (block >> 8)), offset);
#else
        scale[half] = __uint_as_float((uint32)__ldg((const uint16*)scales + at) << 16);
#endif
      }
      const uint32 word[4] = {words[b].x, words[b].y, words[b].z, words[b].w};
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32 pairs[8];
        #pragma unroll
        for (int j = 0; j < 4; j++) {
          #pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            // The byte's high half is the first column. A code's copies are 128 bytes apart.
            const int low = 16 * pair + 8 * half;
            const uint32 second = low >= 7 ? word[j] >> (low - 7) : word[j] << (7 - low);
            const uint32 first = word[j] >> (low + 4 - 7 >= 0 ? low + 4 - 7 : 0) << (low + 4 - 7 >= 0 ? 0 : 7 - low - 4);
            pairs[2 * j + pair] = pack(*(const float*)(own + (first & 0x780u)) * scale[half],
                                       *(const float*)(own + (second & 0x780u)) * scale[half]);
          }
        }
        uint4* const to = (uint4*)(out + (size_t)half * 8 * p.blocks * 64 + b * 64);
        to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
      }
    }
  }
}
