"""How many row blocks layers have, and how far they fill them."""

from collections.abc import Iterable

from ..arrays.mapping import array_bounds
from ..layers.crossbar import CrossbarLayer


def filling(layer: CrossbarLayer, mapping: str, rows: int) -> tuple[int, float]:
    """(row blocks of a layer; mean share of their rows that hold weights) with a mapping, on so many rows.

    A row block is up to `rows` rows of a group, for all its outputs. How many arrays side by side hold these follows from the columns of
    an array, which costs know (`cost.events`).
    """
    _, channels, height, width = layer.w_shape
    held = [stop - start for start, stop in array_bounds(mapping, height * width, channels, rows, layer.geometry.planes)]
    return len(held) * layer.geometry.groups, sum(held) / len(held) / rows


def together(fillings: Iterable[tuple[int, float]]) -> tuple[int, float]:
    """As `filling`, of several layers."""
    fillings = list(fillings)
    blocks = sum(count for count, _ in fillings)
    return blocks, sum(count * share for count, share in fillings) / blocks
