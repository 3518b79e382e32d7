"""Vectors of many lanes, and what is looked up or multiplied in them."""
