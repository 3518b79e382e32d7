"""Programming a chip (`program`): one draw of all cells of a network on a device, its wires and its converters."""

import functools
import hashlib
import logging
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..arrays.cells import LARGEST_CELL, Cells, Chip, fraction_bits
from ..arrays.circuits import Circuits
from ..arrays.readout import Readout
from ..devices import Device, Wires, faults
from ..devices.device import check_is_device
from ..devices.wires import STRAIGHT, effective, gate_curve
from ..layers.crossbar import CrossbarLayer, crossbar_layers, on_crossbars
from ..storage import sources
from ..storage.effective import kept

log = logging.getLogger(__name__)

VALUES, REFERENCE, CONVERTERS, INPUTS, NEGATIVE, WEIGHTS, CIRCUITS = range(7)  # what a generator draws: the last part of its key;
# of circuits with the bits of their converters added
MOST_LEVELS = 1e6  # levels, of a converter's noise or offset: 32 bits hold it on the grid
MOST_MISMATCH = 0.3  # share, of a unit capacitor: at three deviations below the mean something is left of it
COLUMNS = 128  # bit lines of one array, where word lines resist: outputs of one slice, behind its reference columns, or their pairs
FITTED_INPUTS, FITTED_GROUPS = 64, 8  # of the curve of gate access: random inputs, in which
DENSEST, SPARSE = 0.5, 3  # DENSEST u^SPARSE of the rows are on, u uniform: an eighth in the mean, as high digits behind a ReLU have few


@dataclass(frozen=True)
class _Draw:
    """Everything that decides a chip, see `program`, and who wants to know how far it is."""

    device: Device
    seed: int
    reference_cells: str
    adc_noise: float
    adc_offset: float
    adc_gain: float
    circuits: Mapping[str, float]  # the first numbers of `Circuits`, by their flags
    wires: Wires
    noise_seed: int
    done: Callable[[], Any]  # to be called behind each slice
    curve_errors: list[float] = field(default_factory=list)  # of the curves that were fitted


