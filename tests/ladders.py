"""Currents of one array with wires, of its cells and inputs: what the simulator makes effective cells and curves of."""

import numpy as np

from models.quant.devices.wires import Wires, effective


def solve(conductance, volts, wire_ohm, row_ohm=0.0, driver_ohm=0.0, access="voltage"):
    """The currents of the columns, amperes `[n, columns]`, by Kirchhoff's laws. Gate access: a row at 0 V is cut off, the cells of another
    row i lie between an ideal supply at `volts[i]` and their bit lines. Args: conductance, siemens `[rows, columns]`; volts `[n, rows]`."""
    cells, volts = np.array(conductance, float), np.array(volts, float)
    if access == "voltage":
        return volts @ effective(cells, Wires(access, wire_ohm, row_ohm, driver_ohm))
    # What a bit line is, seen from below a row: the current into a short circuit, and the conductance.
    short, seen = np.zeros((2, len(volts), cells.shape[1]))
    for i, row in enumerate(cells):
        seen += (volts[:, i, None] != 0) * row
        short += volts[:, i, None] * row
        passed = 1 / (1 + wire_ohm * seen)  # the share of a short circuit's current that gets through the next segment
        seen *= passed
        short *= passed
    return short


def behind(curve, on):
    """`S (b_0 + b_1 S + b_2 S^2)`, `S = on @ cells`, amperes at 1 V. Args: curve, of `gate_curve`."""
    s, (b0, b1, b2) = on @ curve.cells, curve.b
    return s * (b0 + s * (b1 + s * b2))
