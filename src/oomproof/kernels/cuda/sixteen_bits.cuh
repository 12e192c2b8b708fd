// Pairs of 16-bit numbers in a word, loads past the first cache, and the chain of kernels, for sources
// whose macro SIXTEEN_BITS says which numbers: 0 bfloat16, 1 float16.
#ifndef OOMPROOF_SIXTEEN_BITS
#define OOMPROOF_SIXTEEN_BITS

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;

__device__ __forceinline__ float low(uint32 pair) {
#if SIXTEEN_BITS == 0
  return __uint_as_float(pair << 16);
#else
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(value) : "r"(pair));
  return value;
#endif
}

__device__ __forceinline__ float high(uint32 pair) {
#if SIXTEEN_BITS == 0
  return __uint_as_float(pair & 0xffff0000u);
#else
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(value) : "r"(pair));
  return value;
#endif
}

// Both rounded to nearest, the first in the low half.
__device__ __forceinline__ uint32 pack(float first, float second) {
  uint32 pair;
#if SIXTEEN_BITS == 0
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
  return pair;
}

// Weights are read once: they need not stay in the first cache.
__device__ __forceinline__ uint4 stream16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// What another kernel has just written is not taken from the first cache.
__device__ __forceinline__ uint4 fresh16(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// Until the kernel in front of this one has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
