"""How often does a network of torchvision see the same in photographs on crossbars as in float? The photographs need no labels.

    python examples/imagenet.py resnet18 path/to/photographs
    python examples/imagenet.py resnet18 path/to/photographs --state resnet18-f37072fd.pth      # without a download
    python examples/imagenet.py resnet18 --random                       # random weights and noise, to look at the report

Every second photograph calibrates, and the others are compared. With labels, `eval.py --model torchvision/resnet18 --dataset imagefolder`
measures accuracy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from experiment.inputs import foreign
from experiment.program.cli import UserError, run_main, user_error
from experiment.inputs.streamed import Streamed
from models.quant import CrossbarSpec, convert

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def pictures(folder: str | None, count: int = 8) -> list:
    """The files of a folder, or without one as many pictures of noise."""
    if folder is None:
        return list(np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8))
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
    if len(found) < 2:
        raise UserError(f"{folder}: {len(found)} photographs ({', '.join(sorted(EXTENSIONS))}), and at least 2 are needed")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a network of torchvision")
    parser.add_argument("folder", nargs="?", help="photographs")
    parser.add_argument("--state", help="a file with the weights, in place of the published ones")
    parser.add_argument("--random", action="store_true", help="random weights, and noise for photographs")
    parser.add_argument("--image_size", type=int, help="pixels a side, in place of the network's own")
    parser.add_argument("--bits", type=int, default=8, help="of weights and inputs")
    parser.add_argument("--adc_bits", type=int, default=8, help="of the converters")
    given = parser.parse_args(argv)
    if given.random == bool(given.folder):
        raise UserError("give a folder of photographs, or --random")

    found = foreign.load(f"torchvision/{given.name}", given.state, given.image_size, weights=not given.random)
    if given.random:
        print("random weights and noise: what the network sees means nothing")
    shown = Streamed(pictures(given.folder), found.transform)
    with user_error(str):
        spec = CrossbarSpec(w_bits=given.bits, a_bits=given.bits, adc_bits=given.adc_bits)
        net = convert(found.network, spec, [part.read() for part in shown[::2].split(16)])
    print(net.crossbar_report)

    same = total = 0
    with torch.no_grad():
        for part in shown[1::2].split(16):
            inputs = part.read()
            same += int((net(inputs).argmax(1) == found.network(inputs).argmax(1)).sum())
            total += len(inputs)
    print(f"the same class as in float: {same} of {total}")
    return 0


if __name__ == "__main__":
    run_main(main)
