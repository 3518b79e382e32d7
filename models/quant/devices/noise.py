"""Read noise of a cell as a line in its value (`affine`): variances of independent cells then add up to a column's in closed form."""

import numpy as np


def affine(x: np.ndarray, sigma: np.ndarray, top: float) -> tuple[float, float, float]:
    """`s^2 = c_0 + c_1 x`: of the lines that are nowhere negative on 0..top, that of least squares through `sigma^2`.

    Args: x, values of the levels; sigma, of each level in the same unit.
    Returns: `(c_0, c_1, misfit)`, misfit the largest |sigma of the line - sigma| over the levels, in units of their largest sigma.
    """
    c_0, c_1 = _line(x, sigma**2, top)
    fit = np.sqrt(np.maximum(c_0 + c_1 * x, 0.0))
    return c_0, c_1, float(np.abs(fit - sigma).max() / (sigma.max() or 1.0))


def _line(x: np.ndarray, variance: np.ndarray, top: float) -> tuple[float, float]:
    """Where the free line falls below 0 at one end, the best line that does not is 0 there (it cannot at both: variances are not
    negative, and it passes through their mean)."""
    if not np.ptp(variance):  # exactly: the mean of many equal numbers is rounded
        return float(variance[0]), 0.0
    around, mean = x - x.mean(), variance.mean()
    if not around.any():  # levels that have become one
        return float(mean), 0.0
    c_1 = float(around @ (variance - mean) / (around @ around))
    c_0 = float(mean - c_1 * x.mean())
    if c_0 < 0:
        return 0.0, float(x @ variance / (x @ x))
    if c_0 + c_1 * top < 0:
        c_1 = -float((top - x) @ variance / ((top - x) @ (top - x)))
        return -c_1 * top, c_1
    return c_0, c_1
