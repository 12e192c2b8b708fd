"""Our own decoder: static memory, CUDA graphs, kernels for stored weights."""
