"""16-bit arithmetic that gives exactly the codes of an ADC: searched for, then checked on every read that can occur."""

from __future__ import annotations

import numpy as np

EVEN, TOWARDS_ZERO = 1, 2  # how a form treats ties; 0 where there are none


def fixed_point(u: np.ndarray, codes: np.ndarray, gain: float,
                bounds: tuple[int, int]) -> tuple[int, int, int, int, int] | None:
    """Find 16-bit arithmetic that gives `codes` for every `u`: `y = floor((u 2^s + c) M / 2^16)`,
    `q = floor((y + t) / 2^f)`, clipped to `bounds`.

    Reads half-way between two levels may need the last bit t: `floor(y / 2^f) mod 2` sends them to the even code, `y < 0`
    to the one nearer to zero; elsewhere t = 0.

    Args: u, all reads that can occur, ascending integers; codes, what the ADC gives for them; gain, codes a unit of `u`.
    Returns: `(s, c, M, f, kind of t)`, or None where none of the candidates gives every code.
    """
    x = u.astype(np.int64)
    reach = int(np.abs(x).max()) + 1 + int(np.ceil(1 / gain))
    shift = 15 - int(reach).bit_length()
    fraction = min(14, int(np.floor(np.log2(32767 / gain))) - 16 + shift)
    if shift < 0 or fraction < 0:
        return None
    factor = gain * 2.0 ** (16 + fraction - shift)
    if not 1 <= factor < 32760:
        return None
    half = 2.0 ** (15 + fraction) / factor  # raises q by one half
    # No form falls where u rises, nor do codes: one that has both ends of each run of equal codes has all that lie between.
    changes = np.diff(codes) != 0
    ends = np.append(True, changes) | np.append(changes, True)
    for tie in (0, EVEN, TOWARDS_ZERO):
        centre = half - (2.0**15 / factor if tie else 0)  # half of the last bit: a tie lies within its step
        for m in np.unique(np.rint(factor).astype(int) + np.array([0, 1, -1, 2, -2, 3, -3, 4, -4])):
            c = int(round(centre)) + np.array(sorted(range(-24, 25), key=abs))[:, None]
            q = np.clip(_apply_form(x[ends], (shift, c, m, fraction, tie)), *bounds)
            good = (q == codes[ends]).all(axis=1) & (np.abs((x[ends] << shift) + c) < 2**15).all(axis=1)
            if good.any():
                form = shift, int(c[good.argmax(), 0]), int(m), fraction, tie
                return form if np.array_equal(np.clip(_apply_form(x, form), *bounds), codes) else None
    return None


def _apply_form(u, form):
    """`q` of a form, not clipped."""
    shift, offset, factor, fraction, tie = form
    y = (((u.astype(np.int64) << shift) + offset) * factor) >> 16
    nudge = {0: 0, EVEN: (y >> fraction) & 1, TOWARDS_ZERO: y < 0}[tie]
    return (y + nudge) >> fraction
