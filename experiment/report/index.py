"""What reports are called, and `reports.csv`, the list of what each is of."""

import contextlib
import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path

from models.quant import Calibration
from models.quant.measuring.setting import Setting
from models.quant.storage.files import locked, write_text

from ..measure.results import csv_text
from ..program import flags

INDEX = "reports.csv"


def report_text(setting: Setting, planes: str | None = None) -> str:
    """A setting as tables name it, and what these leave out, as all of their rows have it in common."""
    usual, calibrated = Calibration(), setting.spec.adc_range == "calibrated"
    values = {name: getattr(setting.calibration, name) for name in ("rule", "per", "correct", "share") if calibrated}
    notes = [f"{flags.flag_name(name)} {value}" for name, value in values.items() if value != getattr(usual, name)]
    notes += [f"chip {setting.chips.chip_seed}"] if setting.chips else []
    return ", ".join([str(setting), *notes, *([f"cells of {planes}"] if planes else [])])


def report_name(setting: Setting, text: str) -> str:
    """The files of a report, without their ends: bits of its cells and of its ADC, and what tells its text from others."""
    bits = f"{setting.spec.adc_bits:g}".replace(".", "_")
    return f"report_c{setting.spec.cell_bits}_b{bits}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def add_to_index(folder: Path, files: Mapping[str, str]) -> None:
    """Add files to the list of a folder, and leave out those that are no longer there. Args: files, `{name: what it is of}`."""
    path = folder / INDEX
    with locked(path):
        known = {}
        with contextlib.suppress(OSError, ValueError, csv.Error), open(path, newline="", encoding="utf-8") as file:
            known = {row[0]: row[1] for row in list(csv.reader(file))[1:] if len(row) == 2}
        there = sorted(each for each in (known | files).items() if Path(folder, each[0]).exists())
        write_text(path, csv_text([("file", "of"), *there]))
