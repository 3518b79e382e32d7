"""What a network multiplies, found by running it once: products with weights, by which path (`binding`), on which inputs.

Nothing is asked of the network's code but that it runs: a mode of PyTorch sees every call. What follows from parameters and buffers
alone is told from what follows from the input, so that a weight that is computed at each call is known as one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree

from ..layers.batches import Batch, called, copied
from .binding import step
from .products import PRODUCTS, Form, operands

SAMPLE = 2**14  # values of one call that are kept of a product's input
# Products that no layer on crossbars stands for, by what they are called.
OTHERS: dict[str, str] = {func.__name__: f"a use of {func.__name__} that is not known" for func in PRODUCTS} | {
    name: what for what, names in {
        "an einsum": "einsum", "a batched product": "bmm baddbmm addbmm matmul __matmul__", "a bilinear layer": "bilinear",
        "a tensordot": "tensordot", "an inner product": "inner vdot dot linalg_vecdot", "a scaled addmm": "addmm", "an addmv": "addmv",
        "a product of several matrices": "linalg_multi_dot chain_matmul", "a Kronecker product": "kron",
        "a sparse product": "_sparse_mm _sparse_addmm smm sspaddmm", "a table of distances": "cdist",
        "a cosine similarity": "cosine_similarity", "a solution of equations": "linalg_solve linalg_solve_triangular",
        "a convolution by another name": "convolution conv_tbc", "an attention called as one function": "multi_head_attention_forward",
        "a recurrent layer": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        "a fused encoder layer": "_transformer_encoder_layer_fwd", "a fused attention": "_native_multi_head_attention",
    }.items() for name in names.split()
}
ADDED_TO = ("addmm", "baddbmm", "addbmm", "addmv")  # whose first tensor is only added
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
BETWEEN_ACTIVATIONS = ("matmul", "__matmul__", "bmm", "einsum", "mm", "mv", "dot", "vdot", "linalg_vecdot", "linear", "inner", "tensordot",
                       "scaled_dot_product_attention", *ADDED_TO, *CONVOLUTIONS)
UNREGISTERED = "a product with a parameter that no module of the network holds (give modules in a list to nn.ModuleList)"
OF_A_VECTOR, OF_A_BUFFER = "a product with weights of one dimension", "a product with a buffer"


@dataclass(eq=False)
class Product:
    """One product of an input and a weight.

    Attributes:
        parameter: name of the parameter in the network; path: how the weight follows from it, "" being the parameter itself.
        form: what kind of product it is. other_form: whether it was seen as two kinds, or with weights
            that come about alike and are not the same.
        weight: as the product takes it. sources: where it is no part of the parameter's memory, but computed at each call, of what:
            `(module, name of its parameter, buffer or attribute)` each; else None.
        calls, multiplications: in all calls of one pass.
        lowest, largest, sample: of the input's values.
        gram: `sum x x^T` over pixels, `[groups, rows, rows]`, rows in (channel, tap) order, where it is asked for.
    """

    parameter: str
    path: str
    form: Form
    weight: Tensor
    sources: tuple[tuple[nn.Module, str], ...] | None
    other_form: bool = False
    calls: int = 0
    multiplications: int = 0
    lowest: float = float("inf")
    largest: float = float("-inf")
    sample: list[Tensor] = field(default_factory=list)
    gram: Tensor | None = None


@dataclass
class Trace:
    """What `trace` found.

    Attributes: products, in the order of their first calls; known, `{parameter: paths on the way to its products, and of those with other
        weights}`; others, `{name of a parameter: what it is that no crossbar does}`; buffers, the same of those; others_multiplications,
        of both, where a call does not say as if each weight met each row of the input once; constant, parameters of products whose input
        is the same for every image; alone, those that are multiplied by each other; between, multiplications of two activations; looked_up,
        parameters that what follows from the input is not only multiplied by; output, of the network, for the first batch.
    """

    products: list[Product] = field(default_factory=list)
    known: dict[str, set[str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    others_multiplications: int = 0
    constant: dict[str, None] = field(default_factory=dict)
    alone: dict[str, None] = field(default_factory=dict)
    between: int = 0
    looked_up: dict[str, None] = field(default_factory=dict)
    output: Any = None


@torch.no_grad()
def trace(model: nn.Module, batches: list[Batch], gram: bool = False) -> Trace:
    """Run a network on batches of its inputs and see what it multiplies. Args: gram, sum `x x^T` of every input too."""
    watcher = _Watcher(model, gram)
    for number, batch in enumerate(batches):
        watcher.first = number == 0
        with watcher:
            y = called(model, copied(batch))  # which the network may write to
        if watcher.first:
            watcher.found.output = y
    return watcher.found


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module, gram: bool):
        super().__init__()
        self.found, self.gram, self.first = Trace(), gram, True
        self.by_place: dict[tuple[str, str], Product] = {}
        self.origin: dict[int, tuple[str, str, Tensor]] = {}  # of matrices that follow from one parameter: its name, the path
        self.no_matrix: dict[int, tuple[str, str]] = {}  # of what else follows from one: its name, what a product with it is called
        self.sources: dict[int, dict[tuple[nn.Module, str], None]] = {}  # what a piece of memory was computed from, by its place
        self.fixed: dict[int, Tensor] = {}  # everything that follows from parameters and buffers; kept, so that ids stay theirs
        for name, parameter in model.named_parameters():
            self.fixed[id(parameter)] = parameter
            if parameter.dim() > 1 and parameter.is_floating_point():
                self.origin[id(parameter)] = name, "", parameter
            else:
                self.no_matrix[id(parameter)] = name, OF_A_VECTOR
        self.parameters = dict(model.named_parameters())
        for name, buffer in model.named_buffers():
            self.fixed[id(buffer)] = buffer
            self.no_matrix[id(buffer)] = name, OF_A_BUFFER
        for module in model.modules():  # such as a mask that is a plain attribute
            own = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            self.fixed |= {id(value): value for value in own.values()}
            for name, value in [*module._parameters.items(), *module._buffers.items(), *own.items()]:
                if value is not None:
                    self.sources.setdefault(_place(value), {})[module, name] = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        name = name if name.endswith("__") else name.rstrip("_")  # addmm_ is addmm in place
        written = [tensor for tensor, version in zip(tensors, versions) if version is not None and tensor._version != version]
        if all(id(tensor) in self.fixed for tensor in tensors):
            self._follow(func, args, kwargs, tensors, result, written)
            return result
        for tensor in written:
            if id(tensor) in self.fixed:
                self._written(tensor)
        if func in PRODUCTS or name in OTHERS or name in BETWEEN_ACTIVATIONS:
            self._multiply(func, name, args, kwargs, tensors, result)
        else:
            self.found.looked_up.update({self.origin[id(tensor)][0]: None for tensor in tensors if id(tensor) in self.origin})
        return result

    def _written(self, tensor):
        """What shares the memory of a tensor that something of the input was written to follows from the input from now on."""
        for key in [key for key, each in self.fixed.items() if _place(each) == _place(tensor)]:
            del self.fixed[key]
            self.origin.pop(key, None)
            self.no_matrix.pop(key, None)

    def _follow(self, func, args, kwargs, tensors, result, written):
        """What follows from parameters and buffers alone."""
        found = self._operands(func, args, kwargs, self.origin)
        if found is not None:
            self.found.constant[self.origin[id(found.weight)][0]] = None
        elif func in PRODUCTS:
            factors = [self.origin[id(tensor)][0] for tensor in tensors if id(tensor) in self.origin]
            self.found.alone.update(dict.fromkeys(factors if len(factors) > 1 else ()))
        made = [leaf for leaf in tree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.fixed.update({id(leaf): leaf for leaf in made})
        sources = {source: None for tensor in tensors for source in self.sources.get(_place(tensor), ())}
        for leaf in (*made, *written):
            self.sources.setdefault(_place(leaf), {}).update(sources)
        source = next((self.origin[id(tensor)] for tensor in tensors if id(tensor) in self.origin), None)
        if source is not None:
            name, path, _ = source
            paths = step(path, func, args, kwargs, result)
            self.origin.update({id(leaf): (name, paths[id(leaf)], leaf) for leaf in made if leaf.dim() > 1 and id(leaf) not in self.origin})
            self.no_matrix.update({id(leaf): (name, OF_A_VECTOR) for leaf in made if leaf.dim() == 1})
            if func in PRODUCTS:  # of weights alone
                self.found.known.setdefault(name, set()).update(paths.values())
        else:
            known = next((self.no_matrix[id(tensor)] for tensor in tensors if id(tensor) in self.no_matrix), None)
            self.no_matrix.update({id(leaf): known for leaf in made} if known else {})

    def _multiply(self, func, name, args, kwargs, tensors, result):
        found = self._operands(func, args, kwargs, self.fixed)
        if found is not None:
            self._weighs(found, result)
            return
        weights = [self.origin[id(tensor)][0] for tensor in tensors if id(tensor) in self.origin]
        if weights and name in OTHERS:
            self.found.others.update(dict.fromkeys(weights, OTHERS[name]))
            if self.first:
                x = next((tensor for tensor in tensors if id(tensor) not in self.fixed), tensors[0])
                self.found.others_multiplications += sum(self.parameters[each].numel() for each in weights) * x.numel() // x.shape[-1]
        elif name in BETWEEN_ACTIVATIONS:
            count = _between(name, args, tensors, result) if self.first and isinstance(result, Tensor) else 0
            factors = _factors(name, args, kwargs, tensors)
            known = next((self.no_matrix[id(each)] for each in factors if id(each) in self.no_matrix), None)
            own = next((each for each in factors if isinstance(each, nn.Parameter) and id(each) not in self.fixed), None)
            if known is None and own is not None:
                known = "unregistered_" + "x".join(map(str, own.shape)), UNREGISTERED
            if known is None:
                self.found.between += count
                return
            (self.found.buffers if known[1] == OF_A_BUFFER else self.found.others).update([known])
            self.found.others_multiplications += count

    def _operands(self, func, args, kwargs, known):
        """The parts of a product whose weight follows from one parameter, and whose input is none of what is known."""
        return operands(func, args, kwargs, lambda each: id(each.weight) in self.origin and id(each.x) not in known
                        ) if func in PRODUCTS else None

    def _weighs(self, found, result):
        name, path, weight = self.origin[id(found.weight)]
        product = self.by_place.get((name, path))
        if product is None:
            parameter = self.parameters[name]
            part = (_place(weight), weight.dtype, weight.is_neg()) == (_place(parameter), parameter.dtype, parameter.is_neg())
            product = Product(name, path, found.form, weight.detach(), None if part else tuple(self.sources[_place(weight)]))
            self.by_place[name, path] = product
            self.found.products.append(product)
            parts = path.split("|")
            self.found.known.setdefault(name, set()).update("|".join(parts[:end]) for end in range(2, len(parts) + 1))
        product.other_form |= product.form != found.form or not _same(product, weight)
        if self.first:
            product.calls += 1
            product.multiplications += found.form.multiplications(found.x, found.weight, result)
        x = found.x.detach()
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        product.lowest, product.largest = min(product.lowest, low.item()), max(product.largest, high.item())
        product.sample.append(sampled(x))
        if self.gram:
            gram = gram_of(found.form, x, product.weight)
            product.gram = gram if product.gram is None else product.gram + gram


def _place(tensor):
    """Where the memory of a tensor is."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _factors(name, args, kwargs, tensors):
    """What an input may be multiplied by in one of BETWEEN_ACTIVATIONS. Attention is between activations, whatever its queries are."""
    if name == "linear" or name in CONVOLUTIONS:
        return [args[1] if len(args) > 1 else kwargs.get("weight")]
    return [] if name == "scaled_dot_product_attention" else tensors[name in ADDED_TO:]


