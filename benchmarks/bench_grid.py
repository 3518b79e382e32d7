"""How long does a trained network take on every cell and ADC of a table, beside a plain float32 pass of the same network? No setting may
fall far behind the others.

    python benchmarks/bench_grid.py
    python benchmarks/bench_grid.py --resume pretrained/vgg7_w4a4_cifar10.pt

The images are the embedded digits. Writes benchmarks/results/grid_<model>_<processor>.md and .json.
"""

from pathlib import Path

from common import PRETRAINED, build, markdown_table, median_seconds, parser_of, processor, sample_images, write_results

import torch
from experiment.settings.eval_settings import parse
from experiment.start.starting import crossbar_network
from models import quant
from models.quant.layers.quantizers import OFF

CELL_BITS, ADC_BITS = (1, 2, 4), (3, 4, 5, 6, 7, 8)
CHIP_BITS = 6  # of the ADC of chips
CHIPS = {"a chip": {}, "with read noise": {"read_noise": 0.3}, "with noise of the ADC": {"adc_noise": 0.3},
         "with offsets": {"adc_offset": 0.5}, "with gains": {"adc_gain": 0.02},
         "with gate access": {"wires": quant.Wires("gate", 1.0)}}  # of techC after a day


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=15)
    parser.add_argument("--resume", default=str(PRETRAINED / "resnet20_w4a4_full_cifar10.pt"),
                        help="checkpoint of a network of `models`")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args(argv)
    settings, checkpoint = parse(["--resume", args.resume])
    net = crossbar_network(settings, checkpoint, torch.device("cpu"))
    name = settings.model.removesuffix("_eval")
    plain, (images, _) = build(name, OFF, OFF).eval(), sample_images(args.batch_size)
    rows, found = [], {}
    with torch.inference_mode():
        def ratio(title):
            simulated, float_seconds = median_seconds(lambda: net(images), lambda: plain(images), repeats=args.repeats)
            found[title] = {"seconds_a_batch": simulated, "float32": float_seconds}
            return f"{simulated / float_seconds:.2f}"

        for cell_bits in CELL_BITS:
            row = []
            for adc_bits in ADC_BITS:
                quant.set_spec(net, quant.CrossbarSpec(settings.w_bits, settings.a_bits, cell_bits, adc_bits))
                quant.calibrate(net, images)
                row.append(ratio(f"{cell_bits}-bit cells, {adc_bits}-bit ADC"))
            quant.set_spec(net, quant.CrossbarSpec(settings.w_bits, settings.a_bits, cell_bits, CHIP_BITS))
            for chip, besides in CHIPS.items():
                quant.program(net, quant.Device.load("techC", time="1d"), **besides)
                quant.calibrate(net, images)
                row.append(ratio(f"{cell_bits}-bit cells, {chip}"))
            rows.append([f"{cell_bits}-bit cells", *row])
            quant.program(net, None)
    sections = [f"{name}, weights of {Path(args.resume).name}, 32 x 32, batch {args.batch_size}, calibrated ranges; ratio to plain "
                f"float32 of the same network, median of {args.repeats} passes in turns.",
                markdown_table(["", *(f"{bits}-bit ADC" for bits in ADC_BITS), *CHIPS], rows),
                f"Chips: cells of techC after a day, {CHIP_BITS}-bit ADC; 0.3 uS, 0.3 and 0.5 levels, 2 %, 1 ohm."]
    write_results(f"grid_{name}_{processor()}", "Every cell and ADC", sections, {"settings": found})


if __name__ == "__main__":
    main()
