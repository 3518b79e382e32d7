"""A device (`Device`): what its cells do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import faults, formats, presets
from .laws import Law, Polynomial
from .lines import LARGEST_US, SMALLEST_US
from .noise import affine
from .rows import JointRows
from .times import parse_time

MOST_CELL_BITS = 8


@dataclass(frozen=True, eq=False)
class Device:
    """What a cell does: its levels in microsiemens, and how cells scatter around them, drift and fail, at one time and temperature.

    A level of a measured preset has the statistics of the cells whose first read lay in its window, whatever they had been programmed
    to. So errors of programming are not in it. `techC_cells` draws measured cells, also those that missed their window.

    Conductances are not clipped. Where sigma is as large as the mean, a cell may come out below 0 uS. (Where wires resist, `program`
    solves networks of resistors, and takes such a cell as one of 0 uS.)

    Attributes:
        name: of the device.
        source: where its numbers come from.
        g_min, g_max: nominal conductances, uS, of the lowest and the highest level.
        law: mean, sigma and draws by nominal conductance; without one, cells without scatter.
        time: s since the first read (measured data; for a bake, from the read before it to the read after), or since programming (laws).
            None: the first time that the data have.
        temp: C; None: the lowest temperature that the data have.
        level_values: nominal conductances, uS, of devices with a few levels; None: any number between g_min and g_max.
        rows: cells of one weight measured together; None: no such data.
        stuck_on, stuck_off: probabilities that a cell always has the nominal conductance of the highest or of the lowest level.
        stuck_mask: array of -1 (stuck off), 0 and 1 (stuck on), or a file of one (.npy, or text with commas). All arrays share this map:
            `[word line, output]`, or for pairs `[word line, output, line]`, the positive line first. Where an array is larger, the map
            repeats. A map of one dimension goes on from row to row. Reference columns are not on it. (`draw` knows of no arrays and
            repeats it over the cells in row-major order.)
        read_noise: standard deviation, uS, of reads of one cell: a number, an array with one for each level, "device" for the law of
            the data, None for none. The sigma of a measured table already includes the noise of its one read.
        sigma_us: standard deviation, uS, Gaussian and the same for all levels, in place of the law's; None: the law's.
        sigma_percent: standard deviation, per cent of the range from the lowest to the highest level of a cell, of what every cell
            has besides, Gaussian: `sigma^2 = sigma_law^2 + (sigma_percent (G_max - G_min) / 100)^2`. Stuck cells do not have it.
        n: cells that were programmed; single times and temperatures may have fewer. None: not known.
        certainty: how sure the numbers are. note: what else must be known.
    Raises: ValueError for impossible values, and for times, temperatures and conductances outside the data.
    """

    name: str
    source: str
    g_min: float
    g_max: float
    law: Law | None = field(default=None, repr=False)
    time: float | str | None = None
    temp: float | None = None
    level_values: tuple[float, ...] | None = field(default=None, repr=False)
    rows: JointRows | None = field(default=None, repr=False)
    stuck_on: float = 0.0
    stuck_off: float = 0.0
    stuck_mask: np.ndarray | str | Path | None = field(default=None, repr=False)
    read_noise: float | str | np.ndarray | None = None
    sigma_us: float | None = None
    sigma_percent: float = field(default=0.0, metadata={"younger": True})
    n: int | None = None
    certainty: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for key in ("g_min", "g_max", "temp", "stuck_on", "stuck_off", "sigma_us", "sigma_percent"):
            value = getattr(self, key)
            none = value is None and key in ("temp", "sigma_us")
            if isinstance(value, bool) or not none and not isinstance(value, (int, float, np.integer, np.floating)):
                raise ValueError(f"{key} is {value!r}; a number is expected")
        given = {"law": self.law or Polynomial(self.name), "stuck_mask": faults.load_mask(self.stuck_mask)}
        # In one type: data may say 20 where a user says 20.0, and both are one device.
        moment = given["law"].moment(parse_time(self.time), self.temp)
        given["time"], given["temp"] = (None if value is None else float(value) for value in moment)
        for key, value in given.items():
            object.__setattr__(self, key, value)
        self._check_conductances()
        faults.check(self.stuck_on, self.stuck_off)
        self._check_noise()

    @classmethod
    def load(cls, name: str | Path, time: float | str | None = None, temp: float | None = None, **changes: Any) -> Device:
        """A device that comes with the package, by its name (`presets`), or a file or folder of own measurements (`formats`).

        Args: time, seconds or text such as "1h"; temp, C; changes, other attributes such as `stuck_on=0.001`.
        Raises: ValueError, one line, for a name that is neither, listing the presets, for a file that cannot be right, with its line, and
            for an unknown attribute, time or temperature.
        """
        found = presets.load(name) if name in presets.presets() else formats.read(name)
        return changed(cls(**found), time=time, temp=temp, **changes)

    preset = read = load  # as older scripts call it

    def with_on_off(self, ratio: float) -> Device:
        """The device with `G_min = G_max / ratio` and levels evenly spaced from there on; mean, scatter and drift are the law's there.

        Raises: ValueError for a device with measured levels, which have a ratio of their own, and where the law does not reach so far.
        """
        if self.level_values is not None:
            raise ValueError(f"on_off {ratio:g}: {self.name} has {len(self.level_values)} levels of its own, from {self.g_min:g} to "
                             f"{self.g_max:g} uS, and so its own ratio; leave on_off out")
        try:
            return replace(self, g_min=self.g_max / ratio)
        except ValueError as error:
            raise ValueError(f"on_off {ratio:g}: {error}") from None

    def levels(self, bits: int) -> np.ndarray:
        """Nominal conductances `G_l`, uS, float64 `[2^bits]`, rising.

        `G_min + l (G_max - G_min) / (2^bits - 1)`; of devices with a few levels those nearest to even spacing in level number, the
        first and the last among them.

        Raises: ValueError where the device has fewer levels, or joint rows have no cell of so many bits.
        """
        if type(bits) is not int or not 1 <= bits <= MOST_CELL_BITS:
            raise ValueError(f"bits of a cell are {bits!r}; allowed are whole numbers from 1 to {MOST_CELL_BITS}")
        if self.rows is not None:
            return self.rows.law(bits).series[None].targets.copy()
        if self.level_values is None:
            return self.g_min + np.arange(2**bits) * ((self.g_max - self.g_min) / (2**bits - 1))
        return np.array(self.level_values, np.float64)[spread(len(self.level_values), bits, f"{self.name} has", "levels")]

    def step(self, bits: int) -> float:
        """`dG = (G_max - G_min) / (2^bits - 1)`, uS; a cell's value in units of levels is `x = (G - G_min) / dG`."""
        g = self.levels(bits)
        return float(g[-1] - g[0]) / (2**bits - 1)

    def mean(self, g: np.ndarray | float) -> np.ndarray:
        """Mean conductance, uS, at the device's time and temperature, of cells programmed to nominal `g` uS. Faults are left out.

        Raises: ValueError for conductances that the data do not cover.
        """
        return self.law.mean(self._nominal(g), self.time, self.temp)

    def sigma(self, g: np.ndarray | float) -> np.ndarray:
        """Standard deviation, uS, of such cells. Raises: as `mean`."""
        g = self._nominal(g)
        return self._with_more(self.law.sigma(g, self.time, self.temp) if self.sigma_us is None else np.full(g.shape, float(self.sigma_us)),
                               self.g_max - self.g_min)

    def draw(self, levels_index: np.ndarray, bits: int, generator: np.random.Generator) -> np.ndarray:
        """One draw of cells: conductances, uS, float64 of the same shape, scattered and drifted, faults applied.

        Args: levels_index, level of each cell, 0..2^bits-1, any shape. Of the generator first the scatter of all cells is drawn,
            then, where faults have a probability, one uniform number a cell. What `sigma_percent` adds is drawn of a generator that
            it spawns, so that all else is the same whatever that is.
        Raises: ValueError as `levels`, and for an index beyond the levels.
        """
        g, index = self.levels(bits), np.asarray(levels_index)
        _check_codes(index, 2**bits, "level")
        if self.sigma_us is not None:
            cells = self.sigma_us * generator.standard_normal(index.shape)
            cells += self.mean(g)[index]
        else:
            cells = self._law(bits).draw(g, index, self.time, self.temp, generator)
        return self._finished(cells, g[0], g[-1], generator)

    def draw_weights(self, w_codes: np.ndarray, slice_bits: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """One draw of all cells of weights, a measured row for each: uS, float64 `[slices, *w_codes.shape]`, LSB slice first.

        Args: w_codes, weight codes, any shape; slice_bits, bits of each slice, LSB first. Generator as in `draw`.
        Raises: ValueError for a device without joint rows, or with rows of other slices.
        """
        if self.rows is None:
            raise ValueError(f"{self.name} has no rows of all cells of a weight; draw its slices one by one")
        if tuple(slice_bits) not in self.rows.splits:
            raise ValueError(f"{self.name} has rows of cells with {' or '.join(map(str, self.rows.splits))} bits, LSB first, not "
                             f"{tuple(slice_bits)}")
        codes = np.asarray(w_codes)
        _check_codes(codes, len(self.rows.rows), "weight code")
        cells = self.rows.draw(codes, generator)
        ends = np.array([self.levels(bits)[[0, -1]] for bits in slice_bits]).reshape(-1, 2, *[1] * codes.ndim)
        return self._finished(cells, ends[:, 0], ends[:, 1], generator)

    def _finished(self, cells: np.ndarray, off: np.ndarray, on: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Cells, uS, with what `sigma_percent` adds, and with faults. Args: off, on, their lowest and highest level, uS, broadcast."""
        if self.sigma_percent:
            scatter = generator.spawn(1)[0].standard_normal(cells.shape)
            scatter *= self.sigma_percent / 100 * (on - off)
            scatter += cells  # in place: fresh memory takes longer than the sums
            cells = scatter
        return faults.apply(cells, off, on, self.stuck_off, self.stuck_on, self.stuck_mask, generator)

    def _with_more(self, sigma: np.ndarray | float, span: float) -> np.ndarray:
        """The deviation of cells whose levels span so much, where it is `sigma` without `sigma_percent`."""
        return np.hypot(sigma, self.sigma_percent / 100 * span)

    def cell_noise(self, bits: int) -> tuple[float, float, float]:
        """Read-noise variance of a cell in units of levels squared, as a line in its value: `s^2 = c_0 + c_1 x`.

        The line of least squares through the levels' variances, at the mean values that their cells have at the device's time, among
        those with `s^2 >= 0` on 0..2^bits-1.

        Returns: `(c_0, c_1, misfit)`; misfit is the largest |sigma of the line - sigma| over the levels, in units of their largest sigma.
        """
        if self.read_noise is None:
            return 0.0, 0.0, 0.0
        g, dg = self.levels(bits), self.step(bits)
        mean = self._law(bits).mean(g, self.time, self.temp)
        return affine((mean - g[0]) / dg, self._read_sigma(g, bits) / dg, float(2**bits - 1))

    def reach(self, bits: int) -> float:
        """How far, in levels, a cell of so many bits may lie from the lowest level: its mean and six standard deviations."""
        g, law = self.levels(bits), self._law(bits)
        sigma = law.sigma(g, self.time, self.temp) if self.sigma_us is None else self.sigma_us
        return float((np.abs(law.mean(g, self.time, self.temp) - g[0]) + 6 * self._with_more(sigma, g[-1] - g[0])).max() / self.step(bits))

    def _law(self, bits: int) -> Law:
        return self.law if self.rows is None else self.rows.law(bits)

    def _read_sigma(self, g: np.ndarray, bits: int) -> np.ndarray:
        if isinstance(self.read_noise, str):
            return self.law.read_sigma(g, self.time, self.temp)
        noise = np.asarray(self.read_noise, np.float64)
        return np.full(len(g), noise) if noise.ndim == 0 else noise[spread(len(noise), bits, "read_noise has", "values")]

    def _nominal(self, g: np.ndarray | float) -> np.ndarray:
        g = np.asarray(g, np.float64)
        if g.size:
            self.law.covers(float(g.min()), float(g.max()))
        return g

    def _check_conductances(self) -> None:
        if not (math.isfinite(self.g_min) and math.isfinite(self.g_max) and 0 <= self.g_min < self.g_max):
            raise ValueError(f"{self.name}: g_min is {self.g_min!r} and g_max {self.g_max!r} uS; allowed are 0 <= g_min < g_max")
        if not SMALLEST_US <= self.g_max <= LARGEST_US:
            raise ValueError(f"{self.name}: g_max is {self.g_max!r}, which looks like {'siemens' if self.g_max < 1 else 'nS or ohms'}; "
                             f"allowed are {SMALLEST_US:g} to {LARGEST_US:g} uS")
        if self.level_values is not None:
            values = np.array(self.level_values, np.float64)
            if not (values.ndim == 1 and len(values) > 1 and np.isfinite(values).all() and (np.diff(values) > 0).all()):
                raise ValueError(f"{self.name}: level_values is {self.level_values!r}; allowed are two or more finite uS, each above the "
                                 "last")
            if (values[0], values[-1]) != (self.g_min, self.g_max):
                raise ValueError(f"{self.name} has {len(values)} levels of its own, from {values[0]:g} to {values[-1]:g} uS; "
                                 "g_min and g_max cannot be changed")
        self.law.covers(self.g_min, self.g_max)

    def _check_noise(self) -> None:
        if isinstance(self.read_noise, str):
            if self.read_noise != "device":
                raise ValueError(f"read_noise is {self.read_noise!r}; allowed are uS, one for each level, or 'device'")
            self.law.read_sigma(np.array([self.g_min, self.g_max]), self.time, self.temp)
        for key in ("sigma_us", "sigma_percent", *([] if isinstance(self.read_noise, str) else ["read_noise"])):
            values = getattr(self, key)
            most = 1 if key == "read_noise" else 0  # dimensions
            if values is not None and not (np.ndim(values) <= most and np.isfinite(values).all() and (np.asarray(values) >= 0).all()):
                raise ValueError(f"{key} is {values!r}; allowed are finite {'numbers' if key == 'sigma_percent' else 'uS'} from 0 on")
        if self.rows is not None and self.sigma_us is not None:
            raise ValueError(f"{self.name} has measured rows; sigma_us cannot be changed")


def changed(device: Device, **changes: Any) -> Device:
    """`dataclasses.replace` with a message for attributes that there are not."""
    unknown = sorted(changes.keys() - Device.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no attribute of a device; there are {', '.join(Device.__dataclass_fields__)}")
    return replace(device, **changes)


def spread(count: int, bits: int, who: str, what: str) -> np.ndarray:
    """Which of `count` levels a cell of so many bits uses: `rint(l (count - 1) / (2^bits - 1))`.

    Raises: ValueError where they are fewer than the cell's.
    """
    if count < 2**bits:
        raise ValueError(f"{who} {count} {what}, a cell of {bits} bits needs {2**bits}")
    return np.rint(np.arange(2**bits) * ((count - 1) / (2**bits - 1))).astype(np.intp)


def check_is_device(device: Any) -> None:
    """Refuse what is no `Device`. Raises: ValueError."""
    if not isinstance(device, Device):
        raise ValueError(f"device is {device!r}; a Device is expected, such as Device.load('techA')")


def _check_codes(codes: np.ndarray, count: int, what: str) -> None:
    if codes.dtype.kind not in "ui" or codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < count:
        raise ValueError(f"a {what} is no whole number from 0 to {count - 1}")
