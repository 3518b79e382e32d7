"""Own measurements as devices (`read`). The kind of a file follows from its name or its first line.

- CSV `level,conductance_uS`, with optional columns `time_s`, `temp_C`, `cell`, `std_uS`. Levels are numbered 0, 1, ... and all of
  them stand at each time and temperature. Without `std_uS` each line is a measured cell, and cells are drawn from them with
  replacement; with it one line a level is a mean, and cells are Gaussian. The means at the first time and the lowest temperature
  are the nominal conductances. `cell` is for the reader: it is not used.
- CSV `target_uS,mean_uS,std_uS`, with optional columns `time_s`, `temp_C`: a law as a table. Cells that are programmed to `target_uS` are
  Gaussian with this mean and deviation; between targets both are linear. The same targets stand at each time and temperature. The levels
  of a cell, as many as it needs, lie evenly between the first and the last target.
- CSV `weight_level,cell0,cell1,...`, uS: each line holds all cells of one weight measured together, the most significant first.
- CSV `states,mean,std`, siemens: one line a level.
- A folder of `level{W}_raw.npy`, one of these files, or that pattern: for each weight code W an array `[samples, cells]`, siemens,
  the most significant cell first.
"""

from pathlib import Path
from typing import Any

import numpy as np

from .joint import raw_folder, read_joint, read_raw
from .lines import (TARGET, Line, by_level, check_rise, check_siemens, check_spread, check_std_us, check_us, level_name, levels_of,
                    read_lines)
from .presets import presets
from .tables import Cells, Samples, Series, Table

LEVEL_COLUMNS = {"level", "conductance_uS", "time_s", "temp_C", "cell", "std_uS"}
OF_LAW = {TARGET, "mean_uS", "std_uS"}


def read(path: str | Path) -> dict[str, Any]:
    """The attributes of the `Device` of a file or folder.

    Raises: ValueError, one line, for a path where nothing is, and with the file and the line that is wrong for absent levels, values that
        are no numbers, negative, or in another unit, and level means that do not rise.
    """
    name, path = path, Path(path)
    if not str(name) or not (raw_folder(path) or path).exists():
        raise ValueError(f"there is no preset and no file {str(name)!r}; presets are {', '.join(presets())}")
    if folder := path if path.is_dir() else raw_folder(path):
        return read_raw(folder)
    names, lines = read_lines(path)
    columns = set(names)
    if names[0] == "weight_level":
        return read_joint(path, names, lines)
    if columns == {"states", "mean", "std"}:
        for line in lines:
            check_siemens(f"{path}, line {line.number}", np.array([line.values["mean"], line.values["std"]]))
        return _gaussian(path, lines, "states", "mean", "std", 1e6)
    if {"level", "conductance_uS"} <= columns <= LEVEL_COLUMNS:
        check_us(path, lines, ["conductance_uS"])
        if "std_uS" not in columns:
            return _samples(path, lines)
        check_std_us(path, lines, "std_uS")
        return _gaussian(path, lines, "level", "conductance_uS", "std_uS")
    if OF_LAW <= columns <= OF_LAW | {"time_s", "temp_C"}:
        check_us(path, lines, [TARGET, "mean_uS"])
        check_std_us(path, lines, "std_uS")
        return _gaussian(path, lines, TARGET, "mean_uS", "std_uS")
    raise ValueError(f"{path}, line 1: columns {','.join(names)}; known are level,conductance_uS (with time_s,temp_C,cell,std_uS), "
                     "target_uS,mean_uS,std_uS (with time_s,temp_C), weight_level,cell0,cell1,... and states,mean,std")


def _moments(path: Path, lines: list[Line], column: str = "level") -> dict[float | None, dict[float | None, list[list[Line]]]]:
    """Lines by temperature, time and level, both rising. All have the same levels."""
    moments, levels = {}, levels_of(path, lines, column)
    for line in sorted(lines, key=lambda line: (line.values.get("temp_C", 0.0), line.values.get("time_s", 0.0))):
        moments.setdefault(line.values.get("temp_C"), {}).setdefault(line.values.get("time_s"), []).append(line)
    for temp, times in moments.items():
        for time, of_moment in times.items():
            what = "".join(f" at {value:g} {unit}" for value, unit in ((time, "s"), (temp, "C")) if value is not None)
            times[time] = by_level(path, of_moment, column, levels, what)
    return moments


def _samples(path: Path, lines: list[Line]) -> dict[str, Any]:
    moments = _moments(path, lines)
    reads = {temp: [[np.array([line.values["conductance_uS"] for line in level]) for level in levels] for levels in times.values()]
             for temp, times in moments.items()}
    targets = _targets(path, moments, [float(level.mean()) for level in next(iter(reads.values()))[0]])
    series = [Cells(temp, _times(moments[temp]), targets, reads[temp]) for temp in moments]
    return _device(path, Samples(path.stem, series), targets, sum(map(len, _first(moments))))


def _gaussian(path: Path, lines: list[Line], column: str, mean: str, std: str, to_us: float = 1.0) -> dict[str, Any]:
    """Args: the columns of the level, its mean and its deviation; to_us, microsiemens in their unit."""
    check_spread(path, lines, std, mean)
    moments = _moments(path, lines, column)
    for level in (level for times in moments.values() for levels in times.values() for level in levels):
        if len(level) > 1:
            raise ValueError(f"{path}, line {level[1].number}: a second line of "
                             f"{level_name(column, level[1].values[column])}; with {std} there is one a level, time and temperature")
    series = []
    for temp, times in moments.items():
        means, stds = (to_us * np.array([[level[0].values[key] for level in levels] for levels in times.values()]) for key in (mean, std))
        targets = _targets(path, moments, means[0].tolist(), column) if not series else series[0].targets
        series.append(Series(temp, _times(times), targets, means, stds))
    device = _device(path, Table(path.stem, series), series[0].targets, None)
    return device | {"level_values": None} if column == TARGET else device


def _targets(path: Path, moments: dict, means: list[float], column: str = "level") -> np.ndarray:
    """Nominal conductances: those of `TARGET`, else the means at the first time and lowest temperature, which rise."""
    first = _first(moments)
    values = [lines[0].values[column] for lines in first]
    check_rise(means, lambda level: f"{path}, line {first[level][0].number}",
               lambda level: level_name(column, values[level]))
    return np.array(values if column == TARGET else means)


def _first(moments: dict) -> list[list[Line]]:
    """Lines of each level at the first time and lowest temperature."""
    return next(iter(next(iter(moments.values())).values()))


def _times(times: dict) -> tuple[float, ...]:
    return () if None in times else tuple(times)


def _device(path: Path, law: Samples | Table, targets: np.ndarray, n: int | None) -> dict[str, Any]:
    levels = tuple(targets.tolist())
    return {"name": path.stem, "source": f"measured, {path.name}", "g_min": levels[0], "g_max": levels[-1], "law": law,
            "level_values": levels, "n": n}
