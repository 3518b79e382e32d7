"""`results.jsonl`: one line a measured setting, on the disk as soon as it is known; `results.csv` and `results.parquet`, all of
them; `table.json`, those of the last command."""

import contextlib
import csv
import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.quant.files import atomic_write, locked
from models.quant.quantizers import OFF
from models.quant.measuring.measure import Record

from . import foreign
from .chips import CHIP_FIELDS
from .cli import UserError
from .conversion_settings import OPTIONS
from .costs import figures
from .eval_flags import EvalSettings

SPEC_KEYS = ("cell_bits", "adc_bits", "rows", "mapping", "reference", "dac_bits", "adc_range", "adc_plan", "adc_max_bits", "adc_idle",
             "weights")


def row(record: Record, settings: EvalSettings, calib_images: int | None, source: str | None) -> dict[str, Any]:
    """The keys of one line, plain values; what does not apply to a setting is None.

    Args: calib_images, how many images chose the ranges of this setting, None where none did; source, where calibrated ranges
        come from that were not chosen here: a file's path or "checkpoint".
    """
    setting = record.setting
    hardware = {name: setting and getattr(setting.spec, name) for name in SPEC_KEYS}
    if setting and setting.spec.adc_range == "ideal":
        hardware["adc_bits"] = None
    rule = setting.calibration if setting and calib_images else None
    of_uniform, of_plans = (rule if rule and planned in setting.plans else None for planned in (False, True))
    chips = setting and setting.chips
    bits = {"wbit": OFF, "abit": OFF, "wq": None} if record.is_float else {
        "wbit": settings.wbit, "abit": settings.abit, "wq": settings.wq}
    options = {name: getattr(settings, name) if foreign.is_foreign(settings.model) else None for name in OPTIONS}
    return {
        "model": settings.model, "dataset": settings.dataset, **bits, **options, "float_accuracy": record.float_accuracy,
        "float_changed_predictions": record.float_changes,
        **hardware, "map": setting and setting.crossbar_layers, "engine": record.engine,
        "accuracy": record.accuracy, "software_accuracy": record.software_accuracy, "n_images": record.n_images,
        "changed_predictions": record.changed_predictions, "images_per_s": record.images_per_s, "seconds": record.seconds,
        "batch_size": settings.batch_size, "planes": settings.planes if setting else None, "checkpoint": settings.resume,
        "validation": settings.validation, "calib_images": calib_images, "adc_calib": of_uniform and of_uniform.rule,
        "adc_per": of_uniform and of_uniform.per, "adc_correct": rule and rule.correct, "adc_ranges": source,
        "adc_share": of_plans and of_plans.share, "mean_bits": record.mean_bits,
        "conversions": record.conversions, "layer_bits": record.layer_bits,
        "device": chips and chips.name, "device_time_s": chips and chips.device.time, "device_temp_C": chips and chips.device.temp,
        **{name: chips and getattr(chips.device, name) for name in ("stuck_on", "stuck_off")},
        **{name: chips and getattr(chips, name) for name in CHIP_FIELDS},
        "per_layer": {pattern: dict(values) for pattern, values in setting.per_layer} or None if setting else None,
        "calib_on": rule.on if rule and chips else None, "accuracy_std": record.accuracy_std,
        "accuracy_lowest": record.accuracy_lowest, "chip_accuracies": record.chip_accuracies,
        "chip_changed_predictions": record.chip_changes,
        **figures(record.cost),
    }


def is_number(value: Any, low: float = 0, high: float = sys.float_info.max) -> bool:
    """Whether a value is a number of this span: NaN is none, and neither is what a float does not hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_percent(value: Any) -> bool:
    return is_number(value, high=100)


def _is_count(value: Any) -> bool:
    return is_number(value) and isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What must stand under a key of a row, if it is there; and under another one if it is there and not None.
NEEDED = {"key": _is_text, "accuracy": _is_percent, "software_accuracy": _is_percent, "n_images": _is_count,
          "seconds": lambda value: is_number(value) and value > 0, "changed_predictions": _is_count}
POSSIBLE = {"engine": _is_text, "mean_bits": is_number, "conversions": is_number, "float_accuracy": _is_percent,
            "float_changed_predictions": _is_count,
            "layer_bits": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
            "chip_accuracies": lambda value: isinstance(value, list) and all(map(_is_percent, value)),
            "chip_changed_predictions": lambda value: isinstance(value, list) and all(map(_is_count, value))}


def is_row(values: Any) -> bool:
    """Whether plain values are a row, as far as they go: older ones have fewer keys."""
    return isinstance(values, dict) and all(fits(values[name]) for name, fits in NEEDED.items() if name in values) and all(
        fits(values[name]) for name, fits in POSSIBLE.items() if values.get(name) is not None)


def check_can_append(path: str | Path) -> None:
    """Raise UserError where a file cannot be written to, before hours of work."""
    try:
        with open(path, "a"):
            return
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def append(path: str | Path, values: Mapping[str, Any]) -> None:
    """Add one line. It stands on a line of its own also behind one that was torn by a crash, and beside other writers."""
    with locked(path), open(path, "ab") as file:
        torn = file.tell() > 0 and _last_byte(path) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(values).encode() + b"\n")


def _last_byte(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file; none of a file that is not there. Lines that a crash tore, or that are no results, are left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [*filter(is_row, rows)]


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of one command's table, in its order, as JSON."""
    atomic_write(path, lambda file: file.write(json.dumps(rows, indent=1).encode()))


def write_tables(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """results.csv, and results.parquet where pyarrow is installed (else none), of these rows. Lists and dicts are JSON in a column.
    Returns: the paths of those that were written; none is where they hold these rows already."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: _flat(row.get(name)) for name in names} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    path, whole = Path(folder, "results.csv"), importlib.util.find_spec("pyarrow") is None or Path(folder, "results.parquet").exists()
    if whole and path.exists() and path.read_bytes() == text.getvalue().encode():
        return []
    written = _write_parquet(path.with_suffix(".parquet"), names, flat)  # first: by the CSV is told whether both are there
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))
    return [path, *written]


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


def _write_parquet(path: Path, names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Columns of one type: numbers, truths, or texts for what is mixed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except Exception:  # not installed, or in halves, which raises nearly anything: the CSV has the same
        path.unlink(missing_ok=True)  # of other rows
        return []

    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        elif kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        columns[name] = values
    atomic_write(path, lambda file: pyarrow.parquet.write_table(pyarrow.table(columns), file))
    return [path]
