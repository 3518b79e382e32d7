"""Programming a chip (`program`): one draw of all cells of a network on a device."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import nn

from .cells import Cells, on_grid
from .crossbar import CrossbarLayer, crossbar_layers
from .devices import Device

VALUES, REFERENCE = range(2)  # what a generator draws: the last part of its key


def program(model: nn.Module, device: Device | None, seed: int = 0, reference_cells: str = "device") -> None:
    """Program every crossbar layer of `model`: cells as the device makes them, the same for the same seed on every machine.

    A cell of conductance G has the value `x = (G - G_min) / dG` in levels, on a grid (`cells.Cells`). The reference column of an
    array has cells of the same device, one column for all outputs of that array: a cell of level r_k in each row, or, where r_k
    lies half-way (DoReFa), the mean of a cell of the highest and one of the lowest level.

    Args:
        device: None gives ideal cells again.
        seed: of the chip. Draws have keys (seed, layer's name, slice), so that a layer's cells do not depend on the others.
        reference_cells: "device", or "ideal": a reference without scatter.
    Raises: ValueError for a device of fewer levels than the cells have, or cells that the grid does not hold; no layer is changed.
    """
    if reference_cells not in ("device", "ideal"):
        raise ValueError(f"reference_cells is {reference_cells!r}; allowed are device, ideal")
    layers = crossbar_layers(model)
    if device is None:
        for _, layer in layers:
            layer.set_cells(None)
        return
    chips = [(layer, *_programmed(name, layer, device, seed, reference_cells)) for name, layer in layers]
    for layer, cells, nominal in chips:
        layer.set_cells(cells, nominal)


def _programmed(name: str, layer: CrossbarLayer, device: Device, seed: int, reference_cells: str) -> tuple[Cells, Cells | None]:
    """(cells of a layer, those cells without scatter where they are not the ideal ones)."""
    ideal, spec = layer.ideal_cells(), layer.spec
    fraction, scale = ideal.fraction_bits, 2**ideal.fraction_bits
    levels = (ideal.values.cpu() // scale).numpy().astype(np.uint8)
    twice = layer.weight_quant.reference_twice(spec.slice_bits)
    joint = _joint(name, layer, device, seed, levels) if device.joint else None
    values, reference = np.empty(levels.shape, np.int32), np.empty(levels.shape[:3], np.int32)
    off = np.zeros(len(levels), np.int32)  # an off-current in units of the grid: a digital reference does not take it away
    for k, bits in enumerate(spec.slice_bits):
        g_min, step = device.levels(bits)[0], device.step(bits)
        drawn = device.draw(levels[k], bits, _generator(seed, name, k, VALUES)) if joint is None else joint[k]
        if spec.reference == "digital":
            off[k] = np.rint(scale * g_min / step)
        values[k] = on_grid((drawn - g_min) / step, spec.cell_bits) + off[k]
        if spec.reference == "analog" and reference_cells == "device":
            x = _reference_cells(device, bits, twice[k], levels.shape[1:3], _generator(seed, name, k, REFERENCE))
            reference[k] = np.rint(scale * (x - g_min) / step)
        else:
            reference[k] = twice[k] * scale // 2 + off[k]
    where = ideal.values.device
    cells = Cells(torch.from_numpy(values).to(where), torch.from_numpy(reference).to(where), fraction)
    if not off.any():
        return cells, None
    shift = torch.from_numpy(off).to(where)
    return cells, Cells(ideal.values + shift.view(-1, 1, 1, 1), ideal.reference + shift.view(-1, 1, 1), fraction)


def _joint(name, layer, device, seed, levels):
    """Conductances of cells that were measured together, `[slices, groups, rows, out / groups]`."""
    codes = sum(levels[k].astype(np.int64) << (layer.spec.cell_bits * k) for k in range(len(levels)))
    return device.draw_weights(codes, layer.spec.slice_bits, _generator(seed, name, 0, VALUES))


def _reference_cells(device, bits, twice, shape, generator):
    """Conductance of the reference in each row: of a cell of level `twice / 2`, or the mean of two of the levels around it."""
    if twice % 2 == 0:
        return device.draw(np.full(shape, twice // 2, np.uint8), bits, generator)
    high = min(2**bits - 1, twice)
    pair = device.draw(np.stack([np.full(shape, high, np.uint8), np.full(shape, twice - high, np.uint8)]), bits, generator)
    return pair.mean(0)


def _generator(seed: int, name: str, k: int, part: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode()), k, part]))
