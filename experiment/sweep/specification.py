"""`eval.py --specify`: the specification sheet of a network, the limits of quantities, each alone, and joint corners.

Each limit is one of `--largest` or `--smallest`. A corner is a setting with half of each limit. All of it is in points, so that a run that
was killed goes on.
"""

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting

from ..program.cli import UserError, user_error
from ..program.flags import arguments_of
from ..report import specification_report
from ..report.specification_report import CORNER, TIME
from ..settings import chips
from ..settings.chips import CHIP_FIELDS, devices_of
from ..settings.costs import figure
from ..settings.eval_flags import CALIBRATION
from ..settings.eval_settings import all_settings
from ..settings.limits import Bound, Span
from ..settings.specification import Quantity, bounds_for, quantities_for, weights_for
from .bench import Bench
from .limits import Case, Limit, bound_of_metric, write_rows
from .workers import Pool, WorkersDied

CHIPS = 4  # at most, unless --chips says how many
OF_RUN = (*CALIBRATION, "calib_images", *chips.OF_RUN, "limit", "validation")  # flags that decide a number, beside those of the hardware
NAME = "specification"  # of its files


class Asked(NamedTuple):
    """A loss that a network with some cells may have. Attributes: weights, of the cells; text, of the bound."""

    weights: str
    text: str
    bound: Bound


class Specification:
    """The sheet of one network.

    Args: bench; parts, its blocks of images; pool, which measures; measure, what measures some settings on all images.
    Attributes: rows, of its files; left_out, `{quantity: why}`.
    Raises: UserError for bounds and files that cannot be.
    """

    def __init__(self, bench: Bench, parts: Sequence[Bench], pool: Pool, measure: Callable[[Sequence[Setting]], object],
                 log: logging.Logger) -> None:
        self.path = bench.folder / NAME
        self.bench, self.of, self.parts, self.pool, self.measure, self.log = bench, bench.settings, parts, pool, measure, log
        self.base = {name: values for name, values in self.of.hardware.items() if name != "weights"}
        self.starts = starts_of(bench) if self.of.refine else {}
        self.chips = self.of.of_chips.get("chips", CHIPS)
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def run(self) -> None:
        """Find all limits, measure the corners, and write the files."""
        quantities, asked = quantities_for(self.of), asked_of(self.bench)
        found: dict[Quantity, dict[Asked, Limit]] = {}
        count, watched = len(quantities) * len(asked), sys.stderr.isatty()
        package = logging.getLogger("models")
        with tqdm(total=count, desc="limits", dynamic_ncols=True, leave=False, disable=not watched) as bar, contextlib.ExitStack() as after:
            after.callback(package.setLevel, package.level)
            package.setLevel(logging.WARNING)  # it has a line for each chip of some kinds
            for quantity in quantities:
                found[quantity] = {}
                for each in asked:
                    if limit := self._limit(quantity, each, found[quantity]):
                        found[quantity][each] = limit
                    bar.update()
        self.rows = [self._row(quantity.name, quantity.unit, each, self._flags(quantity, each, limit)) | limit.row()
                     for quantity, limits in found.items() for each, limit in limits.items()]
        if not self.rows:
            raise UserError(f"no line of a sheet can be made of this hardware; {': '.join(next(iter(self.left_out.items())))}")
        self._write()  # before the corners, which may be what cannot be
        self.rows += self._corners(asked, found)
        self._write()
        self._say()

    def _limit(self, quantity: Quantity, asked: Asked, before: Mapping[Asked, Limit]) -> Limit | None:
        """The limit of a quantity, looked for from where it was, or where that of another loss is; of times from the last one on, as most
        cells hold. None where it cannot be; `left_out` keeps why."""
        flags = self._beside(quantity, asked)
        case = Case(quantity.span, asked.bound, flags, _known(flags), (CHIPS, CHIPS))
        far = len(quantity.span.values) - 1 if quantity.unit == TIME else None
        near = next((limit.found.place for other, limit in before.items() if other.weights == asked.weights), far)
        start = self.starts.get((quantity.name, asked.weights, asked.text), near)
        try:
            case.check(self.bench)
            limit = Limit(case, self.parts, self.pool, None, start if start is None else max(start, 0), sides=self.of.refine)
        except WorkersDied:
            raise
        except UserError as error:
            self.left_out[f"{quantity.name}, {asked.weights}"] = str(error)
            return None
        self.log.info(f"{quantity.name}, {asked.weights}, {asked.text}: {limit.case.text(limit.found.place)}, from "
                      f"{limit.case.text(limit.found.sure)} to {limit.case.text(limit.found.lost)}")
        return limit

    def _beside(self, quantity: Quantity, asked: Asked) -> dict[str, list]:
        """The hardware beside a value of a quantity."""
        others = {name: values for name, values in self.base.items() if name != quantity.span.flag}
        return {**others, **quantity.flags, "weights": [asked.weights]}

    def _flags(self, quantity: Quantity, asked: Asked, limit: Limit) -> dict[str, list]:
        """What sets a limit by hand; where no value keeps the bound, the first, which does not."""
        return {**self._beside(quantity, asked), quantity.span.flag: [quantity.span.values[max(limit.found.place, 0)]]}

    def _row(self, name: str, unit: str, asked: Asked, flags: Mapping[str, list]) -> dict[str, Any]:
        [setting] = self._settings(flags)
        chosen = {**self.of.given, "chips": self.chips}
        of_run = [name for name in (*OF_RUN, "chips") if name in chosen and (setting.chips or name not in CHIP_FIELDS)]
        said = {**flags, **{name: chosen[name] for name in of_run}}
        return {"quantity": name, "unit": unit, "weights": asked.weights, "asked": asked.text,
                "by_hand": shlex.join(arguments_of(said)), "measured_on": self.bench.looked_at, "left_out": None}

    def _settings(self, flags: Mapping[str, list]) -> list[Setting]:
        """Those of some hardware, with the chips of a limit."""
        return all_settings(flags, self.of.w_bits, self.of.a_bits, calibration=self.of.calibration,
                            of_chips={**self.of.of_chips, "chips": self.chips}, known=_known(flags))

    def _corners(self, asked: Sequence[Asked], found: Mapping[Quantity, Mapping[Asked, Limit]]) -> list[dict[str, Any]]:
        """A row for each corner, of a loss for which there are limits."""
        there = {each for limits in found.values() for each in limits}
        flags = {each: {**self.base, "weights": [each.weights]} for each in asked if each in there}
        for quantity, limits in found.items():
            joint = quantity.joint and quantity.span.flag not in self.base
            joint = joint and all(self.base.get(name, values) == values for name, values in quantity.flags.items())
            for each, limit in limits.items():
                if joint:  # where no value keeps the bound, half of the first
                    flags[each] |= {**quantity.flags, quantity.span.flag: [quantity.span.values[max(limit.found.place, 0)] / 2]}
        settings = {each: self._settings(flags[each])[0] for each in flags}
        self.measure([*dict.fromkeys(settings.values())])
        empty = dict.fromkeys(self.rows[0])
        return [empty | self._row(CORNER, "", each, flags[each]) | corner_of(self.bench.record(setting), each.bound)
                for each, setting in settings.items()]

    def _write(self) -> None:
        """The files: the lines, and those that were left out."""
        rows = [*self.rows, *({"quantity": name, "left_out": why} for name, why in self.left_out.items())]
        keys = dict.fromkeys(key for each in rows for key in each)
        write_rows(self.path, [{**keys, **row} for row in rows])

    def _say(self) -> None:
        title = f"{self.of.resume or self.of.model}: {self.bench.looked_at}"
        specification_report.plot(self.path.with_suffix(".png"), self.rows, title)
        self.log.info("\n" + specification_report.table(json.loads(self.path.with_suffix(".json").read_text())))
        self.log.info(f"specification: {self.path}.csv, {self.path}.json, {self.path}.png")


