"""VGG for 32x32 images; one definition for training and for crossbar inference."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.building import layers_of
from models.quant.layers import fusion

# Output channels of each 3x3 convolution, "M" for 2x2 max pooling; then the width of the hidden linear layer.
CONFIGS = {
    "vgg7": ([128, 128, "M", 256, 256, "M", 512, 512, "M"], 1024),
    "vgg16": ([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"], 512),
}


class VGG(nn.Module):
    """Convolutions (3x3, no bias, batch norm, ReLU), then hidden linear layer (batch norm, ReLU) and logits.

    Source: Simonyan and Zisserman, arXiv 1409.1556, section 2, in the form for CIFAR-10 of DoReFa-Net and its successors.

    Args: config, a key of `CONFIGS`; num_classes, width of the output; options, those of `building.Layers`, of which older
        versions call `crossbar_layers` `map`, which is understood.
    Input `[N, 3, 32, 32]`, output `[N, num_classes]`.
    Raises: ValueError for an unknown option, or a value that is not allowed.
    """

    def __init__(self, config: str = "vgg7", num_classes: int = 10, **options: Any) -> None:
        super().__init__()
        if "map" in options:
            options["crossbar_layers"] = options.pop("map")
        if config not in CONFIGS:
            raise ValueError(f"config is {config!r}; allowed are {', '.join(CONFIGS)}")
        make = layers_of("VGG", options)

        plan, hidden = CONFIGS[config]
        layers, channels, side = [], 3, 32
        for width in plan:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                side //= 2
            else:
                first = not layers
                layers += [make.image_conv(width) if first else make.conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            make.linear(channels * side * side, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            # No batch norm follows: DoReFa's levels reach +-1 whatever the weights, so raw logits would be far too large.
            make.linear(hidden, num_classes, 1 / math.sqrt(hidden) if make.spread_levels else 1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, 32, 32]`."""
        return fusion.run([self.features, self.flatten, self.classifier], x)

    @property
    def last(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.classifier[-1]

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        """Multiply the logits, but for their bias, by the scale of the last layer's input."""
        norm, _, last = self.classifier[-3:]
        for parameter in (norm.weight, norm.bias, *([last.act_quant.act_alpha] if last.act_quant.on else [])):
            parameter.mul_(factor)
