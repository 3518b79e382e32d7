"""How long do converted networks take, beside the plain float32 network? Both are called in turns, in one process.

    python benchmarks/bench_networks.py
    python benchmarks/bench_networks.py --networks mobilenet_v2 --images 4

The networks are those of torchvision with random weights. Their batch norms are settled on random images. Writes
benchmarks/results/networks_<processor>.md and .json.
"""

import time

from common import markdown_table, median_seconds, parser_of, processor, write_results

import torch
import torchvision
from models.quant import CrossbarSpec, convert

SETTINGS = {
    "W8A8, no ADC": CrossbarSpec(8, 8, adc_range="ideal"),
    "W4A4, 1-bit cells, 6-bit ADC": CrossbarSpec(4, 4, cell_bits=1, adc_bits=6),
    "W8A8, 1-bit cells, 8-bit ADC": CrossbarSpec(8, 8, cell_bits=1, adc_bits=8),
}


def settled(name: str, images: torch.Tensor) -> torch.nn.Module:
    """A network whose activations have the size that training would give them."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).train()
    with torch.no_grad():
        for _ in range(3):
            network(images)
    return network.eval().to(memory_format=torch.channels_last)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16"],
                        help="names of torchvision")
    parser.add_argument("--images", type=int, default=8, help="of 224 x 224 pixels, in a batch")
    parser.add_argument("--calib_images", type=int, default=16, help="that choose scales and ADC ranges")
    args = parser.parse_args(argv)
    numbers = torch.Generator().manual_seed(0)
    calibration = torch.randn(args.calib_images, 3, 224, 224, generator=numbers)
    images = calibration[:args.images].contiguous(memory_format=torch.channels_last)
    rows, found = [], {}
    for name in args.networks:
        network, found[name] = settled(name, calibration[:16]), {}
        for title, spec in SETTINGS.items():
            started = time.perf_counter()
            converted = convert(network, spec, calibration)
            conversion = time.perf_counter() - started
            with torch.no_grad():
                plain, simulated = median_seconds(lambda net=network: net(images), lambda net=converted: net(images), repeats=args.repeats)
            found[name][title] = {"seconds_a_batch": simulated, "float32": plain, "conversion_seconds": conversion}
            rows.append([name, title, f"{1e3 * simulated / args.images:.1f}", f"{simulated / plain:.2f}", f"{conversion:.0f}"])
            print(*rows[-1], sep="\t", flush=True)
    sections = [f"224 x 224, batch {args.images}; median of {args.repeats} passes in turns with plain float32. Conversion: quantizers, "
                f"correction and calibration on {args.calib_images} images, with what is compiled once.",
                markdown_table(["network", "setting", "ms an image", "ratio to float32", "conversion, s"], rows)]
    write_results(f"networks_{processor()}", "Converted networks", sections, {"networks": found})


if __name__ == "__main__":
    main()
