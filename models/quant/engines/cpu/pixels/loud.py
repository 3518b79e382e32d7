"""Layers of few columns whose ADCs only clip (`converter.Adc.relative`): the integer convolution, less what clipping takes off.

A read with few ones among its inputs cannot clip. The input pixels of which a digit has more, the *loud* ones, are listed; their reads
are made side by side, 256 pixels to a vector, column by column and tap by tap, as in `pixels_kernel`. Of those hardly one clips.

    output = sum A (2 W - L) / s + sum over loud reads 2^(z + c k) (clip(u / s) - u / s)

s being the spacing of u, which is also the ADC's step.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from ....arrays.mapping import MappedLayer
from ....kernels.cache import SOURCES
from ....kernels.inner import inlined, inner
from ....kernels.simd import has_byte_tables, population, set_threads, uint8_at
from ..planes.converter import Adc
from ..vectors.picks import (BYTE_ROWS, PIXELS, TABLE, added_bytes, any_byte, full_i8, larger_bytes, less_bytes, load_bytes, load_table,
                             picked_bytes, smaller_bytes, store_bytes)
from ..vectors.wide import WIDE, bit_of_64_bytes
from ..whole import choice
from .pixels import MOST_ROWS
from .pixels_layout import sets_of, tables_of

TOGETHER = 4096  # input pixels of a work item, about

# tables        int8 `[group, out, slice, tap, set, 64]`, see `pixels_layout`
# first, size   channels of each set of a tap
# low, high     u beyond which a read clips, `[slice]`; spacing: s
# most          ones that a read can have and cannot clip
# taps          `[tap, 2]`, input pixels down and right
# place         of codes, `[digit, slice]`: exponents of 2
LoudLayout = namedtuple("LoudLayout", "tables first size low high spacing most taps place stride pad groups channels input_bits")


class Loud:
    """One layer, as it is run where `serves`. Args: adc and convolution, of `converter.static_adc`; other, with `by_reads`, the way
    that it may take the place of."""

    name = choice.LOUD

    def __init__(self, layer: MappedLayer, adc: Adc | None, convolution: object, other: Any) -> None:
        self.layer, self.adc, self.convolution, self._other = layer, adc, convolution, other

    def serves(self, a_codes: torch.Tensor) -> bool:
        """Whether this is the faster way for such an input: reads fit in bytes, belong to one tap, and clip seldom."""
        return self._fits and choice.fastest_for(self.layer, a_codes, {"loud": self.simulate, "by reads": self._other.by_reads},
                                                 self.layer.ranges) == "loud"

    @functools.cached_property
    def _fits(self):
        layer, channels = self.layer, self.layer.group_channels
        if self.adc is None or not self.adc.relative or not has_byte_tables() or layer.tallest > MOST_ROWS or layer.spec.dac_bits > 1:
            return False
        if not choice.may(self.name):
            return False
        whole_taps = [stop - start for start, stop in layer.arrays] == [channels] * (layer.kernel[0] * layer.kernel[1])
        low, high = self._reach
        return whole_taps and low.min() >= -127 and high.max() <= 127

    @functools.cached_property
    def _weights(self):
        return self.layer.row_weights.cpu().numpy().astype(np.float64)

    @functools.cached_property
    def _limits(self):
        """u beyond which reads clip, `[slice, 1, 1]`."""
        adcs = [self.layer.converter(0, k) for k in range(len(self.layer.reference_twice))]
        ends = np.array([(adc.q_min, adc.q_max) for adc in adcs], np.int64).T[..., None, None]
        return self.adc.relative * ends[0], self.adc.relative * ends[1]

    @functools.cached_property
    def _reach(self):
        """Smallest and largest u that each column can give, `[array, slice, group, out]`."""
        return tuple(np.stack([part[:, :, start:stop].sum(2) for start, stop in self.layer.arrays])
                     for part in (self._weights.clip(max=0), self._weights.clip(min=0)))

    @functools.cached_property
    def _can_clip(self):
        (smallest, largest), (low, high) = self._reach, self._limits
        return bool((smallest < low).any() or (largest > high).any())

    @functools.cached_property
    def _layout(self):
        layer, spec, geometry = self.layer, self.layer.spec, self.layer.geometry
        sets, weights = sets_of(layer, BYTE_ROWS), self._weights.astype(np.int32)
        s, of_tap = self.adc.relative, sets.start[1]
        channels = np.array(sets.rows[:of_tap], np.int64)
        low, high = (limits.ravel() for limits in self._limits)
        largest, smallest = weights.max((1, 2, 3)), weights.min((1, 2, 3))
        most = min([TABLE * WIDE, *(int(h) // int(w) for h, w in zip(high, largest) if w > 0),
                    *(int(v) // int(w) for v, w in zip(low, smallest) if w < 0)])
        tables = tables_of(weights, sets, BYTE_ROWS, np.int8)
        place = np.arange(len(spec.digit_bits))[:, None] + spec.cell_bits * np.arange(len(spec.slice_bits))
        return LoudLayout(tables.reshape(*tables.shape[:3], -1, of_tap, TABLE), channels[:, 0].copy(), channels[:, 1] - channels[:, 0],
                    low.clip(-128), high.clip(max=127), s, most, np.array(sets.taps[::of_tap], np.int64), place,
                    np.array(geometry.stride), np.array([geometry.padding[0], geometry.padding[2]]), geometry.groups, layer.group_channels,
                    spec.a_bits)

    def simulate(self, a_codes: torch.Tensor) -> torch.Tensor:
        """The layer's accumulators, int32 `[1, N, H', W', out]`."""
        set_threads()
        out = self.convolution(a_codes)[None]
        if self._can_clip:
            out, layout = out.contiguous(), self._layout
            images, height, width, _ = a_codes.shape
            _correct(layout, a_codes.contiguous().numpy(), out[0].numpy(), max(1, TOGETHER // (height * width)))
        return out


@njit(cache=True, parallel=True)
def _correct(layout, codes, out, together, sources=SOURCES):
    """Take off what clips of the sums `out`, int32 `[N, H', W', out]`, of codes uint8 `[N, H, W, in]`, `together` images at a time."""
    for item in prange((len(codes) + together - 1) // together):
        _correct_images(layout, codes[item * together:(item + 1) * together], out[item * together:(item + 1) * together],
                        codes.ctypes.data + codes.size)


@inner
def _correct_images(layout, codes, out, end):
    """The same for some images. Args: end, the address behind the last code."""
    room = codes.shape[0] * codes.shape[1] * codes.shape[2] + PIXELS
    pixels, indices, changes = np.empty(room, np.int64), np.empty((len(layout.first), room), np.uint8), np.empty(PIXELS // 8, np.uint64)
    for group in range(layout.groups):
        for z in range(layout.input_bits):
            count = _list_loud(layout, codes, group, z, end, pixels, indices)
            for first in range(0, count, PIXELS):
                for o in range(layout.tables.shape[1]):
                    for k in range(layout.tables.shape[2]):
                        low, high = full_i8(layout.low[k]), full_i8(layout.high[k])
                        for tap in range(len(layout.taps)):
                            table = layout.tables[group, o, k, tap].ctypes.data
                            u = full_i8(0)
                            for s in range(len(layout.first)):
                                u = added_bytes(u, picked_bytes(load_table(table + s * TABLE), load_bytes(indices[s].ctypes.data + first)))
                            change = less_bytes(smaller_bytes(larger_bytes(u, low), high), u)
                            if any_byte(change):
                                store_bytes(changes.ctypes.data, change)
                                channel = group * layout.tables.shape[1] + o
                                _take_off(layout, changes, pixels[first:first + PIXELS], codes.shape[1], codes.shape[2], tap,
                                          layout.place[z, k], out[..., channel])


@inner
def _list_loud(layout, codes, group, z, end, pixels, indices):
    """Number and input bits of the loud pixels; those up to whole vectors have no ones. Returns: how many."""
    images, height, width, _ = codes.shape
    count = 0
    for pixel in range(images * height * width):
        start = codes.ctypes.data + (pixel * layout.groups + group) * layout.channels
        word = _bits(start, layout.channels, z, end)
        if population(word) > layout.most:
            pixels[count] = pixel
            for s in range(len(layout.first)):
                indices[s, count] = word >> np.uint64(layout.first[s]) & np.uint64((1 << layout.size[s]) - 1)
            count += 1
    indices[:, count:count + PIXELS] = 0
    return count


@inlined
def _bits(codes, size, z, end):
    """Bit z of so many codes from an address on, nothing read from address `end` on."""
    if codes + WIDE <= end:
        word = bit_of_64_bytes(codes, 0, z)
        return word if size == WIDE else word & np.uint64((1 << size) - 1)
    word = np.uint64(0)
    for c in range(size):
        word |= np.uint64(uint8_at(codes, c) >> z & 1) << np.uint64(c)
    return word


@inner
def _take_off(layout, changes, pixels, height, width, tap, place, out):
    """What clipping changes in the reads of one column, eight bytes to a word, to `out`, `[N, H', W']`."""
    for word in range(len(changes)):
        left, i = changes[word], 8 * word
        while left:
            change = np.int64(np.int8(left & np.uint64(255)))
            if change != 0:
                image, rest = pixels[i] // (height * width), pixels[i] % (height * width)
                y, x = rest // width + layout.pad[0] - layout.taps[tap, 0], rest % width + layout.pad[1] - layout.taps[tap, 1]
                if y >= 0 and x >= 0 and y % layout.stride[0] == 0 and x % layout.stride[1] == 0:
                    y, x = y // layout.stride[0], x // layout.stride[1]
                    if y < out.shape[1] and x < out.shape[2]:
                        out[image, y, x] += np.int32(change // layout.spacing << place)
            left >>= np.uint64(8)
            i += 1
