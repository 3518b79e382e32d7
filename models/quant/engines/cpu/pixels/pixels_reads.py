"""What becomes of reads with output pixels side by side on the way to their converters: curves, noise, gains and offsets, as `cells_reads`.

What all columns of a read share stands in `at.reads`: `[array, digit, slice, field, pixel]`, of PIXELS pixels, the fields of `cells_reads`.
"""

from __future__ import annotations

import numpy as np

from ....kernels.inner import inlined, inner
from ....kernels.simd import float32_at, float64_at, int32_at, int64_at, put_float32, put_int64, uint8_at
from ..grid.cells_reads import DEVIATION, FIRST, HIGH, LIFT, LOW, RISE, SECOND, SHARED
from ..vectors.picks import PIXELS, SHORT_ROWS, ints_of_bytes, with_picked_ints
from ..vectors.wide import WIDE, added, full_i32, store_ints
from ..vectors.wide_noise import (ROUNDER, between_curves_of_reads, converted_alike, curved_reads, mixed, put_currents, put_curves,
                                  put_keys, with_noise_of_reads)

PATTERNS = 2**SHORT_ROWS  # of the input bits of a set of rows


@inner
def draw(shape, at, raster, seed, first_image, first):
    """What the noise of each read follows from, of the pixels from raster pixel `first` on, to `at.reads`: as `cells_reads.add_noise`."""
    kinds = shape.arrays * shape.digits * shape.slices
    for lane in range(PIXELS):
        row, x = (first + lane) // raster.pitch, (first + lane) % raster.pitch
        put_int64(at.keys, lane, np.int64(mixed(seed, row // raster.rows + first_image)))
        put_int64(at.keys, PIXELS + lane, (row % raster.rows * raster.out_width + x) * kinds)
    for t in range(shape.arrays):
        for z in range(shape.digits):
            for k in range(shape.slices):
                reads, number = fields_of(shape, at, t, z, k, 0), (t * shape.digits + z) * shape.slices + k
                for lane in range(0, PIXELS, WIDE):
                    keys, low = at.keys + 8 * lane, reads + 4 * lane
                    put_keys(keys, keys + 8 * PIXELS, number, low + 4 * LOW * PIXELS, low + 4 * HIGH * PIXELS)
                noise, ones = (z * shape.slices + k) * shape.deviations, at.classes + (t * shape.digits + z) * PIXELS
                for lane in range(PIXELS):
                    entry = 2 * (noise + min(np.int64(uint8_at(ones, lane)), shape.deviations - 1))
                    put_float32(reads, DEVIATION * PIXELS + lane, float32_at(at.noise, entry))
                    put_float32(reads, LIFT * PIXELS + lane, float32_at(at.noise, entry + 1))


@inlined
def fields_of(shape, at, t, z, k, lane):
    """Where the first field of a read's stands."""
    return at.reads + 4 * (((t * shape.digits + z) * shape.slices + k) * SHARED * PIXELS + lane)


@inner
def bend(shape, at, group, pixel):
    """What the curve of each read follows from, of the pixels from `pixel` of the block on, to `at.reads`: as `cells_reads.add_curves`,
    of digits of one bit."""
    for t in range(shape.arrays):
        for z in range(shape.digits):
            planes, first, end = at.planes + z * at.bit_stride + pixel, int64_at(at.set_start, t), int64_at(at.set_start, t + 1)
            for k in range(shape.slices):
                references = at.references + 4 * (group * shape.slices + k) * shape.sets * PATTERNS
                b0, b1, b2 = float32_at(at.curve, 3 * k), float32_at(at.curve, 3 * k + 1), float32_at(at.curve, 3 * k + 2)
                for half in range(0, PIXELS, WIDE):
                    inputs, reads = at.sums_of_rows + 4 * half, fields_of(shape, at, t, z, k, half)
                    store_ints(inputs, 0, ints_of_bytes(at.classes + (t * shape.digits + z) * PIXELS + half))
                    if shape.paired:
                        put_currents(inputs, float64_at(at.current, k), reads + 4 * FIRST * PIXELS)
                        continue
                    total = full_i32(0)
                    for s in range(first, end):
                        total = with_picked_ints(total, references + 4 * s * PATTERNS, planes + half + int64_at(at.place, s))
                    store_ints(inputs, PIXELS, total)
                    put_curves(inputs, inputs + 4 * PIXELS, float64_at(at.current, k), b0, b1, b2, shape.analog, ROUNDER,
                               reads + 4 * FIRST * PIXELS, reads + 4 * SECOND * PIXELS, reads + 4 * RISE * PIXELS)


@inlined
def read_out(shape, at, u, both, group, o, t, z, k, lane):
    """u of 64 reads, from this one of the PIXELS on, as their converter sees it; both, of curved pairs, what their cells hold together."""
    reads = fields_of(shape, at, t, z, k, lane)
    if shape.curved and shape.paired:
        b0, b1, b2 = float32_at(at.curve, 3 * k), float32_at(at.curve, 3 * k + 1), float32_at(at.curve, 3 * k + 2)
        u = between_curves_of_reads(u, both, reads + 4 * FIRST * PIXELS, b0, b1, b2)
    elif shape.curved:
        u = curved_reads(u, reads + 4 * FIRST * PIXELS, PIXELS, float32_at(at.curve, 3 * k + 2))
    if shape.noisy:
        drawn = at.drawn + 12 * (group * shape.out_channels + o)
        u = with_noise_of_reads(u, reads + 4 * LOW * PIXELS, PIXELS, int32_at(drawn, 0), int32_at(drawn, 1), int32_at(drawn, 2))
    converter = ((k * shape.groups + group) * shape.arrays + t) * shape.out_channels + o
    if shape.gained:
        return converted_alike(u, float64_at(at.gains, converter), int32_at(at.offsets, converter))
    return added(u, full_i32(int32_at(at.offsets, converter))) if shape.moved else u
