"""`eval.py --search N`: of all combinations of the flags' values, N that Optuna proposes, each by what is known of those before it.

Proposals are made in the driver alone, `TOGETHER` at a time, and from a seed: the same search measures the same settings, however
many workers it has. So nothing of it needs to be kept: a search that was killed asks the same questions again, and the points
answer at once.
"""

import importlib.util
import logging
import statistics
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import quant
from models.quant.measuring.metrics import Metric, OfTorchmetrics, Scale, accuracy
from models.quant.measuring.setting import Setting, fits
from models.quant.storage.files import write_text

from ..inputs.foreign import is_language_model
from ..measure.columns import named, value_of
from ..measure.results import csv_text
from ..program.cli import UserError, needed
from ..program.user_code import is_file
from ..report.drawing import add_title, new_figure, save
from ..settings import per_layer
from ..settings.chips import devices_of
from ..settings.eval_flags import EvalSettings
from ..settings.eval_settings import all_settings
from ..settings.limits import Bound, bounds_of, check_range
from .bench import Bench

TOGETHER = 8  # settings that are proposed at a time, whatever the number of workers
ASKED = 10  # proposals for each setting, most of which are new
KNOWN = 10  # results that Optuna has before it proposes anything: until then what it is not given is drawn at random


@dataclass(frozen=True)
class Objective:
    """Something to be best at. Attributes: column, of results.jsonl; sign, 1 where more is better, else -1; axis, its name and unit;
    needs, what it takes, such as a flag; share, it is a number of images, and their share in percent is what is compared, between sets of
    different size too; upright, pictures have it on their vertical axis."""

    column: str
    sign: int
    axis: str
    needs: str = ""
    share: bool = False
    upright: bool = False

    def of(self, row: Mapping[str, Any]) -> float | None:
        """Its value in a line of results.jsonl; None where it has none."""
        value = row.get(self.column)
        return 100 * value / row["n_images"] if self.share and value is not None else value


OBJECTIVES = {
    "changed": Objective("changed_predictions", -1, "predictions that differ from the software's (%)", share=True, upright=True),
    "bits": Objective("mean_bits", -1, "mean ADC bits of all reads"),
    "conversions": Objective("conversions", -1, "share of the reads that are converted"),
    "energy": Objective("energy_uJ", -1, "energy of an example (uJ)", "--cost"),
    "latency": Objective("latency_us", -1, "latency of an example (us)", "--cost"),
    "area": Objective("area_mm2", -1, "area (mm2)", "--cost"),
}


def objectives_for(metric: Metric | OfTorchmetrics) -> dict[str, Objective]:
    """What a search may be for where this metric is measured: itself, and `OBJECTIVES`, of which changes are of classes."""
    scale, others = metric.scale, {name: each for name, each in OBJECTIVES.items() if name != "changed" or metric.predict}
    return {scale.name: Objective(scale.name, 1 if scale.higher else -1, scale.axis, upright=True)} | others


class Space:
    """All combinations of the values of flags, and of single layers.

    Attributes: variables, `{name: values}`; a flag, or "layer flag". own_bits: those that are the ADC bits of a layer.
    Raises: UserError where a pattern fits no layer.
    """

    def __init__(self, settings: EvalSettings, layers: Sequence[str]) -> None:
        self.settings = settings
        self.rows = {name: values for name, values in settings.hardware.items() if name != "per_layer"}
        self.devices = devices_of(self.rows)
        self.variables = {name: values for name, values in self.rows.items() if len(values) > 1}
        self.fixed: dict[str, dict[str, Any]] = {}  # by pattern, values of flags; of several that fit a layer the later ones win
        for pattern, changes in per_layer.parse(settings.hardware.get("per_layer", ())).items():
            fitting = [name for name in layers if fits(name, pattern)]
            if not fitting:
                raise UserError(f"--per_layer {pattern}: no layer on crossbars is called so; there are {', '.join(layers)}")
            for field, values in changes.items():
                own = [f"{name} {field}" for name in fitting]
                if len(values) == 1:
                    self.fixed.setdefault(pattern, {})[field] = values[0]
                    self.variables = {name: values for name, values in self.variables.items() if name not in own}
                else:
                    self.variables |= dict.fromkeys(own, values)
        self.own_bits = [name for name in self.variables if name.endswith(" adc_bits")]

    def alike(self, share: float) -> dict[str, Any]:
        """The values of all variables that stand in the same place of theirs, 0 the first, 1 the last."""
        return {name: values[round(share * (len(values) - 1))] for name, values in self.variables.items()}

    def planned(self, chosen: Mapping[str, Any]) -> Setting | None:
        """The setting whose plan shares the bits that layers have in `chosen` among them, in the mean the same; None where there are
        no such layers, or no such plan."""
        if not self.own_bits:
            return None
        bits = round(statistics.fmean(chosen[name] for name in self.own_bits), 2)
        try:
            setting = self.setting({name: value for name, value in chosen.items() if name not in self.own_bits}
                                   | {"adc_bits": bits})
        except UserError:
            return None
        return setting if setting.spec.planned and setting.calibration.share == "network" else None

    def setting(self, chosen: Mapping[str, Any]) -> Setting:
        """The setting of one value for each variable. Raises: UserError for hardware that cannot be."""
        rows = {name: [chosen.get(name, values[0])] for name, values in self.rows.items()}
        own: dict[str, dict[str, Any]] = {}
        for name, value in chosen.items():
            layer, _, flag = name.rpartition(" ")
            if layer:
                own.setdefault(layer, {})[flag] = value
        layers = {pattern: values for pattern, values in self.fixed.items() if pattern not in own}
        for layer, values in own.items():  # behind the patterns, of which the later ones win
            fixed = [known for pattern, known in self.fixed.items() if fits(layer, pattern)] if layer in self.fixed else []
            layers[layer] = dict(ChainMap(values, *reversed(fixed)))
        texts = [f"{pattern}:" + ",".join(f"{flag}={value}" for flag, value in values.items()) for pattern, values in layers.items()]
        of = self.settings
        [found] = all_settings(rows | {"per_layer": texts}, of.w_bits, of.a_bits, calibration=of.calibration, of_chips=of.of_chips,
                               known=self.devices)
        return found


