"""Scripts that measure, and their results. What a script says of itself is how it is run."""
