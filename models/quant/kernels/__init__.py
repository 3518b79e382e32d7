"""Kernels for CPUs that serve all engines: what runs between the crossbar layers, counts, moments and check sums, and what every kernel is
made with (`cache`, `inner`, `simd`)."""

import os
import sys

import torch

# Numba, when it is imported, counts the cores that the thread may run on. Where OpenMP is told to bind threads to cores, as on many
# clusters, PyTorch has bound this one to one core by then, and all kernels would run on that alone.
if {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"} & set(os.environ) and "numba" not in sys.modules:
    os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
