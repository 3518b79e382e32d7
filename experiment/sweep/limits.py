"""`eval.py --largest read_noise=0:20:0.1 --at_least accuracy=software-0.5`: the last value of a flag at which a network keeps a bound.

`sequential` says which values, chips and images tell. They are points of blocks of the images (`parts`), so that nothing is measured twice,
and a run that was killed goes on.
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
from models.quant.measuring.metrics import Metric, OfTorchmetrics
from models.quant.measuring.setting import Setting
from models.quant.storage.files import write_text

from ..measure.results import csv_text
from ..program.cli import UserError
from ..report.specification_report import unseen_text
from ..report.tables import in_common, note, text_table
from ..settings.chips import devices_of
from ..settings.eval_settings import all_settings
from ..settings.limits import Bound, Span, bounds_of, check_range, example_of, fields_of_hardware, spans_of
from ..start.images import word_of
from .bench import Bench
from .parts import numbers_of
from .search import known_bound
from .sequential import LastKept, Look, Seen
from .workers import Pool
from .worklist import Worklist

ERROR = 0.05  # chance that an interval does not hold the limit
CHIPS = 10, 36  # of a decision, and where chips differ, unless --chips says how many: 36 have one of a kind of a tenth with 97.7 %
TRIED = 1000  # values of a span, at most, that are looked at before any work


@dataclass(frozen=True)
class Case:
    """A limit that is looked for. Attributes: flags, `{flag: [value]}` of the hardware beside that of the span; known, devices among which
    theirs have their names; chips, of a decision and at most, unless --chips says how many."""

    span: Span
    bound: Bound
    flags: Mapping[str, list]
    known: Mapping[str, Device] = field(default_factory=dict)
    chips: tuple[int, int] = CHIPS

    def setting(self, bench: Bench, value: float, chips: int | None = None) -> Setting:
        """The setting of a value, with so many chips (None: as asked for) if it has any. Raises: UserError for what cannot be."""
        of = bench.settings
        of_chips = {"chips": self.chips[1], **of.of_chips, **({} if chips is None else {"chips": chips})}
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
    bound = bound_of_metric(*bounds_of(of)[0], bench.metric)
    layers = {name: of.hardware[name] for name in ("per_layer",) if name in of.hardware}
    others, known = {name: values for name, values in of.hardware.items() if name not in layers}, devices_of(of.hardware)
    each = [dict(zip(others, ([value] for value in values))) for values in itertools.product(*others.values())]
    cases = [Case(span, bound, flags | layers, known) for span in spans_of(of) for flags in each]
    for case in cases:
        case.check(bench)
    return cases


def bound_of_metric(text: str, bound: Bound | None, metric: Metric | OfTorchmetrics) -> Bound:
    """A bound of how much of the metric may be lost. Args: text, what says it. Raises: UserError for what cannot be."""
    scale = metric.scale
    bound = known_bound(text, bound, metric, [scale.name])
    if (bound.sign > 0) != scale.higher:
        raise UserError(f"{text}: {'more' if scale.higher else 'less'} is better: give a bound such as {example_of(scale)}")
    return bound


class Limit:
    """The limit of one case.

    Args: parts, the bench's blocks of images; pool, which measures; log, which is told of each look; start, sides, see `LastKept`.
    Attributes: software, its value of the metric; settings, the first and the last; drawn, whether it has chips; chips, of a decision and
        at most; worst, the metric on the worst chip that was seen, `{place: value}`; found, what the tests found; examples, what they are
        called.
    Raises: UserError for a bound that the metric cannot have.
    """

    def __init__(self, case: Case, parts: Sequence[Bench], pool: Pool, log: logging.Logger | None, start: int | None = None,
                 sides: bool = True) -> None:
        self.case, self.parts, self.pool, self.log = case, parts, pool, log
        self.metric, of, self.examples = parts[0].metric, parts[0].settings, word_of(parts[0].shown.kind)
        self.settings = [case.setting(parts[0], value) for value in (case.span.values[0], case.span.values[-1])]
        self.drawn = any(setting.chips for setting in self.settings)
        self.chips = ((of.of_chips["chips"],) * 2 if "chips" in of.of_chips else case.chips) if self.drawn else (1, 1)
        self._measure({part: [None] for part in parts})
        self.baseline = numbers_of(parts, None)
        self.mean = self.baseline[:, 0].sum() / self.baseline[:, 1].sum()
        self.software = self.metric.value(self.mean)
        check_range(f"a bound of {case.bound.at(self.software):.4g}", case.bound, self.metric, self.software)
        self.worst: dict[int, float] = {}
        self.ends = [*itertools.accumulate(part.shown.batches.count for part in parts)]
        beside = abs(case.bound.at(self.software) - self.software)
        least = max(0.0, beside * (100 - beside)) if self.metric.scale.unit == "%" else 0.0
        of_all = parts[0].shown.of_all  # of which --limit takes a part
        self.found = LastKept(len(case.span.values), self.ends, self.chips, of_all, ERROR, self._observe, self._holds, least,
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
        found = lost / weights.mean() - lost.sum(1, keepdims=True) / weights.sum() * (weights / weights.mean() - 1)
        self.worst[place] = self.metric.scale.worst([self._value(loss) for loss in found.mean(1)])
        return found

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
        values = sorted(self._value(seen.mean + side * seen.half) for side in (-1, 1))
        ends = " to ".join(scale.text(min(max(value, self.metric.range[0]), self.metric.range[1])) for value in values)
        worst = f", the worst {scale.text(self.worst[seen.place])}" if look.chips > 1 else ""
        by = f"{chips_text(look.chips * self.drawn)}{worst}, {look.images} {self.examples}"
        self.log.info(f"{self.case.span.flag} {self.case.text(seen.place)}: {scale.name} {ends}, {by}: "
                      f"{ {True: 'kept', False: 'not kept', None: 'undecided'}[seen.keeps]}")

    @property
    def share(self) -> float:
        """Images that were looked at, of those that a grid of all values would take with all chips and images."""
        return self.found.used / (len(self.case.span.values) * self.chips[1] * self.ends[-1])

    def row(self) -> dict[str, Any]:
        """The answer as plain values: None where an end is open."""
        values, found = self.case.span.values, self.found

        def at(place: int) -> float | None:
            return values[place] if 0 <= place < len(values) else None

        def texts(places: Sequence[int]) -> str | None:
            return ", ".join(map(self.case.text, places)) or None

        seen = found.seen.get(found.place)
        return {"flag": self.case.span.flag, "kind": "smallest" if self.case.span.smallest else "largest",
                "setting": self.settings[0].text(without=self.case.span.flag), "metric": self.case.bound.name,
                "bound": self.case.bound.at(self.software), "software": self.software,
                "value": at(found.place), "kept_for_sure": at(found.sure), "lost_for_sure": at(found.lost), "chance_of_error": ERROR,
                "undecided": texts(found.undecided), "not_in_order": texts(found.not_in_order),
                "mean": seen and self._value(seen.mean), "worst_chip": seen and self.worst[found.place] if found.unseen else None,
                "unseen_share": found.unseen, "first": values[0], "last": values[-1], "values": len(values),
                "values_looked_at": len(found.seen), "chips": self.chips[1], "images": self.ends[-1], "images_looked_at": found.used,
                "share_of_a_grid": self.share}

    def says(self) -> list[str]:
        """What a line of the table does not say."""
        row, text, count, found = self.row(), self.case.text, len(self.case.span.values), []
        if row["not_in_order"]:
            found.append(f"not in order: {text(self.found.place)} keeps the bound, and {row['not_in_order']} not")
        elif not 0 <= self.found.place < count - 1:
            looked = "value" if row["values_looked_at"] == count else "value that was looked at"
            found.append(f"{'every' if self.found.place >= 0 else 'no'} {looked} from {text(0)} to {text(count - 1)} keeps the bound")
        if row["undecided"]:
            found.append(f"undecided: {row['undecided']}")
        if row["values_looked_at"] < count:
            found.append(f"{row['values_looked_at']} of {count} values were looked at")
        return found


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
    first, scale = limits[0], limits[0].metric.scale
    names = [f"{limit.row()['kind']} {limit.case.span.flag}" + (f", {name}" if len(limits) > 1 else "")
             for limit, name in zip(limits, names)]
    rows = [[name, *map(limit.case.text, (limit.found.place, limit.found.sure, limit.found.lost)),
             *("" if value is None else scale.text(value) for value in (limit.row()["mean"], limit.row()["worst_chip"])),
             chips_text(limit.chips[1] * limit.drawn), f"{limit.share:.1%}"] for limit, name in zip(limits, names)]
    bound = f"{scale.name} at {'least' if first.case.bound.sign > 0 else 'most'} {scale.text(first.case.bound.at(first.software))}"
    lines = [f"bound: {bound}; software: {scale.text(first.software)}; {images}",
             f"value: the last one at which the mean of all chips and {first.examples} that were seen keeps the bound; mean, worst chip: "
             "there",
             "kept at, not kept at: the last value that tests decided to keep it, and the first one that they decided not to; one of the "
             f"two is wrong with a chance of {ERROR:.0%} at most",
             *dict.fromkeys(unseen_text(limit.found.unseen) for limit in limits if limit.found.unseen),
             f"of a grid: {first.examples} that were looked at, of those that all values would take",
             *(f"{name}: {line}" for name, limit in zip(names, limits) for line in limit.says())]
    return "\n".join([*([note(f"all settings: {shared}")] if shared else []),
                      text_table(["limit", "value", "kept at", "not kept at", "mean", "worst chip", "of", "of a grid"], rows),
                      *map(note, lines)])