def program(model: nn.Module, device: Device | None, seed: int = 0, reference_cells: str = "device", *,
            read_noise: float | str | None = None, adc_noise: float = 0.0, adc_offset: float = 0.0, adc_gain: float = 0.0,
            adc_inl: float = 0.0, adc_dnl: float = 0.0, adc_mismatch: float = 0.0, comparator_noise: float = 0.0,
            wires: Wires | None = None, noise_seed: int = 0, progress: bool = False) -> None:
    """Program every crossbar layer of `model`: cells as the device makes them, the same for the same seed on every machine.

    A cell of conductance G has the value `x = (G - G_min) / dG` in levels, on a grid (`cells.Cells`). An array has one reference
    column of the same device, for all its outputs. Each of its rows has a cell of level r_k. Where r_k lies half-way (DoReFa), it has the
    mean of a cell of the highest and one of the lowest level. Pairs (`pair`) have no reference column. Both of their cells are drawn,
    also those that are off, and the grid holds their difference.

    ADC ranges and their correction stay as they are, so the correction is still that of the cells before. Call `correct` (or
    `calibrate`) afterwards to measure it on the new ones. With a digital reference the reads include the device's off-current, so ranges
    of other cells do not fit. Call `calibrate` there, also after `program(model, None)`.

    Args:
        device: None gives ideal cells again.
        seed: of the chip. Draws have keys (seed, layer's name, slice), so that a layer's cells do not depend on the others.
        reference_cells: "device", or "ideal": a reference without scatter.
        read_noise: standard deviation of a cell's reads, uS, in place of the device's (`Device.read_noise`).
        adc_noise: standard deviation of a converter's noise, in levels of a cell.
        adc_offset, adc_gain: standard deviations of the converters' offsets, in levels of a cell, and of their relative gains. Each
            converter has one draw, which stays: each physical column, or as many as share one (`columns_per_adc` bit lines; a pair is two).
        adc_inl, adc_dnl: standard deviations of the converters' INL and DNL, in steps (`arrays.circuits`).
        adc_mismatch: relative standard deviation of a unit capacitor of theirs.
        comparator_noise: standard deviation of the noise of each conversion, in steps.
        wires: see `Wires`. With voltage access the cells become effective ones, exact for all inputs; the two lines of a pair stand side
            by side. With gate access they are the cells of `devices.wires.gate_curve`, and reads go through its curve, each line of a
            pair for itself. The curve's error on random inputs is logged.
        noise_seed: of the noise of reads; each chip has its own noise.
        progress: show a progress bar, where it takes some seconds.
    Raises: ValueError for impossible values, a device of fewer levels than the cells have, or cells that the grid does not hold. No
        layer is changed then.
    """
    if device is None:
        for _, layer in crossbar_layers(model):
            layer.chip = None
        return
    check_is_device(device)
    check_seed(seed)
    if reference_cells not in ("device", "ideal"):
        raise ValueError(f"reference_cells is {reference_cells!r}; allowed are device, ideal")
    circuits = {"adc_inl": adc_inl, "adc_dnl": adc_dnl, "adc_mismatch": adc_mismatch, "comparator_noise": comparator_noise}
    for name, value in ({"adc_noise": adc_noise, "adc_offset": adc_offset, "adc_gain": adc_gain} | circuits).items():
        most = MOST_MISMATCH if name == "adc_mismatch" else MOST_LEVELS
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value!r}; allowed are numbers from 0 to {most:g}")
    if read_noise is not None:
        device = replace(device, read_noise=read_noise)
    layers = on_crossbars(model)
    for _, layer in layers:
        check_chip(layer, device, wires, reference_cells)
        check_circuits(layer, **circuits)
    slices = sum(len(layer.slice_bits) for _, layer in layers)
    watched = sys.stderr.isatty()
    with tqdm(total=slices, desc=f"programming chip {seed}", unit="slice", disable=not progress, leave=False, dynamic_ncols=True,
              delay=2 if watched else 60, mininterval=0.5 if watched else 60) as bar:
        draw = _Draw(device, seed, reference_cells, adc_noise, adc_offset, adc_gain, circuits, wires or Wires(), noise_seed, bar.update)
        chips = [(layer, _chip(name, layer, draw)) for name, layer in layers]
    for layer, chip in chips:
        layer.chip = chip
    if draw.curve_errors:
        log.info("gate access: the fitted curves are %.1f %% off the exact ladders at most (rms, random inputs)",
                 100 * max(draw.curve_errors))
    if worst := max((device.cell_noise(bits)[2] for layer, _ in chips for bits in layer.slice_bits), default=0.0):
        log.info("read noise: its line in conductance is off the sigma of a level by %.0f %% of the largest one at most", 100 * worst)


def check_circuits(layer: CrossbarLayer, **drawn: float) -> None:
    """Refuse converters that are drawn, by the arguments of `program`, where steps follow each batch. Raises: ValueError."""
    if layer.spec.adc_range == "dynamic" and (name := next((name for name, value in drawn.items() if value), None)):
        raise ValueError(f"{name} is {drawn[name]:g} with adc_range 'dynamic', whose steps are others in each batch; allowed are "
                         "calibrated and full")


def check_chip(layer: CrossbarLayer, device: Device, wires: Wires | None = None, reference_cells: str = "device") -> None:
    """Check that the cells of a layer can be programmed so, without drawing any. Arguments as for `program`. Raises: ValueError."""
    spec, gate = layer.spec, wires is not None and wires.access == "gate"
    layer.check_reads(gate and wires.resist, any(device.cell_noise(bits)[1] for bits in layer.slice_bits))
    for bits in layer.slice_bits:
        most = LARGEST_CELL >> fraction_bits(layer.cell_spec.cell_bits)
        off = device.levels(bits)[0] / device.step(bits) if spec.reference == "digital" else 0.0  # the off-current, see `off_currents`
        if (reach := device.reach(bits) + off) >= most:
            raise ValueError(f"{device.name}: cells of {bits} bits lie up to {reach:.3g} levels from {'0 uS' if off else 'the lowest one'}"
                             f", a level being {device.step(bits):.3g} uS; the grid holds {most}")
        device.cell_noise(bits)
    if device.stuck_mask is not None:
        faults.check_mask(device.stuck_mask, 2 if spec.weights == "pair" else 1)
    if device.rows:  # which has rows of all slices of a weight
        device.draw_weights(np.zeros(1, np.uint8), layer.slice_bits, np.random.default_rng(0))
    if gate and spec.dac_bits > 1:
        raise ValueError(f"access is 'gate' with dac_bits {spec.dac_bits}; with gate access a row is only on or off, so allowed is "
                         "dac_bits 1")
    if spec.weights == "pair" and reference_cells != "device":
        raise ValueError(f"reference_cells is {reference_cells!r} and weights 'pair', which have no reference column; leave it at device")


