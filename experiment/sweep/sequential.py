"""Which of some values keep a bound in the mean, found by tests that take no more chips and images than each needs (`LastKept`).

The model. The network has N images, which are fixed, and any number of chips, which are drawn. `e[c, i]` is what image i loses or wins on
chip c, beside the software. Its mean over the N images and all chips that could be is what must keep the bound. A look sees C chips on n of
the images, drawn without replacement (with `--limit` no look sees all N), and takes

    m = mean e[c, i],   V = S_c^2 / C + (1 - n / N) S_i^2 / n

S_c^2 is the variance of the chips' means and S_i^2 that of the images'. (What chips and images have together is in both: V is rather too
large.) `(m - mean) / sqrt(V)` is taken as Student's t, of Welch's and Satterthwaite's degrees of freedom. A value is decided when the
interval `m +- t sqrt(V)` lies on one side of the bound; else the next look sees more.

Of images that are right or wrong, e is -100, 0 or 100: where its mean is at a bound b, its variance is at least `100 |b| - b^2`. The
interval is no narrower than this and the normal distribution make it.

Two kinds of looks. A rough one sees `FIRST_CHIPS` chips. It says where to look next, and is left as soon as its interval of chance `ROUGH`
on each side lies on one side of the bound. Only sure ones decide: they see C chips, and where these differ by more than their images
explain, at last some more.

The chance of error. A value is decided wrongly on one side alone, with chance a at each look, at the most. There are K sure looks, and at
most the first T values that are looked at are decided. With `a = error / (K T)` all decisions together are wrong with at most the chance
`error`, whatever the decisions have to do with each other (Boole's inequality). Few values are all among these T. Which ones of many are,
depends on what was seen: that this makes no more errors was tried on simulated networks (`tests/test_limits.py`).

What no test can know. C chips have none of a kind of chip that is a share p of all with the chance `(1 - p)^C`: they say nothing of it.
So a half of the chance of error is for that, and what is decided holds of chips without kinds that are rarer than `unseen_share(C, error)`.

Where to look. Nothing says that values behind one that does not keep the bound do not keep it either. So few values are all looked at until
they are decided, or all was seen. Of more values first `FEW` are looked at roughly, from end to end. Then the values between the last one
that seems to keep the bound and the next are bisected, and if others do not fall in order, also those between the first one that seems not
to keep it and the one before. The values around are looked at until they are decided, or all was seen. If that changes what one of them
says, looks of as few chips as misled count no more: chips are the same at all values, and those that misled at one mislead at others. At
last values to the sides are looked at, until one is decided on each. (Without the sides many values are bisected alone.)
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FIRST_CHIPS = 4  # of rough looks
FEWEST, TIMES = 100, 8  # images of the first look, at least, and by what images grow from look to look
FEW = 12  # values that are all looked at
ROUGH = 0.2  # chance, on each side, by which an interval tells where to go on
DIFFER = 2  # by how much the variance of chips' means is more than images explain: 1.9 by chance in one of 20 cases, of ten chips


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
    """Looks of so many chips at images that end there."""
    return [Look(chips, end) for end in ends]


def unseen_share(chips: int, error: float) -> float:
    """p with `(1 - p)^C = error`: with this chance so many chips have none of a kind that is a share p of all."""
    return 1 - error ** (1 / chips)


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
    """A look at a value. Attributes: place, of the value; look; mean, half, the interval; keeps, whether it keeps the bound, None where
    this is open; likely, what the mean says."""

    place: int
    look: Look
    mean: float
    half: float
    keeps: bool | None
    likely: bool


def differ(found: np.ndarray) -> bool:
    """Whether the means of chips differ by more than the images of each explain. Args: found, `e[c, i]`.

    `S_c^2 > DIFFER S_r^2 / n`, S_r^2 the variance of what is left of e without the means of chips and of images.
    """
    chips, images = found.shape
    if min(chips, images) == 1:
        return False
    left = found - found.mean(1, keepdims=True) - found.mean(0) + found.mean()
    return bool(found.mean(1).var(ddof=1) * (chips - 1) * (images - 1) > DIFFER * np.square(left).sum() / images)


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
    """Which of `count` values keep a bound in the mean, the first those that should keep it most easily. `find` fills the attributes.

    Args: ends, of the blocks of images; chips, C, and the most, where they differ; of_all, N; observe, `e[c, i]` of a value at a look;
        holds, whether a mean keeps the bound, None for what no mean can be; error, least, see above and `interval`; say, is told of each
        look; start, the place where the last one is thought to be; sides, whether values are looked at that the bisection does not need.
    Attributes: place, of the last value whose mean keeps the bound, -1 where there is none; sure, lost, of the last value that was decided
        to keep it and the first one that was decided not to, -1 and `count` where there is none; undecided, places that were looked at in
        full, and left open; not_in_order, those before `place` whose means do not keep the bound; unseen, the share of all chips that a
        kind may be and none of it was seen, None for one chip; seen, the last look at each place.
    """

    count: int
    ends: Sequence[int]
    chips: tuple[int, int]
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
        self.done: set[int] = set()  # places that were decided, or of which all was seen
        chips, most = self.chips
        self.looks = list(dict.fromkeys([*looks_of(self.ends, chips), Look(most, self.ends[-1])]))
        self.enough = min(chips, FIRST_CHIPS)  # chips: looks of fewer count for nothing
        steps = math.ceil(math.log2(self.count + 1))
        self.tests = min(self.count, FEW + 2 * steps + 2 if self.sides or self.count <= FEW else 2 * steps)
        own = self.error / (1 + (chips > 1))  # chance of error of the tests
        self.each, self.unseen = own / (len(self.looks) * self.tests), unseen_share(chips, self.error - own) if chips > 1 else None
        start, several = [] if self.start is None else [self.start], np.linspace(0, self.count - 1, FEW).round().astype(int).tolist()
        self.first = [*range(self.count)] if self.count <= FEW else start + several * self.sides

    def find(self) -> "LastKept":
        """Look as long as there is a reason to."""
        while (asked := self._next()) is not None:
            self._test(*asked)
        self.place = self._falls()[0][0]
        self.undecided = [place for place in sorted(self.done) if self.seen[place].keeps is None]
        self.not_in_order = [place for place, keeps in self._known() if place < self.place and not keeps]
        return self

    def _early(self, place: int) -> bool:
        """Whether a place was not looked at, or so early that it counts for nothing."""
        return place not in self.done and (place not in self.seen or self.seen[place].look.chips < self.enough)

    def _known(self) -> list[tuple[int, bool]]:
        """Places that were looked at, in their order, and whether their means keep the bound."""
        return [(place, self.seen[place].likely) for place in sorted(self.seen) if not self._early(place)]

    def _falls(self) -> list[tuple[int, int]]:
        """Where values that were looked at cease to keep the bound, by their means, the last pair first."""
        pairs = itertools.pairwise([(-1, True), *self._known(), (self.count, False)])
        return [(low, high) for (low, keeps), (high, does) in pairs if keeps and not does][::-1]

    def _next(self) -> tuple[int, bool] | None:
        """The place to look at next, and whether roughly; None where there is none."""
        for place in filter(self._early, self.first):
            return place, self.count > FEW
        falls = self._falls()
        (low, beyond), (before, high) = falls[0], falls[-1]
        for start, end in (falls[0], falls[-1]):
            if end - start > 1:
                return self._between(start, end), True
        for place in (low, beyond, before, high):
            if place in self.seen and place not in self.done:
                return place, False
        for side, end, wanted in ((low, 0, self.sure.__lt__), (high, self.count - 1, self.lost.__gt__)) if self.sides else ():
            for place in itertools.takewhile(wanted, away(side, end)):
                if 0 <= place < self.count and place not in self.done and (place in self.seen or len(self.seen) < self.tests):
                    return place, False
        return None

    def _between(self, low: int, high: int) -> int:
        """The place to look at between two: in the middle; from a start, steps away from it first, twice as far each time, until there is a
        place on either side."""
        middle = (low + high) // 2
        if self.start is None:
            return middle
        step = 2 ** (len(self.seen) - 1)
        beyond = low + step if high == self.count else high - step if low == -1 else middle
        return beyond if low < beyond < high else middle

    def _test(self, place: int, rough: bool) -> None:
        """Look at a value until it is decided, or all was seen. Args: rough, or until it is likely enough to go on from there."""
        before = self.seen.get(place)
        for look in looks_of(self.ends, self.enough) if rough else self.looks:
            if before and (look == before.look or look.images < before.look.images):
                continue  # it saw as much
            found = self.observe(place, look)
            (mean, half), (_, likely) = (interval(found, self.of_all, each, self.least) for each in (self.each, ROUGH))
            first_ones = [*self.seen, place].index(place) < self.tests
            decided = look in self.looks and first_ones and self._agree(mean, half)
            keeps = bool(self.holds(mean))
            self.seen[place] = Seen(place, look, mean, half, keeps if decided else None, keeps)
            self.say(self.seen[place])
            if decided:
                self.sure, self.lost = (max(self.sure, place), self.lost) if keeps else (self.sure, min(self.lost, place))
            if decided or rough and self._agree(mean, likely):
                break
            if look.images == self.ends[-1] and self.chips[0] <= look.chips < self.chips[1] and not differ(found):
                break
        after = self.seen[place]
        if not rough or after.keeps is not None:
            self.done.add(place)
        if before and before.likely != after.likely:  # so few chips misled
            self.enough = max(self.enough, after.look.chips)

    def _agree(self, mean: float, half: float) -> bool:
        """Whether an interval lies on one side of the bound, and within what a mean can be."""
        found = {self.holds(mean + side) for side in (-half, 0, half)}
        return len(found) == 1 and None not in found

    @property
    def used(self) -> int:
        """Images that all looks took, those of each chip counted."""
        return sum(seen.look.chips * seen.look.images for seen in self.seen.values())
