"""Vectors of many lanes, what is looked up or multiplied in them, and the loop that large kernels share."""
