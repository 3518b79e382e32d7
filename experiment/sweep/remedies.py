"""`eval.py --remedy`: what wins back most of what a setting loses, for the least energy or area more.

Each remedy (`settings/remedies.py`) is a setting like any other: its points are kept, workers share them, and a run that was killed goes
on.
"""

import logging
import math
import statistics
from collections.abc import Callable, Sequence

from models.quant.measuring.measure import Record
from models.quant.measuring.metrics import chance_of_changes
from models.quant.measuring.setting import Setting

from ..program.cli import UserError
from ..report import remedy_report
from ..report.remedy_report import COSTS, Found, Tried
from ..settings.costs import figure
from ..settings.limits import Bound, bounds_of, example_of
from ..settings.remedies import Remedy, remedies_for
from . import retraining
from .bench import Bench
from .limits import bound_of_metric, write_rows


class Remedies:
    """The remedies of a network's settings that are beyond the bound.

    Args: bench, whose images measure; measure, what measures some settings with it; benches, of the evaluation, to which those of networks
        that are trained here come.
    Attributes: found, one for each such setting.
    """

    def __init__(self, bench: Bench, measure: Callable[[Sequence[Setting]], object], benches: list[Bench], log: logging.Logger) -> None:
        self.bench, self.of, self.measure, self.benches, self.log = bench, bench.settings, measure, benches, log
        self.bound = bound_for(bench)
        self.by = self.of.remedy_by or ("energy" if bench.costs.technology else "points")
        self.found: list[Found] = []

    def run(self) -> None:
        """Measure all of them, and write remedies.json, .csv and .png."""
        for setting in self.of.settings:
            record = self.bench.record(setting)
            if setting.without_cells:
                self.log.info(f"{setting}: has no cells, and no remedies")
                continue
            bound = self.bound.at(record.software_accuracy)
            if self.bound.holds(record.accuracy, record.software_accuracy):
                self.log.info(f"{setting}: {record.metric.said(record.accuracy)} keeps {record.metric.said(bound)}, and needs no remedy")
                continue
            self.found.append(self._of(setting, Found(record, bound)))
        path = self.bench.folder / "remedies"
        for suffix in (".csv", ".json", ".png"):  # those of an earlier command are not of these settings
            path.with_suffix(suffix).unlink(missing_ok=True)
        if self.found:
            write_rows(path, [row for found in self.found for row in remedy_report.rows(found)])
            remedy_report.plot(path.with_suffix(".png"), self.found, self.by, f"{self.of.resume or self.of.model}: {self.bench.looked_at}")
            self.log.info(f"remedies: {path}.csv, {path}.json, {path}.png")

    def __str__(self) -> str:
        return "\n\n".join(remedy_report.table(found) for found in self.found)

    def _of(self, setting: Setting, found: Found) -> Found:
        alone = self._possible(setting, remedies_for(setting), found.left_out)
        self.measure([*alone.values()])
        tried = {remedy: self._tried(found, remedy.name, self.bench.record(each)) for remedy, each in alone.items()}
        best = sorted((remedy for remedy, each in tried.items() if each.clear), key=lambda remedy: -tried[remedy].won)
        if second := next((remedy for remedy in best[1:] if remedy.kind != best[0].kind), None):
            for both, each in self._possible(setting, [best[0] + second], found.left_out).items():
                self.measure([each])
                tried[both] = self._tried(found, both.name, self.bench.record(each))
        found.tried = [*tried.values()]
        if self.of.remedy_epochs:
            name = retraining.name_of(self.of.remedy_epochs)
            try:
                trained = retraining.trained_bench(self.bench, setting, self.log)
                self.benches.append(trained)
                trained.load(self.log)
                trained.measure(setting, wait=True, progress=True)
                found.tried.append(self._tried(found, name, trained.record(setting)))
            except UserError as error:
                found.left_out[name] = str(error)
        found.sort(self.by)
        return found

    def _possible(self, setting: Setting, remedies: Sequence[Remedy], left_out: dict[str, str]) -> dict[Remedy, Setting]:
        """The settings of those that can be."""
        made: dict[Remedy, Setting] = {}
        for remedy in remedies:
            try:
                each = remedy.of(setting)
                self.bench.check([each])
                if each not in made.values():
                    made[remedy] = each
            except (ValueError, UserError) as error:
                left_out[remedy.name] = str(error)
        return made

    def _tried(self, found: Found, name: str, record: Record) -> Tried:
        sign = 1 if record.metric.higher else -1
        more = {by: figure(record.cost, column).typical - figure(found.record.cost, column).typical
                for by, (column, _) in COSTS.items() if record.cost and found.record.cost}
        return Tried(name, record, sign * (record.accuracy - found.record.accuracy) + 0.0, self._error(found.record, record), more,
                     reaches=self.bound.holds(record.accuracy, found.record.software_accuracy))

    def _error(self, before: Record, after: Record) -> float | None:
        """The standard error of their difference: over chips of the same seeds; of one chip or ideal cells over examples, of a class each
        at most the root of those that changed; None for a metric that says nothing of one."""
        chips = [a - b for a, b in zip(after.chip_accuracies or (), before.chip_accuracies or ())]
        if len(chips) > 1:
            one = 100 / after.examples if after.metric.unit == "%" else 0.0  # example: chips that agree may do so by chance
            return max(statistics.stdev(chips), one) / math.sqrt(len(chips))
        if before.numbers is not None and after.numbers is not None:
            return self.bench.metric.chance(after.numbers, before.numbers)
        if before.predictions is None or after.predictions is None:
            return None
        return chance_of_changes((before.predictions != after.predictions).sum().item(), len(before.predictions))


def bound_for(bench: Bench) -> Bound:
    """The one bound that settings should keep. Raises: UserError."""
    metric, bounds = bench.metric.scale, bounds_of(bench.settings)
    if len(bounds) != 1:
        raise UserError(f"--remedy needs one bound, and {len(bounds)} are given: {example_of(metric)}")
    return bound_of_metric(*bounds[0], bench.metric)
