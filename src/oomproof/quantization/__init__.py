"""From weights to the bytes of a format and back, and products with weights that stay in them."""
