"""What `eval.py --remedy` shows and writes: for each setting a table, lines of the files, and a panel of the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.quant.measuring.measure import Record

from ..measure.columns import rounded
from ..settings.costs import figure
from .drawing import add_title, colormap, new_figure, save, wrapped
from .tables import note, text_table

COSTS = {"energy": ("energy_uJ", "uJ"), "area": ("area_mm2", "mm2")}  # their columns in results, and their units
UNSURE = 0.025  # chance that a remedy which wins nothing clearly wins


@dataclass(frozen=True)
class Tried:
    """A remedy beside its setting. Attributes: name; record, of the remedied network; won, points nearer to the bound than the setting;
    error, the standard error of that, over chips where there are several, else over examples; None where there is none; more,
    `{"energy": uJ of an example, "area": mm2}` that it costs more, by typical sources, empty without costs; reaches, whether it keeps the
    bound."""

    name: str
    record: Record
    won: float
    error: float | None
    more: Mapping[str, float]
    reaches: bool

    @property
    def clear(self) -> bool:
        """Whether it wins more than chance alone gives: Student's t of chips, or the normal distribution of examples. It does not where the
        metric says nothing of chance."""
        from scipy import special

        chips = len(self.record.chip_accuracies or ())
        errors = float(-special.stdtrit(chips - 1, UNSURE) if chips > 1 else -special.ndtri(UNSURE))
        return self.error is not None and self.won > errors * self.error

    def worth(self, by: str) -> float:
        """Points won for each unit more, infinite for what costs nothing; points alone where nothing is won, and without costs."""
        price = self.more.get(by)
        return self.won if price is None or self.won <= 0 else math.inf if price <= 0 else self.won / price


@dataclass
class Found:
    """The remedies of one setting. Attributes: record, of the setting; bound, the number that it should keep; tried, the best first;
    left_out, `{remedy: why}`."""

    record: Record
    bound: float
    tried: list[Tried] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def sort(self, by: str) -> None:
        """First what clearly wins, and of that what costs nothing; then by points for each unit more."""
        self.tried.sort(key=lambda each: (each.clear, each.worth(by), each.won), reverse=True)


def table(found: Found) -> str:
    """A line for the setting, and one for each remedy."""
    record, metric = found.record, found.record.metric
    costs = [by for by in COSTS if record.cost]
    header = ["remedy", metric.head, "won", "kept", *(head for by in costs for head in (f"{by} {COSTS[by][1]}", f"won/{COSTS[by][1]}"))]
    lines = [["as it is", metric.text(record.accuracy), "", "no", *(text for by in costs for text in (_cost(record, by), ""))]]
    for i, each in enumerate(found.tried, 1):
        won = metric.text(each.won, "+") + (f" ± {metric.text(each.error)}" if each.error is not None else "")
        lines.append([f"{i} {each.name}", metric.text(each.record.accuracy), won, "yes" if each.reaches else "no",
                      *(text for by in costs for text in (_cost(each.record, by), _worth(each, by)))])
    head = (f"remedies of {record}: {metric.said(record.accuracy)}, software {metric.said(record.software_accuracy)}, asked for "
            f"{metric.said(found.bound)}")
    notes = [f"left out: {'; '.join(f'{name} ({why})' for name, why in found.left_out.items())}"] if found.left_out else []
    if any(each.error is not None for each in found.tried):
        notes.append("±: standard error, over chips, or where there is one, over examples; a win that chance gives too, with more than "
                     f"{UNSURE:.1%}, is not clear, and stands behind the others")
    notes += ["costs, of an example, by typical sources; free: costs no more than the setting"] if costs else []
    return "\n".join([note(head), text_table(header, lines), *map(note, notes)])


def _cost(record: Record, by: str) -> str:
    return rounded(figure(record.cost, COSTS[by][0]).typical) if record.cost else ""


def _worth(tried: Tried, by: str) -> str:
    if not tried.clear:
        return "not clear" if tried.won > 0 else ""
    return "free" if math.isinf(worth := tried.worth(by)) else f"{worth:.3g}"


def rows(found: Found) -> list[dict[str, Any]]:
    """The lines of the files: the setting, its remedies, and those that were left out."""
    empty = _row(found, None)
    left_out = [{**dict.fromkeys(empty), "of": empty["of"], "remedy": name, "left_out": why} for name, why in found.left_out.items()]
    return [empty, *(_row(found, each) for each in found.tried), *left_out]


def _row(found: Found, tried: Tried | None) -> dict[str, Any]:
    """One of them; None: that of the setting."""
    record = tried.record if tried else found.record
    costs = {column: figure(record.cost, column).typical if record.cost else None for column, _ in COSTS.values()}
    more = {f"more_{column}": tried.more.get(by) if tried else None for by, (column, _) in COSTS.items()}
    return {"of": str(found.record), "remedy": tried and tried.name, "setting": str(record.setting), record.metric.name: record.accuracy,
            "software": found.record.software_accuracy, "bound": found.bound, "won": tried and tried.won,
            "won_standard_error": tried and tried.error, "clear": tried and tried.clear, **costs, **more,
            "kept": bool(tried and tried.reaches), "left_out": None}


def plot(path: Path, found: Sequence[Found], by: str, title: str) -> None:
    """Points won over what they cost more, a panel for each setting; without costs in their order."""
    colors = colormap("tab20").colors
    figure_ = new_figure(7.5, 4.2 * len(found))
    for each, axes in zip(found, figure_.subplots(len(found), squeeze=False)[:, 0]):
        priced = by in COSTS and all(by in tried.more for tried in each.tried)
        for i, tried in enumerate(each.tried):
            x = tried.more[by] if priced else i + 1
            axes.errorbar([x], [tried.won], yerr=tried.error, marker="o" if tried.clear else "x", linestyle="", capsize=2,
                          color=colors[i % 20], label=f"{i + 1} {tried.name}")
            axes.annotate(str(i + 1), (x, tried.won), (4, 4), textcoords="offset points", fontsize="x-small")
        axes.axhline(abs(each.bound - each.record.accuracy), color="black", linestyle="--", linewidth=1, label="asked for")
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(xlabel=f"{by} more ({COSTS[by][1]})" if priced else "remedy", ylabel=f"won, {each.record.metric.axis}")
        axes.set_title(wrapped(str(each.record), 6), fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), title="x: no clear win", title_fontsize="x-small")
    add_title(figure_, title)
    save(figure_, path, dpi=150)
