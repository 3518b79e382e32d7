"""How long do the crossbar engines take, beside a plain forward pass of the same VGG7? All is timed in one process and one run.

    python benchmarks/bench_engines.py

Writes benchmarks/results/engines.md and engines.json. The numba engine takes longer, the more input bits are one: rows that are zero cost
nothing. So the share of ones is part of the result. --resume takes a trained network. Without it, weights are random, and the batch norm
statistics are those of the images.
"""

import argparse
import collections
import copy
import functools
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from common import build, markdown_table, median_seconds, parser_of, sample_images, write_results

import torch
from models import quant
from models.quant.layers.quantizers import OFF
from models.quant.network.modes import hooked
from utils import load_network

W_BITS = A_BITS = 4
ADC_BITS = 6
CHIPS = {"cells of techC after a day": {}, "the same with read noise": {"read_noise": 0.3},
         "the same with wires, gate access": {"wires": quant.Wires("gate", 1.0)}}
PLANS = {"uniform 4-bit ADC": {"adc_bits": 4}, "plan of 2 bits in the mean": {"adc_bits": 2, "adc_plan": "significance"},
         "plan of 2 bits that skips idle reads": {"adc_bits": 2, "adc_plan": "significance", "adc_idle": "skip"},
         "plan of 2 bits by ones": {"adc_bits": 2, "adc_plan": "ones"}, "plan of 1 bit by ones": {"adc_bits": 1, "adc_plan": "ones"}}


def crossbar_network(args, images):
    """VGG7 on crossbars with sensible activations: weights of a checkpoint, or random ones and the images' statistics."""
    if args.resume:
        return load_network(args.resume)
    net = build("vgg7_quant_eval", W_BITS, A_BITS)
    with quant.without_adc(net):
        torch.optim.swa_utils.update_bn([images], net)
    return net.eval()


def set_hardware(net, cell_bits, adc_range, images):
    quant.set_spec(net, quant.CrossbarSpec(W_BITS, A_BITS, cell_bits, ADC_BITS, adc_range=adc_range))
    if adc_range == "calibrated":
        quant.calibrate(net, images)


def reads_an_image(net, images):
    """How many partial sums its ADCs digitise for one image, and the share of input bits that are one."""
    found = collections.Counter()

    def count(layer, inputs, output):
        mapped, codes = layer.mapped("ideal"), layer.a_codes(inputs[0])
        found["reads"] += output[0].numel() * len(mapped.arrays) * len(mapped.spec.digit_bits) * len(mapped.spec.slice_bits)
        found["bits"] += A_BITS * codes.numel()
        found["ones"] += sum(int((codes >> bit & 1).sum()) for bit in range(A_BITS))
    with hooked(layer.register_forward_hook(count) for _, layer in quant.crossbar_layers(net)):
        net(images)
    return found["reads"], found["ones"] / found["bits"]


