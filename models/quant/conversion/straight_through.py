"""A product in training: forward what arrays make of it, or of its quantized numbers alone; backward straight through to input and weight.

With the codes `A = clip(rint(x / s_a), lo, hi)` and `W' = clip(rint(w / s_c), -m, m)` the quantized product is

    y_c = g_c (s_a s_c sum A W' + bias_c) + o_c

and what an ADC, a chip and their correction make of it is a constant beside it (Bengio et al., arXiv 1308.3432): the gradient of y is that
of the quantized product. Through the rounding it goes as through nothing where x is in its window, and to the scales, where these are
learned, as Esser et al. say (LSQ, arXiv 1902.08153, equation 3).

Kept for the backward pass are input and weight as the network has them, which it keeps anyway. Codes are made again, in one pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import elementwise
from ..layers import channels
from ..layers.convolution import convolution, gradients
from .linear_quantizers import rounded, straight


class Product(torch.autograd.Function):
    """`[N, H', W', out]`, float32, of a `ConvertedLayer`.

    Args: images, `[N, H, W, in]`; kernel, `[out, in / groups, kh, kw]`; bias, `[out]` or None; input_scale, weight_scale, those of the
        layer's quantizers; layer; x, the input as the layer has it, to be read by the arrays, or None for the quantized product alone.
    """

    @staticmethod
    def forward(ctx, images: Tensor, kernel: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, layer,
                x: Tensor | None) -> Tensor:
        device = images.device.type
        ctx.layer, ctx.shape = layer, None if bias is None else bias.shape
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        ctx.save_for_backward(images, kernel, input_scale, weight_scale)
        with torch.autocast(device, enabled=False):
            if x is None:
                return _quantized(layer, *_codes(layer, images, kernel, ctx.dtype))
            y = layer.reads(x)
            if layer.correct_batches and layer.chip and layer.spec.adc_range == "calibrated":
                exact = _quantized(layer, *_codes(layer, images, kernel, ctx.dtype))
                wanted, found = channels.std_mean(exact, -1), channels.std_mean(y, -1)
                y = channels.scaled(y, *channels.towards(wanted, found), -1)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, (images, kernel, input_scale, _) = ctx.layer, ctx.saved_tensors
        to_images, to_kernel, to_bias, to_input_scale, to_weight_scale, *_ = ctx.needs_input_grad
        grad, gain, steps = grad.float(), layer.quant_gain, layer.weight_quant.steps_of(kernel)
        of_bias = (grad.flatten(0, 2).sum(0) * gain).sum_to_size(ctx.shape) if to_bias else None
        of_images = of_kernel = of_input_scale = of_weight_scale = None
        codes, weights, unit = _codes(layer, images, kernel, ctx.dtype)
        wanted = to_images or to_input_scale, to_kernel or to_weight_scale
        # In units of weight codes, so that the operands stay whole numbers, which 16 bits hold.
        scaled = (grad * (gain * steps)).permute(0, 3, 1, 2).to(ctx.dtype)
        of_codes, of_weights = gradients(scaled, codes, weights, layer.form.geometry, wanted)
        if wanted[0]:
            of_codes = of_codes.float() if unit[1] == 1 else of_codes.float() * unit[1]
            of_images, sums = straight(images.permute(0, 3, 1, 2), of_codes, input_scale.detach().view(1), *layer.act_quant.window)
            of_images = of_images.permute(0, 2, 3, 1)
            if to_input_scale:
                of_input_scale = layer.act_quant.gradient_of_scale(sums, images[0].numel()).view_as(input_scale)
                of_input_scale = layer.act_quant.decayed(of_input_scale, images)
        if wanted[1]:
            factor, largest = (unit[0] * input_scale.detach() / steps).view(-1, 1, 1, 1), layer.weight_quant.largest
            of_kernel, sums = straight(kernel, of_weights.float() * factor, steps, -largest, largest)
            of_weight_scale = layer.weight_quant.gradient_of_scale(sums, kernel[0].numel()) if to_weight_scale else None
        return (of_images if to_images else None, of_kernel if to_kernel else None, of_bias, of_input_scale, of_weight_scale, None, None)


def _codes(layer, images, kernel, dtype):
    """(codes of the input `[N, in, H, W]`, those of the weight around zero, what 1 of each of the two is worth in codes): powers of two,
    that take sums of products below the largest number of float16 and round nothing."""
    quantizer, unit = layer.weight_quant, (1.0, 1.0)
    codes = rounded(images.permute(0, 3, 1, 2), layer.act_quant.scale.detach().view(1), *layer.act_quant.window, dtype)
    weights = rounded(kernel, quantizer.steps_of(kernel), -quantizer.largest, quantizer.largest, dtype)
    if dtype == torch.float16:
        unit = float(2**layer.act_quant.abit), float(2**quantizer.wbit)
        codes, weights = codes / unit[0], weights / unit[1]
    return codes, weights, unit


def _quantized(layer, codes, weights, unit):
    """The quantized product, `[N, H', W', out]`, float32."""
    sums = convolution(codes, weights, layer.form.geometry).permute(0, 2, 3, 1).float()
    scale, offset = layer.scale_and_offset()
    scale, offset = (scale * (2 * unit[0] * unit[1])).float(), offset.float()
    if sums.device.type == "cpu":
        return elementwise.scaled(sums.contiguous(), scale, offset)
    return torch.addcmul(offset, sums, scale)
