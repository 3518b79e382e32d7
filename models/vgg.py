"""VGG for 32x32 images; one definition for training and for crossbar inference."""

import math

from torch import nn

from .quant import CrossbarSpec, Qconv2d, Qconv2dDoreFa, QLinear, QLinearDoreFa, fusion

# Output channels of each 3x3 convolution, "M" for 2x2 max pooling; then the width of the hidden linear layer.
CONFIGS = {
    "vgg7": ([128, 128, "M", 256, 256, "M", 512, 512, "M"], 1024),
    "vgg16": ([64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"], 512),
}
MAPS = ("conv", "all")


class VGG(nn.Module):
    """Convolutions (3x3, no bias, batch norm, ReLU), then hidden linear layer (batch norm, ReLU) and logits.

    Args:
        config: a key of `CONFIGS`.
        num_classes: width of the output.
        wbit, abit: weight and activation bits, 1..8, 32 for off.
        alpha_init: first PACT clipping level of every layer.
        wq: weight quantizer, "dorefa" or "sawb".
        quantize_image: round the image to the activation grid.
        spec: a `CrossbarSpec` puts layers on crossbars; None computes them as they are trained, without arrays.
        map: with `spec`, "all" puts every layer but the first on crossbars, "conv" the convolutions only.

    Input `[N, 3, 32, 32]`, output `[N, num_classes]`.
    """

    def __init__(self, config="vgg7", num_classes=10, wbit=4, abit=4, alpha_init=10.0, wq="dorefa",
                 quantize_image=False, spec=None, map="all"):
        super().__init__()
        if map not in MAPS:
            raise ValueError(f"map is {map!r}; allowed are {', '.join(MAPS)}")
        if spec is not None and (spec.w_bits, spec.a_bits) != (wbit, abit):
            raise ValueError(f"the spec has {spec.w_bits}-bit weights and {spec.a_bits}-bit activations, "
                             f"the network wbit={wbit}, abit={abit}; make them equal")
        options = dict(alpha_init=alpha_init, wq=wq)
        bits = dict(wbit=wbit, abit=abit, **options)

        def conv(c_in, c_out):
            if c_in == 3:
                return Qconv2d(3, c_out, 3, padding=1, bias=False, image=True, quantize_image=quantize_image, **bits)
            if spec is not None:
                return Qconv2dDoreFa(c_in, c_out, 3, padding=1, bias=False, spec=spec, **options)
            return Qconv2d(c_in, c_out, 3, padding=1, bias=False, **bits)

        def linear(n_in, n_out, out_scale=1.0):
            if spec is not None and map == "all":
                return QLinearDoreFa(n_in, n_out, spec=spec, out_scale=out_scale, **options)
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
            linear(hidden, num_classes, 1 / math.sqrt(hidden) if wbit < 32 and wq == "dorefa" else 1.0),
        )

    def forward(self, x):
        return fusion.run([self.features, self.flatten, self.classifier], x)


def crossbar_vgg(config="vgg7", wbit=4, abit=4, spec=None, **kwargs):
    """A `VGG` on crossbars; without a `spec`, on the default hardware for its bits."""
    return VGG(config, wbit=wbit, abit=abit, spec=spec or CrossbarSpec(w_bits=wbit, a_bits=abit), **kwargs)