def peak_memory(kind):
    """Peak resident MiB of a process that runs one batch of 256 images: kind "plain" or "crossbar"."""
    command = [sys.executable, __file__, "--memory_of", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_for_memory(kind):
    images, _ = sample_images(256)
    with torch.inference_mode():
        if kind == "plain":
            build("vgg7_quant", OFF, OFF).eval()(images)
        else:
            net = build("vgg7_quant_eval", W_BITS, A_BITS).eval()
            set_hardware(net, 1, "calibrated", images[:16])
            net(images)
    # Linux hands the peak of the parent on in getrusage; VmHWM is of this process alone.
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    print((int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024)


class Times:
    """Times of a crossbar network, each beside one of the plain network, which is called in turns with it.

    Attributes: rows, of the table; numbers, of the JSON file.
    """

    def __init__(self, batch: torch.Tensor, repeats: int):
        self.batch, self.repeats = batch, repeats
        self.plain = build("vgg7_quant", OFF, OFF).eval()
        self.rows, self.numbers = [], {"batch_size": len(batch), "repeats": repeats}

    def beside(self, *runs, images=None, repeats=None):
        """ms an image of `run(images)` for each of `runs`, and behind them of the plain network; all are called in turns."""
        images = self.batch if images is None else images
        calls = *(functools.partial(run, images) for run in runs), functools.partial(self.plain, self.batch)
        *seconds, plain = median_seconds(*calls, repeats=repeats or self.repeats)
        return [*(1e3 / len(images) * each for each in seconds), 1e3 / len(self.batch) * plain]

    def add(self, title, ms, float_ms, reads=None):
        self.rows.append([title, f"{ms:.3g}", f"{ms / float_ms:.2f}", f"{reads / ms / 1e6:.3g}" if reads else ""])
        self.numbers[title] = {"ms_an_image": ms, "ratio_to_float32": ms / float_ms, "reads_an_image": reads}


def time_software(times, net):
    """The plain network in both types, and the crossbar network without ADCs."""
    def bf16(images):
        with torch.autocast("cpu", torch.bfloat16):
            times.plain(images)

    bf16_ms, float_ms = times.beside(bf16)
    times.add("plain float32", float_ms, float_ms)
    times.add("plain bfloat16", bf16_ms, float_ms)
    quant.set_spec(net, quant.CrossbarSpec(W_BITS, A_BITS, adc_range="ideal"))
    times.add("no ADC (one integer convolution a layer)", *times.beside(net))


def time_ideal_cells(times, net, few):
    """All cells and ranges, with the reference engine too where it is given a few images; returns the share of input bits that are one."""
    for cell_bits in (1, 2, 4):
        for adc_range in ("calibrated", "dynamic"):
            kind = f"{cell_bits}-bit cells, {adc_range}"
            with quant.set_engine("numba"):
                set_hardware(net, cell_bits, adc_range, times.batch)
                reads, share = reads_an_image(net, times.batch)
                times.add(f"numba, {kind}", *times.beside(net), reads)
            if few is not None:
                with quant.set_engine("reference"):
                    times.add(f"reference, {kind}", *times.beside(net, images=few, repeats=1), reads)
    return share


def time_plans(times, net):
    """Fewer bits than those of `time_ideal_cells`, alike or planned."""
    with quant.set_engine("numba"):
        for title, converters in PLANS.items():
            quant.set_spec(net, quant.CrossbarSpec(W_BITS, A_BITS, cell_bits=1, **converters))
            quant.calibrate(net, times.batch)
            times.add(f"numba, 1-bit cells, {title}", *times.beside(net))


def time_chips(times, net):
    """Chips of each kind of cells, all called in turns: their ratios to each other are of interest too."""
    for cell_bits in (1, 2, 4):
        with quant.set_engine("numba"):
            set_hardware(net, cell_bits, "calibrated", times.batch)
            chips = [copy.deepcopy(net) for _ in CHIPS]
            for chip, (title, options) in zip(chips, CHIPS.items()):
                started = time.perf_counter()
                quant.program(chip, quant.Device.load("techC", time="1d"), **options)
                times.numbers[f"seconds to program {cell_bits}-bit {title}"] = time.perf_counter() - started
            *all_ms, float_ms = times.beside(*chips)
            for title, ms in zip(CHIPS, all_ms):
                times.add(f"numba, {cell_bits}-bit {title}", ms, float_ms)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resume", help="checkpoint of a trained 4-bit VGG7; default random weights")
    parser.add_argument("--data_path", help="folder of images, as for eval.py --dataset imagefolder; default the embedded digits")
    parser.add_argument("--reference_images", type=int, default=2, help="images for the reference engine")
    parser.add_argument("--skip_slow", action="store_true", help="leave out the reference engine")
    parser.add_argument("--memory_of", choices=("plain", "crossbar"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        run_for_memory(args.memory_of)
        return

    batch, _ = sample_images(args.batch_size, args.data_path)
    few = None if args.skip_slow else batch[:args.reference_images]
    with torch.inference_mode():
        times, net = Times(batch, args.repeats), crossbar_network(args, batch)
        time_software(times, net)
        share = time_ideal_cells(times, net, few)
        time_plans(times, net)
        time_chips(times, net)
    memory = {kind: peak_memory(kind) for kind in ("plain", "crossbar")}
    shown = "images of a folder" if args.data_path else "digits"
    sections = [f"VGG7 on 32x32 images ({shown}), {W_BITS}-bit weights and activations, 128 rows, {ADC_BITS}-bit ADC, whole network, batch "
                f"{len(batch)}, {'weights of ' + args.resume if args.resume else 'random weights'}; {100 * share:.1f} % of the input bits "
                f"are one. Median of {args.repeats} runs after a warm-up, in turns with the plain network.",
                markdown_table(["what", "ms an image", "ratio to float32", "G reads/s"], times.rows),
                markdown_table(["peak memory, batch 256", "MiB", "ratio"],
                               [[kind, f"{mib:.0f}", f"{mib / memory['plain']:.2f}"] for kind, mib in memory.items()])]
    write_results("engines", "Crossbar engines", sections, times.numbers | {"ones_share": share, "peak_memory_mib": memory})


if __name__ == "__main__":
    main()
