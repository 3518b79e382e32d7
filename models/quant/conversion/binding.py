"""Weights that know which layers on crossbars hold them: how a network of any code comes to compute on crossbars.

A network multiplies by a weight in many ways: a module's own forward, `F.linear(x, self.qkv_weight)`, `x @ w.T`, a convolution by a
weight that is standardized at each call. What they have in common is the parameter. `Bound` is a parameter whose products with an
input are those of the layer that it is bound to, however the code around it came to the product.

A product may also take what was made of a parameter alone: a part (`w.chunk(3)[0]`), a transpose, a standardized weight. Each is known
by its *path*, the calls and their numbers that led to it from the parameter: `tracing` writes down the paths that end in a
product, and here the same calls lead to the same path, and by it to the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from .products import PRODUCTS, operands


class Bound(nn.Parameter):
    """A parameter whose products are those of layers on crossbars: `layers`, `{path: layer}`, "" being the parameter itself.

    `known` are the paths on the way to these. Everything else that is done with it is done with an ordinary tensor.
    """

    layers: dict[str, nn.Module]
    known: frozenset[str]

    @staticmethod
    def of(parameter: Tensor, layers: dict[str, nn.Module], known: frozenset[str]) -> Bound:
        """The same memory as a parameter that is bound."""
        bound = Tensor._make_subclass(Bound, parameter.detach(), parameter.requires_grad)
        bound.layers, bound.known = layers, known
        return bound

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Bound:
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                memo[id(self)] = copied = Bound.of(self.detach().clone(memory_format=torch.preserve_format), {}, self.known)
                copied.requires_grad_(self.requires_grad)
            copied.layers.update(copy.deepcopy(self.layers, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        with torch._C.DisableTorchFunctionSubclass():
            data = self.detach().as_subclass(Tensor)
        return _rebuild, (data, self.requires_grad), {"layers": self.layers, "known": self.known}, None, None, _set_state


def _rebuild(data, requires_grad):
    return Bound.of(nn.Parameter(data, requires_grad), {}, frozenset())


def _set_state(bound, state):
    bound.layers, bound.known = state["layers"], state["known"]


class _Made(Tensor):
    """What was made of a bound parameter alone, on the way to a product."""

    root: Bound
    path: str

    @staticmethod
    def of(value: Tensor, root: Bound, path: str) -> _Made:
        made = value.as_subclass(_Made)
        made.root, made.path = root, path
        return made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    """Any function of PyTorch with a bound parameter, or what was made of it, among its arguments."""
    if func in PRODUCTS:
        found = operands(func, args, kwargs)
        if found is not None and isinstance(found.weight, (Bound, _Made)):
            root, path = origin(found.weight)
            if path in root.layers:
                with torch._C.DisableTorchFunctionSubclass():
                    return root.layers[path](found.x, plain(found.weight), found.bias)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    marked = next((arg for arg in tree.tree_leaves((args, kwargs)) if isinstance(arg, (Bound, _Made))), None)
    root, path = origin(marked)
    if not root.known:
        return result
    paths = step(path, func, args, kwargs, result)
    return tree.tree_map_only(Tensor, lambda value: _Made.of(value, root, paths[id(value)])
                              if paths.get(id(value)) in root.known else value, result)


def origin(weight: Bound | _Made) -> tuple[Bound, str]:
    """(parameter, path) of a bound weight."""
    return (weight, "") if isinstance(weight, Bound) else (weight.root, weight.path)


def plain(weight: Tensor) -> Tensor:
    """The same tensor without its binding, its gradient flowing as before."""
    return weight.as_subclass(Tensor)


def step(path: str, func: Callable, args: tuple, kwargs: dict, result: Any) -> dict[int, str]:
    """`{id of a tensor of the result: its path}` after one call on what has this path."""
    numbers = ",".join("_" if isinstance(leaf, Tensor) else repr(leaf) for leaf in tree.tree_leaves((args, kwargs)))
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):  # properties: T, mT, data
        name = f"{name}:{getattr(getattr(func, '__self__', None), '__name__', '')}"
    tensors = [leaf for leaf in tree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return {id(leaf): f"{path}|{name}({numbers})[{index}]" for index, leaf in enumerate(tensors)}
