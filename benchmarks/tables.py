"""All tables of the docs about one network, by one command. It runs `eval.py` and `train.py`, and writes what they find as Markdown.

    python benchmarks/tables.py --data_path path/to/images --workers 2
    python benchmarks/tables.py --data_path path/to/images --network pretrained/other.pt --tables settings presets_2bit
    python benchmarks/tables.py --data_path path/to/images --limit 50 --tables pairs      # a try, in files of its own

All of them take days: a chip of the 10,000 test images takes a minute, a training hours. Stop it when you like. Started again, it goes
on: settings are points, measured once, and trainings have checkpoints. Every command is printed and can be given by hand. After each
table it writes benchmarks/results/tables_<network>.md and .json. Tables that are not chosen stay there as they were.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, markdown_table, parser_of, write_results

from experiment.program.cli import UserError, run_main, run_program
from experiment.settings.eval_settings import checkpoint_of
from models.quant import CrossbarSpec
from models.quant.devices.times import show_time

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]  # what is KEPT of one of results.jsonl

FIRST_AND_LAST = {  # flags of each preset at its first and its last time; a day where there is no last, nothing where there are no times
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
    **dict.fromkeys(("rram_wan_crosssim", "milo_irps21", "neurram_chip", "stuck_at_mnsim", "stuck_at_chen"), ("",)),
}
IN_PAIRS = {"techB": -1, "techB_cycled10k": -1, "techC": -1, "techC_cells": 0, "winbond_asu_2bit": -1, "stuck_at_chen": 0}  # when
KEPT = ("cell_bits", "adc_bits", "weights", "rows", "mapping", "reference", "dac_bits", "adc_range", "adc_plan", "adc_idle", "map",
        "device", "device_time_s", "device_temp_C", "chips", "accuracy", "accuracy_std", "accuracy_lowest", "changed_predictions",
        "software_accuracy", "n_images", "torch", "numba", "cpu")
CHIPS = "--chips 10"
NEW_CHIPS = f"{CHIPS} --chip_seed 1000"  # that no training saw

# What trainings have in common, and of each: its name, hardware, and what it has besides. Flags that stand later win.
TRAINING = ("--adc_aware --epochs 6 --val_split 0.02 --lr 0.02 --schedule_type cosine --cutout 8 --alpha_lr 0.001 --label_smoothing 0.1 "
            "--weight_clip 2.2 --batch_size 128")
PLANNED = "--cell_bits 1 --adc_plan significance --adc_bits 1"
ON_CHIPS = "--epochs 1 --chip_steps 4 --lr 0.01 --cutout 0"
THROUGH_ADC = {
    "adc3": ("--cell_bits 1 --adc_bits 3", ""),
    "adc3_short": ("--cell_bits 1 --adc_bits 3", "--epochs 2 --lr 0.005 --cutout 0"),
    "adc2": ("--cell_bits 1 --adc_bits 2", "--epochs 2"),
    "plan1": (PLANNED, "--epochs 2"),
    "plan1_distilled": (PLANNED, "--epochs 2 --distill 1 --label_smoothing 0"),
    "plan1_skip": (f"{PLANNED} --adc_idle skip", "--epochs 2 --distill 1 --label_smoothing 0"),
    **{f"ones{bits}": (f"--cell_bits 1 --adc_plan ones --adc_bits {bits}", "--epochs 2 --distill 1 --label_smoothing 0")
       for bits in (0.75, 0.5)},
}
THROUGH_CHIPS = {
    "chips_techB": ("--cell_bits 2 --adc_bits 6 --device techB --device_time 100000", ON_CHIPS),
    "chips_techC": ("--cell_bits 2 --adc_bits 6 --device techC --device_time 1d", ON_CHIPS),
}


def of_presets(cell_bits: int, presets: Sequence[str]) -> list[str]:
    """The settings of some presets, first and last times, in groups as of `eval.py --table`."""
    return [f"--device {name} {time} --cell_bits {cell_bits} --adc_bits 6" for name in presets for time in FIRST_AND_LAST[name]]


def of_pairs() -> list[str]:
    """Settings of offset cells beside pairs, at the time that costs offset cells most."""
    return [f"--device {name} {FIRST_AND_LAST[name][when]} --cell_bits 2 --adc_bits 6 --weights offset pair"
            for name, when in IN_PAIRS.items()]


# ---- programs --------------------------------------------------------------------------------------------------------------


def run(command: Sequence[str | Path]) -> None:
    """Print a command and run it. Raises: UserError where it ends with an error, or was stopped."""
    words = [*map(str, command)]
    print(f"$ {shlex.join(words)}", flush=True)
    done, stopped = run_program(words, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable})  # which the scripts start
    if stopped or done.returncode:
        raise UserError(f"the command above ended with {done.returncode}; started again, the tables go on from there")


class Programs:
    """`eval.py` and `train.py` on a network and its images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.network = Path(args.network).resolve()
        self.name = f"tables_{self.network.stem}" + (f"_{args.limit}" if args.limit else "")
        self.folder = Path(args.save_path or ROOT / "save" / self.name).resolve()
        self.images = ["--dataset", args.dataset, "--data_path", Path(args.data_path).resolve()]
        self.of_eval = [*(["--limit", args.limit] if args.limit else []), *(["--workers", args.workers] if args.workers else [])]
        self.of_train = ["--limit_train", 10 * args.limit, "--limit_test", args.limit] if args.limit else []
        config = checkpoint_of(str(self.network))["config"]
        self.config = [part for name in ("model", "w_bits", "a_bits", "wq", "wd") if name in config for part in (f"--{name}", config[name])]

    def settings(self) -> list[Row]:
        """Those of vgg_cifar_eval.sh."""
        return self._evaluate(["bash", "vgg_cifar_eval.sh"], self.network, self.folder, [])

    def table(self, groups: Sequence[str], flags: str, network: Path | None = None) -> list[Row]:
        """Some settings. Args: groups, as of `eval.py --table`; flags, of all of them; network, one that was trained here."""
        folder = network.parent if network else self.folder
        return self._evaluate([sys.executable, "eval.py"], network or self.network, folder, [*shlex.split(flags), "--table", *groups])

    def _evaluate(self, program: Sequence[str], network: Path, folder: Path, flags: Sequence[str]) -> list[Row]:
        run([*program, "--resume", network, *self.images, *self.of_eval, "--save_path", folder, "--prob_path", folder / "prob", *flags])
        rows = json.loads((folder / "table.json").read_text())
        return [{name: row[name] for name in KEPT} for row in rows if row["cell_bits"]]  # without the software's

    def trained(self, trainings: dict[str, tuple[str, str]], before: str, after: str) -> list[Row]:
        """Networks that are trained on their hardware. Args: before, after, flags of the evaluations of the network that they start from,
        and of what comes out. Returns: a row after each, with `trained`, its flags, and the row `before`."""
        rows = []
        for name, (hardware, training) in trainings.items():
            [first] = self.table([hardware], before)
            run([sys.executable, "train.py", "--fine_tune", self.network, *self.config, *shlex.split(f"{TRAINING} {hardware} {training}"),
                 *self.images, *self.of_train, "--save_path", self.folder / name, "--go_on"])
            [last] = self.table([hardware], after, self.folder / name / "model_best.pth.tar")
            rows.append(last | {"trained": f"{hardware} {training}".strip(), "before": first})
        return rows