def _chip(name: str, layer: CrossbarLayer, draw: _Draw) -> Chip:
    """A layer on the chip: of pairs the lines of both signs are drawn, of other cells their one line and the reference column."""
    spec, ideal, device = layer.spec, layer.ideal_cells(), draw.device
    pairs, digital, scale = spec.weights == "pair", spec.reference == "digital", 2**ideal.fraction_bits
    held = ideal.values.cpu() >> ideal.fraction_bits
    lines = [(part, levels.clamp(min=0).byte().numpy()) for part, levels in ((VALUES, held), (NEGATIVE, -held))[:1 + pairs]]
    devices = [_with_map(device, layer.arrays, held.shape[3], len(lines), side) for side in range(len(lines))]
    joint = [_joint(name, layer, draw, levels, part, own) for (part, levels), own in zip(lines, devices)] if device.rows else None
    twice, off, both = layer.weight_quant.reference_twice(layer.slice_bits), off_currents(layer, device), None
    values, reference = np.empty(held.shape, np.int32), ideal.reference.cpu().numpy() + off[:, None, None]
    if pairs and (draw.wires.access == "gate" or any(device.cell_noise(bits)[1] for bits in layer.slice_bits)):
        both = np.empty(held.shape, np.int32)

    def draw_slice(k: int) -> tuple[float, ...] | None:
        bits, curve = layer.slice_bits[k], None
        g_min, step = device.levels(bits)[0], device.step(bits)
        drawn = [own.draw(levels[k], bits, generator(draw.seed, name, k, part)) for (part, levels), own in zip(lines, devices)
                 ] if joint is None else [of_line[k] for of_line in joint]
        column = np.empty((*held.shape[1:3], 0))  # that of the reference: pairs and digital references have none
        if not (pairs or digital):
            column = _reference_column(draw, bits, twice[k], held.shape[1:3], generator(draw.seed, name, k, REFERENCE))[..., None]
        beside = column.shape[2]
        if draw.wires.resist:  # the lines of a pair stand side by side
            seen = np.concatenate([column, np.stack(drawn, axis=-1).reshape(*held.shape[1:3], -1)], axis=-1)
            seen, curve = _behind_wires(seen, layer, draw, generator(draw.seed, name, k, INPUTS), beside)
            column, drawn = seen[..., :beside], np.moveaxis(seen[..., beside:].reshape(*held.shape[1:], -1), -1, 0)
            curve = _of_cells(curve, scale, step, scale * g_min / step - off[k])
        plus, minus = drawn if pairs else (drawn[0], g_min)
        values[k] = _on_grid(plus - minus, scale, step)
        values[k] += off[k]
        if beside:
            reference[k] = np.rint(scale * (column[..., 0] - g_min) / step)
        if both is not None:
            both[k] = _on_grid(plus + minus - 2 * g_min, scale, step)
        draw.done()
        return curve

    # Each has a generator of its own, and NumPy draws outside the interpreter's lock. Wires are solved on all threads already, and their
    # cells kept in the folder that this thread knows of.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        each = map if draw.wires.resist else pool.map
        curves = [*filter(None, each(draw_slice, range(len(layer.slice_bits))))]
    where = ideal.values.device
    values, reference, both = (part if part is None else torch.from_numpy(part).to(where) for part in (values, reference, both))
    # Where noise is concerned, the reference of a cell in a pair is the other one, on or off: 1 of it.
    shares = [0.0 if digital or draw.reference_cells == "ideal" else 1.0 if pairs or r % 2 == 0 else 0.5 for r in twice]
    readout = _readout(name, layer, draw, scale, off, shares, curves, both)
    return Chip(Cells(values, reference, ideal.fraction_bits), ideal.raised(off) if off.any() else None, readout,
                of_arrays=draw.wires.resist or device.stuck_mask is not None, code_sums=layer.code_sums(), of=layer.version())


