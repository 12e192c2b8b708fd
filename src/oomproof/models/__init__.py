"""What a model is: its shapes, tensors and files, read without loading a single weight."""
