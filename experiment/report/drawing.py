"""What pictures are made with. matplotlib is imported with the first one: half a second, which commands without a picture need not take."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.quant.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D

POINTS = {"x-small": 6.9, "small": 8.3, "medium": 10, "large": 12}  # matplotlib's sizes of text
SMALLEST = 5  # points of letters that can be read
LEGEND = 8  # lines of a legend that leave room for the curves beside it
NEAR = 0.004  # of a panel's width and height: marks that hide each other


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which no window shows and nothing else holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def colormap(name: str) -> Colormap:
    """matplotlib's colour map of this name."""
    from matplotlib import colormaps

    return colormaps[name]


def add_title(figure: FigureBase, text: str, size: str = "medium") -> None:
    """A title of one line, in smaller letters where these would not fit into the figure, or the part of one."""
    from matplotlib.textpath import TextPath

    text = text.replace("$", r"\$")  # which would be mathematics
    inches = figure.figure.get_figwidth()  # parts are as wide
    points = min(POINTS[size], 0.97 * 72 * inches / TextPath((0, 0), text, size=1).get_extents().width)
    figure.suptitle(text if points > SMALLEST else wrapped(text, inches, SMALLEST), fontsize=max(points, SMALLEST))


def add_note(figure: Figure, text: str) -> None:
    """What is to be known of a picture, below it, in as many lines as it takes."""
    figure.supxlabel(wrapped(text, figure.get_figwidth()), fontsize="small")


def wrapped(text: str, inches: float, size: str | float = "small") -> str:
    """A text whose lines are broken where a figure of so many inches would cut them off; it stands in the middle."""
    letters = int(72 * (inches - 0.8) / (0.55 * POINTS.get(size, size)))
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in text.splitlines())


def add_legend(figure: Figure, axes: Axes, title: str | None = None, notes: Sequence[str] = (), below: bool = False) -> None:
    """The legend of a figure of one panel: within it where it is short, else below, where it hides no curve.

    Args: notes, what else is to be known of the panel; below, however short it is.
    """
    from matplotlib.patches import Patch

    handles, names = axes.get_legend_handles_labels()
    inches = 0.75 * figure.get_figwidth()
    names = [wrapped(name, inches, "x-small") for name in (*names, *notes)]
    handles += [Patch(visible=False) for _ in notes]
    look = {"fontsize": "x-small", "title": title and wrapped(title, inches, "x-small"), "title_fontsize": "x-small"}
    lines = sum(len(name.splitlines()) for name in names) + bool(title)
    if lines <= LEGEND and not below:
        axes.legend(handles, names, **look)
    else:
        figure.set_figheight(figure.get_figheight() + lines * 1.7 * POINTS["x-small"] / 72)
        figure.legend(handles, names, loc="outside lower center", **look)


def show_hidden(axes: Axes, lines: Sequence[Line2D], whole: bool = False) -> None:
    """Lay larger marks below those on which marks of later lines lie, and broader lines below parts between two of these: they show on
    both sides of what covers them. Args: whole, only of lines that others hide altogether."""
    axes.get_xlim(), axes.get_ylim()  # which places follow from
    of_panel = axes.transScale + axes.transLimits
    places = [of_panel.transform(line.get_xydata()) for line in lines]
    for i, (line, own) in enumerate(zip(lines, places)):
        covered = [(abs(own[:, None] - other[None]).max(2) < NEAR).any(1) for other in places[i + 1:]]
        marks, parts = sum(covered, 0 * own[:, 0]), sum((each[1:] & each[:-1] for each in covered), 0 * own[1:, 0])
        if whole and not marks.all():
            continue
        for k, above in enumerate(marks):
            _below(axes, line, slice(k, k + 1), above, marker=line.get_marker(), markersize=line.get_markersize() + 3 * above)
        for k, above in enumerate(parts):
            _below(axes, line, slice(k, k + 2), above, linewidth=line.get_linewidth() + 2.5 * above)


def _below(axes: Axes, line: Line2D, part: slice, above: float, **look: Any) -> None:
    """Draw a part of a line again, below so many others."""
    if above:
        axes.plot(*line.get_xydata()[part].T, color=line.get_color(), zorder=line.get_zorder() - 0.01 * above, **look)


def height_of_names(names: Sequence[str], inches: float) -> float:
    """Inches that names below an axis of so many inches need: none where they stand side by side, else their length, turned."""
    longest = max(map(len, names)) * 0.55 * POINTS["x-small"] / 72
    return longest if longest * len(names) > 0.95 * inches else 0.0


def width_of_names(names: Sequence[str]) -> float:
    """Inches that an axis must have for its names to be read, turned."""
    return len(names) * 1.25 * POINTS["x-small"] / 72


def label_decades(axes: Axes) -> None:
    """Numbers on a logarithmic horizontal axis, some within each decade, for axes that span less than one."""
    from matplotlib.ticker import FuncFormatter

    def label(x: float, _: int) -> str:
        return f"{x:g}" if f"{x:e}"[0] in "12357" else ""

    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(FuncFormatter(label))


def save(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a picture as PNG, whole or not at all. `figure.savefig` would draw it twice, first to arrange it, which drawing does too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    atomic_write(path, FigureCanvasAgg(figure).print_png)
