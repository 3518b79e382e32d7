"""What is measured and kept: points, their keys, ranges, chips, columns of results."""
