"""How long does a training step take? Plain float32, plain bfloat16, and 4-bit QAT in both, in one process and one run.

    python benchmarks/bench_train.py

Writes benchmarks/results/train.md and train.json.
"""


from common import build, markdown_table, median_seconds, parser_of, sample_images, write_results

import torch
from models.quant.layers.quantizers import OFF
from torch.nn import functional as F

SETTINGS = [("plain, float32", OFF, False), ("plain, bfloat16", OFF, True), ("4-bit QAT, float32", 4, False),
            ("4-bit QAT, bfloat16", 4, True)]


def step_of(bits, bf16, images, labels):
    """A function that makes one step of SGD with Nesterov momentum."""
    net = build("vgg7_quant", bits, bits).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    return step


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--batch_size", type=int, default=128)
    args = parser.parse_args(argv)
    images, labels = sample_images(args.batch_size)
    steps = [step_of(bits, bf16, images, labels) for _, bits, bf16 in SETTINGS]
    milliseconds = {title: 1e3 / args.batch_size * seconds
                    for (title, *_), seconds in zip(SETTINGS, median_seconds(*steps, repeats=args.repeats))}
    base = milliseconds["plain, float32"]
    rows = [[title, f"{ms:.2f}", f"{ms / base:.2f}"] for title, ms in milliseconds.items()]
    sections = [f"VGG7 on 32x32 images, batch {args.batch_size}, one step of SGD; median of {args.repeats} steps after a "
                "warm-up.", markdown_table(["step", "ms an image", "ratio to float32"], rows)]
    write_results("train", "Training step", sections, {"ms_an_image": milliseconds, "batch_size": args.batch_size})


if __name__ == "__main__":
    main()
