"""Layers: quantizers, training layers, and those whose products are computed on arrays."""
