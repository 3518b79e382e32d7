"""Output pixels side by side, and reads that clip."""
