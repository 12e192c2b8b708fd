"""Small CUDA C++ programs, and the struct that their kernels take."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest

from oomproof.kernels.source import Program

ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities that every source must compile for."""

needs_nvrtc = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="NVRTC is not installed here"
)


class Params(ctypes.Structure):
    """As `struct Params` below."""

    _fields_ = (
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("small", ctypes.c_uint8),
        ("strides", ctypes.c_int64 * 2),
        ("flag", ctypes.c_uint16),
    )


STRUCT = """
struct Params {
  float* values;
  int count;
  float scale;
  unsigned char small;
  long long strides[2];
  unsigned short flag;
};
"""

SCALE = Program(
    name="scale.cu",
    text="""
#include "params.cuh"
extern "C" __global__ void __launch_bounds__(256) scale(const __grid_constant__ Params p) {
  extern __shared__ float row[];
  __shared__ float fixed[64];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fixed[threadIdx.x % 64] = p.scale * FACTOR;
  row[threadIdx.x] = i < p.count ? p.values[i] : 0.0f;
  __syncthreads();
  if (i < p.count) p.values[i] = row[threadIdx.x] * fixed[threadIdx.x % 64] + p.flag;
}
""",
    headers={"params.cuh": STRUCT},
    defines={"FACTOR": 2},
)

SPILL = Program(
    name="spill.cu",
    text="""
extern "C" __global__ void __launch_bounds__(1024) spill(const float* x, float* y, int count) {
  float v[160];
#pragma unroll
  for (int i = 0; i < 160; i++) v[i] = x[i * 1024 + threadIdx.x];
#pragma unroll 1
  for (int j = 0; j < count; j++) {
#pragma unroll
    for (int i = 0; i < 160; i++) v[i] = v[i] * v[(i * 7 + 3) % 160] + x[j];
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 160; i++) sum += v[i] * x[i];
  y[threadIdx.x] = sum;
}
""",
)