# ---- Markdown --------------------------------------------------------------------------------------------------------------


def accuracy(row: Row) -> str:
    """Of several chips with deviation and, in brackets, the lowest."""
    of_chips = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.2f} ({row['accuracy_lowest']:.2f})"
    return f"{row['accuracy']:.2f}{of_chips}"


def over_bits(rows: Sequence[Row]) -> str:
    """A line for each hardware, a column for each precision of its ADC; plans in a table of their own."""
    tables = []
    for plan, what, column in (("uniform", "accuracy % (predictions changed)", "{:g}-bit ADC"),
                               ("significance", "the same by mean bits of all reads, planned", "{:g}"),
                               ("ones", "the same, planned by ones", "{:g}")):
        lines: dict[str, dict[float, str]] = {}
        for row in rows:
            if row["adc_plan"] == plan:
                text = f"{accuracy(row)} ({row['changed_predictions']})"
                lines.setdefault(hardware(row), {})[row["adc_bits"] or math.inf] = text
        bits = sorted({each for line in lines.values() for each in line})
        header = [what, *("no ADC" if each == math.inf else column.format(each) for each in bits)]
        if lines:
            tables.append(markdown_table(header, [[name, *(line.get(each, "") for each in bits)] for name, line in lines.items()]))
    return "\n\n".join(tables)


def hardware(row: Row) -> str:
    """Cells, and the flags that are not at their default, but for those of precision."""
    usual = CrossbarSpec()
    names = "weights", "rows", "mapping", "reference", "dac_bits", "adc_range", "adc_idle"
    flags = [f"`--{name} {row[name]}`" for name in names if row[name] != getattr(usual, name)]
    flags += [f"`--crossbar_layers {row['map']}`"] if row["map"] != "all" else []
    return ", ".join([f"{row['cell_bits']}-bit cells", *flags])


