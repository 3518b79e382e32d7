"""Accuracy of the shipped VGG7 on chips of every device preset, at its first and at its last time.

    python benchmarks/presets.py --data_path path/to/images --workers 2
    python benchmarks/presets.py --data_path path/to/images --cellBit 1 --weights offset pair --presets techB techC

A chip of the 10,000 test images takes minutes, so this is a study of many hours: one that was stopped goes on when it is started again, and
what other presets and settings were measured before stays in benchmarks/results/presets.json, which the table presets.md is made from.
Devices that have no last time (cmo_hfox, pcm, winbond_asu_2bit at 85 C) are taken after a day.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from common import RESULTS, markdown_table, write_results

import eval as evaluation
from experiment.cli import UserError, run_main
from models.quant import Device

FIRST_AND_LAST = {  # flags
    "techA": ("--device_time 0", "--device_time 100000"),
    "techB": ("--device_time 0", "--device_time 100000"),
    "techB_cycled10k": ("--device_time 0", "--device_time 10000"),
    "techC": ("--device_time 0", "--device_time 100000"),
    "techC_cells": ("--device_time 0", "--device_time 100000"),
    "rram_wan": ("--device_time 1s", "--device_time 2d"),
    "cmo_hfox": ("--device_time 0", "--device_time 1d"),
    "cmo_hfox_0.2pct": ("--device_time 0", "--device_time 1d"),
    "pcm": ("--device_time 20s", "--device_time 1d"),
    "winbond_asu_2bit": ("--device_time 20s", "--device_time 1d --device_temp 85"),
    "winbond_asu_1bit": ("",),
    "rram_wan_crosssim": ("",),
    "milo_irps21": ("",),
    "neurram_chip": ("",),
    "stuck_at_mnsim": ("",),
    "stuck_at_chen": ("",),
}
NETWORK = Path(__file__).resolve().parent.parent / "pretrained" / "vgg7_w4a4_cifar10.pt"
COLUMNS = ("device", "device_time_s", "device_temp_C", "cell_bits", "weights", "calib_on", "chips")  # what tells rows apart
KEPT = (*COLUMNS, "accuracy", "accuracy_std", "accuracy_lowest", "changed_predictions", "software_accuracy", "n_images",
        "torch", "numba", "cpu")


def flags(presets: list[str], times: str, cell_bits: list[int], weights: list[str]) -> list[str]:
    """Of eval.py, one for each preset, time, cell and mapping: as values of `--also`, the first as they are."""
    which = {"both": slice(None), "first": slice(1), "last": slice(-1, None)}[times]
    settings = [f"--device {name} {time} --cellBit {bits} --weights {mapping} --adc_prec 6"
                for bits in cell_bits for mapping in weights for name in presets for time in FIRST_AND_LAST[name][which]
                if holds(name, bits)]
    if not settings:
        raise UserError("none of these presets has levels enough for cells of so many bits: give others, or a lower --cellBit")
    first, *others = settings
    return [*shlex.split(first), *(part for setting in others for part in ("--also", setting))]


def holds(preset: str, bits: int) -> bool:
    """Whether a preset's cells have levels enough for so many bits."""
    values = Device.preset(preset).level_values
    return values is None or 2**bits <= len(values)


def table(rows: list[dict]) -> str:
    """In Markdown, one line a setting."""
    lines = [[f"`{row['device']}`", row["cell_bits"], row["weights"], row["calib_on"],
              *("" if row[name] is None else f"{row[name]:g}" for name in ("device_time_s", "device_temp_C")), row["chips"],
              *("" if row[name] is None else f"{row[name]:.2f}" for name in ("accuracy", "accuracy_std", "accuracy_lowest")),
              row["changed_predictions"], row["cpu"]]
             for row in rows]
    return markdown_table(["preset", "bits a cell", "weights", "ranges of", "after, s", "C", "chips", "accuracy %", "deviation", "lowest",
                           "changed", "processor"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="folder of the CIFAR-10 images, as for eval.py --dataset imagefolder")
    parser.add_argument("--presets", nargs="+", choices=FIRST_AND_LAST, default=list(FIRST_AND_LAST))
    parser.add_argument("--times", choices=("both", "first", "last"), default="both")
    parser.add_argument("--cellBit", nargs="+", type=int, default=[2])
    parser.add_argument("--weights", nargs="+", default=["offset"])
    parser.add_argument("--calib_on", default="nominal")
    parser.add_argument("--chips", type=int, default=10)
    parser.add_argument("--workers", nargs=1, default=[], help="as for eval.py")
    parser.add_argument("--save_path", default="save/presets", help="folder of the points")
    args = parser.parse_args(argv)
    evaluation.main(["--resume", str(NETWORK), "--dataset", "imagefolder", "--data_path", args.data_path, "--save_path", args.save_path,
                     "--chips", str(args.chips), "--calib_on", args.calib_on,
                     *(("--workers", *args.workers) if args.workers else ()), *flags(args.presets, args.times, args.cellBit, args.weights)])
    file = RESULTS / "presets.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    measured = [json.loads(line) for line in Path(args.save_path, "results.jsonl").read_text().splitlines()]
    measured = [row for row in measured if row["chips"] and row["adc_bits"] == 6]
    rows = {tuple(row[column] for column in COLUMNS): {column: row[column] for column in KEPT} for row in known + measured}
    order = list(FIRST_AND_LAST)
    rows = sorted(rows.values(), key=lambda row: (row["cell_bits"], row["weights"], row["calib_on"], order.index(row["device"]),
                                                  row["device_time_s"] or 0))
    section = ("4-bit VGG7, 6-bit ADC, 128 rows, CIFAR-10: mean, deviation and lowest of the chips, and predictions that differ from "
               f"software ({rows[0]['software_accuracy']:.2f} %) in the mean. Rows are of several runs; date and command are those of "
               "the last.")
    write_results("presets", "Device presets", [section, table(rows)], {"rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
