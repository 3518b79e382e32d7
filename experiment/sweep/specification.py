"""`eval.py --specify`: the specification sheet of a network, the limits of quantities, each alone, and joint corners.

Each limit is one of `--largest` or `--smallest`. A corner is a setting with half of each limit. All of it is in points, so that a run that
was killed goes on.
"""

import contextlib
import itertools
import json
import logging
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting

from ..program.cli import UserError, ended_by_signals, user_error
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
from .sequential import FEW, FIRST_CHIPS, Look
from .workers import Pool, WorkersDied
from .worklist import Worklist, show_seconds

CHIPS = 4  # at most, unless --chips says how many
OF_RUN = (*CALIBRATION, "calib_images", *chips.OF_RUN, "limit", "validation")  # flags that decide a number, beside those of the hardware
NAME = "specification"  # of its files
REST = "the rest"  # what a sheet that was interrupted lacks
TRIED = 3


class Asked(NamedTuple):
    """A loss that a network with some cells may have. Attributes: weights, of the cells; text, of the bound."""

    weights: str
    text: str
    bound: Bound


class Specification:
    """The sheet of one network.

    Args: bench; parts, its blocks of images; pool, which measures; measure, what measures some settings on all images.
    Attributes: rows, of its files; earlier, those of the sheet that is refined, as long as they are not; left_out, `{quantity: why}`.
    Raises: UserError for bounds and files that cannot be.
    """

    def __init__(self, bench: Bench, parts: Sequence[Bench], pool: Pool, measure: Callable[[Sequence[Setting]], object],
                 log: logging.Logger) -> None:
        self.path = bench.folder / NAME
        self.bench, self.of, self.parts, self.pool, self.measure, self.log = bench, bench.settings, parts, pool, measure, log
        self.base = {name: values for name, values in self.of.hardware.items() if name != "weights"}
        self.earlier = sheet_of(bench) if self.of.refine else {}
        self.chips = self.of.of_chips.get("chips", CHIPS)
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def run(self) -> None:
        """Find all limits, measure the corners, and write the files. What is known when it is interrupted is written and shown."""
        package = logging.getLogger("models")
        with contextlib.ExitStack() as after:
            after.callback(package.setLevel, package.level)
            package.setLevel(logging.WARNING)  # it has a line for each chip of some kinds
            after.enter_context(ended_by_signals())
            try:
                self._find()
            except BaseException:
                if self.rows:
                    with contextlib.suppress(OSError):  # such as a full disk, which is said
                        self._write()
                        self._say()
                raise
        self._say()

    def _find(self) -> None:
        cases, found = self._cases(), {}
        self.log.info(f"specification: limits to find: {len(cases)}; first some chips, to see how long that takes")
        clock = Clock(self.parts, self.pool, {each: (case, self._start(*each)) for each, case in cases.items()}, self.of.refine)
        self.log.info(f"specification: 0 of {len(cases)}{clock.left()}")
        for number, ((quantity, asked), case) in enumerate(cases.items(), 1):
            start = self._start(quantity, asked, found.setdefault(quantity, {}))
            with clock.finding((quantity, asked)), self._leaving_out(quantity, asked):
                if not any(other.weights == asked.weights for other in found[quantity]):
                    case.check(self.bench)  # a second, of large networks: here, where it is needed
                found[quantity][asked] = Limit(case, self.parts, self.pool, None, start, sides=self.of.refine)
            if limit := found[quantity].get(asked):
                self.rows.append(self._row(quantity.name, quantity.unit, asked, self._flags(quantity, asked, limit)) | limit.row())
                self.log.info(f"{quantity.name}, {asked.weights}, {asked.text}: {case.text(limit.found.place)}, from "
                              f"{case.text(limit.found.sure)} to {case.text(limit.found.lost)}; {number} of {len(cases)}{clock.left()}")
            self.earlier.pop((quantity.name, asked.weights, asked.text), None)
            self.left_out[REST] = f"interrupted after {number} of {len(cases)} limits; the same command goes on"
            if self.rows:
                self._write()
        if not self.rows:
            raise UserError(f"no line of a sheet can be made of this hardware; {': '.join(next(iter(self.left_out.items())))}")
        if not self.of.only:
            self.earlier.clear()
            self.rows += self._corners(asked_of(self.bench), found)
        del self.left_out[REST]
        self._write()

    def _cases(self) -> dict[tuple[Quantity, Asked], Case]:
        """What is looked for, where flags do not say already that it cannot be; `left_out` keeps why not."""
        found = {}
        for quantity, asked in itertools.product(quantities_for(self.of), asked_of(self.bench)):
            flags = self._beside(quantity, asked)
            case = Case(quantity.span, asked.bound, flags, _known(flags), (CHIPS, CHIPS))
            with self._leaving_out(quantity, asked):
                case.setting(self.bench, quantity.span.values[-1])
                found[quantity, asked] = case
        return found

    @contextlib.contextmanager
    def _leaving_out(self, quantity: Quantity, asked: Asked) -> Iterator[None]:
        """Within `with`, why a limit cannot be is kept in `left_out`."""
        try:
            yield
        except WorkersDied:
            raise
        except UserError as error:
            self.left_out[f"{quantity.name}, {asked.weights}"] = str(error)

    def _start(self, quantity: Quantity, asked: Asked, before: Mapping[Asked, Limit] = MappingProxyType({})) -> int | None:
        """Where a limit is looked for first: where it was, or where that of another loss is; of times at the last one, as most cells hold.
        None: in the middle. Args: before, limits of the quantity."""
        if row := self.earlier.get((quantity.name, asked.weights, asked.text)):
            return _place(quantity.span, row["value"])
        far = len(quantity.span.values) - 1 if quantity.unit == TIME else None
        return next((max(limit.found.place, 0) for other, limit in before.items() if other.weights == asked.weights), far)

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
        """The files: the lines, those of an earlier sheet that are not refined yet, and those that were left out."""
        rows = [*self.rows, *self.earlier.values(), *({"quantity": name, "left_out": why} for name, why in self.left_out.items())]
        keys = dict.fromkeys(key for each in rows for key in each)
        write_rows(self.path, [{**keys, **row} for row in rows])

    def _say(self) -> None:
        title = f"{self.of.resume or self.of.model}: {self.bench.looked_at}"
        rows = json.loads(self.path.with_suffix(".json").read_text())
        specification_report.plot(self.path.with_suffix(".png"), [row for row in rows if not row["left_out"]], title)
        self.log.info("\n" + specification_report.table(rows))
        self.log.info(f"specification: {self.path}.csv, {self.path}.json, {self.path}.png")


