"""ResNets for 32x32 images; one definition for training and for crossbar inference."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.building import Layers, layers_of
from models.quant.layers import fusion

# Output channels and number of blocks of each stage, and whether a shortcut that changes the shape has weights.
CONFIGS = {
    "resnet20": ((16, 32, 64), (3, 3, 3), False),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), True),
}


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: `relu(f(x) + shortcut(x))`.

    Where the shape changes, the shortcut takes every other pixel and has zeros for the channels that are new (option A of He et
    al., section 3.3: no weights), or is a 1x1 convolution with batch norm (option B), which lies on crossbars as the others do.
    """

    def __init__(self, make: Layers, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = make.conv(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = make.conv(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.downsample = None
        if projection and (stride > 1 or self.new_channels):
            self.downsample = nn.Sequential(make.conv(in_channels, out_channels, kernel=1, stride=stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in, H, W]` to `[N, out, H / stride, W / stride]`."""
        y = self.bn2(fusion.run([self.conv1, self.bn1, self.relu, self.conv2], x))
        return self.relu(y + self._shortcut(x))

    def _shortcut(self, x):
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride > 1:
            x = x[:, :, ::self.stride, ::self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class ResNet(nn.Module):
    """A 3x3 convolution, stages of blocks of which all but the first halve the image, the mean over pixels, logits.

    Source: He et al., arXiv 1512.03385: "resnet20", section 4.2, with shortcuts without weights (option A); "resnet18", table 1, in
    the usual form for small images: a 3x3 convolution of stride 1 and no pooling in front, shortcuts of option B.

    The first layer's image is no PACT activation, as in `VGG`. What shortcuts carry is digital and is not quantized. The logits have
    a learned scale, since no batch norm follows that could give one to DoReFa's levels, which reach +-1 whatever the weights.

    Args: config, a key of `CONFIGS`; num_classes, width of the output; options, those of `building.Layers`.
    Input `[N, 3, 32, 32]`, output `[N, num_classes]`.
    Raises: ValueError for an unknown option, or a value that is not allowed.
    """

    def __init__(self, config: str = "resnet20", num_classes: int = 10, **options: Any) -> None:
        super().__init__()
        if config not in CONFIGS:
            raise ValueError(f"config is {config!r}; allowed are {', '.join(CONFIGS)}")
        make = layers_of("ResNet", options)
        widths, depths, projection = CONFIGS[config]
        self.stem = nn.Sequential(make.image_conv(widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        stages, channels = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            first = Block(make, channels, width, 2 if stage else 1, projection)
            stages.append(nn.Sequential(first, *(Block(make, width, width, 1, projection) for _ in range(depth - 1))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.last = make.linear(channels, num_classes)
        self.logit_scale = nn.Parameter(torch.tensor(1 / math.sqrt(channels) if make.spread_levels else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, 32, 32]`."""
        x = self.stages(self.stem(x))
        return self.last(x.mean((2, 3))) * self.logit_scale

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        """Multiply the logits, but for their bias."""
        self.logit_scale.mul_(factor)
        self.last.bias.div_(factor)
