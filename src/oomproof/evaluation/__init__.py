"""What formats cost on a model: perplexity, KL divergence and agreement against its 16 bits."""