class Search:
    """The search for the best settings of one network.

    Args: bench, whose images choose: the validation images.
    Attributes: found, `{setting: {objective: value}}`; front, the settings that no other one is better than in everything, of those
        within the bounds.
    Raises: UserError for values, objectives and bounds that cannot be.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.of = bench, bench.settings
        self.space = Space(self.of, [name for name, _ in quant.crossbar_layers(bench.net)])
        self.known = objectives_for(bench.metric)
        self.objectives, self.bounds = aims(self.of, bench.metric)
        self.names = list(dict.fromkeys([*self.objectives, *(bound.name for bound in self.bounds)]))
        self.found: dict[Setting, dict[str, float]] = {}
        self.front: list[Setting] = []
        self.refused: UserError | None = None  # the last of the reasons why combinations cannot be

    def run(self, measure: Callable[[Sequence[Setting]], object], log: logging.Logger) -> None:
        """Measure N settings. Args: measure, what measures some with the bench."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=self.of.search_seed, n_startup_trials=KNOWN, multivariate=True)
        study = optuna.create_study(directions=["maximize" if self.known[name].sign > 0 else "minimize" for name in self.objectives],
                                    sampler=sampler)
        starts = [self.space.alike(share) for share in (1, 0, 0.5, 0.75, 0.25)]
        plans = [*dict.fromkeys(setting for start in starts if (setting := self.space.planned(start)) and self._can_be(setting))]
        first, proposed = len(plans) + KNOWN - 1 + TOGETHER, 0
        if self.of.search <= first:
            log.info(f"search: the first settings, up to {first}, are fixed ones and some at random; those behind them are proposed from "
                     f"what is known, of --search {self.of.search} perhaps none")
        self._measure(plans[:self.of.search], measure)
        starts += [self._as_planned(start, bits) for start in starts if (bits := self._planned_bits(self.space.planned(start)))]
        for start in starts:
            study.enqueue_trial({name: self.space.variables[name].index(value) if _ordered(self.space.variables[name]) else value
                                 for name, value in start.items()})
        asked = 0
        while len(self.found) < self.of.search and asked < ASKED * self.of.search:
            knows = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])) >= KNOWN
            trials = [study.ask() for _ in range(min(TOGETHER, self.of.search - len(self.found)))]
            asked += len(trials)
            settings = [self._setting(trial) for trial in trials]
            new = list(dict.fromkeys(setting for setting in settings if setting and setting not in self.found))
            if new:
                self._measure(new, measure)
                proposed += len(new) if knows else 0
                log.info(f"search: {len(self.found)} of {self.of.search} settings, {proposed} of them proposed from what is known")
            for trial, setting in zip(trials, settings):
                if setting is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                values = self.found[setting]
                for bound in self.bounds:
                    trial.set_constraint(f"{bound.name} {bound.sign}", self._beyond(bound, values))
                study.tell(trial, [values[name] for name in self.objectives])
        if not self.found:
            raise UserError(f"--search: none of these combinations is possible hardware: {self.refused}")
        self.front = self._front()
        if not self.front:
            best = self._nearest()
            raise UserError(f"--search: none of {len(self.found)} settings is within the bounds; nearest is {best}: "
                            + ", ".join(f"{name} {value:.4g}" for name, value in self.found[best].items()))

    def _measure(self, settings: Sequence[Setting], measure: Callable[[Sequence[Setting]], object]) -> None:
        if settings:
            measure(settings)
            self.found |= {setting: self._values(setting) for setting in settings}

    def _planned_bits(self, setting: Setting | None) -> dict[str, float] | None:
        """What a plan that was measured gives each layer. (Older points do not say it.)"""
        return self.bench.point(setting)["row"].get("layer_bits") if setting in self.found else None

    def _as_planned(self, start: Mapping[str, Any], bits: Mapping[str, float]) -> dict[str, Any]:
        """`start` with the values of the layers' bits that are nearest to these."""
        def nearest(name: str) -> Any:
            planned = bits.get(name.rpartition(" ")[0], start[name])  # a layer without an ADC has none
            return min(self.space.variables[name], key=lambda value: abs(value - planned))

        return {**start, **{name: nearest(name) for name in self.space.own_bits}}

    def _setting(self, trial: Any) -> Setting | None:
        """What a trial proposes: of numbers, which have an order, Optuna knows the place, of words the word."""
        chosen = {name: values[trial.suggest_int(name, 0, len(values) - 1)] if _ordered(values) else trial.suggest_categorical(name, values)
                  for name, values in self.space.variables.items()}
        try:
            setting = self.space.setting(chosen)
        except UserError as error:
            self.refused = error
            return None
        return setting if self._can_be(setting) else None

    def _can_be(self, setting: Setting) -> bool:
        """Whether the network can be on a setting."""
        try:
            self.bench.check([setting])
        except UserError as error:
            self.refused = error
            return False
        return True

    def _values(self, setting: Setting) -> dict[str, float]:
        row = self.bench.point(setting)["row"]
        for name in self.names:
            if self.known[name].of(row) is None:
                raise UserError(f"--search: {setting} has no {name}, which needs {self.known[name].needs or 'settings with an ADC'}")
        return {name: self.known[name].of(row) for name in self.names}

    def _beyond(self, bound: Bound, values: Mapping[str, float]) -> float:
        """How far values are beyond a bound."""
        return bound.beyond(values[bound.name], value_of(self.bench.point(None)["row"], Scale().name))

    def _excess(self, setting: Setting) -> list[float]:
        """How far a setting is beyond each bound."""
        return [self._beyond(bound, self.found[setting]) for bound in self.bounds]

    def _nearest(self) -> Setting:
        """That which is least beyond its bounds, all of them together; to be far within one makes up for nothing."""
        return min(self.found, key=lambda setting: sum(max(0, excess) for excess in self._excess(setting)))

    def _front(self) -> list[Setting]:
        """Not dominated, and within the bounds; by the first objective, best first."""
        points = {setting: [self.known[name].sign * values[name] for name in self.objectives] for setting, values in self.found.items()
                  if all(excess <= 0 for excess in self._excess(setting))}
        best = [setting for setting, own in points.items()
                if not any(other != own and all(a >= b for a, b in zip(other, own)) for other in points.values())]
        return sorted(best, key=lambda setting: points[setting], reverse=True)

    # ---- what people look at ------------------------------------------------------------------------------------------

    def write(self, tested: Bench) -> list[Path]:
        """search.csv, search.png and, where plotly is installed, search.html. Args: tested, the bench that measured the front on the
        test images. Returns: their paths."""
        folder = tested.folder
        rows = [self._row(setting, tested) for setting in self.found]
        paths = [folder / "search.csv", folder / "search.png"]
        write_text(paths[0], csv_text([rows[0], *(row.values() for row in rows)]))
        x, y = self._axes_of()
        front = sorted((row for row in rows if row["front"]), key=lambda row: row[x])
        self._plot(paths[1], x, y, rows, front)
        if importlib.util.find_spec("plotly"):
            paths.append(folder / "search.html")
            self._page(paths[2], x, y, rows, front)
        return paths

    def _row(self, setting: Setting, tested: Bench) -> dict[str, Any]:
        point = tested.point(setting) if setting in self.front else None
        return {"setting": str(setting), **self.found[setting], "within_bounds": all(excess <= 0 for excess in self._excess(setting)),
                "front": setting in self.front,
                **{f"test_{name}": point and self.known[name].of(point["row"]) for name in self.names},
                f"test_{named('software_accuracy', self.bench.metric.scale.name)}": point and value_of(point["row"], "software_accuracy")}

    def _axes_of(self) -> tuple[str, str]:
        """What is on the horizontal and on the vertical axis: up is what the other pictures have there too, else the first objective."""
        up, *others = sorted(self.objectives, key=lambda name: not self.known[name].upright)
        across = (others or ["bits"])[0]
        return across if across in self.names else up, up

    @property
    def _title(self) -> str:
        return f"{self.of.resume or self.of.model}: {len(self.found)} settings"

    def _plot(self, path: Path, x: str, y: str, rows: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]]) -> None:
        figure = new_figure(7, 4.5)
        axes = figure.subplots()
        axes.plot([row[x] for row in rows], [row[y] for row in rows], "o", color="0.7", markersize=4, label="measured")
        axes.plot([row[x] for row in front], [row[y] for row in front], "o-", label=f"front, {self.bench.shown.kind}")
        axes.plot([row[f"test_{x}"] for row in front], [row[f"test_{y}"] for row in front], "x--", label="front, as measured at the end")
        axes.set(xlabel=self.known[x].axis, ylabel=self.known[y].axis)
        add_title(figure, self._title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
        save(figure, path, dpi=150)

    def _page(self, path: Path, x: str, y: str, rows: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]]) -> None:
        import plotly.graph_objects as go

        figure = go.Figure()
        for name, some, mode, prefix in (("measured", rows, "markers", ""), ("front", front, "lines+markers", ""),
                                         ("front, as measured at the end", front, "lines+markers", "test_")):
            text = ["<br>".join([row["setting"].replace(", ", "<br>"), *(f"{objective}: {row[prefix + objective]:.4g}"
                                                                        for objective in self.names)]) for row in some]
            figure.add_scatter(x=[row[prefix + x] for row in some], y=[row[prefix + y] for row in some], mode=mode, name=name, text=text,
                               hoverinfo="text")
        figure.update_layout(title=self._title, xaxis_title=self.known[x].axis, yaxis_title=self.known[y].axis)
        write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def check_search(settings: EvalSettings) -> None:
    """Refuse a search where Optuna cannot be imported, that has nothing to choose from, or whose objectives and bounds cannot be, where
    the metric is known before the network is. Raises: UserError."""
    if settings.search:
        own = [values for changes in per_layer.parse(settings.hardware.get("per_layer", ())).values() for values in changes.values()]
        if all(len(values) == 1 for values in (*own, *(values for name, values in settings.hardware.items() if name != "per_layer"))):
            raise UserError("--search chooses among the values of hardware flags: give one of them several, such as --adc_bits 3:8")
        needed("optuna", "--search needs Optuna: pip install -r requirements-search.txt")
        if importlib.util.find_spec("plotly"):  # which draws a page at the end
            needed("plotly.graph_objects", "")
        if not is_file(settings.model) and not is_language_model(settings.model):  # which have a metric of their own
            aims(settings, accuracy)


