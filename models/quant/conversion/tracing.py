"""What a network multiplies, found by running it once: products with weights, by which path (`binding`), on which inputs.

Nothing is asked of the network's code but that it runs: a mode of PyTorch sees every call. What follows from parameters and buffers
alone is told from what follows from the input, so that a weight that is computed at each call is known as one.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers.batches import Batch, called, copied
from .binding import step
from .products import ADDED_TO, BETWEEN_ACTIVATIONS, CONVOLUTIONS, OTHERS, PRODUCTS, Form, name_of, operands, readings
from .recurrent import RECURRENT

SAMPLE = 2**14  # values of one call that are kept of a product's input
UNREGISTERED = "a product with a parameter that no module of the network holds (give modules in a list to nn.ModuleList)"
OF_A_VECTOR, OF_A_BUFFER = "a product with weights of one dimension", "a product with a buffer"
WRITTEN = "a product with weights that were written into another tensor"
CHOSEN, HELD = "a product with weights that the input chooses", "an attention to weights"
UNDER_VMAP = "a product under torch.vmap"
HIDDEN = "a product in code that shows PyTorch no calls (torch.jit, or C++)"
OPERATORS, OF_PYTORCH = (torch._ops.OpOverload, torch._ops.OpOverloadPacket), ("aten", "prim", "prims")
CHOOSES = ("__getitem__", "gather", "index_select", "select", "take_along_dim")


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
        of both, where a call does not say as if each weight met each row of the input once; constant, `{(parameter, path): numbers}` of
        weights whose input is the same for every image; alone, of those that are multiplied by each other; digital, (parameter, path) of
        all that no layer can stand for; between, multiplications of two activations; looked_up, parameters that what follows from the
        input is not only multiplied by; output, of the network, for the first batch.
    """

    products: list[Product] = field(default_factory=list)
    known: dict[str, set[str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    others_multiplications: int = 0
    constant: dict[tuple[str, str], int] = field(default_factory=dict)
    alone: dict[tuple[str, str], int] = field(default_factory=dict)
    digital: set[tuple[str, str]] = field(default_factory=set)
    between: int = 0
    looked_up: dict[str, None] = field(default_factory=dict)
    output: Any = None


@torch.no_grad()
def trace(model: nn.Module, batches: list[Batch], gram: bool = False) -> Trace:
    """Run a network on batches of its inputs and see what it multiplies. Args: gram, sum `x x^T` of every input too."""
    also: frozenset = frozenset()
    while True:
        watcher = _Watcher(model, gram, also)
        for number, batch in enumerate(batches):
            watcher.first = number == 0
            with _Hidden(watcher), watcher:
                y = called(model, copied(batch))  # which the network may write to
            if watcher.first:
                watcher.found.output = y
        # A weight that meets inputs is on arrays, so what meets it besides, the same for every image, is read there too.
        met = {each for each in watcher.met if (product := watcher.by_place.get(each[:2])) and product.form == each[2]}
        if met <= also:
            return watcher.found
        also |= met


class _Watcher(TorchFunctionMode):
    """Args: also, (parameter, path, form) of products that are of the network where their input is the same for every image too."""

    def __init__(self, model: nn.Module, gram: bool, also: frozenset[tuple[str, str, Form]]):
        super().__init__()
        self.found, self.gram, self.also, self.first, self.inside = Trace(), gram, also, True, False
        self.met: set[tuple[str, str, Form]] = set()  # those that have such an input
        self.by_place: dict[tuple[str, str], Product] = {}
        self.origin: dict[int, tuple[str, str, Tensor]] = {}  # of matrices that follow from one parameter: its name, the path
        self.no_matrix: dict[int, tuple[str, str]] = {}  # of what else follows from one: its name, what a product with it is called
        self.sources: dict[int, dict[tuple[nn.Module, str], None]] = {}  # what a piece of memory was computed from, by its place
        self.fixed: dict[int, Tensor] = {}  # everything that follows from parameters and buffers; kept, so that ids stay theirs
        self.picked: dict[int, tuple[Tensor, str, bool]] = {}  # what an index of the input takes from a matrix: kept, whose, of a stack
        for name, parameter in model.named_parameters():
            self.fixed[id(parameter)] = parameter
            if parameter.dim() > 1 and parameter.is_floating_point():
                self.origin[id(parameter)] = name, "", parameter
            else:
                self.no_matrix[id(parameter)] = name, OF_A_VECTOR
        self.parameters = dict(model.named_parameters())
        self.by_memory = {_place(parameter): name for name, parameter in self.parameters.items() if parameter.dim() > 1}
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
        if func in RECURRENT:
            with self:  # to see its products
                return RECURRENT[func](*args, **kwargs)
        tensors = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        self.inside, name = True, name_of(func)
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside = False
        written = [tensor for tensor, version in zip(tensors, versions) if version is not None and tensor._version != version]
        if all(id(tensor) in self.fixed for tensor in tensors):
            read = next((each for each, place in self._constant(func, args, kwargs) if place in self.also), None)
            if read is not None:
                self._weighs(read, result)
            else:
                self._follow(func, args, kwargs, tensors, result, written)
            return result
        for tensor in written:
            if id(tensor) in self.fixed:
                self._written(tensor)
        if func in PRODUCTS or name in OTHERS or name in BETWEEN_ACTIVATIONS:
            self._multiply(func, name, args, kwargs, tensors, result)
        else:
            self._looked_up(func, name, tensors, result)
        return result

    def _looked_up(self, func, name, tensors, result):
        """What else something of the input does with a matrix."""
        matrices = {self.origin[id(tensor)][0]: tensor for tensor in tensors if id(tensor) in self.origin}
        self.found.looked_up.update(dict.fromkeys(matrices))
        if isinstance(func, OPERATORS) and str(func).partition(".")[0] not in OF_PYTORCH:
            no_gains = [own for own, tensor in matrices.items() if tensor.numel() > max(tensor.shape)]
            self.others(no_gains, f"an operator of a library, {func}", tensors[0])
        source = next((tensor for tensor in tensors if id(tensor) in self.picked), None)
        if isinstance(result, Tensor) and name in CHOOSES and id(tensors[0]) in self.origin:
            self.picked[id(result)] = result, self.origin[id(tensors[0])][0], tensors[0].dim() > 2
        elif isinstance(result, Tensor) and source is not None and result.numel() == source.numel():  # turned, cast, scaled
            self.picked[id(result)] = result, *self.picked[id(source)][1:]

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
            self.found.constant[self.origin[id(found.weight)][:2]] = found.weight.numel()
        elif func in PRODUCTS:
            factors = {self.origin[id(tensor)][:2]: tensor.numel() for tensor in tensors if id(tensor) in self.origin}
            self.found.alone.update(factors if len(factors) > 1 else {})
        for _, place in self._constant(func, args, kwargs):
            self.met.add(place)
        if name_of(func) in OTHERS:
            self.found.digital.update(self.origin[id(tensor)][:2] for tensor in tensors if id(tensor) in self.origin)
        made = [leaf for leaf in tree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.fixed.update({id(leaf): leaf for leaf in made})
        sources = {source: None for tensor in tensors for source in self.sources.get(_place(tensor), ())}
        for leaf in (*made, *written):
            self.sources.setdefault(_place(leaf), {}).update(sources)
        places = {_place(each) for each in written if id(each) not in self.origin}
        filled = [key for key, each in self.fixed.items() if key not in self.origin and _place(each) in places] if places else []
        source = next((self.origin[id(tensor)] for tensor in tensors if id(tensor) in self.origin), None)
        if source is not None:
            name, path, _ = source
            paths = step(path, func, args, kwargs, result)
            self.no_matrix.update({id(leaf): (name, OF_A_VECTOR) for leaf in made if leaf.dim() == 1})
            self.no_matrix.update(dict.fromkeys(filled, (name, WRITTEN)))
            self.origin.update({id(leaf): (name, paths[id(leaf)], leaf) for leaf in made
                                if leaf.dim() > 1 and id(leaf) not in self.origin and id(leaf) not in filled})
            if func in PRODUCTS:  # of weights alone
                self.found.known.setdefault(name, set()).update(paths.values())
        else:
            known = next((self.no_matrix[id(tensor)] for tensor in tensors if id(tensor) in self.no_matrix), None)
            self.no_matrix.update(dict.fromkeys([*map(id, made), *filled], known) if known else {})

    def _multiply(self, func, name, args, kwargs, tensors, result):
        found = self._operands(func, args, kwargs, self.fixed)
        if found is not None and _is_batched(found.x):  # what kernels cannot see
            self.found.digital.add(self.origin[id(found.weight)][:2])
            self.others([self.origin[id(found.weight)][0]], UNDER_VMAP, found.x)
            return
        if found is not None:
            self._weighs(found, result)
            return
        weights = [self.origin[id(tensor)][:2] for tensor in tensors if id(tensor) in self.origin]
        if weights and name in OTHERS:
            self.found.digital.update(weights)
            x = next((tensor for tensor in tensors if id(tensor) not in self.fixed), tensors[0])
            self.others([each for each, _ in weights], OTHERS[name], x)
        elif name in BETWEEN_ACTIVATIONS:
            count = _between(name, args, tensors, result) if self.first and isinstance(result, Tensor) else 0
            known = next(filter(None, map(functools.partial(self._known, name), _factors(name, args, kwargs, tensors))), None)
            if known is None:
                self.found.between += count
                return
            (self.found.buffers if known[1] == OF_A_BUFFER else self.found.others).update([known])
            self.found.others_multiplications += count

    def _constant(self, func, args, kwargs):
        """[(product, (parameter, path, form) of its weight)] of all ways to read a product of what follows from weights and buffers."""
        every = readings(func, args, kwargs) if func in PRODUCTS else []
        return [(each, (*self.origin[id(each.weight)][:2], each.form)) for each in every if id(each.weight) in self.origin]

    def others(self, names, what, x):
        """Products with these parameters that no crossbar does, of an input."""
        self.found.others.update(dict.fromkeys(names, what))
        if self.first:
            inputs = x.numel() // max(1, x.shape[-1]) if x.dim() else 1
            self.found.others_multiplications += sum(self.parameters[each].numel() for each in names) * inputs

    def _known(self, name, factor):
        """(whose weight a factor is, what a product with it is called), or None where it is no weight."""
        if id(factor) in self.no_matrix:
            return self.no_matrix[id(factor)]
        if id(factor) in self.origin:
            return self.origin[id(factor)][0], HELD
        _, own, of_a_stack = self.picked.get(id(factor), (None, None, False))
        if of_a_stack or own and (name == "linear" or name in CONVOLUTIONS):  # a row of a table may be an input as well
            return own, CHOSEN
        if _is_batched(factor):
            while _is_batched(factor):
                factor = torch._C._functorch.get_unwrapped(factor)
            own = self.by_memory.get(_place(factor))
            return own and (own, UNDER_VMAP)
        if isinstance(factor, nn.Parameter) and id(factor) not in self.fixed:
            return "unregistered_" + "x".join(map(str, factor.shape)), UNREGISTERED
        return None

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


class _Hidden(TorchDispatchMode):
    """Products with weights that no function of PyTorch was called for, as far as Python sees."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.watcher.inside and name_of(func) in OTHERS:
            tensors = [leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            names = [name for each in tensors if (name := self.watcher.by_memory.get(_place(each)))]
            self.watcher.others(names, HIDDEN, tensors[0])
        return result


def _is_batched(tensor):
    """Whether it stands for many, under torch.vmap."""
    return isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor)


def _place(tensor):
    """Where the memory of a tensor is."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _factors(name, args, kwargs, tensors):
    """What an input may be multiplied by in one of BETWEEN_ACTIVATIONS. The queries of an attention may be anything."""
    if name == "linear" or name in CONVOLUTIONS:
        return [args[1] if len(args) > 1 else kwargs.get("weight")]
    if name == "scaled_dot_product_attention":
        return [args[number] if len(args) > number else kwargs.get(key) for number, key in ((1, "key"), (2, "value"))]
    return tensors[name in ADDED_TO:]


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
    """Whether this is the weight that the product was seen with; the values of a parameter may have moved since (`w.data = ...`)."""
    if product.sources is None and weight.data_ptr() == product.weight.data_ptr():
        return weight.shape == product.weight.shape
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