def _on_grid(conductance, scale, step):
    """uS above the lowest level as whole numbers on the cells' grid, in the memory of `conductance`."""
    conductance /= step
    conductance *= scale
    return np.rint(conductance, out=conductance)


def off_currents(layer: CrossbarLayer, device: Device) -> np.ndarray:
    """What the cells of each slice hold beside their levels, on their grid, int32: the device's off-current, where a digital reference does
    not take it away."""
    if layer.spec.reference != "digital":
        return np.zeros(len(layer.slice_bits), np.int32)
    scale = 2**fraction_bits(layer.cell_spec.cell_bits)
    return np.array([round(scale * device.levels(bits)[0] / device.step(bits)) for bits in layer.slice_bits], np.int32)


def _of_cells(curve, scale, step, missing):
    """`Readout.curve` of a slice. Args: curve, `(b_0, b_1, b_2)` for siemens; step, uS of a level; missing, what a cell's value lacks
    of its current, in units of u."""
    b0, b1, b2 = curve
    unit = step * 1e-6 / scale  # siemens
    return b0, b1 * unit, b2 * unit**2, missing


def _effective(lines, arrays, wires, beside=0):
    """Cells as the sense nodes of bit lines see them, uS `[groups, rows, lines]`. Where word lines resist, an array has COLUMNS of the
    lines, and beside them, nearest to the drivers, the first `beside` of all: the reference column of each array.
    """
    if not (wires.row_ohm or wires.driver_ohm):
        return _solved(lines, arrays, wires, lines.shape[-1], 0)
    return kept(lines, (_code(), arrays, wires, COLUMNS, beside), lambda: _solved(lines, arrays, wires, COLUMNS, beside))


@functools.cache
def _code():
    """Digest of the code that solves: files of another one must not be taken."""
    return sources.digest([__name__, Wires.__module__], {__name__.partition(".")[0]})


def _solved(lines, arrays, wires, columns, beside):
    found, alike = np.empty_like(lines), {}
    for start, stop in arrays:
        for first in range(beside, lines.shape[-1], columns):
            last = min(first + columns, lines.shape[-1])
            alike.setdefault((stop - start, last - first), []).append((np.s_[start:stop], np.s_[first:last]))
    for parts in alike.values():  # of one size, solved together
        blocks = [np.concatenate([lines[:, rows, :beside], lines[:, rows, some]], axis=-1) for rows, some in parts]
        for (rows, some), solved in zip(parts, 1e6 * effective(1e-6 * np.stack(blocks), wires)):
            found[:, rows, some] = solved[..., beside:]
            if some.start == beside:  # one of each array: that of its first outputs stands for all
                found[:, rows, :beside] = solved[..., :beside]
    return found


def _joint(name, layer, draw, levels, part, device):
    """Conductances of cells that were measured together, `[slices, groups, rows, out / groups]`."""
    codes = sum(levels[k].astype(np.int64) << (layer.cell_spec.cell_bits * k) for k in range(len(levels)))
    return device.draw_weights(codes, layer.slice_bits, generator(draw.seed, name, 0, part))


def _with_map(device, arrays, outputs, lines, side=0):
    """The device with its map of stuck cells, if it has one, over the arrays of a layer; of outputs of so many lines that of one side."""
    if device.stuck_mask is None:
        return device
    return replace(device, stuck_mask=faults.on_arrays(device.stuck_mask, arrays, outputs * lines)[:, side::lines])


