"""A converter, both ways: what turns a read value `v` into a code q, and a code into its value.

The one place of both. Whoever digitises a read, plans bits or says what accumulators are worth takes it from here, and engines make
their tables and constants of it. Another kind (levels that are not evenly spaced) is a subclass of `Converter` with `level` and `nearest`,
and a field of the spec that `CrossbarSpec.converter` finds it by. The reference engine runs it; the others refuse it
(`engines.reach.lacking`), but that the CPU engine runs tables of a file (`transfer`), by their thresholds.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch


@dataclass(frozen=True)
class Converter:
    """One ADC, linear: `q = clip(rint(v / delta), q_min, q_min + 2^B - 1)` in float64, ties to even; value `delta q`.

    This formula is the truth; an engine may compute a code in another way only after checking it here for every possible read.

    Attributes:
        delta: step, in units of `v`.
        q_min: lowest code.
        bits: B; 0 bits make no conversion, and the code is 0.
        factor: what levels are multiplied by before those of converters with other steps are added to them, an integer.
    """

    delta: float
    q_min: int
    bits: int
    factor: int = 1

    exact_zero: ClassVar[bool] = True  # whether a read of 0 has a code of value 0

    @property
    def q_max(self) -> int:
        """Highest code."""
        return self.q_min + 2**self.bits - 1

    @property
    def worth(self) -> float:
        """What 1 of `added` is worth, in units of `v`."""
        return self.delta / self.factor

    @property
    def largest(self) -> int:
        """A bound of the size of what it adds."""
        return self.factor * max(2**self.bits, -int(self.level(self.q_min)), int(self.level(self.q_max)))

    @staticmethod
    def level(q: Any) -> Any:
        """Value of the codes q, whole numbers, some in float64, in steps: whole, 0 of code 0, rising with q. Numbers, arrays, tensors."""
        return q

    @staticmethod
    def nearest(x: Any) -> Any:
        """Code of a read of x steps, float64, where none is the lowest or the highest. Arrays or tensors."""
        return torch.round(x) if isinstance(x, torch.Tensor) else np.rint(x)

    @classmethod
    def edge(cls, q: Any) -> Any:
        """Where the reads of code q end and those of q + 1 begin, in steps; a read that lies there has the even one of the two codes."""
        return (cls.level(q) + cls.level(q + 1)) / 2

    @property
    def thresholds(self) -> np.ndarray:
        """Where its codes begin but for the lowest one, float64, in steps: a read has as high a code as it has reached thresholds. At one
        that begins an odd code it has not."""
        return self.edge(self.q_min + np.arange(2**self.bits - 1))

    def encode(self, u: Any, unit: float = 1.0) -> Any:
        """Codes of the reads `v = unit u`. Args: u, array or tensor; unit, 1/2 or 1. Returns: int64 of the shape of u."""
        if isinstance(u, torch.Tensor):
            return self.nearest(u.double() * unit / self.delta).clamp(self.q_min, self.q_max).long()
        q = self.nearest(np.asarray(u, dtype=np.float64) * unit / self.delta)
        return np.clip(q, self.q_min, self.q_max).astype(np.int64)

    def decode(self, q: Any) -> Any:
        """Values of the codes q, in units of `v`."""
        return self.delta * self.level(q)

    def added(self, q: Any) -> Any:
        """What codes add to accumulators before they are put in their place `2^(d z + c k)`: integers in units of `worth`."""
        return self.factor * self.level(q)

    def table(self, low: int, high: int, unit: float) -> np.ndarray:
        """Codes of u = low .. high, int64."""
        return self.encode(np.arange(low, high + 1), unit)

    def around_steps(self, low: int, high: int, unit: float) -> tuple[np.ndarray, np.ndarray]:
        """(u, their codes): the ends of low..high and all u around a step of `encode`. What does not fall as u rises, as `encode`, and
        gives these codes here gives them for every u of the range: between two of these u that are no neighbours codes are all alike."""
        steps = np.floor(self.edge(self.q_min + np.arange(2**self.bits)) * self.delta / unit)
        around = np.clip(np.add.outer([-1, 0, 1, 2], steps), low, high).astype(np.int64)
        u = np.unique([low, high, *around.flat])
        codes = self.encode(u, unit)
        assert not np.any((np.diff(codes) != 0) & (np.diff(u) > 1))
        return u, codes
