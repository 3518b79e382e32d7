"""Time of every layer of ResNet-18 and EfficientNet-Lite0 at 224x224 with 8-bit weights and activations, layer by layer, beside plain
float32 convolutions of the same shapes: without an ADC, with an 8-bit ADC and with one that loses much, and of its calibration.

    python benchmarks/bench_layers.py

Writes benchmarks/results/layers.md and layers.json. Weights and inputs are random (60 % of the activations are not zero). Shapes:
He et al., arXiv 1512.03385, table 1; Tan and Le, arXiv 1905.11946, table 1, in the "lite" form, without squeeze and excitation.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NamedTuple

from common import markdown_table, median_seconds, write_results

import torch
from models import quant
from torch.nn import functional as F


class Shape(NamedTuple):
    """A convolution of `size` x `size` pixels, padded as its kernel needs."""

    channels: int
    out: int
    kernel: int
    stride: int
    groups: int
    size: int


def resnet18() -> list[Shape]:
    """The layers of ResNet-18 in their order, shortcuts and the last linear layer too."""
    shapes, channels, size = [Shape(3, 64, 7, 2, 1, 224)], 64, 56
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        shapes += [Shape(channels, out, 3, stride, 1, size)] + [Shape(out, out, 3, 1, 1, size // stride)] * 3
        if stride > 1:
            shapes.append(Shape(channels, out, 1, stride, 1, size))
        channels, size = out, size // stride
    return [*shapes, Shape(512, 1000, 1, 1, 1, 1)]


def efficientnet_lite0() -> list[Shape]:
    """The layers of EfficientNet-Lite0 in their order."""
    shapes, channels, size = [Shape(3, 32, 3, 2, 1, 224)], 32, 112
    for expand, kernel, stride, out, repeats in ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
                                                 (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)):
        for step in [stride] + [1] * (repeats - 1):
            middle = channels * expand
            shapes += [Shape(channels, middle, 1, 1, 1, size)] * (expand > 1)
            shapes.append(Shape(middle, middle, kernel, step, middle, size))
            size //= step
            shapes.append(Shape(middle, out, 1, 1, 1, size))
            channels = out
    return [*shapes, Shape(channels, 1280, 1, 1, 1, size), Shape(1280, 1000, 1, 1, 1, 1)]


SPEC = quant.CrossbarSpec(w_bits=8, a_bits=8, cell_bits=1)
SETTINGS = {"no ADC": {"adc_range": "ideal"}, "8-bit ADC": {"adc_bits": 8}, "3-bit ADC": {"adc_bits": 3},
            "3-bit ADC, im2col": {"adc_bits": 3, "mapping": "im2col"}}


def layer_times(shape: Shape, images: int, repeats: int) -> dict[str, float]:
    """ms an image of one layer: plain, with each of `SETTINGS`, and of calibrating it."""
    torch.manual_seed(0)
    x = F.relu(torch.randn(images, shape.channels, shape.size, shape.size) + 0.25).contiguous(memory_format=torch.channels_last)
    layer = quant.Qconv2dDoreFa(shape.channels, shape.out, shape.kernel, shape.stride, shape.kernel // 2, groups=shape.groups,
                                bias=False, alpha_init=4.0, spec=SPEC).eval()
    weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
    times = {}

    def plain():
        F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.groups)

    for title, options in SETTINGS.items():
        layer.set_spec(quant.CrossbarSpec(w_bits=8, a_bits=8, cell_bits=1, **options))
        if "adc_bits" in options:
            started = time.perf_counter()
            quant.calibrate(layer, x)
            times[f"calibrating, {title}"] = time.perf_counter() - started
        times[title], times["plain float32"] = median_seconds(lambda: layer(x), plain, repeats=repeats)
    return {title: 1e3 / images * seconds for title, seconds in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs after one warm-up; the median counts")
    args = parser.parse_args(argv)
    sections, numbers = [f"{SPEC.w_bits}-bit weights and activations, 1-bit cells, {SPEC.rows} rows, batch {args.batch_size}, ms an "
                         f"image; median of {args.repeats} runs after a warm-up, in turns with plain float32."], {}
    for name, shapes in (("ResNet-18", resnet18()), ("EfficientNet-Lite0", efficientnet_lite0())):
        with torch.inference_mode():
            times = {shape: layer_times(shape, args.batch_size, args.repeats) for shape in dict.fromkeys(shapes)}
        titles = ["plain float32", *SETTINGS, *(title for title in times[shapes[0]] if title.startswith("calibrating"))]
        rows = []
        for part, chosen in (("all layers", shapes), ("depthwise", [shape for shape in shapes if shape.groups > 1])):
            total = {title: sum(times[shape][title] for shape in chosen) for title in titles}
            numbers[f"{name}, {part}"] = total
            if chosen:
                rows.append([f"**{part}** ({len(chosen)})", *(f"{total[title]:.3g}" for title in titles)])
        rows += [["{0}->{1}, {2}x{2}/{3}, {5}x{5}".format(*shape) + f", {shape.groups} groups" * (shape.groups > 1),
                  *(f"{times[shape][title]:.3g}" for title in titles)] for shape in times]
        sections += [f"## {name}", markdown_table(["layer", *titles], rows)]
        numbers[name] = {str(tuple(shape)): found for shape, found in times.items()}
    write_results("layers", "Layers with 8-bit codes", sections, numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
