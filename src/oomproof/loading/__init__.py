"""From checkpoint bytes to tensors on their devices: bounded staging, progress, integrity."""
