"""Counting what the arrays of a network have to do for some images (`counting`).

What is counted depends on the images and the network's activations, not on cells or ADCs: for each layer, bit b and row r

    ones_b[r] = number of output pixels of all images whose code at row r has bit b

and, for each way of cutting rows into arrays and inputs into digits, how many reads of a digit have an n of how many bits, n being the sum
of the digits on the word lines: those of none are idle. So one pass serves all cells and ADCs, and it may be a pass that is made anyway:

    with counting(network) as counts:
        predictions = network(images)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..arrays.mapping import array_bounds
from ..arrays.spec import MOST_ROWS, CrossbarSpec, Geometry
from ..kernels.ones import Ones, array_lengths, tap_lengths
from ..layers import batches
from ..layers.crossbar import CrossbarLayer, crossbar_layers

LENGTHS = 1 + (2 * MOST_ROWS * 255).bit_length()  # of n: the most rows, each of a line for both signs, and the largest digits
Layout = tuple[str, int, int]  # (mapping, rows, dac_bits) of `CrossbarSpec`: how rows are cut into arrays, and inputs into digits


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """What reached the arrays of one layer, of all images together.

    Attributes:
        w_shape: `[out, in / groups, kh, kw]`. groups: of the convolution.
        pixels: output pixels, once for each pass that a layer needs (signed inputs in phases take two).
        outputs: output pixels, once. inputs: numbers that come in for an image, in the call that has most of them.
        multiplications: products of a number that came in and a weight.
        ones: int64 `[a_bits, groups, rows]`, rows in (tap, channel) order, as above.
        reads: for each layout, int64 `[digits, LENGTHS]`: how many reads of each digit have an n of 0, 1, ... bits.
    """

    w_shape: tuple[int, int, int, int]
    groups: int
    pixels: int
    outputs: int
    inputs: float
    multiplications: int
    ones: np.ndarray
    reads: dict[Layout, np.ndarray]

    def reads_of(self, spec: CrossbarSpec) -> np.ndarray:
        """`reads` on this hardware; its idle ones are `[:, 0]`. Raises: ValueError where they were not counted."""
        layout = spec.mapping, spec.rows, spec.dac_bits
        if layout not in self.reads:
            wanted, *known = ("{} mapping, {} rows, dac_bits {}".format(*each) for each in (layout, *self.reads))
            raise ValueError(f"reads were counted for {' and '.join(known)}, not for {wanted}: give that layout to count")
        return self.reads[layout]

    def by_class(self, spec: CrossbarSpec, classes: int) -> np.ndarray:
        """How many reads of each digit have an n of each class, int64 `[digits, classes]`. Args: classes, how many the layer has on this
        hardware (`OnArrays.classes`). Raises: see `reads_of`."""
        return np.add.reduceat(self.reads_of(spec), range(classes), axis=1)

    def shares(self, spec: CrossbarSpec, classes: int) -> np.ndarray:
        """`by_class` as a share of the reads of a digit, float64."""
        found = self.by_class(spec, classes)
        return found / np.maximum(found.sum(1, keepdims=True), 1)


@dataclass(eq=False)
class Counts:
    """What a network's arrays had to do. Attributes: images, how many there were; layers, by name."""

    images: int = 0
    layers: dict[str, LayerCounts] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        """What one network's arrays had to do for the images of both."""
        both = {name: _both(self.layers[name], other.layers[name]) for name in self.layers.keys() & other.layers.keys()}
        return Counts(self.images + other.images, self.layers | other.layers | both)


def _both(a: LayerCounts, b: LayerCounts) -> LayerCounts:
    """Counts of a layer on two sets of images."""
    reads = {layout: found + b.reads[layout] for layout, found in a.reads.items()}
    return LayerCounts(a.w_shape, a.groups, a.pixels + b.pixels, a.outputs + b.outputs, max(a.inputs, b.inputs),
                       a.multiplications + b.multiplications, a.ones + b.ones, reads)


