"""What a machine has: its GPUs, its RAM, its disk. No torch; GPUs are read through NVML alone."""
