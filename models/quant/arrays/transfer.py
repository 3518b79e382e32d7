"""Converters by a table (`Transfer`): where each code begins, and what it is worth, from a file (`read`) or from code (`of_code`).

A CSV has a line for each code, in rising order; a code begins at its threshold, the first one nowhere. This is a ternary converter:

    threshold,value
    ,-1
    -0.5,0
    0.5,1

A JSON says the same as `{"thresholds": [-0.5, 0.5], "values": [-1, 0, 1]}`. Both are in steps: a read v lies at `v / delta`, and a code of
value x stands for `delta x`. Nothing of the table is moved: `delta` alone is chosen, and 0 steps are v = 0.

Code gives both numbers, or the value of a read, from which they follow:

    def ternary(x):
        return (x > 0.5) - (x < -0.5)
"""

import csv
import functools
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .converter import Converter

VALUE_GRID = 64  # values of codes are multiples of 1 / VALUE_GRID steps, so that their sums are exact
MOST_CODES = 2**12
LARGEST = 2**15 // VALUE_GRID  # steps, of a threshold or value
LOOKS = 16  # reads in a step at which a function is asked whether its value has changed
FINEST = 2**40  # parts of a step, to one of which its thresholds are found


def read(path: str | Path) -> tuple[list[float], list[float]]:
    """(thresholds, values) in a file. Raises: ValueError, one line, for a file that is none."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    return _of_json(text) if path.suffix == ".json" else _of_csv(text)


def of_code(code: Any) -> Any:
    """What a class or a function says of a converter, for `text_of`.

    Code that needs no arguments is called. If that leaves a function `value(x)`, it is the value of a read of x steps, in steps, which
    may not fall as x rises. Its table has the thresholds at which it changes, to 2^-40 of a step. Raises: what the code raises.
    """
    made = code() if _needs_nothing(code) else code
    return _steps_of(made) if callable(made) and not hasattr(made, "thresholds") else made


def _needs_nothing(code: Any) -> bool:
    try:
        inspect.signature(code).bind()
    except (TypeError, ValueError):  # no code, or that of C, which says nothing of its arguments
        return False
    return True


def _steps_of(function: Callable[[float], Any]) -> tuple[list[float], list[float]]:
    """(thresholds, values) of a function, by bisection; one code more than a table may have where it has too many."""
    at, reach = functools.cache(lambda place: float(function(place / FINEST))), LARGEST * FINEST
    thresholds, values = [], [at(-reach)]
    for low, high in itertools.pairwise(range(-reach, reach + 1, FINEST // LOOKS)):
        while at(high) != values[-1] and len(values) <= MOST_CODES:
            above = high
            while above - low > 1:
                middle = (low + above) // 2
                low, above = (middle, above) if at(middle) == values[-1] else (low, middle)
            thresholds.append((low if len(values) % 2 else above) / FINEST)  # a read at it has the even code (`nearest`), as it should
            values.append(at(above))
            low = above
    return thresholds, values


def text_of(table: Any) -> str:
    """A table as the text that `CrossbarSpec.adc_transfer` holds: the begin of its digest, `thresholds ... values ...`.

    Args: table, what has `thresholds` and `values`, or is a pair of them. Raises: ValueError, one line, for what can be none.
    """
    try:
        pair = (table.thresholds, table.values) if hasattr(table, "thresholds") else table
        thresholds, values = (list(map(float, numbers)) for numbers in pair)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ValueError(f"gives {type(table).__name__}; thresholds and values are expected, each a list of numbers, or the function of a "
                         "read") from None
    for name, numbers in (("value", values), ("threshold", thresholds)):
        if odd := [number for number in numbers if not np.rint(VALUE_GRID * abs(number)) < VALUE_GRID * LARGEST]:  # as it is kept
            raise ValueError(f"has the {name} {odd[0]:g}; allowed are steps below {LARGEST}")
        if odd := [after for before, after in itertools.pairwise(numbers) if after < before]:
            raise ValueError(f"has the {name} {odd[0]:g} behind a larger one; {name}s do not fall")
    if not 2 <= len(values) <= MOST_CODES:
        raise ValueError(f"has {len(values)} codes; allowed are 2 to {MOST_CODES}")
    if len(thresholds) != len(values) - 1:
        raise ValueError(f"has {len(values)} values and {len(thresholds)} thresholds; allowed is one threshold less than values")
    parts = [" ".join(f"{number:.17g}" for number in numbers)
             for numbers in (thresholds, [round(VALUE_GRID * number) / VALUE_GRID for number in values])]
    table = "thresholds {} values {}".format(*parts)
    return f"{hashlib.sha256(table.encode()).hexdigest()[:8]} {table}"


def _of_json(text):
    try:
        found = json.loads(text)
        thresholds, values = (list(map(float, found[name])) if isinstance(found[name], list) else None for name in ("thresholds", "values"))
        if thresholds is None or values is None:
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError('is not a JSON of the form {"thresholds": [-0.5, 0.5], "values": [-1, 0, 1]}') from None
    return thresholds, values


def _of_csv(text):
    try:
        head, *rows = [*csv.reader(text.splitlines()), []]
    except csv.Error as error:
        raise ValueError(f"is no CSV: {error}") from None
    if [name.strip() for name in head] != ["threshold", "value"]:
        raise ValueError("line 1: threshold,value is expected")
    thresholds, values = [], []
    for number, row in enumerate(rows, 2):
        if row:
            try:
                threshold, value = row
                thresholds += [float(threshold)] if values or threshold.strip() else []  # the first code begins nowhere
                values.append(float(value))
            except ValueError:
                raise ValueError(f"line {number}: a threshold and a value are expected, two numbers of steps") from None
    return thresholds, values


def table_of(given: Any) -> str | None:
    """The text of a table (`text_of`), of a path, of code (`of_code`), or of such a text itself; None stays None. Raises: ValueError of the
    field adc_transfer, as `read` and `text_of`."""
    if given is None or isinstance(given, str) and re.match(r"[0-9a-f]{8} thresholds [^a-z]*\bvalues ", given):
        return given
    try:
        return text_of(read(given) if isinstance(given, (str, Path)) else of_code(given))
    except ValueError as error:
        raise ValueError(f"adc_transfer is {str(given)!r}: {error}") from None


@functools.cache
def kind(text: str) -> "type[Transfer]":
    """The converters of a table that `text_of` returned."""
    parts = text.split()
    middle = parts.index("values")
    table = tuple(map(float, parts[2:middle])), tuple(map(float, parts[middle + 1:]))
    return type("Transfer", (Transfer,), {"full": table, "most_bits": (len(table[1]) - 1).bit_length()})


@functools.cache
def _stopped(full, bits, most_bits):
    """(thresholds, values), float64, of the conversions of a table that stop after so many of its bits."""
    if bits == 0:
        return np.zeros(0), np.zeros(1)
    apart = 2 ** (most_bits - bits)
    values = [np.mean(full[1][first:first + apart]) for first in range(0, len(full[1]), apart)]
    return np.array(full[0][apart - 1::apart]), np.rint(VALUE_GRID * np.array(values)) / VALUE_GRID


@dataclass(frozen=True)
class Transfer(Converter):
    """A converter by a table, see above; code q = 0, 1, ... of a read is how many thresholds it has reached.

    A conversion of fewer bits than the table has stops early, as those of successive approximation do: it has every `2^s`-th
    threshold, and the mean of the values that it does not tell apart. One of 0 bits is none, and worth 0. `kind` makes the class
    of a table; `full` and `most_bits` are the table and its bits.
    """

    exact_zero = False

    @property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(thresholds, values) of its conversions, in steps."""
        return _stopped(self.full, self.bits, self.most_bits)

    @property
    def q_max(self) -> int:
        return len(self.table[1]) - 1

    @property
    def worth(self) -> float:
        return self.delta / (self.factor * VALUE_GRID)

    @property
    def largest(self) -> int:
        return int(np.abs(self.added(np.arange(self.q_max + 1))).max())

    @property
    def thresholds(self) -> np.ndarray:
        return self.table[0]

    def level(self, q: Any) -> Any:
        """Values of the codes q, in steps."""
        return self.table[1][q]

    def nearest(self, x: Any) -> Any:
        """Code of a read of x steps. Arrays or tensors."""
        if isinstance(x, torch.Tensor):
            return torch.from_numpy(self.nearest(x.cpu().numpy())).to(x)
        below, reached = (np.searchsorted(self.thresholds, x, side) for side in ("left", "right"))
        return reached - (reached > below) * reached % 2

    def added(self, q: Any) -> Any:
        return self.factor * np.rint(VALUE_GRID * self.level(q)).astype(np.int64)
