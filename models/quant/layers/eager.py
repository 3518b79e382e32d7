"""Functions that `torch.compile` leaves out of its graphs: kernels of Numba and Triton, and checksums, are not for it."""

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
        refuse_export()
        if torch.compiler.is_compiling():
            return _disabled(function, name)(*args, **kwargs)
        return function(*args, **kwargs)
    return call


def refuse_export(*_: object) -> None:
    """Raise RuntimeError where `torch.export` looks: kernels are no part of its graphs, and of a converted network it sees weights without
    their binding, so that the graph would be that of the float network. May be a hook."""
    if torch.compiler.is_exporting():
        raise RuntimeError("a network on crossbars cannot be exported (torch.export, torch.onnx): what its arrays compute is no graph of "
                           "PyTorch's operators; export the float network that it was made from")


def _disabled(function, name):
    if not hasattr(function, name):
        setattr(function, name, torch.compiler.disable(function))
    return getattr(function, name)
