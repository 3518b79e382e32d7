"""What is done with all layers of a network: its hardware, counts of its reads, ranges and plans, chips, diagnostics."""
