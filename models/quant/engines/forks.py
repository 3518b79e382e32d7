"""Children that are forked from a process in which kernels ran, such as workers of a `DataLoader`: kernels run there too, on one thread.

A child has no copy of its parent's threads, and GNU's OpenMP waits for them for ever, in PyTorch's operations as in Numba's. Numba ends
such a child at its first kernel, unless it has said anew how many threads there are.
"""

import ctypes
import os
import sys

import torch


def _on_one_thread() -> None:
    pool = sys.modules.get("numba.np.ufunc.omppool")  # what Numba has loaded once a kernel has run on OpenMP's threads
    if pool is not None and pool.openmp_vendor == "GNU":  # others are forked with their threads
        torch.set_num_threads(1)
        ctypes.CFUNCTYPE(None, ctypes.c_int)(pool.launch_threads)(1)
        sys.modules["numba"].set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_on_one_thread)
