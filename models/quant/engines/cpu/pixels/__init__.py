"""Output pixels side by side."""
