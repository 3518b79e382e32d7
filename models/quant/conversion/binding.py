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
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from ..layers.eager import outside_graphs
from ..layers.prepared import unchanged
from .products import OTHERS, PRODUCTS, name_of, operands
from .recurrent import RECURRENT

# What takes a part of a weight, or the same in another shape or type: a product with it is one with the weight.
PARTS = {"__getitem__", "bfloat16", "chunk", "contiguous", "double", "expand", "flatten", "float", "half", "index_select", "mT", "narrow",
         "permute", "repeat", "reshape", "select", "split", "squeeze", "t", "T", "to", "transpose", "type", "type_as", "unflatten",
         "unsqueeze", "view", "view_as"}


# What computes a weight from a weight and numbers: another factor, another sign, a standardized one.
ARITHMETIC = {"__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rpow__", "__rsub__", "__rtruediv__", "__sub__",
              "__truediv__", "abs", "add", "clamp", "clip", "div", "divide", "exp", "mul", "multiply", "neg", "pow", "relu", "round",
              "rsub", "sigmoid", "sign", "softmax", "sqrt", "square", "sub", "tanh", "true_divide"}


class _Followed:
    """A tensor that is followed to the products that it enters."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})


class Bound(_Followed, nn.Parameter):
    """A parameter whose products are those of layers on crossbars: `layers`, `{path: layer}`, "" being the parameter itself.

    `known` are the paths on the way to these, `digital` those of products that are known to stay as they are, `label` the name of the
    parameter.
    Everything else that is done with it is done with an ordinary tensor.
    """

    layers: dict[str, nn.Module]
    known: frozenset[str]
    digital: frozenset[str]
    label: str

    @staticmethod
    def of(parameter: Tensor, layers: dict[str, nn.Module], known: frozenset[str] = frozenset(), digital: frozenset[str] = frozenset(),
           label: str = "") -> Bound:
        """The same memory as a parameter that is bound."""
        bound = Tensor._make_subclass(Bound, parameter.detach(), parameter.requires_grad)
        bound.layers, bound.known, bound.digital, bound.label = layers, known, digital, label
        return bound

    def __deepcopy__(self, memo: dict) -> Bound:
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                memo[id(self)] = copied = Bound.of(self.detach().clone(memory_format=torch.preserve_format), {}, self.known,
                                                    self.digital, self.label)
                copied.requires_grad_(self.requires_grad)
            copied.layers.update(copy.deepcopy(self.layers, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        with torch._C.DisableTorchFunctionSubclass():
            data = self.detach().as_subclass(Tensor)
        state = {name: getattr(self, name) for name in ("layers", "known", "digital", "label")}
        return _rebuild, (data, self.requires_grad), state, None, None, _set_state


def _rebuild(data, requires_grad):
    return Bound.of(nn.Parameter(data, requires_grad), {})


def _set_state(bound, state):
    vars(bound).update(state)


class _Made(_Followed, Tensor):
    """What was made of a bound parameter alone, on the way to a product."""

    root: Bound
    path: str

    @staticmethod
    def of(value: Tensor, root: Bound, path: str) -> _Made:
        made = value.as_subclass(_Made)
        made.root, made.path = root, path
        return made


@outside_graphs
def _call(func, args, kwargs):
    """Any function of PyTorch with a bound parameter, or what was made of it, among its arguments."""
    if func in RECURRENT:
        with unchanged():  # from one step to the next
            return RECURRENT[func](*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if func in PRODUCTS:
            found = operands(func, args, kwargs, _has_a_layer)
            if found is not None:
                root, path = origin(found.weight)
                layer, weight = root.layers[path], plain(found.weight)
                layer.see(weight)  # before its hooks, which may count its reads
                return layer(found.x, weight, found.bias)
        result = func(*args, **kwargs)
    tensors = [arg for arg in tree.tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
    root, path = origin(next(arg for arg in tensors if isinstance(arg, _Followed)))
    part = _name(func) in PARTS and isinstance(tensors[0], _Followed) or _name(func) in ARITHMETIC and _computed(tensors, result)
    paths = step(path, func, args, kwargs, result)
    if name_of(func) in OTHERS and root.known.isdisjoint(paths.values()):  # else it is one of weights, on the way to a product
        _warn_of_unseen(func, args, kwargs, tensors)

    def marked(value):
        if any(value is each for each in tensors):  # as of `weight.to(x.dtype)` where that changes nothing
            return value
        return _Made.of(value, root, paths[id(value)]) if paths[id(value)] in root.known or part and value.dim() > 1 else value

    return tree.tree_map_only(Tensor, marked, result)


def _warn_of_unseen(func, args, kwargs, tensors):
    """A matrix product with a weight on its left is one with an input only where a layer is: else it may be the weight's norm."""
    def is_input(each):
        return isinstance(each.weight, _Followed) and not isinstance(each.x, _Followed) and (
            not each.form.left or any(layer.form.left for layer in origin(each.weight)[0].layers.values()))

    if func in PRODUCTS:
        found = operands(func, args, kwargs, is_input)
        weight = found and found.weight
    else:
        followed = [tensor for tensor in tensors if isinstance(tensor, _Followed)]
        weight = followed[0] if len(followed) < len(tensors) else None
    if weight is None:
        return
    root, path = origin(weight)
    if path not in root.digital:
        warnings.warn(f"a product with {root.label} that was not seen when the network was converted is computed without "
                      "crossbars: its weight is another part or comes about in another way", RuntimeWarning, 3)


def _computed(tensors, result):
    """Whether arithmetic on these gives a weight of the shape of one of them, which the others are no more than factors of."""
    weights = [tensor for tensor in tensors if isinstance(tensor, _Followed)]
    others = (tensor.numel() for tensor in tensors if not isinstance(tensor, _Followed))
    return result.shape == weights[0].shape and max(others, default=0) < result.numel()


def _has_a_layer(product):
    """Whether it is a product that a layer was made for: of this weight, of this form."""
    if not isinstance(product.weight, _Followed):
        return False
    root, path = origin(product.weight)
    return path in root.layers and root.layers[path].form == product.form


def origin(weight: Bound | _Made) -> tuple[Bound, str]:
    """(parameter, path) of a bound weight."""
    return (weight, "") if isinstance(weight, Bound) else (weight.root, weight.path)


def plain(weight: Tensor) -> Tensor:
    """The same tensor without its binding, its gradient flowing as before."""
    return weight.as_subclass(Tensor)


def _text(leaf):
    """What a path says of one argument: of a tensor nothing, but for the few whole numbers of an index."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    short = not isinstance(leaf, _Followed) and leaf.numel() <= 16 and not leaf.is_floating_point() and not leaf.is_complex()
    return repr(leaf.tolist()) if short else "_"


def _name(func):
    """That of a function, a method or, for its `__get__`, a property: T, mT."""
    name = getattr(func, "__name__", repr(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def step(path: str, func: Callable, args: tuple, kwargs: dict, result: Any) -> dict[int, str]:
    """`{id of a tensor of the result: its path}` after one call on what has this path."""
    numbers = ",".join(_text(leaf) for leaf in tree.tree_leaves((args, kwargs)))
    name = _name(func)
    tensors = [leaf for leaf in tree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return {id(leaf): f"{path}|{name}({numbers})[{index}]" for index, leaf in enumerate(tensors)}
