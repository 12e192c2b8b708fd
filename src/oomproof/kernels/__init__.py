"""CUDA C++ kernels: sources in the package, compiled when they are first used, kept, launched."""
