"""Whole sums at once: exact integer products, and the choice between ways by trying them."""
