"""What pictures are made with. matplotlib is imported with the first one: half a second, which commands without a picture need not take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.quant.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which no window shows and nothing else holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def colormap(name: str) -> Colormap:
    """matplotlib's colour map of this name."""
    from matplotlib import colormaps

    return colormaps[name]


def label_decades(axes: Axes) -> None:
    """Numbers on a logarithmic horizontal axis, some within each decade, for axes that span less than one."""
    from matplotlib.ticker import FuncFormatter

    def label(x: float, _: int) -> str:
        return f"{x:g}" if f"{x:e}"[0] in "12357" else ""

    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(FuncFormatter(label))


def save(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a picture as PNG, whole or not at all."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