def side_by_side(rows: Sequence[Row]) -> str:
    """A line for each device, its rows side by side."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row["device"], []).extend([conditions(row), accuracy(row), str(row["changed_predictions"])])
    width = max(map(len, lines.values()))
    return markdown_table(["preset", *["at", "accuracy %", "changed"] * (width // 3)],
                          [[f"`{name}`", *line, *[""] * (width - len(line))] for name, line in lines.items()])


def conditions(row: Row) -> str:
    """Time, temperature where it is not that of a room, and the weights where they are not offset cells."""
    time, temperature = row["device_time_s"], row["device_temp_C"]
    return ", ".join([*([] if time is None else [show_time(time)]), *([] if temperature in (None, 25) else [f"{temperature:g} C"]),
                      *([] if row["weights"] == "offset" else [row["weights"]])])


def before_and_after(rows: Sequence[Row]) -> str:
    """A line for each training."""
    return markdown_table(["trained with", "before: accuracy %", "changed", "after: accuracy %", "changed", "software after it, %"],
                          [[f"`{row['trained']}`", accuracy(row["before"]), row["before"]["changed_predictions"], accuracy(row),
                            row["changed_predictions"], f"{row['software_accuracy']:.2f}"] for row in rows])


@dataclass(frozen=True)
class Table:
    """Attributes: title; make, measures its rows; show, makes them Markdown."""

    title: str
    make: Callable[[Programs], list[Row]]
    show: Callable[[Sequence[Row]], str]


def of_chips(title: str, groups: Sequence[str]) -> Table:
    return Table(f"{title}, 6-bit ADC, ten chips", lambda programs: programs.table(groups, CHIPS), side_by_side)


TABLES = {
    "settings": Table("Every cell and ADC", Programs.settings, over_bits),
    "presets_2bit": of_chips("Devices at their first and last time, 2-bit cells", of_presets(2, list(FIRST_AND_LAST))),
    "presets_1bit": of_chips("Devices at their first and last time, 1-bit cells", of_presets(1, ["techA", "techC", "rram_wan", "pcm"])),
    "pairs": of_chips("Offset cells and pairs, 2-bit cells", of_pairs()),
    "through_adc": Table("Trained through the ADC", lambda programs: programs.trained(THROUGH_ADC, "", ""), before_and_after),
    "through_chips": Table("Trained on chips, and ten that it never saw",
                           lambda programs: programs.trained(THROUGH_CHIPS, CHIPS, NEW_CHIPS), before_and_after),
}
def section(table: Table, rows: Sequence[Row]) -> str:
    """A table under its title, with images, processors and versions of its rows."""
    first = rows[0].get("before", rows[0])
    machines = dict.fromkeys(f"{row['cpu']}, torch {row['torch']}, numba {row['numba']}" for row in rows)
    about = [f"{first['n_images']} test images", f"software {first['software_accuracy']:.2f} %", *machines]
    return f"## {table.title}\n\n{'; '.join(about)}\n\n{table.show(rows)}"


def write(name: str, tables: dict[str, list[Row]]) -> None:
    """Write results/<name>.md and .json of the tables that there are, and print the former."""
    known = {each: tables[each] for each in TABLES if each in tables}
    about = ("Of chips the mean, the deviation, and in brackets the lowest. changed: predictions that differ from the software's. Rows may "
             "be of several runs; date and command are those of the last.")
    write_results(name, "Tables of a network", [about, *(section(TABLES[each], rows) for each, rows in known.items())], {"tables": known})


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--network", default=ROOT / "pretrained" / "vgg7_w4a4_cifar10.pt", help="what train.py made, or exported")
    parser.add_argument("--dataset", default="imagefolder")
    parser.add_argument("--data_path", required=True, help="folder of the images, as for eval.py")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME",
                        help=f"of {', '.join(TABLES)}; default all")
    parser.add_argument("--workers", type=int, help="as for eval.py")
    parser.add_argument("--limit", type=int, help="use only so many test images, and ten times as many to train on")
    parser.add_argument("--save_path", help="folder of points and trainings; default save/tables_<network>")
    args = parser.parse_args(argv)
    programs = Programs(args)
    file = RESULTS / f"{programs.name}.json"
    tables = json.loads(file.read_text())["tables"] if file.exists() else {}
    for number, name in enumerate(args.tables, 1):
        print(f"table {number} of {len(args.tables)}: {TABLES[name].title}", flush=True)
        tables[name] = TABLES[name].make(programs)
        write(programs.name, tables)
    return 0


if __name__ == "__main__":
    run_main(main)
