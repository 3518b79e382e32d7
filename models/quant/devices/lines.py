"""Lines of a CSV of measurements, and what cannot be right in them: every message names the file and the line."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SMALLEST_US, LARGEST_US = 1e-2, 1e4  # a device whose every cell is below 10 nS is one in siemens; one above 10 mS is none in siemens,
LARGEST_S = 1e-6 * LARGEST_US  # and in uS it is one in nS, or in ohms
TARGET = "target_uS"  # the column of nominal conductances, of a law as a table
MOST_SPREAD = 10  # of a standard deviation over the largest mean


class Line(NamedTuple):
    """A line of a CSV: its number, from 1 on, and its columns as numbers."""

    number: int
    values: dict[str, float]


def read_lines(path: Path) -> tuple[list[str], list[Line]]:
    """Names of the columns, and all lines."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from None
    if len(rows) < 2:
        raise ValueError(f"{path}, line 1: no lines of data")
    names = [name.strip() for name in rows[0][1]]
    if len(names) == 1 and (other := next((each for each in ";\t|" if each in names[0]), None)):
        raise ValueError(f"{path}, line {rows[0][0]}: columns stand between {other!r}; a comma is expected")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, line {rows[0][0]}: a column stands there twice")
    return names, [_line(path, number, names, row) for number, row in rows[1:]]


def _line(path: Path, number: int, names: list[str], row: list[str]) -> Line:
    if len(row) != len(names):
        raise ValueError(f"{path}, line {number}: {len(row)} values for {len(names)} columns")
    values = {}
    for name, text in zip(names, row):
        if name == "cell":
            continue
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"{path}, line {number}: {name} is {text.strip()!r}, no number") from None
        if not math.isfinite(values[name]):
            raise ValueError(f"{path}, line {number}: {name} is {text.strip()}, not finite")
        if values[name] < 0 and name != "temp_C":
            raise ValueError(f"{path}, line {number}: {name} is {text.strip()}, negative")
        if name in ("level", "states", "weight_level") and values[name] != int(values[name]):
            raise ValueError(f"{path}, line {number}: {name} is {text.strip()}, no whole number")
    return Line(number, values)


def check_us(path: Path, lines: list[Line], columns: list[str]) -> None:
    if all(line.values[column] < SMALLEST_US for line in lines for column in columns):
        raise ValueError(f"{path}, line {lines[0].number}: {columns[0]} is {lines[0].values[columns[0]]:g} and none is as large as "
                         f"{SMALLEST_US:g}: these look like siemens, uS are expected")
    for line in lines:
        for column in columns:
            if line.values[column] > LARGEST_US:
                raise ValueError(f"{path}, line {line.number}: {column} is {line.values[column]:g}, which looks like nS or ohms; uS are "
                                 f"expected, at most {LARGEST_US:g}")


def check_std_us(path: Path, lines: list[Line], column: str) -> None:
    """Deviations that are all below a hundredth of the smallest conductance that uS may have, but not all 0, are none in uS."""
    largest = max(lines, key=lambda line: line.values[column])
    if 0 < largest.values[column] < SMALLEST_US / 100:
        raise ValueError(f"{path}, line {largest.number}: {column} is {largest.values[column]:g} and none is larger: these look like "
                         "siemens, uS are expected")


def check_spread(path: Path, lines: list[Line], column: str, means: str) -> None:
    """Deviations far above all means are in another unit."""
    widest, top = max(lines, key=lambda line: line.values[column]), max(line.values[means] for line in lines)
    if widest.values[column] > MOST_SPREAD * top:
        raise ValueError(f"{path}, line {widest.number}: {column} is {widest.values[column]:g}, more than {MOST_SPREAD} times the largest "
                         f"{means}, {top:g}; one unit is expected")


def check_siemens(where: str, values: np.ndarray) -> None:
    if values.max() > LARGEST_S:
        raise ValueError(f"{where}: {values.max():g} looks like uS, siemens are expected")


def check_rise(levels: Sequence[float], where: Callable[[int], str], called: Callable[[int], str] = "level {}".format) -> None:
    """Args: mean of each level, uS; where a level stands, and what it is called, for the message."""
    for level in range(1, len(levels)):
        if levels[level] <= levels[level - 1]:
            raise ValueError(f"{where(level)}: {called(level)} has a mean of {levels[level]:g} uS, not above the {levels[level - 1]:g} uS "
                             f"of {called(level - 1)}")


def level_name(column: str, level: float) -> str:
    """What messages call a level, by what stands in its column."""
    return f"{column if column == TARGET else 'level'} {level:g}"


def levels_of(path: Path, lines: list[Line], column: str) -> Sequence[float]:
    """What stands in the column of all levels: of `TARGET` each conductance that does, rising, else 0, 1, ...; at least two."""
    found = sorted({line.values[column] for line in lines})
    if column != TARGET:
        return range(max(2, int(found[-1]) + 1))
    if len(found) < 2:
        raise ValueError(f"{path}, line {lines[-1].number}: {TARGET} is {found[0]:g} on all lines; two or more are expected")
    return found


def by_level(path: Path, lines: list[Line], column: str, levels: Sequence[float], what: str = "") -> list[list[Line]]:
    """Lines of each of the levels."""
    found = {}
    for line in lines:
        found.setdefault(line.values[column], []).append(line)
    for level in levels:
        if level not in found:
            all_of = "targets are" if column == TARGET else "levels are 0, 1, ... without gap,"
            raise ValueError(f"{path}, line {lines[-1].number}: the data end{what} without {level_name(column, level)}; {all_of} the same "
                             "at all times and temperatures")
    return [found[level] for level in levels]
