"""Element-wise steps on the CPU in one pass over memory each: PACT, DoReFa and linear quantizers, forward and backward, codes of a
crossbar layer's input, scaling of its result.

PyTorch would take four to eight passes for a quantizer and a slow mixed-type multiplication for the result. Tensors are
float32 or, where trained, bfloat16, which NumPy does not have: its bits are the upper half of a float32's.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

from .cache import SOURCES
from .inner import inlined
from .output import NOT_TO_CODES, ToCodes, act_code, next_code, scale_sum
from .simd import bits_of_float32, float32_from_bits, set_threads

CHUNK = 2**14  # elements of one work item


@inlined
def _part(array, chunk):
    """The elements of one work item. A loop over them from 0 on is one that LLVM vectorises: in one that starts at
    `chunk * CHUNK`, Numba allows for indices below zero."""
    return array[chunk * CHUNK:(chunk + 1) * CHUNK]


def _widen(value):
    """float32 of an element: of a float32 itself, of the bits of a bfloat16."""


@overload(_widen)
def _(value):
    if value == types.uint16:
        return lambda value: float32_from_bits(np.uint32(value) << np.uint32(16))
    return lambda value: value


def _store(array, i, value):
    """Write a float32 as an element, to a bfloat16 rounded to nearest, ties to even."""


@overload(_store)
def _(array, i, value):
    if array.dtype == types.uint16:
        def store(array, i, value):
            bits = bits_of_float32(value)
            array[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:
        def store(array, i, value):
            array[i] = value
    return store


@njit(cache=True, parallel=True)
def _pact_forward(x, alpha, scale, out, sources=SOURCES):
    """Whole numbers `rint(clip(x, 0, alpha) scale)` of flat x, into `out`."""
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        source, target = _part(x, chunk), _part(out, chunk)
        for i in range(len(source)):
            _store(target, i, np.rint(min(max(_widen(source[i]), np.float32(0)), alpha) * scale))


# "reassoc" lets LLVM sum in vector lanes, eight times faster; the order stays the same from call to call.
@njit(cache=True, parallel=True, fastmath={"reassoc"})
def _pact_backward(x, grad, alpha, scale, grad_x, sums, sources=SOURCES):
    """Gradient of flat x, `scale grad` where x is within 0 and alpha; and of alpha, summed chunk by chunk, float32 `[chunks]`."""
    for chunk in prange(len(sums)):
        total = np.float32(0)
        source, grads, target = _part(x, chunk), _part(grad, chunk), _part(grad_x, chunk)
        for i in range(len(source)):
            value, g = _widen(source[i]), _widen(grads[i]) * scale
            above = value >= alpha
            total += g if above else np.float32(0)
            _store(target, i, np.float32(0) if value <= 0 or above else g)
        sums[chunk] = total


@njit(cache=True, parallel=True)
def _dorefa_forward(t, twice_largest, levels, out, sources=SOURCES):
    """`2 rint((t / twice_largest + 1/2) levels) - levels` of flat t, float32."""
    for chunk in prange((t.size + CHUNK - 1) // CHUNK):
        source, target = _part(t, chunk), _part(out, chunk)
        for i in range(len(source)):
            target[i] = np.float32(2) * np.rint((source[i] / twice_largest + np.float32(0.5)) * levels) - levels


@njit(cache=True, parallel=True)
def _dorefa_backward(t, grad, factor, out, sources=SOURCES):
    """`grad factor (1 - t^2)`, flat, float32."""
    for chunk in prange((t.size + CHUNK - 1) // CHUNK):
        source, grads, target = _part(t, chunk), _part(grad, chunk), _part(out, chunk)
        for i in range(len(source)):
            target[i] = grads[i] * factor * (np.float32(1) - source[i] * source[i])


@njit(cache=True, parallel=True)
def _window_forward(x, steps, low, high, out, sources=SOURCES):
    """`clip(rint(x / step), low, high)` of x `[rows, n]`, each row with its step, into `out`."""
    parts = (x.shape[1] + CHUNK - 1) // CHUNK
    for chunk in prange(len(x) * parts):
        row, part = chunk // parts, chunk % parts
        source, target, step = _part(x[row], part), _part(out[row], part), steps[row]
        for i in range(len(source)):
            _store(target, i, min(max(np.rint(_widen(source[i]) / step), low), high))


@njit(cache=True, parallel=True, fastmath={"reassoc"})
def _window_backward(x, grad, steps, low, high, edge, grad_x, sums, sources=SOURCES):
    """Gradient of x `[rows, n]`: that of its code's value where `x / step` is within low and high, or so close that it rounds there; and of
    the steps, summed chunk by chunk, float32 `[rows, chunks]`."""
    parts = sums.shape[1]
    for chunk in prange(sums.size):
        row, part, total = chunk // parts, chunk % parts, np.float32(0)
        source, grads, target, step = _part(x[row], part), _part(grad[row], part), _part(grad_x[row], part), steps[row]
        for i in range(len(source)):
            place, g = _widen(source[i]) / step, _widen(grads[i])
            inside = place >= low - edge and place <= high + edge
            code = min(max(np.rint(place), low), high)
            total += g * (code - (place if inside else np.float32(0)))
            _store(target, i, g if inside else np.float32(0))
        sums[row, part] = total


def _elements(x):
    """The elements of a dense tensor in the order of its memory, as NumPy sees them."""
    flat = x.resolve_neg().as_strided((x.numel(),), (1,))
    return (flat.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else flat.numpy())


def can_run(x: torch.Tensor) -> bool:
    """Whether the functions of quantizers here take this tensor."""
    return (x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)))


def _like(grad, x):
    """The gradient in the type and the order of memory of `x`."""
    grad = grad.to(x.dtype)
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def pact_forward(x: torch.Tensor, alpha: torch.Tensor, levels: int) -> torch.Tensor:
    """Codes `round(clip(x, 0, alpha) levels / alpha)` in the dtype and memory format of `x`."""
    set_threads()
    out = torch.empty_like(x)
    _pact_forward(_elements(x.detach()), np.float32(alpha), np.float32(levels / alpha), _elements(out))
    return out


def pact_backward(x: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor,
                  levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, gradient of alpha) for `grad` of the codes; sums in a fixed order, whatever the threads."""
    set_threads()
    grad = _like(grad, x)
    grad_x = torch.empty_like(x)
    sums = np.zeros((x.numel() + CHUNK - 1) // CHUNK, np.float32)
    _pact_backward(_elements(x.detach()), _elements(grad), np.float32(alpha), np.float32(levels / alpha),
                   _elements(grad_x), sums)
    return grad_x, alpha.new_tensor(sums.sum(dtype=np.float64))


def dorefa_forward(t: torch.Tensor, largest: torch.Tensor, levels: int) -> torch.Tensor:
    """`2 round(levels (t / (2 largest) + 1/2)) - levels` of float32 `t`; largest, a scalar tensor."""
    set_threads()
    out = torch.empty_like(t)
    _dorefa_forward(_elements(t), np.float32(2 * largest), np.float32(levels), _elements(out))
    return out


def dorefa_backward(t: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`grad factor (1 - t^2)`; factor, a scalar tensor."""
    set_threads()
    out = torch.empty_like(t)
    _dorefa_backward(_elements(t), _elements(_like(grad, t)), np.float32(factor), _elements(out))
    return out


def _rows(x, steps):
    """The elements of a dense tensor, `[steps, elements]`."""
    return _elements(x).reshape(len(steps), -1)


def window_forward(x: torch.Tensor, steps: torch.Tensor, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes `clip(rint(x / step), low, high)` in another type, float32 or bfloat16, and the memory format of `x`. Args: steps, float32
    `[1]`, or one for each row of a contiguous `x`."""
    set_threads()
    out = torch.empty_like(x, dtype=dtype)
    _window_forward(_rows(x.detach(), steps), steps.numpy(), np.float32(low), np.float32(high), _rows(out, steps))
    return out


def window_backward(x: torch.Tensor, grad: torch.Tensor, steps: torch.Tensor, low: int, high: int,
                    edge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, sums that make that of the steps, float32 `[steps]`), for `grad` of the values; see `_window_backward`. Sums are in a
    fixed order, whatever the threads. Args: as `window_forward`."""
    set_threads()
    grad, grad_x = _like(grad, x), torch.empty_like(x)
    sums = np.zeros((len(steps), (x.numel() // len(steps) + CHUNK - 1) // CHUNK), np.float32)
    _window_backward(_rows(x.detach(), steps), _rows(grad, steps), steps.numpy(), np.float32(low), np.float32(high), np.float32(edge),
                     _rows(grad_x, steps), sums)
    return grad_x, torch.from_numpy(sums.sum(1, dtype=np.float64).astype(np.float32))


@njit(cache=True, parallel=True)
def _codes(x, alpha, scale, out, sources=SOURCES):
    """Codes of flat x, uint8, into `out`. Returns: how many of x are not a number."""
    unknown = 0
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        source, target, not_a_number = _part(x, chunk), _part(out, chunk), np.int32(0)
        for i in range(len(source)):
            not_a_number += np.int32(source[i] != source[i])
            target[i] = act_code(source[i], alpha, scale)
        unknown += not_a_number
    return unknown


@njit(cache=True, parallel=True)
def _window_codes(x, scale, low, high, lift, top, left, out, sources=SOURCES):
    """x `[N, H, W in]`; out `[N, H', W' in]` with `top` rows above and `left` elements before each."""
    (images, height, length), rows, unknown = x.shape, out.shape[1], 0
    for item in prange(images * rows):
        image, row, not_a_number = item // rows, item % rows, np.int32(0)
        target = out[image, row]
        if row < top or row >= top + height:
            target[:] = lift
        else:
            source, inner = x[image, row - top], target[left:left + length]
            target[:left], target[left + length:] = lift, lift
            for i in range(length):
                not_a_number += np.int32(source[i] != source[i])
                inner[i] = np.int32(min(max(np.rint(source[i] / scale), low), high)) + lift
        unknown += not_a_number
    return unknown


@njit(cache=True, parallel=True)
def _scale(acc, unit, shift, scale, offset, to_codes, out, sources=SOURCES):
    """`scale_sum` of each sum `[pixels, channels]`, float32, or with gains in `to_codes` the next layer's code, uint8, into `out`."""
    pixels, channels = acc.shape
    together = max(1, CHUNK // channels)
    for chunk in prange((pixels + together - 1) // together):
        for i in range(chunk * together, min(pixels, (chunk + 1) * together)):
            for c in range(channels):
                if len(shift):
                    y = scale_sum(shift.dtype.type(acc[i, c]) * unit + shift[c], scale[c], offset[c])
                else:
                    y = scale_sum(acc[i, c], scale[c], offset[c])
                if len(to_codes.gain):
                    out[i, c] = next_code(y, to_codes.gain[c], to_codes.shift[c], to_codes.alpha, to_codes.factor)
                else:
                    out[i, c] = y


def act_codes(x: torch.Tensor, alpha: torch.Tensor, levels: int) -> tuple[torch.Tensor, bool]:
    """(`quantizers.act_codes` as uint8, whether some of x is not a number): x, float32 NHWC; alpha, float32 scalar tensor."""
    set_threads()
    x = x.detach().contiguous().resolve_neg()
    out = torch.empty(x.shape, dtype=torch.uint8)
    unknown = _codes(x.view(-1).numpy(), np.float32(alpha), np.float32(levels / alpha), out.view(-1).numpy())
    return out, unknown > 0


def window_codes(x: torch.Tensor, scale: torch.Tensor, low: int, high: int, lift: int = 0,
                 padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> tuple[torch.Tensor, bool]:
    """(`clip(rint(x / scale), low, high) + lift` with zeros of x around the images, whether some of x is not a number); ties to even.

    Args: x, float32 `[N, H, W, in]`, contiguous; scale, may be negative; padding, (top, bottom, left, right).
    Returns: uint8 `[N, H', W', in]` where no code is negative, else int16.
    """
    set_threads()
    images, height, width, channels = x.shape
    top, bottom, left, right = padding
    out = torch.empty(images, top + height + bottom, left + width + right, channels,
                      dtype=torch.int16 if low + lift < 0 else torch.uint8)
    unknown = _window_codes(x.resolve_neg().flatten(2).numpy(), np.float32(scale), np.float32(low), np.float32(high), np.int32(lift), top,
                            left * channels, out.flatten(2).numpy())
    return out, unknown > 0


def scaled(acc: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, to_codes: ToCodes | None = None, unit: int = 1,
           shift: torch.Tensor | None = None) -> torch.Tensor:
    """`float32(unit acc + shift) scale + offset`, written over an `acc` of 32 bits; or the next layer's codes, uint8.

    Args: acc, integers `[N, H, W, out]`, in float32 too, contiguous; scale, offset, float32 `[out]`; to_codes, `output.ToCodes`; shift,
        int64 `[out]`; the sum in brackets is one that its type, or for float32 one of 32 bits, holds.
    """
    set_threads()
    integers = np.int64 if acc.dtype == torch.int64 else np.int32
    if shift is not None:
        shift = shift.numpy().astype(integers)
    else:
        shift = np.zeros(0 if unit == 1 else acc.shape[-1], integers)
    if to_codes is not None:
        out = torch.empty(acc.shape, dtype=torch.uint8)
    else:
        out = torch.empty(acc.shape) if acc.dtype == torch.int64 else acc.view(torch.float32)
    rows = -1, acc.shape[-1]
    _scale(acc.view(rows).numpy(), integers(unit), shift, scale.numpy(), offset.numpy(), to_codes or NOT_TO_CODES,
           out.view(rows).numpy())
    return out


def scaled_steps(acc: torch.Tensor, values: list[float], scale: torch.Tensor, offset: torch.Tensor,
                 to_codes: ToCodes | None = None) -> torch.Tensor:
    """`scaled` of `sum_step acc values`, added in float64, of accumulators `[step, N, H, W, out]`; values, a float for each step."""
    total = acc[0] if values == [1.0] else sum(plane.double() * value for plane, value in zip(acc, values)).float()
    return scaled(total, scale, offset, to_codes)
