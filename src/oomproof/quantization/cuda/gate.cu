// SwiGLU's gate: out = silu(gate) * up, row by row; out may be gate.
//
// A thread has 16 bytes of either. What it reads was written just before, and is in the second cache.
//
// Macros: INPUT 0 bfloat16, 1 float16.

#define SIXTEEN_BITS INPUT
#include "sixteen_bits.cuh"

constexpr int THREADS = 256;

struct GateParams {
  const uint16* gate;
  const uint16* up;
  uint16* out;
  long long gate_stride; // elements, as the others
  long long up_stride;
  long long out_stride;
  int width;             // a multiple of 8
};

__device__ __forceinline__ float gated(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const __grid_constant__ GateParams p) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * 8;
  if (column >= p.width) return;
  const size_t row = blockIdx.x;
  const uint4 gate = fresh16(p.gate + row * p.gate_stride + column);
  const uint4 up = fresh16(p.up + row * p.up_stride + column);
  uint4 result;
  const uint32* const g = (const uint32*)&gate;
  const uint32* const u = (const uint32*)&up;
  uint32* const r = (uint32*)&result;
  #pragma unroll
  for (int i = 0; i < 4; i++) r[i] = pack(gated(low(g[i]), low(u[i])), gated(high(g[i]), high(u[i])));
  *(uint4*)(p.out + row * p.out_stride + column) = result;
}
