"""What a law of cells can be asked (`Law`), and the laws that literature gives as formulas.

`g` is always the nominal conductance, uS, any shape; time in seconds and temp in degrees Celsius are values that `Law.moment` gave.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .times import Times, show

UNKNOWN: dict[float | None, Times] = {None: Times()}


class Law:
    """How cells lie around nominal conductances. Subclasses give `name`, `times`, `span`, `mean` and `sigma`.

    Attributes:
        name: whose law, for messages.
        times: the times of each temperature in C; key None where the data name no temperature.
        span: lowest and highest nominal conductance, uS, that the data cover; None: no limit.
        shape: "gaussian", or "uniform" with the same standard deviation (cells that are verified to lie within bounds).
        code: digests of the files that it was loaded from, where it is a user's; part of what tells it from other laws.
        steady: whether a number is drawn for each cell where none scatters, too, so that what is drawn behind it is the same at all times.
    """

    name: str
    times: dict[float | None, Times] = UNKNOWN
    span: tuple[float, float] | None = None
    shape: str = "gaussian"
    code: ClassVar[tuple[str, ...]] = ()
    steady = False

    def moment(self, time: float | None, temp: float | None) -> tuple[float | None, float | None]:
        """The time and the temperature that the law is taken at: the data's first time and lowest temperature for None.

        Raises: ValueError for what lies outside the data; nothing is extrapolated, nor interpolated between temperatures.
        """
        known = [t for t in self.times if t is not None]
        if temp is None:
            temp = min(known) if known else None
        elif temp not in self.times:
            raise ValueError(f"{self.name} has no data at {temp:g} C; it has " + (
                ", ".join(f"{t:g} C" for t in sorted(known)) if known else "no data over temperature"))
        return self.times[temp].find(time, self.name if temp is None else f"{self.name} at {temp:g} C"), temp

    def covers(self, *conductances: float) -> None:
        """Raises: ValueError for a nominal conductance, uS, that the data do not cover (1e-9 of the span is rounding)."""
        if self.span is not None:
            slack = 1e-9 * max(self.span)
            for g in conductances:
                if not self.span[0] - slack <= g <= self.span[1] + slack:
                    raise ValueError(f"{self.name} has no data at {g:g} uS; it covers {self.span[0]:g} to {self.span[1]:g} uS")

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        """Mean conductance, uS; here the nominal one."""
        return np.array(g, np.float64)

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        """Standard deviation of the conductance, uS; here 0."""
        return np.zeros(np.shape(g))

    def draw(self, g: np.ndarray, index: np.ndarray, time: float | None, temp: float | None,
             generator: np.random.Generator) -> np.ndarray:
        """Conductances, uS, float64 of the shape of `index`.

        Args: g, levels, uS `[L]`; index, the level of each cell, 0..L-1.
        """
        mean, sigma = self.mean(g, time, temp), self.sigma(g, time, temp)
        if not (self.steady or sigma.any()):
            return mean[index]
        if self.shape == "uniform":  # on +-sqrt(3), of variance 1
            return mean[index] + sigma[index] * (math.sqrt(3) * (2 * generator.random(index.shape) - 1))
        cells = generator.standard_normal(index.shape)  # becomes the result in place: fresh memory takes longer than the sums
        cells *= sigma[index]
        cells += mean[index]
        return cells

    def read_sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        """Standard deviation, uS, of reads of one and the same cell.

        Raises: ValueError where the data have none.
        """
        raise ValueError(f"{self.name} has no read noise of its own; give read_noise in uS")


@dataclass(frozen=True)
class Polynomial(Law):
    """`sigma = sum_i c_i (G / scale)^i`, one set of `c_i` (uS) for each time, lowest power first; the mean is nominal.

    Between times sigma is linear in log t. Without any `c` cells have no scatter.
    """

    name: str
    coefficients: tuple[tuple[float, ...], ...] = ((0.0,),)
    points: tuple[float, ...] = ()
    scale: float = 1.0
    span: tuple[float, float] | None = None
    shape: str = "gaussian"

    @property
    def times(self) -> dict[float | None, Times]:
        """Times of `coefficients`."""
        return {None: Times(self.points, between=True)}

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        i, j, w = self.times[None].bracket(time)
        x = np.asarray(g, np.float64) / self.scale
        low, high = (np.polynomial.polynomial.polyval(x, self.coefficients[k]) for k in (i, j))
        return (1 - w) * low + w * high


@dataclass(frozen=True)
class Relaxation(Law):
    """Cells that were verified and then relax, all levels alike.

    `mean = G + mean_slope ln t`, `sigma^2 = (p_0 + p_1 G)^2 + (s_0 + s_1 ln t)^2`, t in s from 1 s on; at 0 s, just programmed,
    `mean = G` and `sigma = p_0 + p_1 G`. Reads: `sigma = k log10(mean) sqrt(ln((t + t_r) / (2 t_r)))`, uS with conductances in uS.

    Source: the CMO/HfOx model of aihwkit. It clips conductances to the range of the device; here they are not clipped, so that
    mean and sigma are those of the formulas.
    """

    name: str
    programming: tuple[float, float]
    relaxing: tuple[float, float]
    mean_slope: float
    read: tuple[float, float]
    span: tuple[float, float]
    times: ClassVar[dict[float | None, Times]] = {None: Times((0.0,), onward=1.0)}

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        return np.asarray(g, np.float64) + (self.mean_slope * math.log(time) if time else 0.0)

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        programmed = self.programming[0] + self.programming[1] * np.asarray(g, np.float64)
        return np.hypot(programmed, self.relaxing[0] + self.relaxing[1] * math.log(time) if time else 0.0)

    def read_sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        if not time:
            raise ValueError(f"{self.name} has no read noise at 0 s; it has it at all times from {show(1)} on")
        k, width = self.read
        return k * np.log10(np.maximum(self.mean(g, time, temp), 1.0)) * math.sqrt(math.log((time + width) / (2 * width)))


@dataclass(frozen=True)
class PowerLaw(Law):
    """Phase-change cells: `G(t) = P (t / t_0)^-nu`, `P ~ N(G, sigma_p^2)` and `nu ~ N(m, s^2)` for each cell.

    With `x = G / G_max`: `sigma_p = max(0, c_0 + c_1 x + c_2 x^2)` uS, `m = clip(a_m ln x + b_m)`, `s = clip(a_s ln x + b_s)`.
    Of the Gaussians follow, with `l = ln(t / t_0)`: `mean = G exp(-m l + s^2 l^2 / 2)` and
    `variance = (G^2 + sigma_p^2) exp(-2 m l + 2 s^2 l^2) - mean^2`. Time counts from the end of programming, first read at t_0.
    Reads: `sigma = mean min(q / x^p, q_max) sqrt(ln((t + t_r) / (2 t_r)))`.

    Source: aihwkit's model of phase-change memory (Nandakumar et al., ICECS 2019; Joshi et al., Nat. Commun. 11, 2473, 2020).
    It clips conductances and exponents at 0; here neither is clipped, so that the moments above are exact.
    """

    name: str
    g_top: float
    programming: tuple[float, ...]
    exponent: tuple[float, float, float, float]  # slope, offset, lowest, highest
    exponent_sigma: tuple[float, float, float, float]
    first: float
    read: tuple[float, float, float, float]  # q, p, q_max, t_r
    span: tuple[float, float]
    times: dict[float | None, Times] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", {None: Times(onward=self.first)})

    def _spread(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """sigma_p, m and s of nominal conductances."""
        x = np.asarray(g, np.float64) / self.g_top
        log = np.log(np.maximum(x, 1e-7))
        m, s = (np.clip(slope * log + offset, low, high) for slope, offset, low, high in (self.exponent, self.exponent_sigma))
        return np.maximum(np.polynomial.polynomial.polyval(x, self.programming), 0.0), m, s

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        (_, m, s), log = self._spread(g), math.log(time / self.first)
        return np.asarray(g, np.float64) * np.exp(-m * log + (s * log)**2 / 2)

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        (programmed, m, s), log = self._spread(g), math.log(time / self.first)
        square = (np.square(g) + programmed**2) * np.exp(-2 * m * log + 2 * (s * log)**2)
        return np.sqrt(np.maximum(square - self.mean(g, time, temp)**2, 0.0))

    def draw(self, g: np.ndarray, index: np.ndarray, time: float | None, temp: float | None,
             generator: np.random.Generator) -> np.ndarray:
        """As `Law.draw`: first all programmed conductances, then all exponents."""
        programmed, m, s = self._spread(g)
        cells = np.asarray(g, np.float64)[index] + programmed[index] * generator.standard_normal(index.shape)
        exponents = m[index] + s[index] * generator.standard_normal(index.shape)
        return cells * np.exp(-exponents * math.log(time / self.first))

    def read_sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        q, power, most, width = self.read
        share = np.minimum(q / np.maximum(np.asarray(g) / self.g_top, 1e-7)**power, most)
        return self.mean(g, time, temp) * share * math.sqrt(math.log((time + width) / (2 * width)))


@dataclass(frozen=True, eq=False)
class Decades(Law):
    """A few levels whose mean and sigma move by so much a decade: `mean = G + a log10(t / t_0)`, `sigma = s log10(t / t_0)`, from
    t_0 on, at temperatures that have slopes; at the temperature where the levels were told apart only t_0 is known.
    """

    name: str
    targets: np.ndarray  # uS, [L]
    first: float
    slopes: dict[float, tuple[np.ndarray, np.ndarray]]  # temperature: mean and sigma, uS a decade, [L]
    reference_temp: float
    steady: ClassVar[bool] = True

    @property
    def times(self) -> dict[float | None, Times]:
        """Times of each temperature."""
        return {self.reference_temp: Times((self.first,))} | {temp: Times(onward=self.first) for temp in self.slopes}

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return float(self.targets[0]), float(self.targets[-1])

    def mean(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        return np.asarray(g, np.float64) + self._moved(g, time, temp, 0)

    def sigma(self, g: np.ndarray, time: float | None, temp: float | None) -> np.ndarray:
        return self._moved(g, time, temp, 1)

    def _moved(self, g: np.ndarray, time: float | None, temp: float | None, which: int) -> np.ndarray:
        if temp not in self.slopes:
            return np.zeros(np.shape(g))
        return np.interp(g, self.targets, self.slopes[temp][which]) * math.log10(time / self.first)