def corner_of(record: Record, bound: Bound) -> dict[str, Any]:
    """What a row of a corner has beside its flags."""
    return {"metric": record.metric.name, "bound": bound.at(record.software_accuracy), "software": record.software_accuracy,
            "chips": len(record.chip_accuracies or (None,)), "images": record.n_images, "corner_value": record.accuracy,
            "corner_keeps": bound.holds(record.accuracy, record.software_accuracy),
            "corner_energy_uJ": figure(record.cost, "energy_uJ").typical if record.cost else None}


def _known(flags: Mapping[str, list]) -> Mapping[str, Any]:
    """Devices among which that of some flags has its name."""
    return devices_of({name: flags[name] for name in ("device",) if name in flags})


def asked_of(bench: Bench) -> list[Asked]:
    """All losses for all cells, those of the same cells one behind the other. Raises: UserError for bounds and hardware that cannot be."""
    of, scale, refused = bench.settings, bench.metric.scale, []
    for weights in weights_for(of):
        try:
            all_settings({**of.hardware, "weights": [weights]}, of.w_bits, of.a_bits, of_chips=of.of_chips)
        except UserError as error:
            refused.append(error)
    if len(refused) == len(weights_for(of)):
        raise refused[0]
    bounds = {text.partition(" ")[2]: bound_of_metric(text, bound, bench.metric) for text, bound in bounds_for(of, scale)}
    return [Asked(weights, *bound) for weights in weights_for(of) for bound in bounds.items()]


def starts_of(bench: Bench) -> dict[tuple[str, str, str], int]:
    """Where the limits of an earlier sheet are in the spans of this one: the last value that is not beyond. Raises: UserError where there
    is none."""
    path, spans = bench.folder / f"{NAME}.json", {each.name: each.span for each in quantities_for(bench.settings)}
    with user_error(lambda _: f"--refine goes on from a sheet, and {path} is none: run --specify first",
                    (OSError, ValueError, KeyError, TypeError)):
        rows = [row for row in json.loads(path.read_text()) if row["quantity"] in spans and row["value"] is not None]
        return {(row["quantity"], row["weights"], row["asked"]): _place(spans[row["quantity"]], row["value"]) for row in rows}


def _place(span: Span, value: float) -> int:
    sign = -1 if span.smallest else 1
    return max(sum(sign * each <= sign * value for each in span.values) - 1, 0)
