"""The last of some values at which a mean keeps a bound, found by tests that take no more chips and images than each needs (`LastKept`).

The model. The network has N images, which are fixed, and any number of chips, which are drawn. `e[c, i]` is what image i loses or wins on
chip c, beside the software. Its mean over the N images and all chips that could be is what must keep the bound. A look sees C chips on n of
the images, drawn without replacement (with `--limit` no look sees all N), and takes

    m = mean e[c, i],   V = S_c^2 / C + (1 - n / N) S_i^2 / n

S_c^2 is the variance of the chips' means and S_i^2 that of the images'. (What chips and images have together is in both: V is rather too
large.) `(m - mean) / sqrt(V)` is taken as Student's t, of Welch's and Satterthwaite's degrees of freedom. A value is decided when the
interval `m +- t sqrt(V)` lies on one side of the bound; else the next look sees more.

Of images that are right or wrong, e is -100, 0 or 100: where its mean is at a bound b, its variance is at least `100 |b| - b^2`. The
interval is no narrower than this and the normal distribution make it.

The chance of error. A value is decided wrongly on one side alone, with chance a at each look, at the most. There are K looks, and at
most the first `2 s + 2` values that are looked at are decided, with `s = ceil(log2(values + 1))`: as many as a bisection takes, and
`s / 2 + 1` on either side of what it found. (From a start somewhere, a bisection takes s values more; without the sides there are `s + 2`
less.) A bisection that comes back may look at others, which stay open.
With `a = error / (K tests)` all decisions together are wrong with at most the chance `error`, whatever they have to do with each other
(Boole's inequality).

Where to look next needs less. The bisection goes on from a value that is open as soon as its interval of chance `ROUGH` on each side lies
on one side of the bound: so values far from the limit take the first look alone. The two values that it ends at are then looked at until
they are decided, or all was seen. If that changes what one of them says, the bisection goes on, and no value is left at so early a look
again: chips and images are the same at all values, and what misled at one would lead from one to the next.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FIRST_CHIPS = 4  # of the first looks
FEWEST, TIMES = 100, 8  # images of the first look, at least, and by what images grow from look to look
ROUGH = 0.2  # chance, on each side, by which an interval tells a bisection where to go on


class Look(NamedTuple):
    """What a test sees: the first chips and the first images."""

    chips: int
    images: int


def ends_of(images: int) -> list[int]:
    """Ends of the blocks in which images are taken: each look sees whole ones, and the next one measures only those that are new."""
    ends = [images]
    while ends[0] >= TIMES * FEWEST:
        ends.insert(0, ends[0] // TIMES)
    return ends


def looks_of(ends: Sequence[int], chips: int) -> list[Look]:
    """The looks at a value, each of more than the one before. Args: ends, of the blocks of images; chips, the most."""
    return list(dict.fromkeys([*(Look(min(chips, FIRST_CHIPS), end) for end in ends), Look(chips, ends[-1])]))


def interval(found: np.ndarray, of_all: int, error: float, least: float = 0.0) -> tuple[float, float]:
    """(m, half the width of the interval) of the values `[C, n]` of some chips and images; of one chip, which stands for itself, from the
    images alone.

    Args: of_all, N; error, by which the mean is beyond one end; least, what the variance of e is at least where its mean is at the bound:
        few chips and images that are alike by chance say less than they seem to.
    """
    from scipy import special  # half a second less than scipy.stats

    chips, images = found.shape
    left = 1 - images / of_all
    parts = [(left * (found.mean(0).var(ddof=1) if images > 1 else math.inf) / images, images - 1)]
    if chips > 1:
        parts.append((found.mean(1).var(ddof=1) / chips, chips - 1))
    parts = [(float(each), freedom) for each, freedom in parts if each > 0]
    variance = sum(each for each, _ in parts)
    if variance == math.inf:  # of one image nothing follows for others
        half = math.inf
    elif not parts:  # nor of images that are all alike, unless it is known how they differ at the bound
        half = math.inf if left and not least else 0.0
    else:
        half = -special.stdtrit(variance**2 / sum(each**2 / freedom for each, freedom in parts), error) * math.sqrt(variance)
    at_bound = least * (left + (chips > 1) / chips) / images
    return float(found.mean()), float(max(half, -special.ndtri(error) * math.sqrt(at_bound)))


class Seen(NamedTuple):
    """A look at a value. Attributes: place, of the value; look; low, high, between which the mean is; keeps, whether it keeps the bound,
    None where this is open; likely, what the mean says."""

    place: int
    look: Look
    low: float
    high: float
    keeps: bool | None
    likely: bool


def away(start: int, end: int) -> Iterator[int]:
    """Places from one to another: 2, 8, 32, ... away from the first, and the last."""
    yield start
    way, step = (1 if end > start else -1), 2
    while step < way * (end - start):
        yield start + way * step
        step *= 4
    if start != end:
        yield end


@dataclass
class LastKept:
    """The last of `count` values whose mean keeps a bound, where none behind one that does not keeps it. `find` fills the attributes.

    Args: of_all, N; observe, `e[c, i]` of a value at a look; holds, whether a mean keeps the bound, None for what no mean can be; error,
        least, see above and `interval`; say, is told of each look; start, the place where it is thought to be; sides, whether values on
        either side are tested that the bisection did not need, until one is decided.
    Attributes: place, of this value, -1 where there is none; sure, lost, of the last value that was decided to keep the bound and the first
        one that was decided not to, -1 and `count` where there is none: the value is from `sure` on and before `lost`, but for the chance
        `error`; seen, the last look at each place.
    """

    count: int
    looks: Sequence[Look]
    of_all: int
    error: float
    observe: Callable[[int, Look], np.ndarray]
    holds: Callable[[float], bool | None]
    least: float = 0.0
    say: Callable[[Seen], object] = lambda seen: None
    start: int | None = None
    sides: bool = True

    def __post_init__(self) -> None:
        self.place, self.sure, self.lost = -1, -1, self.count
        self.seen: dict[int, Seen] = {}
        self.enough = 0  # the first look at which a likely value is left
        steps = math.ceil(math.log2(self.count + 1))
        self.tests = min(self.count, steps * (1 if self.start is None else 2) + (steps + 2) * self.sides)
        self.each = self.error / (len(self.looks) * self.tests)

    def find(self) -> "LastKept":
        """Bisect, again as long as more looks at the two values between which it ends change its way, and then go away from them to the
        sides until a value is decided."""
        low, high = self._between()
        while not all(self._stays(place) for place in (low, high) if place in self.seen):
            low, high = self._between()
        for start, end in ((low, 0), (high, self.count - 1)) if self.sides else ():
            for place in away(start, end):
                if not self.sure < place < self.lost:
                    break
                self._test(place)
        self.place = min(max(low, self.sure), self.lost - 1)
        return self

    def _between(self) -> tuple[int, int]:
        """The last place that seems to keep the bound, and the next one: by bisection; from a start, by steps away from it first, twice as
        far each time, until there is a place on either side."""
        low, high, step = -1, self.count, 1
        place = (low + high) // 2 if self.start is None else self.start
        while high - low > 1:
            seen = self._test(place, rough=True)
            low, high = (place, high) if seen.likely else (low, place)
            beyond = low + step if high == self.count else high - step if low == -1 else high
            place, step = ((low + high) // 2, step) if self.start is None or not low < beyond < high else (beyond, 2 * step)
        return low, high

    def _stays(self, place: int) -> bool:
        """Whether a place that was looked at says the same after all looks that it needs. Where not, few chips and images misled, and the
        same ones would elsewhere: from then on values take as many looks as this one did."""
        before, after = self.seen[place], self._test(place)
        if after.likely != before.likely:
            self.enough = max(self.enough, self.looks.index(after.look))
        return after.likely == before.likely

    def _test(self, place: int, rough: bool = False) -> Seen:
        """Look at a value until it is decided, or all was seen. Args: rough, or until it is likely enough to go on from there."""
        seen = self.seen.get(place)
        first = 0 if seen is None else self.looks.index(seen.look) + 1
        if seen and (seen.keeps is not None or rough and first > self.enough):
            return seen
        for number, look in enumerate(self.looks[first:], first):
            found = self.observe(place, look)
            (mean, half), (_, likely) = (interval(found, self.of_all, each, self.least) for each in (self.each, ROUGH))
            decided, keeps = [*self.seen, place].index(place) < self.tests and self._agree(mean, half), bool(self.holds(mean))
            seen = self.seen[place] = Seen(place, look, mean - half, mean + half, keeps if decided else None, keeps)
            self.say(seen)
            if decided:
                self.sure, self.lost = (max(self.sure, place), self.lost) if seen.keeps else (self.sure, min(self.lost, place))
            if decided or rough and number >= self.enough and self._agree(mean, likely):
                break
        return seen

    def _agree(self, mean: float, half: float) -> bool:
        """Whether an interval lies on one side of the bound, and within what a mean can be."""
        found = {self.holds(mean + side) for side in (-half, 0, half)}
        return len(found) == 1 and None not in found

    @property
    def used(self) -> int:
        """Images that all looks took, those of each chip counted."""
        return sum(seen.look.chips * seen.look.images for seen in self.seen.values())
