"""Counting ones: how often each bit of each code is set, and which bits any of the word lines of an array has.

Eight codes stand in a word of 64 bits. Bit b of all of them is `(word >> b) & 0x0101...`, and up to 255 such words add up without
a carry from one byte into the next.
"""

import numpy as np
import torch
from numba import njit, prange

from .cache import SOURCES
from .simd import set_threads

WORDS = 256  # of one work item: with the sums of eight bits they stay in the first-level cache
MOST_IN_A_BYTE = 255
_EACH_BYTE = np.uint64(0x0101010101010101)


@njit
def _add_words(words, lanes):
    """Add the bits of `words`, `[N, W]`, to the bytes of `lanes`, `[bits, W]`."""
    for n in range(len(words)):
        row = words[n]
        for b in range(len(lanes)):
            lane, shift = lanes[b], np.uint64(b)
            for i in range(len(row)):
                lane[i] += (row[i] >> shift) & _EACH_BYTE


@njit
def _add_bytes(lanes, sums):
    """Add the bytes of `lanes` to `sums`, int64 `[bits, W, 8]`."""
    for b in range(len(sums)):
        for i in range(sums.shape[1]):
            word, target = lanes[b, i], sums[b, i]
            for byte in range(8):
                target[byte] += np.int64((word >> np.uint64(8 * byte)) & np.uint64(255))


@njit(cache=True, parallel=True)
def _ones(words, sums, sources=SOURCES):
    for item in prange((words.shape[1] + WORDS - 1) // WORDS):
        part, target = words[:, item * WORDS:(item + 1) * WORDS], sums[:, item * WORDS:(item + 1) * WORDS]
        for first in range(0, len(words), MOST_IN_A_BYTE):
            lanes = np.zeros((len(sums), part.shape[1]), np.uint64)
            _add_words(part[first:first + MOST_IN_A_BYTE], lanes)
            _add_bytes(lanes, target)


def ones(codes: torch.Tensor, bits: int) -> np.ndarray:
    """How many of N codes have each bit set. Args: codes, uint8 `[N, P]`, contiguous. Returns: int64 `[bits, P]`."""
    places = codes.shape[1]
    if places % 8:
        codes = torch.nn.functional.pad(codes, (0, -places % 8))
    sums = np.zeros((bits, codes.shape[1] // 8, 8), np.int64)
    set_threads()
    _ones(codes.numpy().view(np.uint64), sums)
    return sums.reshape(bits, -1)[:, :places]


@njit
def _join(part):
    joined = np.uint8(0)
    for i in range(len(part)):
        joined |= part[i]
    return joined


@njit(cache=True, parallel=True)
def _joined(codes, cuts, out, sources=SOURCES):
    """The codes of each segment of channels, from `cuts[s]` to `cuts[s + 1]`, joined by OR: out, `[N, segments, pixels]`."""
    for n in prange(len(codes)):
        for pixel in range(codes.shape[1]):
            for s in range(len(cuts) - 1):
                out[n, s, pixel] = _join(codes[n, pixel, cuts[s]:cuts[s + 1]])


@njit
def _join_row(line, source, shift, step):
    """Join the pixels `x step + shift` of a row of the input, where it has them, to each x of `line`."""
    first = max(0, -(shift // step))
    last = min(len(line), (len(source) - 1 - shift) // step + 1)
    target = line[first:max(first, last)]
    part = source[first * step + shift:]
    for x in range(len(target)):
        target[x] |= part[x * step]


@njit
def _count(line, counts):
    for x in range(len(line)):
        counts[line[x]] += 1


@njit(cache=True, parallel=True)
def _array_codes(joined, size, step, first, pieces, counts, sources=SOURCES):
    """Args: joined, `[N, segments, H, W]`; counts, int64 `[N, 256]`, to which is added; the others as `array_codes`."""
    height = joined.shape[2]
    for n in prange(len(joined)):
        line = np.zeros(size[1], np.uint8)
        for y in range(size[0]):
            for p in range(len(pieces)):
                row = y * step[0] - first[0] + pieces[p, 1]
                if 0 <= row < height:
                    _join_row(line, joined[n, pieces[p, 3], row], pieces[p, 2] - first[1], step[1])
                if p + 1 == len(pieces) or pieces[p + 1, 0] != pieces[p, 0]:  # the array is whole
                    _count(line, counts[n])
                    line[:] = 0


def array_codes(codes: torch.Tensor, cuts: np.ndarray, pieces: np.ndarray, size: tuple[int, int], step: tuple[int, int],
                first: tuple[int, int]) -> np.ndarray:
    """How many reads there are of arrays whose codes, joined by OR, are 0, 1, ... 255: int64 `[256]`.

    Args:
        codes: uint8 `[N, H, W, channels]`, contiguous.
        cuts: first channel of each segment, and the number of channels.
        pieces: what arrays consist of, in their order, int64 `[n, 4]`: (array, down, right, segment).
        size, step: of the output, in pixels. first: padding above and to the left.
    """
    images, height, width, channels = codes.shape
    joined = np.empty((images, len(cuts) - 1, height * width), np.uint8)
    counts = np.zeros((images, 256), np.int64)
    set_threads()
    _joined(codes.numpy().reshape(images, height * width, channels), cuts, joined)
    _array_codes(joined.reshape(images, -1, height, width), np.array(size), np.array(step), np.array(first), pieces, counts)
    return counts.sum(0)