def _reference_column(draw, bits, twice, shape, generator):
    """Conductance of the reference column in each row, uS: of a cell of level `twice / 2`, or the mean of one of the highest level and
    one of the lowest."""
    levels = [2**bits - 1, 0] if twice % 2 else [twice // 2]
    if draw.reference_cells == "ideal":  # on levels that are not evenly spaced too
        return np.full(shape, draw.device.levels(bits)[0] + draw.device.step(bits) * twice / 2)
    device = replace(draw.device, stuck_mask=None)  # of outputs
    return device.draw(np.stack([np.full(shape, level, np.uint8) for level in levels]), bits, generator).mean(0)


def _behind_wires(lines, layer, draw, generator, beside=0):
    """Lines of one slice as the sense nodes see them, uS, and the curve behind them, `(b_0, b_1, b_2)` for siemens.

    Args: lines, uS `[groups, rows, lines]`, of which those below 0 conduct nothing; beside, see `_effective`.
    """
    if draw.wires.access == "gate":
        return _behind_a_curve(lines.clip(0), layer.arrays, draw.wires.wire_ohm, generator, draw.curve_errors)
    return _effective(lines.clip(0), layer.arrays, draw.wires, beside), STRAIGHT


def _behind_a_curve(lines, arrays, wire_ohm, generator, errors):
    """(cells of bit lines with gate access, uS as `lines`, `(b_0, b_1, b_2)` for siemens). Args: lines, uS `[groups, rows, lines]`."""
    found, curve = np.empty_like(lines), None
    for rows in sorted({stop - start for start, stop in arrays}, reverse=True):  # the curve is that of the fullest arrays
        alike = [slice(start, stop) for start, stop in arrays if stop - start == rows]
        on = generator.random((len(alike), FITTED_INPUTS, rows)) < DENSEST * generator.random((len(alike), FITTED_INPUTS, 1)) ** SPARSE
        # The groups of an array are columns like any other, as their wires leave the same of each row.
        seen = np.stack([np.moveaxis(lines[:FITTED_GROUPS, part, :COLUMNS], 0, 1).reshape(rows, -1) for part in alike])
        fit = gate_curve(1e-6 * seen, on, wire_ohm, curve)
        if curve is None and fit.b != STRAIGHT:  # which is the curve of arrays that conduct nothing, too
            curve = fit.b
        errors.append(fit.error)
        for part, left in zip(alike, fit.left):
            found[:, part] = lines[:, part] * left[:, None]
    return found, curve or STRAIGHT


def _readout(name, layer, draw, scale, off, shares, curves, both=None):
    """What the layer's reads have besides, or None. Args: shares, m of `Readout.cell_noise` for each slice; both, see there."""
    noise = [draw.device.cell_noise(bits) for bits in layer.slice_bits]
    cell_noise = tuple((scale**2 * c0 - scale * c1 * shift, scale * c1, m) for (c0, c1, _), shift, m in zip(noise, off, shares))
    gain = offset = circuits = None
    mapped, lines = layer.mapped("ideal", cells=None), 2 if layer.spec.weights == "pair" else 1
    each = max(1, (layer.spec.columns_per_adc or 1) // lines)  # outputs of a slice
    groups, _, out = mapped.w_rows.shape
    shape = groups, len(mapped.arrays), -(-out // each)
    if draw.adc_gain or draw.adc_offset:
        normals = np.stack([generator(draw.seed, name, k, CONVERTERS).standard_normal((2, *shape)) for k in range(len(shares))], axis=1)
        normals = normals.repeat(each, axis=-1)[..., :out]
        gain = torch.from_numpy(1 + draw.adc_gain * normals[0])
        offset = torch.from_numpy(np.rint(scale * draw.adc_offset * normals[1]).astype(np.int32))
    noisy = any(c0 or c1 for c0, c1, _ in noise)
    curved = any(b1 or b2 for _, b1, b2, _ in curves)
    if any(draw.circuits.values()):
        circuits = Circuits(*draw.circuits.values(), shape, each, functools.partial(_of_circuits, draw.seed, name))
    if not (noisy or draw.adc_noise or gain is not None or curved or both is not None or circuits):
        return None
    key = hashlib.sha256(f"{draw.noise_seed} {draw.seed} {name}".encode()).digest()[:8]
    return Readout((scale * draw.adc_noise) ** 2, cell_noise if noisy else None, int.from_bytes(key, "little"), gain, offset,
                   tuple(curves) if curved else None, both, circuits)


def _of_circuits(seed, name, k, bits):
    return generator(seed, name, k, CIRCUITS + bits)


def check_seed(seed: int) -> None:
    """Refuse what is no seed of a chip. Raises: ValueError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; allowed are whole numbers from 0 on")


def generator(seed: int, name: str, k: int, part: int) -> np.random.Generator:
    """What draws `part` of slice k of the layer `name` on the chip of this seed: the same numbers on every machine."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode()), k, part]))
