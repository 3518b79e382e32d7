"""What `eval.py --specify` shows: the sheet as a table, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..settings.specification import GATE, ON_OFF
from .drawing import add_title, colormap, new_figure, save
from .tables import note, text_table

CORNER = "corner"  # the quantity of the rows that are no limits
TIME = "time"  # the unit of times, in seconds
UNITS = (("y", 365 * 86400.0), ("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
COUNTS = ("bits", "rows")
PANELS = {"time (s)": (TIME,), "bits, rows": COUNTS}  # of the picture: axis, and units; the first panel has all others
FIRST_PANEL = "value, in the unit of its name"
LEFT, RIGHT = 8, 9  # Matplotlib's arrows that begin at a point (CARETLEFTBASE, CARETRIGHTBASE)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The sheet as texts: a header, and a line for each quantity, a column for each kind of cells and loss."""
    rows = [row for row in rows if not row["left_out"]]
    columns = dict.fromkeys((row["weights"], row["asked"]) for row in rows)
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        lines.setdefault(_name(row), {})[row["weights"], row["asked"]] = _cell(row)
        if row.get("corner_energy_uJ") is not None:
            lines.setdefault("energy there, uJ", {})[row["weights"], row["asked"]] = f"{row['corner_energy_uJ']:.3g}"
    header = ["limit", *(f"{weights}, {text.partition('=')[2].removeprefix('software')}" for weights, text in columns)]
    return [header, *([name, *(found.get(each, "") for each in columns)] for name, found in lines.items())]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sheet, and what it means."""
    header, *lines = cells(rows)
    return "\n".join([text_table(header, lines), *map(note, notes(rows))])


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the sheet means."""
    there = [row for row in rows if not row["left_out"]]
    first, quantities = there[0], {row["quantity"] for row in there}
    chips = max(row["chips"] for row in there)
    found = [f"{first['measured_on']}; software: {first['metric']} {first['software']:.4g}; at the most {chips} chips"]
    if quantities != {CORNER}:
        found.append("a (b, c): a by the mean of all that was measured; decided by tests are b, which keeps the bound, and c, which does "
                     f"not. Of each limit one of these two is wrong with a chance of {first['chance_of_error']:.0%} at most")
        found += [unseen_text(max(shares))] if (shares := [row["unseen_share"] for row in there if row.get("unseen_share")]) else []
        found += [f"{_name(row)}, {row['weights']}, {row['asked']}: not in order: {row['not_in_order']} not kept" for row in there
                  if row.get("not_in_order")]
    if GATE in quantities:
        found.append(f"{GATE}: by a curve that is fitted to the ladder; --report with the flags of by_hand says how far it is off")
    if ON_OFF in quantities:
        found.append(f"{ON_OFF}: of a digital reference. An analog one and pairs take the off-current out: there ideal cells have no limit")
    if CORNER in quantities:
        found.append(f"{CORNER}: the {first['metric']} where each limit of cells, reads and ADCs is halved, all together; where no value "
                     "keeps the bound, half of the first one")
    return found + [f"left out: {row['quantity']}: {row['left_out']}" for row in rows if row["left_out"]]


def unseen_text(share: float) -> str:
    """Of which chips a limit holds. Args: share, of a kind of chip, of all of them."""
    return f"what is decided holds for kinds of chips that are at least {share:.0%} of all; of a rarer kind none may have been seen"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['quantity']}, {row['unit']}" if row["unit"] not in ("", TIME, *COUNTS) else row["quantity"]


def _cell(row: Mapping[str, Any]) -> str:
    """A limit with its interval; of a corner what the metric is there."""
    if row["quantity"] == CORNER:
        return f"{row['corner_value']:.4g} ({'kept' if row['corner_keeps'] else 'not kept'})"
    show = _time if row["unit"] == TIME else _number
    sign, other = ("<", "≥") if row["kind"] == "largest" else (">", "≤")
    if row["value"] is None:
        return f"{sign} {show(row['first'])}"
    if row["value"] == row["last"]:
        return f"{other} {show(row['last'])}"
    ends = (show(row[key]) if row[key] is not None else "…" for key in ("kept_for_sure", "lost_for_sure"))
    return f"{show(row['value'])} ({', '.join(ends)})"


def _number(value: float) -> str:
    """With three digits, or all before the point, or two of small ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{3 if value >= 1 else 2}g}"


def _time(seconds: float) -> str:
    """With two digits, in the largest unit of which it has one."""
    unit, size = next((each for each in UNITS if seconds >= each[1]), UNITS[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def plot(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Bars on logarithmic scales, with lines from what surely keeps the bound to what surely does not; a panel for each kind of unit."""
    limits = [row for row in rows if row["quantity"] != CORNER and row["value"] is not None]
    of_unit = {unit: axis for axis, units in PANELS.items() for unit in units}
    panels = {axis: [row for row in limits if of_unit.get(row["unit"], FIRST_PANEL) == axis] for axis in (FIRST_PANEL, *PANELS)}
    panels = {axis: found for axis, found in panels.items() if found}
    if not panels:
        return
    asked = list(dict.fromkeys((row["weights"], row["asked"]) for row in limits))
    names = {axis: list(dict.fromkeys(map(_name, found))) for axis, found in panels.items()}
    heights = [len(each) for each in names.values()]
    figure = new_figure(8, 1.5 + 0.11 * len(asked) * sum(heights) + 0.5 * len(panels))
    axes_of = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (axis, found) in zip(axes_of, panels.items()):
        for i, each in enumerate(asked):
            bars = [row for row in found if (row["weights"], row["asked"]) == each]
            at = [names[axis].index(_name(row)) + (i + 0.5) / len(asked) * 0.8 - 0.4 for row in bars]
            value = np.array([row["value"] for row in bars], float)
            ends = np.array([[row["kept_for_sure"], row["lost_for_sure"]][::1 if row["kind"] == "largest" else -1] for row in bars],
                            float).reshape(-1, 2).T  # low and high; NaN: open
            around = np.nan_to_num(np.abs(ends - value))
            axes.barh(at, value, 0.8 / len(asked), color=colormap("Paired").colors[_color(asked, i)], label=", ".join(each),
                      xerr=around, error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "black"})
            for marker, end in zip((LEFT, RIGHT), ends):
                axes.plot(value, np.where(np.isnan(end), at, np.nan), linestyle="", marker=marker, markersize=2.5, color="black")
        axes.set(xscale="log", xlabel=axis, yticks=range(len(names[axis])), yticklabels=names[axis])
        axes.set_ylim(len(names[axis]) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small",
                  title="bars: the limit; lines: from what surely keeps the bound to what surely does not; arrows: nothing is sure there",
                  title_fontsize="x-small")
    add_title(figure, title)
    save(figure, path, dpi=150)


def _color(asked: Sequence[tuple[str, str]], i: int) -> int:
    """Of a map of pairs of light and dark: a pair for each kind of cells."""
    kinds = list(dict.fromkeys(weights for weights, _ in asked))
    return (2 * kinds.index(asked[i][0]) + [text for weights, text in asked if weights == asked[i][0]].index(asked[i][1]) % 2) % 12
