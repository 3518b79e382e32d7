"""How many arrays layers take, and how far they fill them."""

from collections.abc import Iterable

from ..arrays.mapping import array_bounds
from ..layers.crossbar import CrossbarLayer


def filling(layer: CrossbarLayer, mapping: str, rows: int) -> tuple[int, float]:
    """(arrays of a layer, each with a column for every output; mean share of their rows that hold weights) with a mapping, on so many
    rows."""
    _, channels, height, width = layer.w_shape
    held = [stop - start for start, stop in array_bounds(mapping, height * width, channels, rows, layer.geometry.planes)]
    return len(held) * layer.geometry.groups, sum(held) / len(held) / rows


def together(fillings: Iterable[tuple[int, float]]) -> tuple[int, float]:
    """As `filling`, of several layers."""
    fillings = list(fillings)
    arrays = sum(count for count, _ in fillings)
    return arrays, sum(count * share for count, share in fillings) / arrays
