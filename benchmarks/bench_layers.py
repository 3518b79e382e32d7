"""How long do single layers take on crossbars? Each is a ratio to plain float32 of the same layer in the same run.

    python benchmarks/bench_layers.py                    # all of it: half an hour on two cores
    python benchmarks/bench_layers.py --only linear      # layers whose name contains this
    python benchmarks/bench_layers.py --tables           # what was measured on all processors, side by side

It goes over a grid of shapes, cells, ADCs and chips, and so finds a layer or a setting that falls far behind on some processor. Writes
benchmarks/results/layers_<processor>.md and .json. Weights are random. Inputs are as behind a ReLU: 60 % of them are not zero. The same
input, of 4 images, calibrates.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from common import markdown_table, median_seconds, parser_of, processor, ratios_of_all, write_results

import torch
from models import quant
from models.quant import CrossbarSpec, Device
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

WORST = 20  # that are printed
CALIBRATION = 4  # images, or one of more than so many pixels
MANY = 400
MOST_SECONDS = 2.0  # of the repeats of one setting


class Shape(NamedTuple):
    """A convolution of `size` x `size` pixels, padded as its kernel needs; of 1 x 1 pixels a linear layer."""

    channels: int
    out: int
    kernel: int
    size: int
    groups: int = 1

    @property
    def name(self) -> str:
        if self.size == 1:
            return f"linear {self.channels} to {self.out}"
        kind = "depthwise " if self.groups > 1 else f"{self.channels} to " if self.channels != self.out else ""
        return f"{kind}{self.out}, {self.kernel} x {self.kernel}, at {self.size} x {self.size}"


SHAPES = [
    *(Shape(channels, channels, 3, size) for channels, size in (
        (16, 56), (16, 32), (32, 16), (64, 56), (64, 28), (64, 8), (128, 28), (128, 16), (256, 14), (256, 8), (512, 7), (512, 4))),
    *(Shape(channels, out, 1, size) for channels, out, size in ((16, 96, 56), (64, 256, 56), (256, 64, 56), (96, 576, 14), (576, 96, 14),
                                                                (384, 1536, 14), (1536, 384, 14), (512, 2048, 7))),
    *(Shape(channels, channels, kernel, size, channels) for channels, kernel, size in ((96, 3, 56), (240, 5, 28), (576, 3, 14))),
    *(Shape(channels, out, 1, 1) for channels, out in ((64, 10), (512, 512), (1024, 10), (4096, 1024), (8192, 1024))),
]


class Setting(NamedTuple):
    """How a layer is run: `kind` groups settings in tables."""

    kind: str
    bits: int
    options: dict[str, object]
    chip: dict[str, object] | None = None

    @property
    def name(self) -> str:
        adc = f", {self.options['adc_bits']}-bit ADC" if "adc_bits" in self.options else ""
        cells = f", {self.options['cell_bits']}-bit cells" if "cell_bits" in self.options else ""
        return f"W{self.bits}A{self.bits}{cells}{adc}" + (f", {self.kind}" if self.kind != "ideal cells" else "")


def settings() -> Iterator[Setting]:
    """In the order in which they are run: those of the same cells one after the other."""
    for bits in (4, 8):
        yield Setting("no ADC", bits, {"adc_range": "ideal"})
        for cell_bits in (1, 2, 4, 8)[:3 if bits == 4 else 4]:
            for adc_bits in range(3, 9):
                yield Setting("ideal cells", bits, {"cell_bits": cell_bits, "adc_bits": adc_bits})
    for cell_bits in (1, 2, 4):
        for kind, options in (("chip", {}), ("chip with read noise", {"read_noise": 0.3})):
            yield Setting(kind, 4, {"cell_bits": cell_bits, "adc_bits": 6}, options)
    yield Setting("analog inputs", 8, {"cell_bits": 7, "adc_bits": 8, "dac_bits": 8, "rows": 576, "mapping": "im2col", "weights": "pair"})
    yield Setting("analog inputs", 8, {"cell_bits": 2, "adc_bits": 8, "dac_bits": 4})


def layer_ratios(shape: Shape, images: int, repeats: int, progress: tqdm) -> dict[str, tuple[float, float]]:
    """`{setting: (ratio to plain float32, ms of float32)}` of one layer."""
    torch.manual_seed(0)
    x = F.relu(torch.randn(images, shape.channels, shape.size, shape.size) + 0.25)
    if shape.size == 1:
        x, plain = x.flatten(1), nn.Linear(shape.channels, shape.out)
    else:
        x = x.contiguous(memory_format=torch.channels_last)
        plain = nn.Conv2d(shape.channels, shape.out, shape.kernel, padding=shape.kernel // 2, groups=shape.groups)
    plain = plain.eval().to(memory_format=torch.channels_last)
    calibrating = torch.cat([x] * CALIBRATION)[:1 if shape.size**2 > MANY else CALIBRATION]
    found, cells, network, histograms = {}, None, None, None
    for setting in settings():
        progress.set_postfix_str(f"{shape.name}, {images} images, {setting.name}", refresh=False)
        spec = CrossbarSpec(**{"w_bits": setting.bits, "a_bits": setting.bits, **setting.options})
        if cells != (cells := (setting.bits, setting.options.get("cell_bits"), setting.chip)) or spec.dac_bits > 1:
            network = quant.convert(plain, replace(spec, adc_range="ideal"), calibrating, correct="none", first_last_bits=None)
            quant.set_spec(network, spec)
            histograms = quant.collect_histograms(network, calibrating) if spec.adc_range == "calibrated" else None
        quant.set_spec(network, spec)
        if histograms is not None:
            quant.calibrate(network, None, histograms=histograms, correct=None)
        if setting.chip is not None:
            quant.program(network, Device.load("techC"), 0, **setting.chip)
        seconds = median_seconds(functools.partial(network, x), lambda: plain(x), repeats=repeats, most_seconds=MOST_SECONDS)
        found[setting.name] = seconds[0] / seconds[1], 1e3 * seconds[1]
        progress.update()
    return found


def side_by_side(machines: dict[str, dict]) -> str:
    """The ratios of all processors as one table: median and worst of each kind of setting."""
    kinds = {setting.name: f"W{setting.bits}A{setting.bits}, {setting.kind}" for setting in settings()}
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        row = [kind]
        for layers in machines.values():
            ratios = {(layer, name): ratio for layer, found in layers.items() for name, (ratio, _) in found.items()
                      if kinds.get(name) == kind}
            if ratios:
                layer, name = max(ratios, key=ratios.get)
                row += [f"{sorted(ratios.values())[len(ratios) // 2]:.2f}", f"{ratios[layer, name]:.1f} ({layer}; {name})"]
            else:
                row += ["", ""]
        rows.append(row)
    return markdown_table(["", *(f"{machine}, {what}" for machine in machines for what in ("median", "worst"))], rows)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--only", default="", help="part of the names of layers; others keep what was measured before")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    machines = ratios_of_all("layers")
    if args.tables:
        print(side_by_side(machines))
        return
    ratios = machines.setdefault(processor(), {})  # what is there already stays
    cases = [(shape, images) for shape in SHAPES if args.only in shape.name for images in args.images]
    if not cases:
        parser.error(f"--only {args.only}: no layer is called so; there are {', '.join(shape.name for shape in SHAPES)}")
    with torch.inference_mode(), tqdm(total=len(cases) * len(list(settings()))) as progress:
        for shape, images in cases:
            ratios[f"{shape.name}, {images} image{'s' * (images > 1)}"] = layer_ratios(shape, images, args.repeats, progress)
    every = sorted(((ratio, plain, layer, setting) for layer, found in ratios.items() for setting, (ratio, plain) in found.items()),
                   reverse=True)
    sections = [f"Ratio to plain float32 of the same layer, median of {args.repeats} runs in turns after a warm-up; fewer where "
                f"{MOST_SECONDS:g} s are over. {len(every)} cases, their median {every[len(every) // 2][0]:.2f}.", f"## The worst {WORST}",
                markdown_table(["layer", "setting", "ratio", "float32, ms"],
                               [[layer, setting, f"{ratio:.2f}", f"{plain:.3g}"] for ratio, plain, layer, setting in every[:WORST]]),
                "## Medians", side_by_side(machines)]
    write_results(f"layers_{processor()}", "Layers on crossbars", sections, {"ratios": ratios})


if __name__ == "__main__":
    main()
