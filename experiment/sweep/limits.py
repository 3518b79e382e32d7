"""`eval.py --largest read_noise=0:20:0.1 --at_least accuracy=software-0.5`: the last value of a flag at which a network keeps a bound.

`sequential` says which chips and images tell. They are points of blocks of the images (`parts`), so that nothing is measured twice, and a
run that was killed goes on.
"""

import itertools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.quant import Device
from models.quant.devices.times import show_time
from models.quant.measuring.metrics import Scale
from models.quant.measuring.setting import Setting
from models.quant.storage.files import write_text

from ..measure.results import csv_text
from ..program.cli import UserError
from ..report.tables import in_common, note, text_table
from ..settings.chips import devices_of
from ..settings.eval_settings import all_settings
from ..settings.limits import Bound, Span, bounds_of, example_of, fields_of_hardware, spans_of
from ..start.images import word_of
from .bench import Bench
from .parts import numbers_of
from .search import known_bound
from .sequential import LastKept, Look, Seen, looks_of
from .workers import Pool
from .worklist import Worklist

ERROR = 0.05  # chance that an interval does not hold the limit
CHIPS = 10  # at most, unless --chips says how many
TRIED = 1000  # values of a span, at most, that are looked at before any work


@dataclass(frozen=True)
class Case:
    """A limit that is looked for. Attributes: flags, `{flag: [value]}` of the hardware beside that of the span; known, devices among which
    theirs have their names; most_chips, unless --chips says how many."""

    span: Span
    bound: Bound
    flags: Mapping[str, list]
    known: Mapping[str, Device] = field(default_factory=dict)
    most_chips: int = CHIPS

    def setting(self, bench: Bench, value: float, chips: int | None = None) -> Setting:
        """The setting of a value, with so many chips (None: as asked for) if it has any. Raises: UserError for what cannot be."""
        of = bench.settings
        of_chips = {"chips": self.most_chips, **of.of_chips, **({} if chips is None else {"chips": chips})}
        [found] = all_settings({**self.flags, self.span.flag: [value]}, of.w_bits, of.a_bits, calibration=of.calibration,
                               of_chips=of_chips, known=self.known)
        return found

    def check(self, bench: Bench) -> None:
        """Refuse what cannot be: at values all over the span, and in the network at both ends. Raises: UserError."""
        values = self.span.values
        first, *_, last = [self.setting(bench, value) for value in (values[0], *values[::-(-len(values) // TRIED)], values[-1])]
        if first == last and len(values) > 1:
            raise UserError(f"--{self.span.flag} makes no difference to {first}: leave its limit out")
        bench.check([first, last])

    def text(self, place: int) -> str:
        """The value in this place with its unit; "none" before the first one, "more" or "less" behind the last one."""
        flag, values = self.span.flag, self.span.values
        if not 0 <= place < len(values):
            return "none" if place < 0 else "less" if self.span.smallest else "more"
        value = values[place]
        return show_time(value) if flag == "device_time" else f"{value:g}{fields_of_hardware()[flag].metadata.get('unit', '')}"


def cases_of(bench: Bench) -> list[Case]:
    """What --largest and --smallest ask for, each for every combination of the other flags. Raises: UserError for what cannot be."""
    of = bench.settings
    bound = bound_of_metric(*bounds_of(of)[0], bench.metric.scale)
    layers = {name: of.hardware[name] for name in ("per_layer",) if name in of.hardware}
    others, known = {name: values for name, values in of.hardware.items() if name not in layers}, devices_of(of.hardware)
    each = [dict(zip(others, ([value] for value in values))) for values in itertools.product(*others.values())]
    cases = [Case(span, bound, flags | layers, known) for span in spans_of(of) for flags in each]
    for case in cases:
        case.check(bench)
    return cases


def bound_of_metric(text: str, bound: Bound | None, metric: Scale) -> Bound:
    """A bound of how much of the metric may be lost. Args: text, what says it. Raises: UserError for what cannot be."""
    bound = known_bound(text, bound, metric, [metric.name])
    if (bound.sign > 0) != metric.higher:
        raise UserError(f"{text}: {'more' if metric.higher else 'less'} is better: give a bound such as {example_of(metric)}")
    return bound


class Limit:
    """The limit of one case.

    Args: parts, the bench's blocks of images; pool, which measures; log, which is told of each look; start, sides, see `LastKept`.
    Attributes: software, its value of the metric; settings, the first and the last; drawn, whether it has chips; chips, the most; found,
        what the tests found; examples, what they are called.
    """

    def __init__(self, case: Case, parts: Sequence[Bench], pool: Pool, log: logging.Logger | None, start: int | None = None,
                 sides: bool = True) -> None:
        self.case, self.parts, self.pool, self.log = case, parts, pool, log
        self.metric, of, self.examples = parts[0].metric, parts[0].settings, word_of(parts[0].shown.kind)
        self.settings = [case.setting(parts[0], value) for value in (case.span.values[0], case.span.values[-1])]
        self.drawn = any(setting.chips for setting in self.settings)
        self.chips = of.of_chips.get("chips", case.most_chips) if self.drawn else 1
        self._measure({part: [None] for part in parts})
        self.baseline = numbers_of(parts, None)
        self.mean = self.baseline[:, 0].sum() / self.baseline[:, 1].sum()
        self.software = self.metric.value(self.mean)
        self.ends = [*itertools.accumulate(part.shown.batches.count for part in parts)]
        beside = abs(case.bound.at(self.software) - self.software)
        least = max(0.0, beside * (100 - beside)) if self.metric.scale.unit == "%" else 0.0
        of_all = parts[0].shown.of_all  # of which --limit takes a part
        self.found = LastKept(len(case.span.values), looks_of(self.ends, self.chips), of_all, ERROR, self._observe, self._holds, least,
                              self._say if log else lambda seen: None, start, sides).find()

    def _measure(self, settings: Mapping[Bench, Iterable[Setting | None]]) -> None:
        """Measure what is missing."""
        self.pool.measure(Worklist(self.pool.benches, settings).missing, lambda job: None)

    def _observe(self, place: int, look: Look) -> np.ndarray:
        """`e[c, i] = d / w - m (w_i / w - 1)`, what images lose on chips beside the software: d_ci the difference of their sums, w_i their
        weights, w the mean of these, and m of a chip the loss of the metric's mean, which is the mean of e."""
        setting = self.case.setting(self.parts[0], self.case.span.values[place], look.chips)
        parts = self.parts[:self.ends.index(look.images) + 1]
        self._measure({part: [setting] for part in parts})
        before, weights = self.baseline[:look.images].T
        lost = np.stack([numbers_of(parts, chip)[:, 0] for chip in setting.one_by_one]) - before
        return lost / weights.mean() - lost.sum(1, keepdims=True) / weights.sum() * (weights / weights.mean() - 1)

    def _value(self, loss: float) -> float:
        """The metric where its mean has this loss; NaN for a mean that none can have, such as a negative one of squares."""
        try:
            return self.metric.value(self.mean + loss)
        except (ValueError, ArithmeticError):
            return math.nan

    def _holds(self, loss: float) -> bool | None:
        value = self._value(loss)
        return None if math.isnan(value) else self.case.bound.holds(value, self.software)

    def _say(self, seen: Seen) -> None:
        look, scale = seen.look, self.metric.scale
        most = 100.0 if scale.unit == "%" else math.inf
        ends = " to ".join(scale.text(min(value, most)) for value in sorted((self._value(seen.low), self._value(seen.high))))
        by = f"{chips_text(look.chips * self.drawn)}, {look.images} {self.examples}"
        self.log.info(f"{self.case.span.flag} {self.case.text(seen.place)}: {scale.name} {ends}, {by}: "
                      f"{ {True: 'kept', False: 'not kept', None: 'undecided'}[seen.keeps]}")

    @property
    def share(self) -> float:
        """Images that were looked at, of those that a grid of all values would take with all chips and images."""
        return self.found.used / (len(self.case.span.values) * self.chips * self.ends[-1])

    def row(self) -> dict[str, Any]:
        """The answer as plain values: None where an end is open."""
        values, found = self.case.span.values, self.found

        def at(place: int) -> float | None:
            return values[place] if 0 <= place < len(values) else None

        return {"flag": self.case.span.flag, "kind": "smallest" if self.case.span.smallest else "largest",
                "setting": self.settings[0].text(without=self.case.span.flag), "metric": self.case.bound.name,
                "bound": self.case.bound.at(self.software), "software": self.software,
                "value": at(found.place), "kept_for_sure": at(found.sure), "lost_for_sure": at(found.lost), "chance_of_error": ERROR,
                "first": values[0], "last": values[-1], "values": len(values), "chips": self.chips,
                "images": self.ends[-1], "images_looked_at": found.used, "share_of_a_grid": self.share}

    def says_open(self) -> str | None:
        """A line where no value, or each, keeps the bound."""
        place, values, flag = self.found.place, self.case.span.values, self.case.span.flag
        if 0 <= place < len(values) - 1:
            return None
        span = f"{self.case.text(0)} to {self.case.text(len(values) - 1)}"
        return f"{flag}: {'every' if place >= 0 else 'no'} value from {span} keeps the bound"


def chips_text(count: int) -> str:
    """So many chips, or none."""
    return f"{count} chips" if count > 1 else "one chip" if count else "ideal cells"


def find_limits(bench: Bench, parts: Sequence[Bench], pool: Pool, log: logging.Logger) -> None:
    """Find all limits that are asked for, and write limits.csv and limits.json."""
    limits: list[Limit] = []
    for case in cases_of(bench):
        limits.append(Limit(case, parts, pool, log))
        write_rows(bench.folder / "limits", [limit.row() for limit in limits])
    log.info("\n" + limits_table(limits, bench.looked_at))
    log.info(f"limits: {bench.folder / 'limits.csv'}, {bench.folder / 'limits.json'}")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as path.csv and path.json."""
    write_text(path.with_suffix(".csv"), csv_text([rows[0], *(row.values() for row in rows)]))
    write_text(path.with_suffix(".json"), json.dumps(rows, indent=1))


def limits_table(limits: Sequence[Limit], images: str) -> str:
    """The answers, and what they mean. Args: images, how many of which, `Bench.looked_at`."""
    shared, names = in_common([limit.settings[0].text(without=limit.case.span.flag) for limit in limits])
    rows = [[f"{limit.row()['kind']} {limit.case.span.flag}" + (f", {name}" if len(limits) > 1 else ""),
             *map(limit.case.text, (limit.found.place, limit.found.sure, limit.found.lost)), chips_text(limit.chips * limit.drawn),
             f"{limit.share:.1%}"] for limit, name in zip(limits, names)]
    first, scale = limits[0], limits[0].metric.scale
    bound = f"{scale.name} at {'least' if first.case.bound.sign > 0 else 'most'} {scale.text(first.case.bound.at(first.software))}"
    lines = [f"bound: {bound}; software: {scale.text(first.software)}; {images}",
             f"kept at, not kept at: decided by tests; one of the two is wrong with a chance of {ERROR:.0%} at most. Between them the mean "
             f"of all chips and {first.examples} that were seen decides",
             f"of a grid: {first.examples} that were looked at, of those that all values would take",
             *filter(None, (limit.says_open() for limit in limits))]
    return "\n".join([*([note(f"all settings: {shared}")] if shared else []),
                      text_table(["limit", "value", "kept at", "not kept at", "of", "of a grid"], rows), *map(note, lines)])
