"""transformers as an engine: our placement and exact arguments, their model."""
