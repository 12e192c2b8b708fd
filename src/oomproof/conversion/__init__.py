"""From a checkpoint in 16 bits to one in 4, on disk."""
