"""Products of an input and a weight: how PyTorch is asked for them, and each as one convolution of images, channels last.

Arrays hold a matrix that an input is multiplied by pixel after pixel, so every product becomes a convolution `[N, H, W, in]` to
`[N, H', W', out]` with weights `[out, in / groups, kh, kw]`:

- a linear layer on any leading dimensions: a 1x1 convolution, the middle dimensions being pixels; with the weight on the left, `W x`,
  the same of columns;
- a convolution of one dimension: an image one pixel wide; of three: each output plane an image whose channels are those of the `kd`
  planes that it sees, group by group;
- a transposed convolution: one of the input with `stride - 1` zeros between its pixels, the kernel turned round.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arrays.spec import Geometry


@dataclass(frozen=True)
class Form:
    """What kind of product it is: all that is not a tensor.

    Attributes: kind, "linear", "conv" or "transposed"; turned, a linear weight is `[in, out]`; left, of `W x`, where the weight is on the
        left: 1 for a vector x, 2 for columns, 0 where it is on the right; dims, of a convolution, with its stride, padding (before,
        after), dilation, output_padding and kernel size for each, and groups.
    """

    kind: str
    turned: bool = False
    left: int = 0
    dims: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    kernel_size: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As layers are printed."""
        if self.kind == "linear":
            return "linear"
        several = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        shown = [f"{name}={value}" for name, value in several.items() if value not in (1, (1,) * self.dims, ((0, 0),) * self.dims)]
        return ", ".join([f"{'transposed ' if self.kind == 'transposed' else ''}conv{self.dims}d", *shown])

    @property
    def columns(self) -> bool:
        """Whether the weight is multiplied by columns of the input."""
        return self.left > 1

    @property
    def channel_dim(self) -> int:
        """Dimension of the output's channels, from the end."""
        return -1 - self.dims - self.columns

    @property
    def geometry(self) -> Geometry:
        """Of the convolution that this product is."""
        if self.kind == "linear":
            return Geometry()
        if self.kind == "transposed":  # `images` has put zeros between and around the pixels
            return Geometry(dilation=_pair(self.dilation), groups=self.groups)
        (top, bottom), (left, right) = [*self.padding[-2:], (0, 0)][:2]
        planes = self.kernel_size[0] if self.dims == 3 else 1
        return Geometry(_pair(self.stride[-2:]), (top, bottom, left, right), _pair(self.dilation[-2:]), self.groups, planes)

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight as `[out, in / groups, kh, kw]`; a view where it can be."""
        if self.kind == "linear":
            return (weight.t() if self.turned else weight)[:, :, None, None]
        if self.kind == "transposed":  # [in, out / groups, ...]
            inputs, outputs, *size = weight.shape
            weight = weight.view(self.groups, inputs // self.groups, outputs, *size).transpose(1, 2).flip(*range(3, 3 + self.dims))
            weight = weight.reshape(self.groups * outputs, inputs // self.groups, *size)
        if self.dims == 1:
            return weight[..., None]
        if self.dims == 3:
            return weight.transpose(1, 2).flatten(1, 2)
        return weight

    def matrix(self, kernel: Tensor) -> Tensor:
        """The weight that has this kernel: the inverse of `kernel`, for a linear layer or a convolution of one or two dimensions."""
        if self.kind == "linear":
            return kernel[:, :, 0, 0].t() if self.turned else kernel[:, :, 0, 0]
        return kernel[..., 0] if self.dims == 1 else kernel

    def beside(self, values: Tensor, weight: Tensor) -> Tensor:
        """A number for each output channel, `[out]`, in a shape that stands beside the weight."""
        if self.kind == "linear":
            return values if self.turned else values[:, None]
        if self.kind == "conv":
            return values.view(-1, *[1] * (weight.dim() - 1))
        inputs, outputs, *size = weight.shape
        each = values.view(self.groups, 1, outputs).expand(-1, inputs // self.groups, -1)
        return each.reshape(inputs, outputs, *[1] * len(size))

    def images(self, x: Tensor) -> Tensor:
        """The input as `[N, H, W, in]`; a view where it can be."""
        x = x if x.dim() > self.dims + 1 else x[None]
        if self.kind == "linear":
            x = x.mT if self.columns else x
            return x.reshape(len(x), math.prod(x.shape[1:-1]), 1, x.shape[-1])
        if self.kind == "transposed":
            x = self._spread(x)
        if self.dims == 1:
            x = x[..., None]
        if self.dims == 3:
            x = self._planes(x)
        return x.permute(0, 2, 3, 1)

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """`[N, H', W', out]` in the shape that the product gives for input `x`."""
        if self.columns:
            return y.reshape(*x.mT.shape[:-1], y.shape[-1]).mT
        if self.kind == "linear":
            return y.reshape(*x.shape[:-1], y.shape[-1])
        y = y.permute(0, 3, 1, 2)
        if self.dims == 1:
            y = y[..., 0]
        if self.dims == 3:
            images = len(x) if x.dim() > 4 else 1
            y = y.view(images, self.planes_of(x), *y.shape[1:]).transpose(1, 2)
        return y if x.dim() > self.dims + 1 else y[0]

    def empty(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product of an input without numbers: none, in its shape."""
        images, kernel = self.images(x), self.kernel(weight)
        size = images.shape[1:3] if self.kind == "linear" else self.geometry.output_size(*images.shape[1:3], kernel.shape[2:])
        return self.outputs(images.new_empty(len(images), *size, len(kernel)), x)

    def planes_of(self, x: Tensor) -> int:
        """Images of the convolution for each image of the input."""
        if self.dims < 3:
            return 1
        (before, after), reach = self.padding[0], self._reach
        return (x.shape[-3] + before + after - reach) // self.stride[0] + 1

    def multiplications(self, x: Tensor, weight: Tensor, y: Tensor) -> int:
        """How many products of two numbers it takes."""
        return x.numel() * math.prod(weight.shape[1:]) if self.kind == "transposed" else y.numel() * (
            x.shape[-1 - self.columns] if self.kind == "linear" else math.prod(weight.shape[1:]))

    def _spread(self, x):
        """Zeros between the pixels and around them, so that a convolution of stride 1 is the transposed one."""
        for dim, (step, (size, after), dilation, more, kernel) in enumerate(
                zip(self.stride, self.padding, self.dilation, self.output_padding, self.kernel_size), start=2):
            if step > 1:
                spread = x.new_zeros(*x.shape[:dim], (x.shape[dim] - 1) * step + 1, *x.shape[dim + 1:])
                spread[(slice(None),) * dim + (slice(None, None, step),)] = x
                x = spread
            reach = dilation * (kernel - 1)
            sides = [0, 0] * (x.dim() - 1 - dim) + [reach - size, reach - after + more]
            x = F.pad(x, sides)  # a negative number cuts
        return x

    def _planes(self, x):
        """`[N, C, D, H, W]` to `[N D', groups kd C / groups, H, W]`."""
        x = F.pad(x, (0, 0, 0, 0, *self.padding[0]))
        if x.shape[2] < self._reach:
            raise RuntimeError(f"the input has {x.shape[2]} planes with its padding, and the kernel reaches over {self._reach}")
        x = x.unfold(2, self._reach, self.stride[0])[..., ::self.dilation[0]]
        x = x.unflatten(1, (self.groups, -1))  # N, groups, C / groups, D', H, W, kd
        return x.permute(0, 3, 1, 6, 2, 4, 5).flatten(2, 4).flatten(0, 1)

    @property
    def _reach(self):
        return self.dilation[0] * (self.kernel_size[0] - 1) + 1


