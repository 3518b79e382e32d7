"""Points: every measured setting is a file of its own, whose existence means that it is done.

    points = Points("save/run")
    points.measure(key, make)                    # calls make() only where no process has made or is making this point
    point = points.read(key)                     # {"key", "decides", "row", "took_s", "predictions", "ranges"}

`points/<key>.json` is written whole or not at all by whoever measured it, and its row is appended to results.jsonl. A setting with
several chips has a point of each chip besides, under the key that it has alone, in `points/chips` and without a row. Any number of
processes and machines may share the folder: while one measures a point it holds a lock on one byte of `points/.claims`, which ends
with the process. Where a network drive has no locks, a point may be measured twice, to the same result.
"""

import base64
import contextlib
import functools
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting
from models.quant.storage.files import fcntl, remove_stale, write_text

from ..program.plain import is_number
from ..settings import costs
from . import columns, keys, results
from .answers import alike
from .ranges import AdcRanges

TABLES = "0"  # what is claimed to write them, a key that no point has
MOST = 2**26  # predictions that a point holds: those of a thousand chips of ImageNet's validation images are fewer, those of pixels may not
# What a file that is no point can raise where it is read as one.
DAMAGED = OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error


class Claims:
    """Pieces of work that processes claim, on one machine or on several that share a drive: each is one byte of a file, and a claim
    is a lock on it, which ends with its process. Two claims of one process do not exclude each other.

    Args: path, the file, made with the first claim and then left open: to close it would end all claims of the process.
    """

    _open: dict[tuple[int, int], int] = {}  # by device and inode

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def claim(self, key: str, wait: bool = False) -> Iterator[bool]:
        """`with` a claim on a key, a text of hexadecimal digits: True, or False where another process has it.

        Args: wait, until the other process is done. Where the system has no locks every claim succeeds. Raises: PermissionError for
            a file that is closed to this user.
        """
        place, mine = int(key[-15:], 16), True
        if fcntl is not None:
            try:
                fcntl.lockf(self._file(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except OSError as error:  # a drive without locks: a point may be measured twice, to the same result
                if isinstance(error, PermissionError) and error.filename:
                    raise  # of the file, not of the lock
                mine = not isinstance(error, (BlockingIOError, PermissionError))
        try:
            yield mine
        finally:
            if mine and fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._file(), fcntl.LOCK_UN, 1, place)

    def _file(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) in self._open:
                return self._open[status.st_dev, status.st_ino]
        number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        status = os.fstat(number)
        self._open[status.st_dev, status.st_ino] = number
        return number


class Points:
    """The points of a results folder. Nothing is written before the first one is measured.

    Attributes: images, how many images a point that is read has the predictions of; None: as many as it says.
    """

    images: int | None = None

    def __init__(self, folder: str | Path) -> None:
        self.results = Path(folder, "results.jsonl")
        self.folder = Path(folder, "points")
        self.claims = Claims(self.folder / ".claims")
        self.answers: Callable[[], list[list[float]]] | None = None
        self.log: logging.Logger | None = None
        self.named: set[Path] = set()
        self.older: dict[str, str] = {}  # keys of points of other code that are used, by what decides them but for the code
        self.left_out: set[str] = set()  # keys of those that are not

    def expect(self, answers: Callable[[], list[list[float]]], log: logging.Logger) -> None:
        """From now on points of networks with other answers than `answers()`, asked for once, are named in the log, and measured anew."""
        self.answers, self.log = functools.cache(answers), log

    def look_for_older(self, use: bool) -> None:
        """Tell points of other code from those of this. Args: use, whether the last one of a setting stands where none is of this code."""
        found, current = {}, set()
        for path in sorted([*self._paths(), *self._paths(of_several=True)], key=lambda path: path.stat().st_mtime):
            with contextlib.suppress(*DAMAGED):
                decides = _named(path)["decides"]
                same = keys.without_code(decides)
                if keys.is_current(decides):
                    current.add(same)
                else:
                    found[path] = same
        self.older = {same: path.stem for path, same in found.items() if use and same not in current}
        self.left_out = {path.stem for path in found} - {*self.older.values()}

    def says_older(self) -> str | None:
        """A line on points of other code; None where there are none."""
        count = len(self.left_out) + len(self.older)
        text = f"{count} point{'s were' if count > 1 else ' was'} measured with other code ({self.folder}), "
        if self.older:
            return f"{text}{len(self.older)} of which stand{'s' if len(self.older) == 1 else ''} for what this code has not measured"
        return f"{text}and what is asked for is measured anew; --older_points takes them as they are" if count else None

    def key(self, decides: Mapping[str, Any]) -> str:
        """The key of the point of what is decided by these values: that of one of other code where it is used."""
        key, older = keys.key_of(decides), self.older.get(keys.without_code(decides))
        return older if older and any(self.current(older, several) for several in (False, True)) else key

    def path(self, key: str, of_several: bool = False) -> Path:
        """Where a point is, or will be. Args: of_several, that of a chip as one of several."""
        return Path(self.folder, *(["chips"] if of_several else []), f"{key}.json")

    def read(self, key: str, of_several: bool = False) -> dict[str, Any] | None:
        """A point; None where it was not measured, or its file was damaged since. Args: see `path`."""
        point = _named(self.path(key, of_several))
        if point is None or self.images not in (None, point["row"].get("n_images")):
            return None
        with contextlib.suppress(*DAMAGED):
            record_of(point, None)
            if point["ranges"] is not None:
                AdcRanges().take([point["ranges"]])
            return point
        return None

    def current(self, key: str, of_several: bool = False) -> dict[str, Any] | None:
        """A point, as `read`; None too where it is of other code and left out, or of a network that answered otherwise (`expect`). Older
        points do not say how theirs did."""
        point, path = None if key in self.left_out else self.read(key, of_several), self.path(key, of_several)
        if not point or not self.answers or "answers" not in point or alike(point["answers"], self.answers()):
            return point
        if path not in self.named:
            self.log.warning(f"{path} is not used: the network that was measured has the same key as this one, and answered the first "
                             "images otherwise, as where code reads a number from elsewhere")
            self.named.add(path)
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all points of the folder but for those that are left out, as results.jsonl has them; of one that was measured twice
        the last."""
        self.mend()
        there = {path.stem for path in self._paths()} - self.left_out
        return list({row["key"]: row for row in results.read(self.results) if row.get("key") in there}.values())

    def write_tables(self) -> list[dict[str, Any]]:
        """Write `results.write_tables` of all points. One process at a time, so that tables of fewer points replace none of more.

        Returns: the rows.
        """
        with self.claims.claim(TABLES, wait=True):
            rows = self.rows()
            results.write_tables(self.results.parent, rows)
        return rows

    def _paths(self, of_several: bool = False) -> list[Path]:
        return sorted(Path(self.folder, "chips" if of_several else "").glob("[0-9a-f]*.json"))

    def measure(self, key: str, make: Callable[[], Mapping[str, Any]], wait: bool = False, of_several: bool = False) -> bool:
        """Write the point that `make()` returns, without its key, unless it is there already.

        Args: wait, for a process that is measuring it now; of_several, see `path`: results.jsonl then gets no row.
        Returns: whether the point is there; False where another process is measuring it.
        """
        path = self.path(key, of_several)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.claims.claim(key, wait) as mine:
            if mine and not self.current(key, of_several):
                started = time.perf_counter()
                point = {"key": key, **make(), **({"answers": self.answers()} if self.answers else {})}
                point["row"] = {**point["row"], "key": key}
                point.setdefault("took_s", time.perf_counter() - started)
                write_text(path, json.dumps(point))
                self.left_out.discard(key)
                if not of_several:
                    results.append(self.results, point["row"])
            return mine or self.current(key, of_several) is not None  # a damaged one is being made anew

    def mend(self) -> None:
        """Append what a process did not come to that was killed behind a point; remove what it left of a file."""
        if not self.folder.exists():
            return
        known = {row.get("key") for row in results.read(self.results)}
        for path in self._paths():
            if path.stem not in known:
                with self.claims.claim(path.stem) as mine:  # else its process is about to append it
                    if mine and (point := _named(path)):  # of any network, whose images are not known here
                        results.append(self.results, point["row"])
        for folder in (self.folder, self.folder / "chips"):
            remove_stale(folder, ".*.tmp")


# ---- a record as plain values -----------------------------------------------------------------------------------------


def of_record(record: Record, row: Mapping[str, Any], decides: Mapping[str, Any], ranges: Mapping[str, Any] | None) -> dict[str, Any]:
    """A point, but for its key. Args: row, the line of results.jsonl; decides, see `keys`; ranges, the entry of an adc_ranges.json
    of the ranges that were chosen for it."""
    of_one = None if record.predictions is None else record.predictions[None]
    predictions = of_one if record.chip_predictions is None else record.chip_predictions
    return {"decides": decides, "row": row, "is_float": record.is_float,
            "predictions": None if predictions is None or predictions.numel() > MOST else _packed(predictions),
            "numbers": record.numbers if record.numbers is None else record.numbers.tolist(), "ranges": ranges,
            "cost": record.cost and asdict(record.cost)}


def record_of(point: Mapping[str, Any], setting: Setting | None) -> Record:
    """The record of a setting's point. Raises: one of `DAMAGED` for what is none."""
    row = point["row"]
    of_chips = columns.value_of(row, "chip_accuracies")
    predictions = numbers = None
    if point["predictions"] is not None:
        predictions = _unpacked(point["predictions"], (1 if of_chips is None else len(of_chips), row["n_images"]))
    if point.get("numbers") is not None:
        numbers = torch.tensor(point["numbers"], dtype=torch.float64).view(row["n_images"], 2)
    return Record(setting=setting, predictions=predictions if predictions is None else predictions[0], numbers=numbers,
                  chip_predictions=None if of_chips is None else predictions, cost=point["cost"] and costs.restored(point["cost"]),
                  is_float=point.get("is_float", False), **columns.fields_of(row))


def _named(path: Path) -> dict[str, Any] | None:
    """The point in a file that has its name; None for what is none, as far as its row tells."""
    with contextlib.suppress(*DAMAGED):
        point = json.loads(path.read_bytes())
        if point["key"] == path.stem and columns.is_line(point["row"]) and is_number(point["took_s"]):
            return point
    return None


def _packed(predictions: torch.Tensor) -> dict[str, Any]:
    """Classes, int64 `[chips, N, ...]`, in few letters."""
    small = predictions.numpy().astype(np.min_scalar_type(int(predictions.max())).newbyteorder("<"))
    return {"type": small.dtype.str, "shape": list(small.shape), "zlib": base64.b64encode(zlib.compress(small.tobytes())).decode()}


def _unpacked(stored: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """Classes, int64 `[*shape, ...]`; no more is unpacked, whatever there is. Raises: one of `DAMAGED` for what is none."""
    kind, unpacker, found = np.dtype(stored["type"]), zlib.decompressobj(), stored["shape"]
    if kind.kind != "u" or found[:2] != list(shape) or min(found) < 0 or math.prod(found) > MOST:
        raise ValueError(f"predictions {found} of {kind}; unsigned numbers {list(shape)} are expected, at most {MOST}")
    shape = tuple(found)
    content = unpacker.decompress(base64.b64decode(stored["zlib"]), kind.itemsize * math.prod(shape) + 1)
    if not unpacker.eof:
        raise ValueError("the predictions break off, or go on")
    return torch.from_numpy(np.frombuffer(content, kind).reshape(shape).astype(np.int64))
