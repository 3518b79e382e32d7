"""Cells on a grid: sums of rows of cells, products of matrices, noise, and codes."""
