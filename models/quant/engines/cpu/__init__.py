"""The engine for CPUs: `engine`, and the ways that it chooses from. Its kernels are in the rooms below."""
