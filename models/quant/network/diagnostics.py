"""Where the ADC and the cells lose accuracy: numbers for every layer and slice of a network on crossbars."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import adc
from ..arrays.cells import Cells
from ..arrays.mapping import MappedLayer
from ..layers import channels
from ..layers.batches import Batch, called
from ..layers.crossbar import CrossbarLayer
from .calibration import Calibration
from .counts import counting
from .filling import filling
from .modes import converted_layers, hooked, without_adc

CURVE_BITS = range(2, 9)  # ADC precisions of the SQNR curve
SOURCES = ("quantization", "scatter", "wires", "noise", "adc")  # of a chip's errors: noise, with converters' offset and gain
ROUNDING = 2.0**-46  # square error of float32 numbers that were rounded a few times, 2^-48 / 3 each


def decibels(signal: float, error: float) -> float | None:
    """SQNR `10 log10(signal / error)` of two sums of squares, in dB; None where nothing is lost, or no more than float32 rounds off."""
    return float(10 * np.log10(signal / error)) if signal and error > signal * ROUNDING else None


def report(model: nn.Module, images: Batch, histograms: dict[str, np.ndarray], rule: str = Calibration.rule,
           per: str = Calibration.per) -> list[dict[str, Any]]:
    """What the ADC does to each layer of `model` that has one, and whose ranges are set ("calibrated") or follow ("full").

    Args: images, a batch of network inputs, for what needs the layers' outputs; histograms, result of
        `collect_histograms`; rule, per: how `sqnr_over_adc_bits` chooses ranges for other precisions.
    Returns: a list of dicts of plain values, one a layer:
        layer, adc_bits (a mean with a plan), mean_bits (of all reads of `histograms`), row_blocks (see `filling`), fill (mean share
        of their rows used), all_zero_reads (share of reads with no active row), output_sqnr_db,
        sqnr_over_adc_bits {B: dB} of the reads as the shift-add weighs them, unit, u_min, and slices: slice, reachable and seen
        [low, high] of v, delta, q_min, values (of its codes), codes_used (share of 2^B), clipped (share of reads), sqnr_db, histogram
        (counts of the bins of `v = unit (u_min + i)`).
        With a plan delta, q_min and bits are lists over the digits, by ones of lists over the classes of n (`CrossbarSpec.classes`),
        without values, codes_used a mean over those that are converted, and sqnr_over_adc_bits is that of uniform ADCs, for comparison; by
        ones a layer has shares too, of the reads of each digit that are of each class. Decibels are None where no read is changed.
    Raises: ValueError if no layer has an ADC, ranges are missing, for an unknown rule, or for a network on a chip, whose errors `losses`
        tells apart.
    """
    if any(layer.chip for _, layer in converted_layers(model)):
        raise ValueError("this network is on a chip, whose reads are not whole levels; use diagnostics.losses, or take it off with "
                         "program(model, None)")
    chosen, layers, result = Calibration(rule, per), converted_layers(model), []
    with counting(model) as seen:
        inputs, wanted = ideal_pass(model, layers, images)
    for name, layer in layers:
        mapped, counts, reads = layer.mapped(), histograms[name], seen.layers[name].reads_of(layer.spec)
        row_blocks, fill = filling(layer, layer.spec.mapping, layer.spec.rows)
        result.append({
            "layer": name, "adc_bits": layer.spec.adc_bits, "row_blocks": row_blocks, "fill": fill,
            "all_zero_reads": float((reads[:, 0] / reads.sum(1)).mean()),
            "output_sqnr_db": _sqnr(wanted[name].double(), layer.simulate(inputs[name]).double()),
            "sqnr_over_adc_bits": {bits: _weighted_sqnr(mapped, counts.sum(axis=2), bits, chosen) for bits in CURVE_BITS
                                   if bits <= getattr(mapped.spec.converter, "most_bits", bits)},
            "unit": mapped.unit * 2**mapped.bins.shift, "u_min": mapped.bins.first,
            "slices": [_slice(mapped, k, counts[:, k]) for k in range(counts.shape[1])], **_bits_of(mapped, counts),
        })
    return result


@torch.no_grad()
def losses(model: nn.Module, images: Batch, corrected: bool = True,
           straight: Mapping[str, Cells] = MappingProxyType({})) -> list[dict[str, Any]]:
    """Where a network on a chip (`program`) loses accuracy: what is left of each layer's output with errors switched on one after
    another. Inputs are those of software, so that layers do not see each other's errors.

    Args: images, a batch of network inputs; corrected, outputs are compared after `correct`, measured on these images for each row:
        each output channel has its mean and deviation without errors; straight, by layer, what its cells hold without wires, where wires
        resist.
    Returns: a list of dicts of plain values, one for each layer that has an ADC and is on a chip: layer; scatter (root mean square
        distance of its cells from nominal ones, in levels); far (share of cells that are more than half a level away); output
        SQNR in dB against software, None where nothing is lost: adc (the ADC on nominal cells), cells (the chip's cells without ADC),
        both, and chip (with what its reads have besides, equal to both where that is nothing); all, that of the chip against the
        output of unquantized inputs and weights (`CrossbarLayer.unquantized`); and shares, what each of SOURCES, switched on in this order,
        adds to the sum of the squares of that error, as a share of it in the end: their sum is 1, and those are negative that take away
        some of what the ones before did. All 0 where nothing is lost.
    """
    layers, result = [(name, layer) for name, layer in converted_layers(model) if layer.chip], []
    inputs, wanted = ideal_pass(model, layers, images)
    for name, layer in layers:
        chip, ideal = layer.chip, wanted[name].double()
        curved = chip.readout is not None and chip.readout.curve is not None
        of_wires = replace(chip.readout, base=0.0, cell_noise=None, gain=None, offset=None, circuits=None) if curved else None

        def output(cells, readout=None, layer=layer, x=inputs[name], nominal=chip.nominal, ideal=ideal):
            layer.set_cells(cells, nominal, readout)
            y = layer.simulate(x).double()
            if corrected:
                gain, offset = channels.towards(*(channels.std_mean(each, layer.channel_dim) for each in (ideal, y)))
                y = channels.scaled(y, gain, offset, layer.channel_dim)
            return y

        correction = layer.adc_gain, layer.adc_offset
        try:
            if corrected:  # each row has its own in place of the chip's
                layer.set_correction(torch.ones_like(layer.adc_gain), torch.zeros_like(layer.adc_offset))
            adc_alone, both = output(chip.nominal), output(chip.cells)  # a full range follows from nominal cells
            whole = output(chip.cells, chip.readout) if chip.readout else both
            with without_adc(model):
                cells = output(chip.cells)
                steps = [layer.unquantized(inputs[name]).double(), ideal, output(straight[name]) if name in straight else cells]
                steps.append(output(chip.cells, of_wires) if curved else cells)
                steps.append(output(chip.cells, chip.readout) if chip.readout else steps[-1])
        finally:
            layer.chip, (layer.adc_gain, layer.adc_offset) = chip, correction
        steps.append(whole)
        result.append({"layer": name, **_scatter(layer), "all": _sqnr(steps[0], whole), "shares": _shares(steps),
                       **{key: _sqnr(ideal, y) for key, y in (("adc", adc_alone), ("cells", cells), ("both", both), ("chip", whole))}})
    return result


def _sqnr(wanted: Tensor, found: Tensor) -> float | None:
    return decibels(wanted.square().sum().item(), (found - wanted).square().sum().item())


def _shares(steps: list[Tensor]) -> dict[str, float]:
    """Of each of SOURCES. Args: steps, outputs without errors and with one source after another."""
    signal, (wanted, *found) = steps[0].square().sum().item(), steps
    errors = [0.0, *((y - wanted).square().sum().item() for y in found)]
    changed = [(after - before).square().sum().item() > signal * ROUNDING for before, after in pairwise(steps)]
    added = [float(change) * (after - before) for change, (before, after) in zip(changed, pairwise(errors))]
    return {source: error / (errors[-1] or 1.0) for source, error in zip(SOURCES, added)}


def cell_levels(layer: CrossbarLayer) -> list[dict[str, Any]]:
    """Where the cells of a layer on a chip lie. Returns: one dict for each slice: slice, bits, and levels: level (of pairs the difference
    of both cells), cells (how many), mean and deviation in units of levels, and histogram, `[counts, edges]` of all cells of that level."""
    levels, x = _in_levels(layer)
    result = []
    for k, bits in enumerate(layer.slice_bits):
        found = []
        low, high = float(x[k].min()), float(x[k].max())
        edges = np.linspace(low, high, 121) if high > low else np.array([low - 0.5, low + 0.5])
        for level in range(1 - 2**bits if layer.spec.weights == "pair" else 0, 2**bits):
            own = x[k][levels[k] == level]
            counts = np.histogram(own, edges)[0]
            found.append({"level": level, "cells": len(own), "mean": float(own.mean()) if len(own) else None,
                          "deviation": float(own.std()) if len(own) else None, "histogram": counts.tolist()})
        result.append({"slice": k, "bits": bits, "edges": edges.tolist(), "levels": found})
    return result


def _in_levels(layer: CrossbarLayer) -> tuple[np.ndarray, np.ndarray]:
    """(level that each cell was programmed to, value that it has in units of levels), `[slices, groups, rows, out / groups]`."""
    ideal, cells, nominal = layer.ideal_cells(), layer.cells(), layer.chip.nominal if layer.chip else None
    levels = ideal.values.cpu().numpy() // 2**ideal.fraction_bits
    return levels, levels + cells.unit * (cells.values.cpu() - (nominal or ideal).values.cpu()).numpy()


def _scatter(layer: CrossbarLayer) -> dict[str, float]:
    levels, x = _in_levels(layer)
    return {"scatter": float(np.sqrt(np.square(x - levels).mean())), "far": float((np.abs(x - levels) > 0.5).mean())}


def ideal_pass(model: nn.Module, layers: list[tuple[str, CrossbarLayer]],
                images: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({layer: input}, {layer: output}) of the network without ADC, for a batch of network inputs."""
    inputs, outputs = {}, {}

    def keep(name, layer, args, kwargs, output):
        inputs[name], outputs[name] = (*args, *kwargs.values())[0], output

    hooks = (layer.register_forward_hook(partial(keep, name), with_kwargs=True) for name, layer in layers)
    with without_adc(model), torch.no_grad(), hooked(hooks):
        called(model, images)
    return inputs, outputs


def _bits_of(layer: MappedLayer, counts: np.ndarray) -> dict[str, Any]:
    """Of all reads of a layer; counts, `[digits, slices, classes, u]`."""
    reads = counts.sum(axis=3)
    bits = [layer.converter(*kind).bits for kind in np.ndindex(*reads.shape)]
    shares = reads[:, 0] / np.maximum(reads[:, 0].sum(axis=1, keepdims=True), 1)
    return {"mean_bits": float((reads.ravel() @ bits) / reads.sum())} | ({"shares": shares.tolist()} if layer.by_ones else {})


def _slice(layer: MappedLayer, k: int, counts: np.ndarray) -> dict[str, Any]:
    """One slice, the reads of all its kinds; counts, `[digits, classes, u]`."""
    spec, adcs = layer.spec, [layer.converter(z, k, j) for z, j in np.ndindex(*counts.shape[:2])]
    histogram = counts.sum(axis=(0, 1))
    seen = np.flatnonzero(histogram)  # the others may be millions
    u = layer.bins.values[seen]
    ranges, v, counts = _ranges_of(layer, k), layer.unit * u, counts.reshape(len(adcs), -1)[:, seen]  # [digit and class, u]
    q = np.stack([each.encode(u, layer.unit) for each in adcs])
    clips = np.stack([(each.nearest(v / each.delta) != codes) & (each.bits > 0) for each, codes in zip(adcs, q)])
    error = np.stack([each.decode(codes) - v for each, codes in zip(adcs, q)])
    used = [(np.unique(codes[of_kind > 0]), each.bits) for codes, of_kind, each in zip(q, counts, adcs) if each.bits and of_kind.any()]
    if used and not spec.planned:  # one ADC for all of them
        used = [(np.unique(np.concatenate([codes for codes, _ in used])), spec.adc_bits)]
    return {
        "slice": k, "reachable": [layer.unit * u for u in layer.u_range(k)], "seen": [float(v[0]), float(v[-1])],
        **ranges, "codes_used": float(np.mean([len(codes) / 2**bits for codes, bits in used])) if used else 0.0,
        "clipped": float((counts * clips).sum() / counts.sum()),
        "sqnr_db": decibels(float((counts * v**2).sum()), float((counts * error**2).sum())),
        "histogram": histogram.tolist(),
    }


def _ranges_of(layer, k):
    """Step and lowest code of a slice, and the values of its codes; with a plan step, lowest code and bits of each digit, or of each digit
    and class."""
    if layer.spec.planned:
        plan = {"delta": layer.adc_delta, "q_min": layer.adc_q_min, "bits": layer.adc_bits_plan}
        return {name: values[:, k].tolist() for name, values in plan.items()}
    one = layer.converter(0, k)
    return {"delta": one.delta, "q_min": one.q_min, "values": one.decode(np.arange(one.q_min, one.q_max + 1)).tolist()}


def _weighted_sqnr(layer: MappedLayer, histogram: np.ndarray, adc_bits: int, chosen: Calibration) -> float | None:
    """SQNR of all reads, each weighed by the square of what the shift-add multiplies it with."""
    other = replace(layer, spec=replace(layer.spec, adc_plan="uniform", adc_bits=adc_bits))
    signal = error = 0.0
    for k, (delta, q_min) in enumerate(adc.calibrated_ranges(histogram, other, chosen.rule, chosen.per)):
        reads = adc.Reads(histogram, [k], other)
        signal += reads.square @ reads.v**2
        error += reads.square @ reads.errors(delta, q_min, adc_bits) ** 2
    return decibels(float(signal), float(error))
