"""A network with what it is measured on (`Task`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layers.loaders import Take


@dataclass(frozen=True, eq=False)
class Task:
    """What a function in a file returns to `eval.py --model net.py:FUNCTION`, where its inputs are no images or its answers no classes.

    Attributes:
        network: in float.
        data: batches that are measured, with their targets, such as a list or a DataLoader that does not shuffle; gone through again and
            again.
        calibration: batches of training inputs, with or without targets, that choose scales and ADC ranges; all of one size.
        metric: see `measure`; None: percent of the examples whose class is that of the largest output.
        take: a function of a batch that returns (inputs, target), where it is not clear which part of it is what (`loaders.apart`).
        validation: batches with their targets that choose in a search (`--search`); None: there are none.
        kind: what the examples are, such as "windows of text".
    """

    network: nn.Module
    data: Iterable[Any]
    calibration: Iterable[Any]
    metric: Any = None
    take: Take | None = None
    validation: Iterable[Any] | None = None
    kind: str = "examples"
