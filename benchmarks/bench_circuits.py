"""How long do converters with thresholds of their own take (`--adc_inl`, `--adc_transfer`, ...), beside ideal ones on the same chip?

    python benchmarks/bench_circuits.py --data_path path/to/images

Without --data_path the images are the embedded digits. Writes benchmarks/results/circuits_<network>_<processor>.md and .json.
"""

import copy
import functools
import tempfile
from pathlib import Path

from common import PRETRAINED, markdown_table, median_seconds, parser_of, processor, sample_images, write_results

import torch
from models import quant
from utils import load_network

CELL_BITS, ADC_BITS = (1, 2, 4), (4, 6)
DEVICE = "techC"
DRAWN = {"INL 0.5, DNL 0.3 steps": {"adc_inl": 0.5, "adc_dnl": 0.3}, "INL 4 steps": {"adc_inl": 4.0},
         "capacitors off by 2 %": {"adc_mismatch": 0.02}}


def table_file(folder: str, bits: int) -> str:
    """A converter that is no line: steps grow to both ends."""
    values = [level * (1 + abs(level) / 2**bits) for level in range(-2 ** (bits - 1), 2 ** (bits - 1))]
    lines = [f"{threshold},{value}" for threshold, value in zip(["", *((a + b) / 2 for a, b in zip(values, values[1:]))], values)]
    path = Path(folder, f"{bits}.csv")
    path.write_text("threshold,value\n" + "\n".join(lines))
    return str(path)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--resume", default=str(PRETRAINED / "vgg7_w4a4_cifar10.pt"), help="checkpoint")
    parser.add_argument("--data_path", help="folder of images")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args(argv)
    net, (images, _) = load_network(args.resume), sample_images(args.batch_size, args.data_path)
    rows, found = [], {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for cell_bits in CELL_BITS:
            for adc_bits in ADC_BITS:
                nets = {"ideal": chip(net, images, cell_bits, adc_bits)}
                nets |= {name: chip(net, images, cell_bits, adc_bits, **drawn) for name, drawn in DRAWN.items()}
                nets["a table"] = chip(net, images, cell_bits, adc_bits, table_file(folder, adc_bits))
                seconds = median_seconds(*(functools.partial(each, images) for each in nets.values()), repeats=args.repeats)
                title = f"{cell_bits}-bit cells, {adc_bits}-bit ADC"
                found[title] = dict(zip(nets, seconds))
                rows.append([title, f"{1e3 * seconds[0] / len(images):.2f}", *(f"{each / seconds[0]:.2f}" for each in seconds[1:])])
    sections = [f"Chips of {DEVICE} after a day, weights of {Path(args.resume).name}, batch {args.batch_size}; medians of {args.repeats} "
                "passes in turns.", markdown_table(["", "ideal, ms an image", *(f"{name}, times as long" for name in [*nets][1:])], rows)]
    write_results(f"circuits_{Path(args.resume).stem}_{processor()}", "Converters as circuits", sections, {"seconds_a_batch": found})


def chip(net, images, cell_bits, adc_bits, adc_transfer=None, **drawn):
    """A copy of the network on a chip, calibrated."""
    net = copy.deepcopy(net)
    w_bits, a_bits = (getattr(quant.crossbar_layers(net)[0][1].spec, name) for name in ("w_bits", "a_bits"))
    quant.set_spec(net, quant.CrossbarSpec(w_bits, a_bits, cell_bits, adc_bits, adc_transfer=adc_transfer))
    quant.program(net, quant.Device.load(DEVICE, time="1d"), **drawn)
    quant.calibrate(net, images)
    return net


if __name__ == "__main__":
    main()
