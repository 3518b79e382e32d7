"""The resistance of an array's wires: bit lines, word lines, drivers.

A cell of conductance g sits where a word line crosses a bit line. Row 0 is the far end of a bit line: behind the last row, one
segment of wire further, lies the sense node at 0 V, where the column's current is read. Column 0 is the near end of a word line:
in front of it lies the driver, one segment of wire away.

There are two ways to read such an array. With `access="voltage"` (a crosspoint of linear cells) the word lines carry the input
voltages. The network is linear, so each column's current is a weighted sum of the inputs, and the weights, siemens like the
cells, are the *effective cells*: found once for an array (`effective`), they are exact for all inputs. With `access="gate"` (1T1R)
a word line drives the gates of its row: the cells of a driven row lie between one ideal supply and their bit lines, the others are
cut off. Which cells load a bit line then depends on the input: exact is one pass over the ladder for each input (`gate_exact`),
and close to it are effective cells behind a curve (`gate_curve`).

All arithmetic is float64, and nothing here approximates but `gate_curve`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays.spec import FROM_0, check, choice, number

ACCESS = ("voltage", "gate")

# Ohms of bit line from one 1T1R cell to the next, `4 rho / (AR w) / (1 - t (2 AR + 1) / (AR w))`: a cell is 4 wire widths w high
# (the length of the segment), the wire AR w thick, and a barrier of thickness t around it does not conduct. w, AR, rho, t of each
# node: the wire tables of NeuroSim V1.4. A cell is 12 of these widths wide: so many ohms has the word line.
WIRE_OHM = {"130nm": 0.34, "90nm": 0.66, "65nm": 0.60, "45nm": 0.83, "32nm": 1.3, "22nm": 1.9, "14nm": 2.5, "7nm": 5.6}
ROW_OHM = {"130nm": 1.0, "90nm": 2.0, "65nm": 1.8, "45nm": 2.5, "32nm": 3.8, "22nm": 5.6, "14nm": 7.6, "7nm": 16.7}

TOGETHER = 8  # arrays that are solved at a time: less for each step to wait for, and still in a core's cache


@dataclass(frozen=True)
class Wires:
    """Resistances of an array's wires, and the way of access (docs of each field: its `metadata["help"]`).

    Attributes:
        access: "voltage" (crosspoint: inputs are voltages of the word lines, cells are linear) or "gate" (1T1R: a row at 0 V is
            cut off).
        wire_ohm: ohms of a bit line between neighbouring cells, and between the last cell and the sense node. `WIRE_OHM` has
            those of some technology nodes.
        row_ohm: ohms of a word line between neighbouring cells, and between the driver and the first cell; voltage access only.
            `ROW_OHM` has those of the same nodes.
        driver_ohm: ohms of the source behind each word line, in series with the first segment; voltage access only.
    Raises: ValueError for values outside these, and for `row_ohm` or `driver_ohm` with gate access: no current flows into a gate.
    """

    access: str = choice(
        "voltage", ACCESS, "voltage: word lines carry the inputs as voltages, and cells are linear. gate: a word line switches the "
        "cells of its row to a supply (1T1R).")
    wire_ohm: float = number(0.0, "ohms of a bit line from one cell to the next, and from the last cell to the sense node.", FROM_0)
    row_ohm: float = number(
        0.0, "ohms of a word line from one cell to the next, and from the driver to the first cell. For voltage access.", FROM_0)
    driver_ohm: float = number(0.0, "ohms of the driver of each word line. For voltage access.", FROM_0)

    def __post_init__(self) -> None:
        check(self)
        for name in ("row_ohm", "driver_ohm"):
            if self.access == "gate" and (value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r} with access 'gate'; no current flows into a gate, so allowed is 0")

    @property
    def resist(self) -> bool:
        """Whether any of them does."""
        return bool(self.wire_ohm or self.row_ohm or self.driver_ohm)


def effective(conductance: ArrayLike, wires: Wires) -> np.ndarray:
    """Cells that give the same currents for all inputs without wires: `I = volts @ effective(conductance, wires)`.

    An effective cell is the current of its column per volt of its row. With bit-line wires alone, or with those of word lines
    alone, each line is a ladder of its own. With both it is a nodal solve of the whole array, block by block, in some
    `5 rows columns^3` operations, or `5 columns rows^3` if that is less, several arrays at a time on PyTorch's number of threads.

    Args: conductance, siemens `[..., rows, columns]`: each array of the leading axes is one for itself.
    Returns: siemens, float64, of the same shape.
    """
    cells, wire, row, driver = np.asarray(conductance), wires.wire_ohm, wires.row_ohm, wires.driver_ohm
    if row == driver == 0:
        return cells * _shares(cells, wire, wire)
    if wire == 0:
        return cells * _turned(_shares(_turned(cells), row, row + driver))
    if cells.shape[-1] > cells.shape[-2]:
        return _turned(_by_array(_turned(cells), row, row + driver, wire, wire))
    return _by_array(cells, wire, wire, row, row + driver)


def _turned(cells: np.ndarray) -> np.ndarray:
    """Bit lines for word lines and sense nodes for drivers: seen from there it is the same kind of network, and by reciprocity the
    current of a sense node per volt of a driver is that of the driver per volt of the sense node. Twice turned is unturned."""
    return np.swapaxes(cells, -1, -2)[..., ::-1, ::-1]


def _shares(cells: np.ndarray, step: float, end: float) -> np.ndarray:
    """The share of a current into the bit line at each row that reaches the sense node, where only bit lines resist.

    Of a current that enters at row i, `1 / (1 + r y_i)` gets past the segment r below, the rest flows back into the rows 0..i, whose
    conductance is `y_i = g_i + y_{i-1} / (1 + r y_{i-1})`. Everything is a sum or a product of positive numbers, so no digits are
    lost. By reciprocity it is also the share of the supply's voltage across each cell, if all rows are at the same voltage.

    Args: cells, siemens `[..., rows, columns]`; ohms between neighbouring cells, and behind the last one.
    """
    shares, seen = np.empty_like(cells), 0.0
    last = cells.shape[-2] - 1
    for i in range(last + 1):
        seen = seen + cells[..., i, :]
        shares[..., i, :] = 1 / (1 + (step if i < last else end) * seen)
        seen = seen * shares[..., i, :]
    for i in range(last - 1, -1, -1):
        shares[..., i, :] *= shares[..., i + 1, :]
    return shares


def _by_array(cells: np.ndarray, *resistances: float) -> np.ndarray:
    """`_nodal` of all arrays. A thread takes some of them at a time, and shares none of its work: blocks of 128 are too small for that,
    and to wait for a core that is busy takes far longer than they do."""
    arrays = torch.from_numpy(cells.reshape(-1, *cells.shape[-2:]).copy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        found = list(pool.map(lambda some: _nodal(some, *resistances), arrays.split(TOGETHER)))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return torch.cat(found).view(cells.shape).numpy()


def _nodal(cells: Tensor, step: float, end: float, row: float, source: float) -> Tensor:
    """Effective cells of arrays whose bit lines and word lines resist.

    The ladder of `_shares` with all columns at once, since word lines join them: conductances become symmetric matrices
    `Y_i = K_i + (1 + r Y_{i-1})^-1 Y_{i-1}`, and the currents that flow down into the sense nodes, one column for each driver at
    1 V, are `J_i = (1 + r Y_i)^-1 [J_{i-1}, s_i]`. (`K_i`, `s_i`: see `_word_lines`.)

    Args: cells, siemens `[array, rows, columns]`, float64; ohms between neighbouring cells of a bit line, from the last one to the
        sense node, between neighbouring cells of a word line, from the driver's source to the first one.
    """
    arrays, rows, columns = cells.shape
    unit = torch.eye(columns, dtype=cells.dtype)
    both = cells.new_zeros(arrays, columns, columns + rows)  # Y and, a column for each row so far, J
    at_once = max(2**18 // columns**2, 1)  # rows: 2 MB of K for each array
    for first in range(0, rows, at_once):
        loads, sources = _word_lines(cells[:, first:first + at_once], row, source)
        for i, (load, current) in enumerate(zip(loads.unbind(1), sources.unbind(1)), start=first):
            both[..., :columns] += load
            both[..., columns + i] = current
            past = torch.linalg.inv(unit + (step if i < rows - 1 else end) * both[..., :columns])
            both[..., :columns + i + 1] = past @ both[..., :columns + i + 1]
    return both[..., columns:].mT


def _word_lines(cells: Tensor, row: float, source: float) -> tuple[Tensor, Tensor]:
    """What the bit lines see of each word line with its cells: with bit-line nodes at b volts and the driver at V, the currents
    `s V - K b` flow from the word line into them.

    With D the diagonal matrix of the cells and Z the impedances of the line's nodes, `Z[a, b]` volts at a per ampere into b, cells
    included, `K = D - D Z D`. On a line, `Z[a, b] = Z[a, a] d_{a+1} .. d_b` for b > a, where d_b is the share of the voltage that
    the segment before node b leaves, and `Z[a, a]` follows from what the node sees on either side.

    Args: cells, siemens `[..., columns]`; ohms between neighbouring cells, and from the driver's source to the first one.
    Returns: K, siemens `[..., columns, columns]`; s, siemens `[..., columns]`.
    """
    columns = cells.shape[-1]
    beyond = torch.zeros_like(cells)  # conductance of the line beyond a node
    for c in range(columns - 1, 0, -1):
        load = cells[..., c] + beyond[..., c]
        beyond[..., c - 1] = load / (1 + row * load)
    before = torch.empty_like(cells)  # resistance of the line before a node, with the node's own cell
    for c in range(columns):
        series = before[..., c - 1] + row if c else cells.new_tensor(source)
        before[..., c] = series / (1 + series * cells[..., c])
    segments = cells.new_tensor([source] + [row] * (columns - 1))
    left = 1 / (1 + segments * (cells + beyond))
    own = before / (1 + before * beyond)  # Z[a, a]
    loads = cells.new_empty(*cells.shape, columns)
    fed = torch.zeros_like(cells)  # D Z[:, b]: volts of node b from the cells a <= b, each at 1 V behind
    for b in range(columns):
        fed[..., :b] *= left[..., b, None]
        fed[..., b] = cells[..., b] * own[..., b]
        loads[..., b, :b + 1] = fed[..., :b + 1] * -cells[..., b, None]
        loads[..., :b, b] = loads[..., b, :b]
    loads.diagonal(dim1=-2, dim2=-1).add_(cells)
    return loads, cells * left.cumprod(-1)


# ---- gate access ---------------------------------------------------------------------------------------------------------

INPUTS_AT_ONCE = 64  # so that what one pass works on stays in a core's cache
STRAIGHT = (1.0, 0.0, 0.0)  # the curve of wires that do not resist
FIT_ROUNDS = 30  # of a fit of one curve to many arrays: a third of them where these are alike


def gate_exact(conductance: ArrayLike, on: ArrayLike, wire_ohm: float) -> np.ndarray:
    """The currents of bit lines with one ideal supply of 1 V, each input by a pass over its ladder: exact.

    The cells of the rows that are on lie between the supply and the bit line. `I = y_last` volts, where `y_i = x / (1 + r x)`,
    `x = y_{i-1} + on_i g_i`, is the conductance from the supply to the wire below row i.

    Args: conductance, siemens `[..., rows, columns]`; on, `[..., n, rows]`, 1 or True where a row is driven, else 0; wire_ohm, see
        `Wires`. Leading axes are arrays, each for itself; those of `on` may be missing.
    Returns: amperes `[..., n, columns]`.
    """
    cells, on = np.asarray(conductance), np.asarray(on, dtype=np.float64)
    arrays = np.broadcast_shapes(cells.shape[:-2], on.shape[:-2])
    cells, on = (np.broadcast_to(each, arrays + each.shape[-2:]) for each in (cells, on))
    currents = np.zeros((*arrays, on.shape[-2], cells.shape[-1]))
    for index in np.ndindex(arrays):
        for start in range(0, on.shape[-2], INPUTS_AT_ONCE):
            part = slice(start, start + INPUTS_AT_ONCE)
            _pass_down(cells[index], on[index][part], wire_ohm, currents[index][part])
    return currents


def _pass_down(cells: np.ndarray, on: np.ndarray, wire_ohm: float, seen: np.ndarray) -> None:
    """Add to `seen`, zeros `[n, columns]`, the conductances from the supply to the sense node."""
    work = np.empty_like(seen)
    for gates, row in zip(np.ascontiguousarray(on.T)[..., None], cells):
        np.multiply(gates, row, out=work)
        seen += work
        np.multiply(seen, wire_ohm, out=work)
        work += 1
        seen /= work


class Curve(NamedTuple):
    """What gate arrays are nearly: effective cells behind a curve, `I = S (b_0 + b_1 S + b_2 S^2)` at 1 V, `S = on @ cells`.

    cells: siemens, `[..., rows, columns]`.
    b: `(b_0, b_1, b_2)` for S in siemens, so in 1, 1/siemens, 1/siemens^2.
    error: the largest of the arrays' `sqrt(sum (I - exact)^2 / sum exact^2)` over the inputs and columns that it was fitted on.
    left: what the wires leave of each row's cells, `[..., rows]`.
    """

    cells: np.ndarray
    b: tuple[float, float, float]
    error: float
    left: np.ndarray


def gate_curve(conductance: ArrayLike, on: ArrayLike, wire_ohm: float, b: tuple[float, float, float] | None = None) -> Curve:
    """Effective cells and a curve of one variable that come close to `gate_exact`, fitted on the inputs of a calibration.

    The mean bit line of an array has at row i the mean conductance of all its inputs and columns. With h_i the share of the supply's
    voltage across its cells, a cell that is a little larger adds `V h_i^2 dg` to the current: its own drop is `V h_i`, and the share
    h_i of what it lets through reaches the sense node. So the effective cells are `f g h^2`, and what a larger or smaller current
    changes for all rows alike is left to `I = V S (b_0 + b_1 S + b_2 S^2)`, S the sum of the effective cells of the rows that are on.
    One curve serves all arrays, and each array has a factor f: both by least squares, each array's currents in units of their root
    mean square, so that sparse ones count as much as dense ones. f is 1 for a single array, near 1 for alike ones, and makes up for the
    load that a curve takes for granted behind which shorter or sparser arrays stand (`b`).

    With `a = n r I_0 / V` (n rows, I_0 the mean current without wires), the error is some 0.5 % for a = 0.4 and 1.2 % for 1.4 where
    about as many rows are on in each input, and twice that where inputs or columns differ much.

    Args: as in `gate_exact`; all exact currents are held in memory, so a sample of inputs and columns should be given.
    """
    exact = gate_exact(conductance, on, wire_ohm)
    arrays = exact.shape[:-2]
    cells, on = np.asarray(conductance, dtype=np.float64), np.asarray(on, dtype=np.float64)
    cells = np.broadcast_to(cells, arrays + cells.shape[-2:])
    if wire_ohm == 0 or not exact.any():
        return Curve(cells.copy(), STRAIGHT, 0.0, np.ones(cells.shape[:-1]))
    left = _shares((on.mean(axis=-2) * cells.mean(axis=-1))[..., None], wire_ohm, wire_ohm)[..., 0] ** 2
    s, size = on @ (cells * left[..., None]), _root_mean_square(exact)
    size[size == 0] = 1.0  # of an array that conducts nothing, which every curve fits
    b, factor = _fitted(s, exact, size, b)
    factor = factor.reshape(arrays)
    error = _root_mean_square(_behind_curve(factor[..., None, None] * s, b) - exact) / size
    left = factor[..., None] * left
    return Curve(cells * left[..., None], b, float(error.max()), left)


def _fitted(s, exact, size, b):
    """(b, f of each array) of least `sum ((c(f S) - exact) / size)^2`, c the curve; where b is given, f of it. In turns the coefficients,
    which are linear, and a step of Gauss and Newton of each f, from sums of powers of S: of each array's reads one pass."""
    count = math.prod(s.shape[:-2])
    s, exact, weight = s.reshape(count, -1), exact.reshape(count, -1), size.reshape(count) ** -2
    top, power = s.max(), np.arange(1, 4)  # powers of S / top, of the size of 1, lose no digits
    powers = np.cumprod(np.broadcast_to(s / top, (6, *s.shape)), axis=0)
    pairs = weight * powers.sum(-1)[np.add.outer(power, power) - 1]  # [power, power, array]
    currents = weight * (powers[:3] * exact).sum(-1)
    factor, found = np.ones(count), None if b is None else np.array(b) * top**power
    for _ in range(FIT_ROUNDS):
        grown = factor ** power[:, None]
        if b is None:
            found, *_ = np.linalg.lstsq((grown * grown[:, None] * pairs).sum(-1), (grown * currents).sum(-1), rcond=None)
        curve = found[:, None] * grown
        steep = power[:, None] * curve / factor
        slope = np.einsum("ia,ja,ija->a", steep, curve, pairs) - (steep * currents).sum(0)
        bend = np.einsum("ia,ja,ija->a", steep, steep, pairs)
        factor = factor - np.divide(slope, bend, out=np.zeros(count), where=bend > 0)
    return b or tuple(float(each) for each in found / top**power), factor


def _root_mean_square(currents):
    """Of each array, `[..., 1, 1]`."""
    return np.sqrt(np.mean(currents**2, axis=(-1, -2), keepdims=True))


def _behind_curve(s, b):
    return s * (b[0] + s * (b[1] + s * b[2]))
