"""CPU engine for layers of few columns: output pixels side by side (`pixels_plan`, `pixels_kernel`)."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from torch.nn import functional as F

from ...mapping import MappedLayer
from .. import accumulator_dtype
from .choice import fastest_for
from .output import NOT_TO_CODES, ToCodes
from .picks import PIXELS
from .pixels_kernel import Raster, Target, run
from .pixels_plan import NARROW, plan
from .simd import has_byte_tables, set_threads
from .wide import WIDE

PLANES = 2**15  # bytes of the planes of a block, about: they stay in the first-level cache
FEWEST = WIDE  # output pixels of a call
MOST_PHASES = 4  # strides of 2; of longer ones most planes are not used
MOST_ROWS, MOST_COLUMNS = 64, 64  # of an array; of one slice, half of them with u in 16 bits: what is not tried is so where it has no more


class SideBySide:
    """One layer, as it is run where `serves`. Args: other, with `by_columns`, the way that it may take the place of."""

    def __init__(self, layer: MappedLayer, other: Any) -> None:
        self.layer, self._other, self._rasters = layer, other, {}

    @functools.cached_property
    def _plan(self):
        return plan(self.layer)

    def serves(self, a_codes: torch.Tensor) -> bool:
        """Whether this is the faster way for such an input, or can be gone at all."""
        size = self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
        outputs = len(a_codes) * math.prod(size)
        if outputs < FEWEST or not has_byte_tables() or not self._can_run:
            return False
        raster, _ = self._raster(a_codes.shape)
        if 2 * outputs < -(-raster.images * raster.rows * raster.pitch // raster.block) * raster.block:  # most lanes are padding
            return False
        ways = {"side by side": lambda x: self.simulate(x, accumulator_dtype(self.layer)), "by columns": self._other.by_columns}
        way = fastest_for(self.layer, a_codes, ways)
        return self._is_small if way is None else way == "side by side"

    @functools.cached_property
    def _can_run(self):
        spec = self.layer.spec
        if spec.adc_range not in ("calibrated", "full") or self.layer.readout is not None:
            return False
        return math.prod(self.layer.geometry.stride) <= MOST_PHASES and self._plan is not None

    @functools.cached_property
    def _is_small(self):
        columns = len(self.layer.w_codes) // self.layer.geometry.groups
        return self.layer.tallest <= MOST_ROWS and columns <= (MOST_COLUMNS if self._plan[0].form == NARROW else MOST_COLUMNS // 2)

    def simulate(self, a_codes: torch.Tensor, dtype: torch.dtype, values: np.ndarray | None = None, scale: np.ndarray | None = None,
                 offset: np.ndarray | None = None, next_codes: np.ndarray | None = None, to_codes: ToCodes | None = None) -> torch.Tensor:
        """Accumulators of `dtype`, or what the others make of them; see `engine._Prepared.simulate`."""
        set_threads()
        shape, tables = self._plan
        size = self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
        results = shape.steps if values is None else 1 if next_codes is None else 0
        out = torch.empty(results, len(a_codes), *size, len(self.layer.w_codes), dtype=dtype)
        target = Target(
            out=out.numpy().view(np.int32), wide=dtype == torch.int64, values=np.empty(0) if values is None else values,
            scale=np.empty(0, np.float32) if scale is None else scale, offset=np.empty(0, np.float32) if offset is None else offset,
            next_codes=np.empty((0,) * 4, np.uint8) if next_codes is None else next_codes)
        raster, place = self._raster(a_codes.shape)
        codes = F.pad(a_codes.flatten(), (0, WIDE))  # a vector from the last code on is read too
        run(shape, tables, raster, place, target, to_codes or NOT_TO_CODES, codes.numpy())
        return out

    def _raster(self, input_shape):
        """(`Raster`, `Addresses.place`) for inputs `[N, H, W, in]`."""
        key, found = (*input_shape, numba.get_num_threads()), self._rasters
        if key not in found:  # another thread may put its own there meanwhile
            found = self._rasters = {key: self._make_raster(input_shape)}
        return found[key]

    def _make_raster(self, input_shape):
        size = self.layer.geometry.output_size(*input_shape[1:3], self.layer.kernel)
        shape, tables = self._plan
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
