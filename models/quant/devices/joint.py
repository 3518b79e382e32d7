"""Files of weights whose cells were measured together (`read_joint`, `read_raw`)."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.files import load_array
from .lines import Line, by_level, check_siemens, check_us, levels_of
from .rows import JointRows
from .tables import Samples

RAW = re.compile(r"level(\{W\}|\d+)_raw\.npy")


def read_joint(path: Path, names: list[str], lines: list[Line]) -> dict[str, Any]:
    """A CSV `weight_level,cell0,cell1,...`, uS, the most significant cell first. Raises: as `formats.read`."""
    cells = [f"cell{k}" for k in range(len(names) - 1)]
    if not cells or names[1:] != cells:
        raise ValueError(f"{path}, line 1: columns {','.join(names)}; after weight_level come cell0,cell1,... in this order")
    check_us(path, lines, cells)
    levels = by_level(path, lines, "weight_level", levels_of(path, lines, "weight_level"))
    rows = [np.array([[line.values[cell] for cell in cells] for line in level]) for level in levels]
    return _device(path.stem, str(path), path.name, rows)


def raw_folder(path: str | Path) -> Path | None:
    """The folder of files `level{W}_raw.npy` that a path to one of them, or that pattern, means; None for other paths."""
    path = Path(path)
    return path.parent if RAW.fullmatch(path.name) else None


def read_raw(folder: Path) -> dict[str, Any]:
    """A folder of `level{W}_raw.npy`, siemens `[samples, cells]`, the most significant cell first. Raises: as `formats.read`."""
    files = {int(found[1]): path for path in folder.glob("level*_raw.npy") if (found := RAW.fullmatch(path.name))}
    if not files:
        raise ValueError(f"{folder}: no level0_raw.npy, level1_raw.npy, ...")
    for w in range(max(2, max(files) + 1)):
        if w not in files:
            raise ValueError(f"{folder}: no level{w}_raw.npy; weight codes are 0, 1, ... without gap")
    rows = [_load(files[w]) for w in sorted(files)]
    for w, each in enumerate(rows):
        if each.shape[1] != rows[0].shape[1]:
            raise ValueError(f"{files[w]}: {each.shape[1]} cells a weight, {files[0].name} has {rows[0].shape[1]}")
    return _device(folder.resolve().name, str(folder), folder.resolve().name, [1e6 * each for each in rows])


def _load(path: Path) -> np.ndarray:
    """Siemens, `[samples, cells]`."""
    try:
        values = load_array(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no array of numbers ({error})") from None
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {values.dtype} of shape {list(values.shape)}; expected are numbers [samples, cells]")
    values = values.astype(np.float64)
    for wrong, what in ((~np.isfinite(values), "not finite"), (values < 0, "negative")):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(f"{path}, sample {row}: cell {column} is {values[row, column]:g}, {what}")
    check_siemens(str(path), values)
    return values


def _device(name: str, where: str, source: str, rows: list[np.ndarray]) -> dict[str, Any]:
    """Attributes of a `Device`. Args: where, the file for messages; rows, uS, of each weight code."""
    w_bits, cells = (len(rows) - 1).bit_length(), rows[0].shape[1]
    if len(rows) != 2**w_bits:
        raise ValueError(f"{where}: weight codes 0 to {len(rows) - 1}, code {len(rows)} is absent; weights of {w_bits} bits have "
                         f"{2**w_bits} codes")
    joint = JointRows(where, tuple(rows))
    if not joint.splits:
        raise ValueError(f"{where}: {cells} cells cannot hold weights of {w_bits} bits in equal parts (the last may be smaller)")
    law = _law(joint)
    levels = tuple(law.series[None].targets.tolist())
    return {"name": name, "source": f"measured, {source}", "g_min": levels[0], "g_max": levels[-1], "law": law, "level_values": levels,
            "rows": joint, "n": sum(map(len, rows)) * cells}


def _law(joint: JointRows) -> Samples:
    """That of the low cells in the first split whose cells all rise with their levels. Raises: ValueError, of the first, where none do."""
    found = []
    for split in joint.splits:
        try:
            return [joint.law(bits) for bits in split][0]
        except ValueError as error:
            found.append(error)
    raise found[0]
