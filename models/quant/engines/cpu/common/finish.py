"""An output pixel whose reads are added up: its accumulators, or what the network makes of them, to where they are wanted."""

from collections import namedtuple

from numba import int64

from ....kernels.inner import inlined
from ....kernels.output import next_code, scale_sum
from ....kernels.simd import (LANES, bits_of_float32, float32_at, float64_at, int32_at, int64_at, put_float64, put_int64, put_uint8,
                              put_uint32)

# An output pixel of one group.
# place     its first channel in `[N, H', W', out]`; channel: that channel's number
# constant  what each of its accumulators gets besides the codes
# added     whether anything was added to the sums
# sums      the first of its accumulators
Pixel = namedtuple("Pixel", "place channel constant added sums")


@inlined
def finish_pixel(shape, at, pixel):
    """The accumulators of a pixel, `[step, channel]`, to `Target.out` or `Target.next_codes`."""
    if at.scaling:
        for c in range(shape.out_channels):
            put_float64(at.total, c, 0.0)
    for step in range(shape.steps):
        _put_step(shape, at, pixel, step)
        if at.scaling:
            value = float64_at(at.values, step)
            for c in range(shape.out_channels):
                put_float64(at.total, c, float64_at(at.total, c) + int64_at(at.step, c) * value)
        elif at.wide:
            for c in range(shape.out_channels):
                put_int64(at.out, step * at.step_size + pixel.place + c, int64_at(at.step, c))
        else:
            for c in range(shape.out_channels):
                put_uint32(at.out, step * at.step_size + pixel.place + c, int64_at(at.step, c))
    if at.to_codes:
        for c in range(shape.out_channels):
            gain, shift = float32_at(at.gain, pixel.channel + c), float32_at(at.shift, pixel.channel + c)
            put_uint8(at.next_codes, pixel.place + c, next_code(_scaled(at, pixel, c), gain, shift, at.alpha, at.factor))
    elif at.scaling:
        for c in range(shape.out_channels):
            put_uint32(at.out, pixel.place + c, bits_of_float32(_scaled(at, pixel, c)))


@inlined
def _put_step(shape, at, pixel, step):
    """The accumulators of one ADC step to `at.step`, as 64-bit integers."""
    lane = pixel.sums + step * shape.slice_vectors * LANES
    if at.exact:
        for c in range(shape.out_channels):
            put_int64(at.step, c, int64_at(at.exact_acc, lane + c) + pixel.constant)
    elif at.relative == 0:
        for c in range(shape.out_channels):
            put_int64(at.step, c, int32_at(at.acc, lane + c) + pixel.constant)
    else:  # to the sum of all u / s, which `out` holds
        if at.floats:
            for c in range(shape.out_channels):
                put_int64(at.step, c, int64(float32_at(at.out, pixel.place + c)))
        else:
            for c in range(shape.out_channels):
                put_int64(at.step, c, int32_at(at.out, pixel.place + c))
        if pixel.added:
            for c in range(shape.out_channels):
                put_int64(at.step, c, int64_at(at.step, c) + int32_at(at.acc, c))


@inlined
def _scaled(at, pixel, c):
    """y of the pixel's channel `c`, float32."""
    return scale_sum(float64_at(at.total, c), float32_at(at.scale, pixel.channel + c), float32_at(at.offset, pixel.channel + c))
