"""The memory model: short pure functions, one for each term of a device's sum."""
