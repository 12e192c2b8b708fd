// RMSNorm of the hidden states of a few tokens after an update, as add_rms_norm in operators.py.
//
// A block has a token, its threads 16 bytes at a time. The update is read and replaced by the
// normalised states. It may begin while the kernel in front of it ends, as its followers may.
//
// Macros: INPUT 0 bfloat16, 1 float16.

#define SIXTEEN_BITS INPUT
#include "sixteen_bits.cuh"

constexpr int THREADS = 256;
constexpr int CHUNKS = 8;  // of 8 elements, a thread's

struct NormParams {
  uint16* hidden;
  uint16* update;          // normalised states on return
  const uint16* weight;
  long long hidden_stride; // elements
  long long update_stride;
  int columns;             // a multiple of 8
  int adds;
  float eps;
  float multiplier;
};

extern "C" __global__ void __launch_bounds__(THREADS) normalise(const __grid_constant__ NormParams p) {
  __shared__ float sums[THREADS / 32];
  const int thread = threadIdx.x, chunks = p.columns >> 3;
  uint16* const hidden = p.hidden + (size_t)blockIdx.x * p.hidden_stride;
  uint16* const update = p.update + (size_t)blockIdx.x * p.update_stride;
  uint4 weights[CHUNKS], states[CHUNKS], added[CHUNKS];
  #pragma unroll
  for (int k = 0; k < CHUNKS; k++) {
    const int c = k * THREADS + thread;
    weights[k] = c < chunks ? __ldg((const uint4*)p.weight + c) : make_uint4(0, 0, 0, 0);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  #pragma unroll
  for (int k = 0; k < CHUNKS; k++) {
    const int c = k * THREADS + thread;
    states[k] = added[k] = make_uint4(0, 0, 0, 0);
    if (c < chunks) {
      states[k] = fresh16(hidden + c * 8);
      if (p.adds) added[k] = fresh16(update + c * 8);
    }
  }
  float squares = 0.0f;
  #pragma unroll
  for (int k = 0; k < CHUNKS; k++) {
    const int c = k * THREADS + thread;
    uint32* h = (uint32*)&states[k];
    const uint32* u = (const uint32*)&added[k];
    if (p.adds) {
      #pragma unroll
      for (int i = 0; i < 4; i++)
        h[i] = pack(low(h[i]) + low(u[i]) * p.multiplier, high(h[i]) + high(u[i]) * p.multiplier);
      if (c < chunks) *(uint4*)(hidden + c * 8) = states[k];
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) squares += low(h[i]) * low(h[i]) + high(h[i]) * high(h[i]);
  }
  #pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
    squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  if ((thread & 31) == 0) sums[thread >> 5] = squares;
  __syncthreads();
  float total = 0.0f;
  #pragma unroll
  for (int w = 0; w < THREADS / 32; w++) total += sums[w];
  const float scale = rsqrtf(__fdividef(total, (float)p.columns) + p.eps);
  #pragma unroll
  for (int k = 0; k < CHUNKS; k++) {
    const int c = k * THREADS + thread;
    uint32* h = (uint32*)&states[k];
    const uint32* w = (const uint32*)&weights[k];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32 normed = pack(low(h[i]) * scale, high(h[i]) * scale);
      h[i] = pack(low(normed) * low(w[i]), high(normed) * high(w[i]));
    }
    if (c < chunks) *(uint4*)(update + c * 8) = states[k];
  }
}