@contextlib.contextmanager
def counting(network: nn.Module, layouts: Iterable[Layout | tuple[str, int]] | None = None, batch_dim: int = 0) -> Iterator[Counts]:
    """Within the block all that passes the network is counted; after it the result is whole.

    Args: layouts, `(mapping, rows, dac_bits)` for which reads are counted, dac_bits being those that a layer has where they are left out or
        its inputs have fewer bits; None, those that each layer has; batch_dim, along which dimension images lie in a batch.
    Raises: ValueError for a network without layers on crossbars.
    """
    layers = crossbar_layers(network)
    if not layers:
        raise ValueError("the network has no layer on crossbars whose costs could be counted")
    layouts = None if layouts is None else list(dict.fromkeys(layouts))
    counts, watches = Counts(), {name: _Watch(layer, layouts) for name, layer in layers}

    def see_images(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        at_once = batches.length((args, kwargs), batch_dim)
        counts.images += at_once
        for watch in watches.values():
            watch.images = at_once

    hook = network.register_forward_pre_hook(see_images, with_kwargs=True)
    try:
        for name, layer in layers:
            layer.watch = watches[name].see
        yield counts
    finally:
        hook.remove()
        for name, layer in layers:
            layer.watch = watches[name].outer
    counts.layers = {name: watch.result() for name, watch in watches.items() if watch.pixels}


class _Watch:
    """What has been seen of one layer. Ones are added up where the input has them; what the kernel makes of them, which pixels of the
    input lie under a row, is known without the images."""

    def __init__(self, layer: CrossbarLayer, layouts: list[Layout] | None) -> None:
        self.outer = layer.watch  # of a block around this one, as `calibrate` may stand in, which sees on
        self.geometry, self.w_shape, self.a_bits, spec = layer.geometry, layer.w_shape, layer.spec.a_bits, layer.spec
        layouts = [(spec.mapping, spec.rows)] if layouts is None else layouts
        layouts = [(mapping, rows, min(*dac_bits or [spec.dac_bits], spec.a_bits)) for mapping, rows, *dac_bits in layouts]
        arrays = {layout: _spans(*layout[:2], self.w_shape, self.geometry.planes) for layout in layouts}
        ends = {end for spans in arrays.values() for _, _, *ends in spans for end in ends}
        self.cuts, groups = sorted(ends), self.geometry.groups
        self.pieces = {layout: _pieces(spans, self.cuts, self.w_shape[3], groups) for layout, spans in arrays.items()}
        self.cuts = [group * self.w_shape[1] + cut for group in range(groups) for cut in self.cuts[:-1]] + [groups * self.w_shape[1]]
        self.digits = {layout: _digits(self.a_bits, layout[2]) for layout in layouts}
        self.reads = {layout: np.zeros((len(digits), LENGTHS), np.int64) for layout, digits in self.digits.items()}
        self.places: dict[tuple[int, ...], Ones] = {}  # by the input's size [H, W, in]
        self.pixels = self.outputs = self.inputs = self.multiplications = 0
        self.images = 0  # of the batch under way

    def see(self, codes: Tensor, again: bool = False, inputs: int | None = None, multiplications: int | None = None) -> None:
        """Args: codes, uint8 `[N, H, W, in]`; again, they are another pass of inputs that were seen; inputs, multiplications: how many
        numbers came in and were multiplied, where the codes are not these numbers once each: zeros between them, or planes that stand
        in several."""
        if self.outer is not None:
            self.outer(codes, again, inputs, multiplications)
        if not len(codes):
            return
        codes = codes.detach().cpu().contiguous()
        images, height, width, channels = codes.shape
        size = self.geometry.output_size(height, width, self.w_shape[2:])
        outputs = images * size[0] * size[1]
        self.pixels += outputs
        if not again:
            self.outputs += outputs
            self.inputs = max(self.inputs, (codes.numel() if inputs is None else inputs) / (self.images or images))
            self.multiplications += outputs * math.prod(self.w_shape) if multiplications is None else multiplications
        if codes.shape[1:] not in self.places:
            self.places[codes.shape[1:]] = Ones(height * width, channels, self.a_bits, self.cuts)
        ones = self.places[codes.shape[1:]].add(codes.view(images, -1, channels))
        for layout, pieces in self.pieces.items():
            digits = self.digits[layout]
            if layout[0] == "tap":
                times = _times_seen((height, width), self.geometry, self.w_shape[2:])
                found = tap_lengths(ones, pieces[:, [0, 3]], times, digits, LENGTHS)
                reads = outputs * self.w_shape[2] * self.w_shape[3] * (int(pieces[-1, 0]) + 1)
                found[:, 0] += reads - found.sum(1)  # in the padding
            else:
                pieces = pieces * [1, *self.geometry.dilation, 1]
                found = array_lengths(ones.reshape(*ones.shape[:3], height, width), pieces, size, self.geometry.stride,
                                      self.geometry.padding[::2], digits, LENGTHS)
            self.reads[layout] += found

    def result(self) -> LayerCounts:
        found = sum(_under_the_kernel(places.sums.reshape(self.a_bits, *size), self.geometry, self.w_shape[2:])
                    for size, places in self.places.items())
        groups = self.geometry.groups
        found = found.reshape(self.a_bits, -1, groups, self.w_shape[1]).transpose(0, 2, 1, 3).reshape(self.a_bits, groups, -1)
        return LayerCounts(self.w_shape, groups, self.pixels, self.outputs, self.inputs, self.multiplications, found, self.reads)


def _under_the_kernel(places: np.ndarray, geometry: Geometry, kernel: tuple[int, int]) -> np.ndarray:
    """Sums of `places`, `[bits, H, W, in]`, over the output pixels, for each position of the kernel: int64 `[bits, kh kw, in]`."""
    top, bottom, left, right = geometry.padding
    size = geometry.output_size(*places.shape[1:3], kernel)
    padded = np.pad(places, ((0, 0), (top, bottom), (left, right), (0, 0)))
    sums = []
    for place in np.ndindex(*kernel):
        rows, columns = (slice(d * k, d * k + s * (n - 1) + 1, s) for d, k, s, n in zip(geometry.dilation, place, geometry.stride, size))
        sums.append(padded[:, rows, columns].sum((1, 2)))
    return np.stack(sums, 1)


def _times_seen(size: tuple[int, int], geometry: Geometry, kernel: tuple[int, int]) -> np.ndarray:
    """How many output pixels and positions of the kernel see each pixel of the input: int64 `[H W]`."""
    times = []
    for length, out, taps, step, dilation, before in zip(
            size, geometry.output_size(*size, kernel), kernel, geometry.stride, geometry.dilation, geometry.padding[::2]):
        seen = (np.arange(out)[:, None] * step + np.arange(taps) * dilation - before).ravel()
        times.append(np.bincount(seen[(seen >= 0) & (seen < length)], minlength=length))
    return np.outer(*times).ravel()


def _spans(mapping: str, rows: int, w_shape: tuple[int, int, int, int], planes: int) -> list[tuple[int, int, int, int]]:
    """What the arrays of one group consist of: `(array, tap, first channel, behind the last)`. With "tap" mapping those of one tap:
    the others have the same."""
    _, channels, kh, kw = w_shape
    arrays = enumerate(array_bounds(mapping, 1 if mapping == "tap" else kh * kw, channels, rows, planes))
    return [(array, tap, max(start - tap * channels, 0), min(stop - tap * channels, channels))
            for array, (start, stop) in arrays for tap in range(start // channels, (stop - 1) // channels + 1)]


def _digits(a_bits: int, dac_bits: int) -> np.ndarray:
    """(first bit, bits) of each digit of an input, int64 `[digits, 2]`."""
    return np.array([(first, min(dac_bits, a_bits - first)) for first in range(0, a_bits, dac_bits)])


def _pieces(spans: list[tuple[int, int, int, int]], cuts: list[int], kw: int, groups: int) -> np.ndarray:
    """The same of all groups, cut into segments of channels: int64 `[n, 4]`, (array, row and column of the tap, segment)."""
    pieces = [(array, tap // kw, tap % kw, segment) for array, tap, first, end in spans
              for segment, cut in enumerate(cuts) if first <= cut < end]
    arrays = spans[-1][0] + 1
    shifted = np.array(pieces)[None] + np.arange(groups)[:, None, None] * [arrays, 0, 0, len(cuts) - 1]
    return np.ascontiguousarray(shifted.reshape(-1, 4))
