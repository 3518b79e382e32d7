"""Several processes that measure one network together: what `measure` asks of them."""

from collections.abc import Sequence
from typing import Any

from torch import nn


class Processes:
    """What a program of several processes says to each of them, here what one process alone is told; all call these in the same order.
    A module with functions of these names may stand for it."""

    def world(self) -> int:
        """How many there are."""
        return 1

    def mine(self, number: int) -> bool:
        """Whether batch `number` is this one's."""
        return True

    def is_first(self) -> bool:
        """Whether this is the one that chooses ranges for all."""
        return True

    def gathered(self, value: Any) -> list[Any]:
        """The values of all, in their order."""
        return [value]

    def in_order(self, own: Sequence[Any]) -> list[Any]:
        """What all have of their batches, in the order of the batches."""
        return list(own)

    def same_ranges(self, network: nn.Module) -> None:
        """Give a network the ADC ranges, plans and corrections that it has in the first."""


ALONE = Processes()