def validation_bench(bench: Bench) -> Bench:
    """The bench whose examples choose. Raises: UserError for objectives and bounds that cannot be."""
    aims(bench.settings, bench.metric)
    return Bench(replace(bench.settings, validation=True), bench.checkpoint, bench.facts["command"])


def _ordered(values: Sequence) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def aims(settings: EvalSettings, metric: Metric | OfTorchmetrics) -> tuple[list[str], list[Bound]]:
    """Objectives, and bounds. "accuracy" is whatever stands for it. Raises: UserError for what cannot be."""
    if metric.scale.name in OBJECTIVES:
        raise UserError(f"--search: the metric is called {metric.scale.name}, and so is another objective: give it another name")
    known = objectives_for(metric)
    objectives = list(dict.fromkeys(_objective(name, metric.scale, known) for name in settings.objective))
    bounds = [known_bound(text, bound, metric, known) for text, bound in bounds_of(settings)]
    for name in (*objectives, *(bound.name for bound in bounds)):
        if known[name].needs == "--cost" and not settings.cost:
            raise UserError(f"--search: there is no {name} without --cost: give a technology, or see --cost list")
    return objectives, bounds


def _objective(name: str, metric: Scale, known: Iterable[str]) -> str:
    name = metric.name if name == Scale().name else name
    if name not in known:
        raise UserError(f"--objective {name}: unknown, choose from {', '.join(known)}")
    return name


def known_bound(text: str, bound: Bound | None, metric: Metric | OfTorchmetrics, known: Iterable[str]) -> Bound:
    """A bound of something known; "accuracy" is whatever stands for it. Args: text, what says it. Raises: UserError for what cannot be."""
    own = metric.scale.name
    name = bound and (own if bound.name == Scale().name else bound.name)
    if name not in known:
        raise UserError(f"{text}: give NAME=VALUE with one of {', '.join(known)}; VALUE is a number, software, software-0.5 or "
                        "software*1.03")
    if bound.factor and name != own:
        raise UserError(f"{text}: the software has no {name} to compare with: give a number")
    if name == own:
        check_range(text, bound, metric)
    return replace(bound, name=name)
