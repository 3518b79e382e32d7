"""CPU engine for layers of few columns: output pixels side by side (`pixels_layout`, `pixels_kernel`)."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from torch.nn import functional as F

from ....arrays.mapping import MappedLayer
from ....arrays.readout import first_image
from ....kernels.output import ToCodes
from ....kernels.simd import has_byte_tables, set_threads
from ... import accumulator_dtype
from ..common.buffers import room_for_results
from ..vectors.picks import BYTE_ROWS, PIXELS, TABLE
from ..vectors.wide import WIDE
from ..vectors.wide_noise import sums_bytes
from ..whole.choice import SIDE_BY_SIDE, fastest_for, may
from .pixels_kernel import Raster, run
from .pixels_layout import lay_out

PLANES = 2**15  # bytes of the planes of a block, about: they stay in the first-level cache
FEWEST = WIDE  # output pixels of a call
MOST_PHASES = 4  # strides of 2; of longer ones most planes are not used
MOST_BYTES = 2**24  # of all tables: more are not in a cache when they are needed
MOST_KINDS = 256  # of reads whose noise is drawn for a block: what it follows from stays in the second-level cache
MOST_ROWS, MOST_COLUMNS = 64, 64  # of an array; of one slice, half of them with u in 16 bits: what is not tried is so where it has no more


class SideBySide:
    """One layer, as it is run where `serves`. Args: other, with `by_columns`, the way that it may take the place of."""

    name = SIDE_BY_SIDE

    def __init__(self, layer: MappedLayer, other: Any) -> None:
        self.layer, self._other, self._rasters = layer, other, {}

    @functools.cached_property
    def _layout(self):
        return lay_out(self.layer)

    def serves(self, a_codes: torch.Tensor) -> bool:
        """Whether this is the faster way for such an input, or can be gone at all."""
        size = self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
        outputs = len(a_codes) * math.prod(size)
        if outputs < FEWEST or not has_byte_tables() or not self._may_run:
            return False
        way = fastest_for(self.layer, a_codes, {"side by side": self._tried, "by columns": self._other.by_columns}, self.besides)
        if way == "by columns":
            self.__dict__.pop("_layout", None)  # its tables are large
            return False
        if self._layout is None:
            return False
        raster, _ = self._raster(a_codes.shape)
        few = 2 * outputs < -(-raster.images * raster.rows * raster.pitch // raster.block) * raster.block  # most lanes are padding
        return way is not None or self._is_small and not few

    def _tried(self, a_codes):
        if self._layout is not None:
            self.simulate(a_codes, accumulator_dtype(self.layer))
        else:  # no way at all: not to be the faster one
            for _ in range(2):
                self._other.by_columns(a_codes)

    @functools.cached_property
    def _may_run(self):
        layer = self.layer
        if layer.spec.adc_range not in ("calibrated", "full") or not may(self.name):
            return False
        if layer.readout is not None and not self._may_read_out:
            return False
        cells, whole = layer.w_codes.numel() * len(layer.spec.slice_bits), layer.cells is None or layer.in_levels.cells.fraction_bits == 0
        tried = whole or layer.readout is not None
        return math.prod(layer.geometry.stride) <= MOST_PHASES and (tried and cells * TABLE // BYTE_ROWS <= MOST_BYTES or self._is_small)

    @functools.cached_property
    def _may_read_out(self):
        """Whether what reads have besides is the same for all of a column, or follows from n, which a byte holds, or, of curved pairs, from
        what both lines hold together."""
        layer, readout = self.layer, self.layer.readout
        if readout.depends_on_level or layer.classes > 1:
            return False
        counted = readout.cell_noise is not None or readout.curve is not None
        if readout.noisy and not sums_bytes() or counted and (max(layer.spec.digit_bits) > 1 or layer.tallest > 255):
            return False
        kinds = len(layer.arrays) * len(layer.spec.digit_bits) * len(layer.spec.slice_bits)
        return kinds <= MOST_KINDS and len(layer.w_codes) // layer.geometry.groups <= MOST_COLUMNS

    @functools.cached_property
    def besides(self):
        """What its time depends on beside its shape."""
        readout = self.layer.readout
        if readout is None:
            return ()
        return self.layer.compares, readout.noisy, readout.curve is not None, readout.gain is not None and bool((readout.gain != 1).any())

    @functools.cached_property
    def _is_small(self):
        """Whether it is run so without a trial, too: where vectors of columns would not be full."""
        layer, columns = self.layer, len(self.layer.w_codes) // self.layer.geometry.groups
        narrow = max(map(abs, layer.in_levels.u_span)) < 2**7
        return layer.tallest <= MOST_ROWS and columns <= (MOST_COLUMNS if narrow else MOST_COLUMNS // 2)

    def simulate(self, a_codes: torch.Tensor, dtype: torch.dtype, **scaling: np.ndarray | ToCodes) -> torch.Tensor:
        """Accumulators of `dtype`, or what the others make of them; see `engine._Prepared.simulate`."""
        set_threads()
        shape, tables = self._layout
        out = room_for_results(self.layer, a_codes, shape.steps, dtype, scaling)
        raster, place = self._raster(a_codes.shape)
        codes = F.pad(a_codes.flatten(), (0, WIDE))  # a vector from the last code on is read too
        run(shape, tables, raster, place, codes.numpy(), first_image(), out=out.numpy(), **scaling)
        return out

    def _raster(self, input_shape):
        """(`Raster`, `PixelNumbers.place`) for inputs `[N, H, W, in]`."""
        key, found = (*input_shape, numba.get_num_threads()), self._rasters
        if key not in found:  # another thread may put its own there meanwhile
            found = self._rasters = {key: self._make_raster(input_shape)}
        return found[key]

    def _make_raster(self, input_shape):
        size = self.layer.geometry.output_size(*input_shape[1:3], self.layer.kernel)
        shape, tables = self._layout
        images, height, width, _ = input_shape
        rows = _pitch(height, shape.pad_top, shape.stride_y, size[0], int(tables.down.max()))
        pitch = _pitch(width, shape.pad_left, shape.stride_x, size[1], int(tables.right.max()))
        distance = tables.down // shape.stride_y * pitch + tables.right // shape.stride_x
        phase = tables.down % shape.stride_y * shape.stride_x + tables.right % shape.stride_x
        phases, reach = shape.stride_y * shape.stride_x, int(distance.max())
        pixels = images * rows * pitch
        cached = PLANES // (shape.input_bits * shape.intervals * phases)
        shared = -(-pixels // numba.get_num_threads())
        block = max(1, min(cached, shared) // PIXELS) * PIXELS
        length = block + reach
        return (Raster(images, height, width, *size, pitch, rows, block, length),
                (tables.plane * phases + phase) * length + distance)


def _pitch(length, pad, stride, outputs, last_tap):
    """Pixels of a plane from one row to the next, of rows of a phase: a row's padding behind it is that before the next one."""
    touched = (outputs - 1) * stride + last_tap + 1  # of the padded input
    return max(-(-min(pad + length, touched) // stride), -(-(touched - pad) // stride), outputs)