def _between(name, args, tensors, result):
    """Multiplications of a product of activations; a sum or a turn of one alone (`einsum`) has none."""
    left, right = (*tensors[name in ADDED_TO:], None, None)[:2]
    if right is None:
        return 0
    if name in CONVOLUTIONS:
        return (left if "transpose" in name else result).numel() * math.prod(right.shape[1:])
    if name == "tensordot":  # of L S and S R numbers come L R
        return result.numel() * math.isqrt(left.numel() * right.numel() // max(result.numel(), 1))
    if name == "scaled_dot_product_attention":  # scores, and what they weigh
        return 2 * right.shape[-2] * left.numel()
    if name == "einsum" and isinstance(args[0], str):
        return result.numel() * _summed_over(args[0], tensors)
    return result.numel() * left.shape[-1] * (len(left) if name == "addbmm" else 1)


def _summed_over(equation, tensors):
    """Of how many products each number of an `einsum` is the sum."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sizes = {}
    for term, tensor in zip(inputs.split(","), tensors):
        before, _, after = term.partition("...")
        sizes |= dict(zip(before, tensor.shape)) | dict(zip(after[::-1], tensor.shape[::-1]))
    kept = output if arrow else [letter for letter in sizes if inputs.count(letter) == 1]
    return math.prod(size for letter, size in sizes.items() if letter not in kept)


def sampled(x: Tensor) -> Tensor:
    """Some SAMPLE values of x, float32, evenly from all over it, and from all of each of its dimensions: their distance has no divisor in
    common with the number of values, or one channel or column might be met again and again."""
    flat = x.reshape(-1)
    distance = max(1, len(flat) // SAMPLE)
    while math.gcd(distance, len(flat)) > 1:
        distance += 1
    return flat[::distance][:SAMPLE].float().clone()


def _same(product, weight):
    """Whether this is the weight that the product was seen with."""
    if product.sources is None:
        return weight.data_ptr() == product.weight.data_ptr() and weight.shape == product.weight.shape
    return torch.equal(weight, product.weight)


def gram_of(form: Form, x: Tensor, weight: Tensor) -> Tensor:
    """`sum x x^T` over all output pixels: float64 `[groups, rows, rows]`, rows in (channel, tap) order."""
    kernel, geometry = form.kernel(weight), form.geometry
    x = form.images(x.float()).permute(0, 3, 1, 2)
    if kernel.shape[2:] == (1, 1) and geometry.stride == (1, 1):
        rows = x.flatten(2).unflatten(1, (geometry.groups, -1))  # N, groups, channels, pixels
        return torch.einsum("ngrp,ngsp->grs", rows, rows).double()
    top, bottom, left, right = geometry.padding
    total = 0.0
    for image in F.pad(x, (left, right, top, bottom)).split(1):
        rows = F.unfold(image, kernel.shape[2:], geometry.dilation, 0, geometry.stride)[0].unflatten(0, (geometry.groups, -1))
        total = total + (rows @ rows.transpose(1, 2)).double()
    return total
