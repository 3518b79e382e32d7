"""Functions that `torch.compile` leaves out of its graphs: kernels of Numba and Triton, and checksums, are not for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def outside_graphs(function: Function) -> Function:
    """A decorator: within a network that is compiled, `function` runs as it is, and the graph ends before it.

    `torch.compiler.disable` alone would do, but it imports the compiler, a second or more, whether one is wanted or not.
    """
    name = "_outside_graphs"

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return _disabled(function, name)(*args, **kwargs)
        return function(*args, **kwargs)
    return call


def _disabled(function, name):
    if not hasattr(function, name):
        setattr(function, name, torch.compiler.disable(function))
    return getattr(function, name)
