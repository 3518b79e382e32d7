"""How the Triton kernel converts the reads of a layer, and its tiles. Codes are compared with those of `Converter.encode` before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from ...arrays.mapping import MAX_BINS
from ..reach import read_range
from .triton_tile import MAGIC, classes_apart, exact_numbers, of_kinds

if TYPE_CHECKING:
    from ...arrays.mapping import MappedLayer
    from .triton_kernel import Constants


def conversion(layer: MappedLayer) -> tuple[str, torch.Tensor | None]:
    """How the kernel converts the reads of `layer`: `(mode, what it needs of each slice, digit and class or None)`."""
    spec = layer.spec
    if spec.adc_range == "dynamic":
        return "dynamic", None
    if spec.adc_range == "ideal":
        return "sum" if layer.readout is None else "as read", None
    if layer.cells is not None:
        static = np.all(of_kinds(layer, _is_static))
        numbers = torch.tensor(of_kinds(layer, exact_numbers), dtype=torch.float32 if static else torch.float64)
        return "static" if static else "exact", numbers
    if not spec.planned and len(layer.delta_groups) == 1 and all(_is_identity(layer, k) for k in range(len(spec.slice_bits))):
        return "sum", None
    constants = of_kinds(layer, _float32_constants)
    if not any(None in of_digit for of_slice in constants for of_digit in of_slice):
        return "static", torch.tensor(constants, dtype=torch.float32)
    low, high = layer.u_span
    if (high - low + 1) * len(classes_apart(layer)) > MAX_BINS:
        return "exact", torch.tensor(of_kinds(layer, exact_numbers), dtype=torch.float64)
    return "table", torch.from_numpy(np.array(of_kinds(layer, _code_table)))


def _code_table(layer, z, k, j):
    """Codes of digit `z`, slice `k` and class `j` for each u of the layer, int16 `[u]`."""
    return layer.converter(z, k, j).table(*layer.u_span, layer.spec.unit).astype(np.int16)


def _is_identity(layer, k):
    """Whether slice `k`'s ADC gives q = u for every u that it can meet."""
    (low, high), converter = layer.u_range(k), layer.converter(0, k)
    if high - low >= 2**converter.bits:
        return False
    return np.array_equal(converter.table(low, high, layer.spec.unit), np.arange(low, high + 1))


def _float32_constants(layer, z, k, j=-1):
    """`(s, MAGIC + q_min, MAGIC + q_max)` with which the kernel's float32 arithmetic is `Converter.encode`; None without.

    It does not fall as u grows: see `Converter.around_steps`.
    """
    unit, converter = layer.spec.unit, layer.converter(z, k, j)
    u, codes = converter.around_steps(*layer.u_range(k, j), unit)
    magic, nearest = np.float32(MAGIC.value), np.float32(unit / converter.delta)
    bounds = magic + np.float32(converter.q_min), magic + np.float32(converter.q_max)
    for s in (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))):
        if np.array_equal(np.clip(u.astype(np.float32) * s + magic, *bounds) - magic, codes):
            return float(s), float(bounds[0]), float(bounds[1])
    return None


def _is_static(layer, z, k, j):
    """Whether float32 gives the codes of digit `z`, slice `k` and class `j`; reads of 0 bits have none."""
    converter = layer.converter(z, k, j)
    return not converter.bits or _exact_in_float32(converter.delta / layer.unit, read_range(layer, k))


def _exact_in_float32(step, u_range):
    """Whether `u - q D` is exact in float32 for every u of the range and the codes q beside u / D.

    D is a multiple of 1/g, g a power of two, and so are u, q D and what is left. All of them are below the largest |u| + 2 D, so they
    are floats if that is at most 2^24 / g. Steps that are multiples of 1/64 of a level are wholes here on the grid of 1/256.
    """
    grain = step.as_integer_ratio()[1]
    return (max(-u_range[0], u_range[1]) + 2 * step) * grain <= 2**24


def tiling(mode: str, pixels: int, channels: int, programs: int, L: Constants) -> tuple[int, int, dict]:
    """Tile `(pixels, channels)` of one program and the launch options.

    Of ideal cells: on an H100 a tile of 128 x 64 on 8 warps takes 128 registers a thread, so 16 warps share a multiprocessor and
    convert while others multiply. The division of "dynamic" and the numbers of several classes need more registers, a lookup
    goes through shared memory, and so do the codes of several blocks: smaller tiles. Tiles also shrink where they would not fill
    the GPU's 132 multiprocessors twice.

    Args: pixels and channels of one group; programs, groups times ADC steps; L, the layer's constants.
    """
    if not L.ideal:
        return _tiling_of_cells(mode, pixels, channels, programs, L)
    block_n = min(64, max(16, triton.next_power_of_2(channels)))
    large = mode in ("sum", "static", "range") and L.blocks == L.classes == 1
    block_m = min(128 if large else 64, max(16, triton.next_power_of_2(pixels)))
    for smaller in ((min(block_m, 64), block_n), (min(block_m, 64), min(block_n, 32))):
        if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n) * programs < 2 * 132:
            block_m, block_n = smaller
    options = dict(num_warps=8 if block_m == 128 else 4, num_stages=3 if L.blocks == 1 else 2,
                   enable_fp_fusion=False, sanitize_overflow=False)
    if L.acc == tl.int32:
        options["maxnreg"] = 128 if block_m == 128 else 168
    return block_m, block_n, options


def _tiling_of_cells(mode, pixels, channels, programs, L):
    """Of cells on a grid: the largest that need no more registers than there are: float64, and the division of "dynamic", take many.
    Passes that store no tile have their products unrolled, and with several stages in flight these would not fit the shared memory of
    smaller GPUs."""
    most = 64 if mode == "sum" or mode == "static" and L.blocks == 1 else 32
    block_n = min(most, max(16, triton.next_power_of_2(channels)))
    block_m = min(64, max(16, triton.next_power_of_2(pixels)))
    if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n) * programs < 2 * 132:
        block_n = min(block_n, 32)
    stages = 1 if mode in ("range", "histogram") else 2
    return block_m, block_n, dict(num_warps=4, num_stages=stages, enable_fp_fusion=False, sanitize_overflow=False)
