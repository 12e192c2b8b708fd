"""Training LoRA adapters on quantized weights (QLoRA, arXiv:2305.14314)."""
