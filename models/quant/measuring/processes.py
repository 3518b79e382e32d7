"""Several processes that measure one network together: what `measure` asks of them, and how one process alone answers."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn


class Processes(Protocol):
    """What a program of several processes says to each of them; all call these in the same order. A module may stand for it."""

    def world(self) -> int:
        """How many there are."""

    def mine(self, number: int) -> bool:
        """Whether batch `number` is this one's."""

    def is_first(self) -> bool:
        """Whether this is the one that chooses ranges for all."""

    def gathered(self, value: Any) -> list[Any]:
        """The values of all, in their order."""

    def in_order(self, own: Sequence[Any]) -> list[Any]:
        """What all have of their batches, in the order of the batches."""

    def same_ranges(self, network: nn.Module) -> None:
        """Give a network the ADC ranges, plans and corrections that it has in the first."""


class _Alone:
    """One process, which does everything."""

    def world(self) -> int:
        return 1

    def mine(self, number: int) -> bool:
        return True

    def is_first(self) -> bool:
        return True

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def in_order(self, own: Sequence[Any]) -> list[Any]:
        return list(own)

    def same_ranges(self, network: nn.Module) -> None:
        pass


ALONE = _Alone()
