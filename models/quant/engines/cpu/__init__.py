"""The engine for a CPU (`engine`) and its kernels; those that run between the layers too are `kernels`."""
