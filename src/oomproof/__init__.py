"""oomproof: run the largest model your GPUs can hold, and never meet `CUDA out of memory`."""

__version__ = "0.1.0"
