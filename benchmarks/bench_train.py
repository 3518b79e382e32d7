"""How long does a training step take: of quantized numbers, through ADCs, on chips? Each is a ratio to float32 training of the same
network, in one process and in turns.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --only resnet18

The networks are the VGG7 of this project, without its quantizers, and torchvision's ResNet-18, both on images of 32 x 32 pixels, and the
small GPT of examples/language_model.py; weights are random. A step is forward, backward and SGD with momentum. On chips each step has a
new one. Writes benchmarks/results/train_<processor>.md and .json.
"""

import sys
from collections.abc import Callable

from common import RESULTS, build, markdown_table, median_seconds, parser_of, processor, sample_images, write_results

import torch
import torchvision
from models.quant import CrossbarSpec, Device, Training, convert
from models.quant.layers.quantizers import OFF
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(RESULTS.parents[1] / "examples"))
import language_model  # noqa: E402

CHIPS = Training("chips", Device.preset("techC", time="1d"))
SETTINGS = {
    "quantizers": ({"adc_bits": 4}, "quantizers"),
    "adc: 1-bit cells, 4 bits": ({"adc_bits": 4}, "adc"),
    "adc: 2-bit cells, 6 bits": ({"cell_bits": 2, "adc_bits": 6}, "adc"),
    "adc: 1-bit cells, by ones 1.5 bits": ({"adc_bits": 1.5, "adc_plan": "ones"}, "adc"),
    "chips: 2-bit cells, 6 bits": ({"cell_bits": 2, "adc_bits": 6}, CHIPS),
}
NETWORKS = ("vgg7", "resnet18", "gpt")


def subject(name: str, batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, int]:
    """(network, inputs, targets, bits of weights and inputs)."""
    torch.manual_seed(0)
    if name == "gpt":
        network = language_model.GPT()
        tokens = torch.randint(64, (batch // 8, network.context + 1))
        return network, tokens[:, :-1], tokens[:, 1:], 8
    images, labels = sample_images(batch)
    network = build("vgg7_quant", OFF, OFF) if name == "vgg7" else torchvision.models.resnet18(num_classes=10)
    network = network.train().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):  # batch norms get the statistics of activations
            network(images)
    return network, images, labels, 4


def step_of(network: nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """A function that makes one step of SGD."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(network(x).flatten(0, -2), target.flatten()).backward()
        optimizer.step()
    return step


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--batch_size", type=int, default=64, help="images, or eight times as many as windows of text")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    args = parser.parse_args(argv)
    rows, found = [], {}
    for name in args.only:
        network, x, target, bits = subject(name, args.batch_size)
        plain, found[name] = step_of(network, x, target), {}
        for title, (options, train) in SETTINGS.items():
            converted = convert(network, CrossbarSpec(bits, bits, **options), x[:32], train=train)
            seconds, base = median_seconds(step_of(converted, x, target), plain, repeats=args.repeats)
            found[name][title] = {"seconds": seconds, "float32": base}
            rows.append([name, title, f"{1e3 * seconds:.0f}", f"{1e3 * base:.0f}", f"{seconds / base:.2f}"])
            print(*rows[-1], sep="\t", flush=True)
    sections = [f"Batch {args.batch_size}, of the GPT {args.batch_size // 8} windows; medians of {args.repeats} steps after a warm-up, in "
                "turns with float32.", markdown_table(["network", "step", "ms", "ms in float32", "ratio"], rows)]
    write_results(f"train_{processor()}", "Training step", sections, {"networks": found, "batch_size": args.batch_size})


if __name__ == "__main__":
    main()
