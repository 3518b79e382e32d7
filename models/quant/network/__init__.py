"""What is done with all layers of a network: counts of its reads, ranges and plans, chips and their files, diagnostics."""
