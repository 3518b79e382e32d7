"""Measured mean and sigma of levels, interpolated in G and in log t (`Table`), and measured cells themselves (`Samples`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .laws import Law
from .times import Times


@dataclass(frozen=True, eq=False)
class Series:
    """Levels over time at one temperature.

    Attributes:
        temp: C; None: not known.
        times: s, rising, `[T]`; empty: not known, T = 1.
        targets: nominal conductances, uS, rising, `[L]`.
        mean, std: uS, `[T, L]`.
    """

    temp: float | None
    times: tuple[float, ...]
    targets: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class _Levels(Law):
    """A law of data that belong to temperatures and nominal levels, as `series` with `temp`, `times` and `targets`."""

    interpolates = False

    def __init__(self, name: str, series: Sequence[Series], shape: str = "gaussian") -> None:
        self.name, self.shape = name, shape
        self.series = {each.temp: each for each in series}
        self.times = {each.temp: Times(each.times, self.interpolates) for each in series}
        lows, highs = zip(*((each.targets[0], each.targets[-1]) for each in series))
        self.span = float(max(lows)), float(min(highs))


class Table(_Levels):
    """Mean and sigma of cells by nominal conductance: linear in G between levels and linear in log t between times.

    Nothing is extrapolated. Sigma is that of the data: it holds the width of the programming window and the noise of one read.
    Cells are Gaussian around the mean (or uniform, `Law.shape`) and not clipped at 0, which would move mean and sigma: a cell may
    come out slightly below 0 where the data's sigma is as large as its mean.
    """

    interpolates = True
    steady = True

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        return self._at(self.series[temp].mean, g, time, temp)

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        return self._at(self.series[temp].std, g, time, temp)

    def _at(self, values: np.ndarray, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        i, j, w = self.times[temp].bracket(time)
        row = values[i] if i == j else (1 - w) * values[i] + w * values[j]
        return np.interp(g, self.series[temp].targets, row)


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells that were read, at one temperature.

    Attributes:
        temp, times, targets: as in `Series`.
        reads: uS, `reads[t][l]` all cells of level l at time t, in any number.
    """

    temp: float | None
    times: tuple[float, ...]
    targets: np.ndarray
    reads: Sequence[Sequence[np.ndarray]]


class Samples(_Levels):
    """Cells drawn with replacement from those measured at the nearest level, moved by (nominal - level), so that nominal
    conductances between levels are right. Heavy tails and failed cells come as they were measured.

    Only times that were measured: rows of two times cannot be mixed.
    """

    def _nearest(self, g: np.ndarray, temp: float | None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest level of each conductance (the lower of two) and how far the conductance lies above it, uS."""
        targets = self.series[temp].targets
        level = np.abs(np.asarray(g, np.float64)[..., None] - targets).argmin(axis=-1)
        return level, g - targets[level]

    def _reads(self, time: float | None, temp: float | None) -> Sequence[np.ndarray]:
        return self.series[temp].reads[self.times[temp].bracket(time)[0]]

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        level, above = self._nearest(g, temp)
        return np.array([reads.mean() for reads in self._reads(time, temp)])[level] + above

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        """uS: of the cells as they are drawn, so with their number as divisor."""
        level, _ = self._nearest(g, temp)
        return np.array([reads.std() for reads in self._reads(time, temp)])[level]

    def draw(self, g: np.ndarray, index: np.ndarray, time: float | None, temp: float | None,
             generator: np.random.Generator) -> np.ndarray:
        """As `Law.draw`; one uniform number a cell."""
        reads, (level, above) = self._reads(time, temp), self._nearest(g, temp)
        return drawn([reads[number] for number in level], index, generator) + above[index]


def drawn(pools: Sequence[np.ndarray], index: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One of the pool of each index, with replacement, by one uniform number: `[*index.shape, ...]` of pools `[samples, ...]`."""
    uniform, found = generator.random(index.shape), np.empty((*index.shape, *pools[0].shape[1:]))
    for number in np.unique(index):
        here, pool = index == number, pools[number]
        found[here] = pool[(uniform[here] * len(pool)).astype(np.intp)]
    return found
