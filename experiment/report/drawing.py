"""What pictures are made with. matplotlib is imported with the first one: half a second, which commands without a picture need not take."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.quant.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

POINTS = {"x-small": 6.9, "small": 8.3, "medium": 10, "large": 12}  # matplotlib's sizes of text
LEGEND = 8  # lines of a legend that leave room for the curves beside it


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which no window shows and nothing else holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def colormap(name: str) -> Colormap:
    """matplotlib's colour map of this name."""
    from matplotlib import colormaps

    return colormaps[name]


def wrapped(text: str, inches: float, size: str = "small") -> str:
    """A title whose lines are broken where a figure of so many inches would cut them off; it stands above the panel's middle."""
    letters = int(72 * (inches - 0.8) / (0.55 * POINTS[size]))
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in text.splitlines())


def add_legend(figure: Figure, axes: Axes, place: str = "best") -> None:
    """The legend of a figure of one panel: within it, at this place, where it is short, else below, where it hides no curve."""
    handles, names = axes.get_legend_handles_labels()
    names = [wrapped(name, 0.75 * figure.get_figwidth(), "x-small") for name in names]
    lines = sum(len(name.splitlines()) for name in names)
    if lines <= LEGEND:
        axes.legend(handles, names, fontsize="x-small", loc=place)
    else:
        figure.set_figheight(figure.get_figheight() + lines * 1.7 * POINTS["x-small"] / 72)
        figure.legend(handles, names, fontsize="x-small", loc="outside lower center")


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
