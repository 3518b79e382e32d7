"""Training layers: convolution and linear layer with quantized weights and activations.

`y = s_a s_w sum A (2 W - L) + bias` with `s_a = alpha / (2^a - 1)` and L, s_w those of the weight quantizer (DoReFa:
`2^w - 1` and `1 / (2^w - 1)`): the operation runs on integer codes and is scaled once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair

from ..arrays.spec import Geometry
from ..kernels import image as image_kernel
from ..kernels.output import ToCodes
from .convolution import gradients
from .eager import outside_graphs
from .quantizers import AQ, WEIGHT_QUANTIZERS, warn_of_nan

Pair = int | tuple[int, int]  # a number for both, or (vertical, horizontal)


class _Quantized:
    """What `Qconv2d` and `QLinear` share: the quantizers and the arithmetic around the operation.

    Input is `image=True` for a layer that sees the picture: it is no PACT activation and stays unquantized, or with
    `quantize_image` is rounded to the activation grid.
    """

    def _init_quantizers(self, wbit, abit, alpha_init, wq="dorefa", image=False, quantize_image=False, out_scale=1.0):
        if wq not in WEIGHT_QUANTIZERS:
            raise ValueError(f"no weight quantizer is named {wq!r}; known are {', '.join(WEIGHT_QUANTIZERS)}")
        self.weight_quant = WEIGHT_QUANTIZERS[wq](wbit)
        self.act_quant = AQ(abit, alpha_init)
        self.image, self.quantize_image, self.out_scale = image, quantize_image, out_scale

    @property
    def _rounds_input(self):
        """Whether the input becomes codes: a picture does where that is wanted."""
        return self.act_quant.on and (not self.image or self.quantize_image)

    def _operands(self, x):
        """Input and weight as the operation takes them, and the scale that its result needs."""
        scale = self.out_scale
        if self._rounds_input:
            x = self.act_quant.image_codes(x) if self.image else self.act_quant.codes(x)
            scale = scale * self.act_quant.step
        weight = self.weight
        if self.weight_quant.on:
            weight = self.weight_quant.integers(weight)
            scale = scale * self.weight_quant.step
        return x, weight, scale

    def _within_float16(self, x, weight, scale):
        """The same operands in units of `2^a` and `2^w` codes: float16 holds codes, but not the sums of their products, which it ends
        at 65504. Powers of two round nothing."""
        if self._rounds_input:
            x, scale = x / 2**self.act_quant.abit, scale * 2**self.act_quant.abit
        if self.weight_quant.on:
            weight, scale = weight / 2**self.weight_quant.wbit, scale * 2**self.weight_quant.wbit
        return x, weight, scale

    def _check_input(self, x):
        if x.dim() != len(self.INPUT):
            raise ValueError(f"the input has shape {list(x.shape)}; [{', '.join(self.INPUT)}] is expected")
        if not x.is_floating_point():
            raise ValueError(f"the input is of {x.dtype}; real floating-point numbers are expected: x.float()")

    def _finish(self, y, scale):
        if not (isinstance(scale, float) and scale == 1.0):
            y = y * scale
        if self.bias is not None:
            y = y + self.bias.view(-1, *[1] * (y.dim() - 2)) * self.out_scale
        return y

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for input x, in the type of x (autocast aside).

        Raises: ValueError for an input without batch dimension, or of fewer pixels than the kernel has.
        """
        self._check_input(x)
        codes, weight, scale = self._operands(x)
        if self.sums_exactly():
            return self._finish(self._exact_operation(codes, weight, scale), 1.0).to(x.dtype)
        if _in_float16(codes):
            codes, weight, scale = self._within_float16(codes, weight, scale)
        return self._finish(self._operation(codes, weight), scale)

    def sums_exactly(self) -> bool:
        """Whether the layer sums an image in inference: 53 bits hold the sum of image times code exactly, so the result
        cannot depend on the order of the additions, which a library chooses by the batch size."""
        return self.image and self.weight_quant.on and not self.training


