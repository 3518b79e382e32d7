"""When the cells of a device were read: times as text, and the times that data have (`Times`)."""

import math
import re
from dataclasses import dataclass

import numpy as np

UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
TIME = re.compile(rf"\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*({'|'.join(UNITS)})?\s*")


def parse_time(time: float | str | None) -> float | None:
    """Seconds: 3600, "3600", "1h" and "60 min" are the same; None stays None. Units: ms, s, min, h, d, w.

    Raises: ValueError for text that is no time, and for times that are negative or not finite.
    """
    if time is None:
        return None
    if isinstance(time, str):
        found = TIME.fullmatch(time)
        if not found:
            raise ValueError(f"time is {time!r}; allowed are seconds, or a number with one of {', '.join(UNITS)}, such as 10s, 1h or 1d")
        time = float(found[1]) * UNITS[found[2] or "s"]
    if isinstance(time, bool) or not isinstance(time, (int, float, np.integer, np.floating)) or not math.isfinite(time) or time < 0:
        raise ValueError(f"time is {time!r}; allowed are finite seconds from 0 on")
    return float(time)


def show(time: float) -> str:
    """A time as messages name it."""
    return f"{time:g} s"


def show_time(seconds: float) -> str:
    """A time in the largest unit of which it is a whole number: 1h, 90min, 100000s."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


@dataclass(frozen=True)
class Times:
    """The times, in seconds, at which a device may be asked for.

    Attributes:
        points: times that were measured, rising; 0 is the first read.
        between: whether times between two positive points are interpolated, linearly in log t. Log t has no place for 0, so
            nothing lies between the first read and the point after it.
        onward: a law in t holds from here on, without an upper end that its source would name; None: there is no such law.
    """

    points: tuple[float, ...] = ()
    between: bool = False
    onward: float | None = None

    def find(self, time: float | None, owner: str) -> float | None:
        """`time` if the data have it, the first time for None; None for data without times.

        Args: owner, who has the data, for the message.
        Raises: ValueError naming the nearest times, and all that there are.
        """
        if not self.points and self.onward is None:
            if time is not None:
                raise ValueError(f"{owner} has no data over time, so time {show(time)} cannot be asked for")
            return None
        if time is None:
            return self.points[0] if self.points else self.onward
        for point in self.points:
            if math.isclose(time, point, rel_tol=1e-9):
                return point
        positive = [point for point in self.points if point > 0]
        if self.between and positive and positive[0] < time < positive[-1] or self.onward is not None and time >= self.onward:
            return time
        raise ValueError(f"{owner} has no data at {show(time)}; nearest: {self._nearest(time)}; it has {self}")

    def _nearest(self, time: float) -> str:
        known = sorted({*self.points, self.onward} - {None})
        below, above = [t for t in known if t < time][-1:], [t for t in known if t > time][:1]
        return " and ".join(show(t) for t in below + above)

    def bracket(self, time: float | None) -> tuple[int, int, float]:
        """`(i, j, w)`: the value at `time` is `(1 - w) value_i + w value_j` of the points, w linear in log t.

        Args: time, as `find` gives it.
        """
        if time is None:
            return 0, 0, 0.0
        if time in self.points:
            return (i := self.points.index(time)), i, 0.0
        j = next(j for j, point in enumerate(self.points) if point > time)
        low, high = self.points[j - 1], self.points[j]
        return j - 1, j, math.log(time / low) / math.log(high / low)

    def __str__(self) -> str:
        parts = [", ".join(f"{point:g}" for point in self.points) + " s"] if self.points else []
        if self.onward is not None:
            parts.append(f"all times from {show(self.onward)} on")
        lies_between = self.between and sum(point > 0 for point in self.points) > 1
        return " and ".join(parts) + (" and what lies between positive ones" if lies_between else "")