@dataclass
class Operands:
    """One product: input, weight as the call has it, bias, and its form."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    form: Form


def operands(func: Callable, args: tuple, kwargs: dict, fits: Callable[[Operands], bool]) -> Operands | None:
    """The parts of one call of a function in `PRODUCTS`, read so that they fit, else None."""
    return next((each for each in readings(func, args, kwargs) if fits(each)), None)


def readings(func: Callable, args: tuple, kwargs: dict) -> list[Operands]:
    """All ways to read one call of a function in `PRODUCTS`: of a product of two matrices each may be the weight. None where the result is
    written to a tensor that the call has (`out`)."""
    kwargs = dict(kwargs)
    return [] if kwargs.pop("out", None) is not None else PRODUCTS[func](*args, **kwargs)


def _linear(input, weight, bias=None):  # noqa: A002  PyTorch's names, which calls may use
    return [Operands(input, weight, bias, Form("linear"))]


def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # noqa: A002
    dims, size = weight.dim() - 2, tuple(weight.shape[2:])
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(_each(dilation, dims), size)]
        sides = tuple((length // 2, length - length // 2) for length in total)
    else:
        sides = tuple((length, length) for length in _each(padding, dims))
    return [Operands(input, weight, bias, Form("conv", dims=dims, stride=_each(stride, dims), padding=sides, dilation=_each(dilation, dims),
                                               groups=groups, kernel_size=size))]


def _transposed(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):  # noqa: A002
    dims = weight.dim() - 2
    sides = tuple((length, length) for length in _each(padding, dims))
    return [Operands(input, weight, bias, Form(
        "transposed", dims=dims, stride=_each(stride, dims), padding=sides, dilation=_each(dilation, dims),
        output_padding=_each(output_padding, dims), groups=groups, kernel_size=tuple(weight.shape[2:])))]


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):  # noqa: A002
    return [Operands(mat1, mat2, input, Form("linear", turned=True))] if beta == alpha == 1 and input.dim() == 1 else []


def _matmul(input, other=None, mat2=None, vec=None):  # noqa: A002
    other = next(each for each in (other, mat2, vec) if each is not None)
    right = [Operands(input, other, None, Form("linear", turned=True))] if other.dim() == 2 else []
    left = [Operands(other, input, None, Form("linear", left=min(other.dim(), 2)))] if input.dim() == 2 else []
    return right + left


def _rmatmul(input, other):  # noqa: A002
    return _matmul(other, input)


# What reads the arguments of each function that multiplies by a weight, of which Python has several names.
PRODUCTS: dict[Callable, Callable[..., list[Operands]]] = {
    F.linear: _linear, torch.conv1d: _conv, torch.conv2d: _conv, torch.conv3d: _conv, torch.conv_transpose1d: _transposed,
    torch.conv_transpose2d: _transposed, torch.conv_transpose3d: _transposed, torch.addmm: _addmm, Tensor.addmm: _addmm,
    torch.linalg.matmul: _matmul, torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul, torch.mm: _matmul, Tensor.mm: _matmul, torch.mv: _matmul, Tensor.mv: _matmul,
}

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
        "a product of groups": "_grouped_mm grouped_mm _scaled_mm scaled_mm _scaled_grouped_mm scaled_grouped_mm",
        "a product with an activation in it": "_addmm_activation",
    }.items() for name in names.split()
}
ADDED_TO = ("addmm", "baddbmm", "addbmm", "addmv")  # whose first tensor is only added
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
BETWEEN_ACTIVATIONS = ("matmul", "__matmul__", "bmm", "einsum", "mm", "mv", "dot", "vdot", "linalg_vecdot", "linear", "inner", "tensordot",
                       "scaled_dot_product_attention", *ADDED_TO, *CONVOLUTIONS)


def name_of(func: Callable) -> str:
    """What PyTorch calls a function: addmm_ is addmm in place, and aten.mm.default an operator mm."""
    name = getattr(func, "__name__", "")
    name = name.partition(".")[0] if isinstance(func, torch._ops.OpOverload) else name
    return name if name.endswith("__") else name.rstrip("_")


def _each(value, dims):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def _pair(values):
    return (*values, 1)[:2]