class Qconv2d(_Quantized, nn.Conv2d):
    """`nn.Conv2d` with a quantized weight (`wbit` bits) and a PACT input (`abit` bits); 32 bits switch either off.

    Args beyond those of `nn.Conv2d`: `alpha_init`, first clipping level; `wq`, weight quantizer, a key of
    `WEIGHT_QUANTIZERS`; `image`, the input is the picture; `quantize_image`, round the picture to the activation grid, where
    pixels above the clipping level become that level, and negative ones stay negative (`AQ.image_codes`).
    Shapes: `[N, in, H, W]` to `[N, out, H', W']`.
    """

    INPUT = "N", "in", "H", "W"

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair | str = 0,
                 dilation: Pair = 1, groups: int = 1, bias: bool = True, wbit: int = 4, abit: int = 4,
                 alpha_init: float = 10.0, wq: str = "dorefa", image: bool = False, quantize_image: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._init_quantizers(wbit, abit, alpha_init, wq, image, quantize_image)

    def _operation(self, x, weight):
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _operation_gradients(self, grad, x, weight, wanted):
        """Those of `x` and `weight`, as far as they are `wanted`, for the gradient of what `_operation` returns."""
        return gradients(grad, x, weight, self._geometry(), wanted)

    def _geometry(self):
        # From the attributes, which may be changed: `nn.Conv2d` computes its own padding once.
        stride, dilation = pair(self.stride), pair(self.dilation)
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, self.kernel_size)]
            sides = [(size // 2, size - size // 2) for size in total]
        else:
            sides = [(size, size) for size in pair(0 if self.padding == "valid" else self.padding)]
        return Geometry(stride, (*sides[0], *sides[1]), dilation, self.groups)

    def _exact_operation(self, x, weight, scale):
        geometry = self._geometry()
        geometry.output_size(*x.shape[2:], self.kernel_size)  # refuses an image with fewer pixels than the kernel
        if self.groups > 1 or x.device.type != "cpu" or torch.is_grad_enabled():
            return self._operation(x.double(), weight.double()).float() * scale
        offset = torch.zeros(len(weight), dtype=torch.float32)
        return image_kernel.convolution(x, weight, geometry, scale, offset).permute(0, 3, 1, 2)

    def next_codes(self, x: Tensor, to_codes: ToCodes) -> Tensor:
        """In inference on a CPU, without groups and gradients: the codes that the next layer makes of the output for image
        `x`, uint8 `[N, H', W', out]`; see `kernels.output`."""
        warn_of_nan(x)
        x, weight, scale = self._operands(x.detach())
        offset = torch.zeros(len(weight), dtype=torch.float32) if self.bias is None else self.bias.detach() * self.out_scale
        return image_kernel.convolution(x, weight, self._geometry(), scale, offset, to_codes)


def _in_float16(x):
    """Whether an operation on `x` is one of float16, by its type or by autocast."""
    kind = x.device.type
    by_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (torch.get_autocast_dtype(kind) if by_autocast else x.dtype) == torch.float16


class QLinear(_Quantized, nn.Linear):
    """`nn.Linear` with a quantized weight and a PACT input; see `Qconv2d`.

    `out_scale` multiplies the result. A last layer with no batch norm behind it needs it: DoReFa levels reach +-1, so
    raw logits would be tens of times too large.
    Shapes: `[N, in]` to `[N, out]`.
    """

    INPUT = "N", "in"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, wbit: int = 4, abit: int = 4,
                 alpha_init: float = 10.0, wq: str = "dorefa", out_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self._init_quantizers(wbit, abit, alpha_init, wq, out_scale=out_scale)

    def _operation(self, x, weight):
        return F.linear(x, weight)

    def _operation_gradients(self, grad, x, weight, wanted):
        return grad @ weight if wanted[0] else None, grad.t() @ x if wanted[1] else None
