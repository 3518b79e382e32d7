"""Layers of many small groups."""
