"""What is each way through the CPU engine worth? The time of whole networks without this way, over their time with all ways.

    python benchmarks/bench_ways.py --data_path path/to/images
    python benchmarks/bench_ways.py --tables     # what was measured on all processors, side by side

A way can go if, on every processor, no setting of any network gets 15 % slower without it. The ways are those of
`models.quant.engines.cpu.whole.choice`. All give the same numbers, and this is checked here too. Writes
benchmarks/results/ways_<processor>.md and .json.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator

from bench_networks import settled
from common import PRETRAINED, build, markdown_table, median_seconds, parser_of, processor, ratios_of_all, sample_images, write_results

import torch
from models import quant
from models.quant import CrossbarSpec, Device
from models.quant.engines.cpu.whole.choice import WAYS, without
from models.quant.layers.quantizers import OFF
from torch import nn
from tqdm import tqdm
from utils import load_network

SHIPPED = {"vgg7": "vgg7_w4a4_cifar10.pt", "resnet20": "resnet20_w4a4_full_cifar10.pt"}  # others are torchvision's, with random weights
WORTH = 1.15
CHIPS = {"chip": {}, "chip with read noise": {"read_noise": 0.3}, "chip with INL": {"adc_inl": 1.0}}
SETTINGS = {
    "no ADC": {"adc_range": "ideal"},
    **{f"{cells}-bit cells, {adc}-bit ADC": {"cell_bits": cells, "adc_bits": adc}
       for cells, adc in ((1, 6), (1, 4), (2, 6), (4, 6), (4, 8))},
    **{f"whole inputs, {cells}-bit cells, 8-bit ADC": {"cell_bits": cells, "adc_bits": 8, "dac_bits": 8} for cells in (1, 4)},
    "plan of 2 bits": {"adc_bits": 2, "adc_plan": "significance"},
    "ranges of the batch": {"adc_bits": 6, "adc_range": "dynamic"},
    **{f"{cells}-bit cells, {kind}": {"cell_bits": cells, "adc_bits": 6} for cells in (1, 4) for kind in CHIPS},
}


def networks(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, torch.Tensor, Callable[[dict], nn.Module]]]:
    """(name, plain network, images, function of a spec's options that gives it on crossbars)."""
    shown, _ = sample_images(64, args.data_path)
    calibration = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in args.networks:
        if name in SHIPPED:
            plain, images, bits = build(f"{name}_quant", OFF, OFF).eval(), shown, (4, 4)
            crossbars = load_network(PRETRAINED / SHIPPED[name])
        else:
            plain, images, bits = settled(name, calibration), calibration[:2].contiguous(memory_format=torch.channels_last), (8, 8)
            crossbars = quant.convert(plain, CrossbarSpec(*bits, adc_range="ideal"), calibration, correct="none")
        yield name, plain, images, functools.partial(_on, crossbars, images, bits)


def _on(network, images, bits, options):
    network, a_bits = copy.deepcopy(network), bits[1]
    quant.set_spec(network, CrossbarSpec(*bits, **options | {"dac_bits": min(options.get("dac_bits", 1), a_bits)}))
    if options.get("adc_range") is None:
        quant.calibrate(network, images, correct=None)
    return network


def without_each(network: nn.Module, plain: nn.Module, images: torch.Tensor, chip: dict | None, repeats: int) -> dict[str, float]:
    """{way: time without it over that with all; "all": time with all over that of the plain network}."""
    def prepared(*ways):
        own = copy.deepcopy(network)
        if chip is not None:
            quant.program(own, Device.load("techC"), 0, **chip)

        def run():
            with without(*ways):
                return own(images)
        return run

    whole, found = prepared(), {}
    wanted = whole()
    for way in WAYS:
        less = prepared(way)
        if not torch.equal(less(), wanted):
            raise AssertionError(f"without {way!r} the network gives other numbers")
        seconds, base, usual = median_seconds(less, whole, lambda: plain(images), repeats=repeats)
        found[way] = seconds / base
        found.setdefault("all", base / usual)
    return found


def side_by_side(machines: dict[str, dict]) -> str:
    """For each way and processor what it is worth at most, and where."""
    rows = []
    for way in WAYS:
        row = [way]
        for found in machines.values():
            ratios = {f"{network}, {setting}": values[way] for network, settings in found.items() for setting, values in settings.items()
                      if way in values}  # what was measured before there was this way has nothing of it
            best = max(ratios, key=ratios.get, default=None)
            worth = sum(ratio >= WORTH for ratio in ratios.values())
            row.append(f"{ratios[best]:.2f} ({best}), {worth} of {len(ratios)}" if ratios else "not measured")
        rows.append(row)
    header = ["without", *(f"{machine}: most times as long, and how many settings {WORTH:g} times" for machine in machines)]
    return markdown_table(header, rows)


def write(machines: dict[str, dict], repeats: int) -> None:
    """The files of this machine, and its place beside the others."""
    rows = [[network, setting, f"{values['all']:.2f}", *(f"{values[way]:.2f}" if way in values else "" for way in WAYS)]
            for network, settings in machines[processor()].items() for setting, values in settings.items()]
    sections = [f"Time without a way over time with all, called in turns; median of {repeats}. VGG7 and ResNet-20 as shipped: W4A4, "
                "64 images; others W8A8, 2 images of 224 x 224.",
                markdown_table(["network", "setting", "all, over float32", *WAYS], rows), side_by_side(machines)]
    write_results(f"ways_{processor()}", "What each way is worth", sections, {"ratios": machines[processor()]})


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("--networks", nargs="+", default=[*SHIPPED, "resnet18", "efficientnet_b0"])
    parser.add_argument("--data_path", help="folder of images for the shipped networks; default the embedded digits")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    machines = ratios_of_all("ways")
    if args.tables:
        print(side_by_side(machines))
        return
    ratios = machines.setdefault(processor(), {})  # what is there already stays
    with torch.inference_mode(), tqdm(total=len(args.networks) * len(SETTINGS)) as progress:
        for network, plain, images, on in networks(args):
            for setting, options in SETTINGS.items():
                progress.set_postfix_str(f"{network}, {setting}")
                chip = next((CHIPS[kind] for kind in reversed(CHIPS) if setting.endswith(kind)), None)
                ratios.setdefault(network, {})[setting] = without_each(on(options), plain, images, chip, args.repeats)
                progress.update()
            write(machines, args.repeats)  # of each network, as it takes minutes


if __name__ == "__main__":
    main()
