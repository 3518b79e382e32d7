"""`results.jsonl`: one line a measured setting, on the disk as soon as it is known; `results.csv` and `results.parquet`, all of
them; `table.json`, those of the last command."""

import contextlib
import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.quant.storage.files import atomic_write, locked, write_text

from .columns import is_line


def append(path: str | Path, values: Mapping[str, Any]) -> None:
    """Add one line. It stands on a line of its own also behind one that was torn by a crash, and beside other writers."""
    with locked(path), open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))  # the last byte
        torn = file.read()[-1:] not in (b"", b"\n")
        file.write((b"\n" if torn else b"") + json.dumps(values).encode() + b"\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file; none of a file that is not there. Lines that a crash tore, or that are no results, are left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [*filter(is_line, rows)]


def write_tables(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """results.csv, and results.parquet where pyarrow is installed (else none), of these rows. Lists and dicts are JSON in a column.
    Returns: the paths of those that were written; none is where they hold these rows already."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: _flat(row.get(name)) for name in names} for row in rows]
    text = csv_text([names, *(row.values() for row in flat)])
    path, whole = Path(folder, "results.csv"), importlib.util.find_spec("pyarrow") is None or Path(folder, "results.parquet").exists()
    if whole and path.exists() and path.read_bytes() == text.encode():
        return []
    written = _write_parquet(path.with_suffix(".parquet"), names, flat)  # first: by the CSV is told whether both are there
    write_text(path, text)
    return [path, *written]


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


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
