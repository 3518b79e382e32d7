"""VGG for 32x32 images; one definition for training and for crossbar inference."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from .quant import CrossbarSpec, Qconv2d, Qconv2dDoreFa, QLinear, QLinearDoreFa, fusion
from .quant.quantizers import OFF

# Output channels of each 3x3 convolution, "M" for 2x2 max pooling; then the width of the hidden linear layer.
CONFIGS = {
    "vgg7": ([128, 128, "M", 256, 256, "M", 512, 512, "M"], 1024),
    "vgg16": ([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"], 512),
}
CROSSBAR_LAYERS = ("all", "conv")  # every layer but the first, or of these the convolutions only


class VGG(nn.Module):
    """Convolutions (3x3, no bias, batch norm, ReLU), then hidden linear layer (batch norm, ReLU) and logits.

    Source: Simonyan and Zisserman, arXiv 1409.1556, section 2, in the form for CIFAR-10 of DoReFa-Net and its successors.

    Args:
        config: a key of `CONFIGS`.
        num_classes: width of the output.
        wbit, abit: weight and activation bits, 1..8, 32 for off.
        alpha_init: first PACT clipping level of every layer, in units of its input.
        wq: weight quantizer, "dorefa" or "sawb".
        quantize_image: round the image to the activation grid.
        spec: a `CrossbarSpec` puts layers on crossbars; None computes them as they are trained, without arrays.
        crossbar_layers: with `spec`, "all" puts every layer but the first on crossbars, "conv" the convolutions only.
            Older versions call it `map`, which is understood.

    Input `[N, 3, 32, 32]`, output `[N, num_classes]`.
    Raises: ValueError for an unknown option, or a value that is not allowed.
    """

    def __init__(self, config: str = "vgg7", num_classes: int = 10, wbit: int = 4, abit: int = 4, alpha_init: float = 10.0,
                 wq: str = "dorefa", quantize_image: bool = False, spec: CrossbarSpec | None = None,
                 crossbar_layers: str = "all", **others: Any) -> None:
        super().__init__()
        crossbar_layers = others.pop("map", crossbar_layers)
        if others:
            raise ValueError(f"a VGG has no option {', '.join(others)}; known are "
                             f"{', '.join(list(inspect.signature(VGG).parameters)[1:-1])}")
        if config not in CONFIGS:
            raise ValueError(f"config is {config!r}; allowed are {', '.join(CONFIGS)}")
        if crossbar_layers not in CROSSBAR_LAYERS:
            raise ValueError(f"crossbar_layers is {crossbar_layers!r}; allowed are {', '.join(CROSSBAR_LAYERS)}")
        if spec is not None and (spec.w_bits, spec.a_bits) != (wbit, abit):
            raise ValueError(f"the spec has {spec.w_bits}-bit weights and {spec.a_bits}-bit activations, "
                             f"the network wbit={wbit}, abit={abit}; make them equal")
        shared = {"alpha_init": alpha_init, "wq": wq}
        bits = {"wbit": wbit, "abit": abit, **shared}

        def conv(c_in: int, c_out: int) -> nn.Module:
            if c_in == 3:
                return Qconv2d(3, c_out, 3, padding=1, bias=False, image=True, quantize_image=quantize_image, **bits)
            if spec is not None:
                return Qconv2dDoreFa(c_in, c_out, 3, padding=1, bias=False, spec=spec, **shared)
            return Qconv2d(c_in, c_out, 3, padding=1, bias=False, **bits)

        def linear(n_in: int, n_out: int, out_scale: float = 1.0) -> nn.Module:
            if spec is not None and crossbar_layers == "all":
                return QLinearDoreFa(n_in, n_out, spec=spec, out_scale=out_scale, **shared)
            return QLinear(n_in, n_out, out_scale=out_scale, **bits)

        plan, hidden = CONFIGS[config]
        layers, channels, side = [], 3, 32
        for width in plan:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                side //= 2
            else:
                layers += [conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            linear(channels * side * side, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            # No batch norm follows: DoReFa's levels reach +-1 whatever the weights, so raw logits would be far too large.
            linear(hidden, num_classes, 1 / math.sqrt(hidden) if wbit != OFF and wq == "dorefa" else 1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, 32, 32]`."""
        return fusion.run([self.features, self.flatten, self.classifier], x)


def crossbar_vgg(config: str = "vgg7", wbit: int = 4, abit: int = 4, spec: CrossbarSpec | None = None, **options: Any) -> VGG:
    """A `VGG` on crossbars; without a `spec`, on the default hardware for its bits."""
    return VGG(config, wbit=wbit, abit=abit, spec=spec or CrossbarSpec(w_bits=wbit, a_bits=abit), **options)