class Clock:
    """About how long the limits will take of which nothing is measured yet.

    A look passes its images on each of its chips, behind those that measure the correction. Few values all take a first look. Of many a
    bisection takes it at some (2 from a place where the limit may be), and a search to the sides at `FEW` more. Another loss of the same
    cells takes 1. The two values at the limit take all images. Seconds of a pass are those of some chips, seen before anything is looked
    for, as if they were `TRIED` limits, and those of all limits found since.

    Args: cases, limits by what they are of, and where each is looked for first (None: nowhere), see `LastKept`; sides, see there.
    """

    def __init__(self, parts: Sequence[Bench], pool: Pool, cases: Mapping[tuple[Quantity, Asked], tuple[Case, int | None]],
                 sides: bool = False) -> None:
        self.parts, self.pool = parts, pool
        self.passes: dict[tuple[Quantity, Asked], tuple[bool, int]] = {}  # of limits that are left: whether there are chips, how many
        self.took: dict[bool, tuple[float, int]] = {}  # seconds and passes, of ideal cells and of chips
        ends = [*itertools.accumulate(part.shown.batches.count for part in parts)]
        begun: dict[tuple[Quantity, str], bool] = {}
        for (quantity, asked), (case, start) in cases.items():
            values, another = case.span.values, (quantity, asked.weights) in begun
            few, middle = len(values) <= FEW, (len(values) - 1) // 2
            steps = len(values) if few else (math.ceil(math.log2(len(values) + 1)) if start is None else 2) + FEW * sides
            place = 0 if few or sides and start is None else middle if start is None else start
            chips = case.setting(parts[0], values[place]).one_by_one
            drawn, first = bool(chips[0].chips), Look(min(len(chips), FIRST_CHIPS), ends[0])
            if not another:
                begun[quantity, asked.weights] = parts[0].chip(chips[0]) is not None
            if begun[quantity, asked.weights]:
                continue
            seen, whole = self._passed(first), self._passed(Look(len(chips), ends[-1]))
            passes = (1 if another else steps) * seen + 2 * (whole - seen)
            with contextlib.suppress(UserError):  # which its search says
                if drawn not in self.took:
                    case.check(parts[0])
                    beside = case.setting(parts[0], values[place - 1]).one_by_one  # as the first of all has kernels to compile
                    some = [*chips, *beside][:first.chips + (len(chips) == 1)]
                    self.took[drawn] = TRIED * passes * self._of_a_pass(some), TRIED * passes
                self.passes[quantity, asked] = drawn, passes

    def _passed(self, look: Look) -> int:
        return look.chips * (look.images + self.parts[0].shown.calibration.count)

    def _of_a_pass(self, settings: Sequence[Setting]) -> float:
        """Seconds, of settings with one chip or none."""
        part = self.parts[0]
        self.pool.measure(Worklist(self.pool.benches, {part: [None, *settings]}).missing, lambda job: None)
        took = statistics.median_low(part.chip(setting)["took_s"] for setting in settings)
        return took / self._passed(Look(1, part.shown.batches.count)) / (self.pool.workers or 1)

    @contextlib.contextmanager
    def finding(self, limit: tuple[Quantity, Asked]) -> Iterator[None]:
        """Within `with`, this limit is looked for."""
        started = time.perf_counter()
        yield
        if limit in self.passes:
            drawn, passes = self.passes.pop(limit)
            seconds, before = self.took[drawn]
            self.took[drawn] = seconds + time.perf_counter() - started, before + passes

    def left(self) -> str:
        """How long the rest takes, as people say it; nothing where all was begun."""
        seconds = sum(passes * self.took[drawn][0] / self.took[drawn][1] for drawn, passes in self.passes.values())
        return f", about {show_seconds(seconds)} left" if self.passes else ""


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


def sheet_of(bench: Bench) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The limits of the sheet in the folder of a bench, by quantity, cells and loss. Raises: UserError where there is none."""
    path = bench.folder / f"{NAME}.json"
    with user_error(lambda _: f"--refine goes on from a sheet, and {path} is none: run --specify first",
                    (OSError, ValueError, KeyError, TypeError)):
        return {(row["quantity"], row["weights"], row["asked"]): row for row in json.loads(path.read_text()) if row["value"] is not None}


def _place(span: Span, value: float) -> int:
    sign = -1 if span.smallest else 1
    return max(sum(sign * each <= sign * value for each in span.values) - 1, 0)
