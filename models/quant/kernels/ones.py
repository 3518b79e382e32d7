"""Counting ones: how often each bit of each code is set, and which bits any of the word lines of an array has.

Eight codes stand in a word of 64 bits. Their bits are added up where they stand, in fields that grow as the sums do: of three words
in fields of two bits, of fifteen in four bits, of up to 255 in bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange

from .cache import SOURCES
from .inner import inner
from .simd import set_threads

WORDS = 512  # of one work item: their sums stay in the first-level cache
MOST_IN_FOUR_BITS, MOST_IN_A_BYTE = 15, 255
_TWO, _FOUR, _EIGHT = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_1, _2, _4 = np.uint64(1), np.uint64(2), np.uint64(4)


@inner
def _add_three(x, y, z, fields):
    """Add the bits of three rows of words to `fields`, `[4, W]`: field b has bit b of a code below, and bit b + 4 above."""
    f0, f1, f2, f3 = fields[0], fields[1], fields[2], fields[3]
    for i in range(len(x)):
        even = (x[i] & _TWO) + (y[i] & _TWO) + (z[i] & _TWO)
        odd = (x[i] >> _1 & _TWO) + (y[i] >> _1 & _TWO) + (z[i] >> _1 & _TWO)
        f0[i] += even & _FOUR
        f1[i] += odd & _FOUR
        f2[i] += even >> _2 & _FOUR
        f3[i] += odd >> _2 & _FOUR


@inner
def _add_fields(fields, lanes):
    """Add `fields` to the bytes of `lanes`, `[bits, W]`."""
    for b in range(len(lanes)):
        lane, field, shift = lanes[b], fields[b % 4], np.uint64(b // 4 * 4)
        for i in range(len(lane)):
            lane[i] += field[i] >> shift & _EIGHT


@inner
def _add_lanes(lanes, sums):
    """Add the bytes of `lanes` to `sums`, int32 `[bits, 8, W]`."""
    for b in range(len(sums)):
        lane = lanes[b]
        for byte in range(8):
            target, shift = sums[b, byte], np.uint64(8 * byte)
            for i in range(len(lane)):
                target[i] += np.int32(lane[i] >> shift & np.uint64(255))


@inner
def _add_words(words, sums):
    """Add the bits of words, `[N, W]`, to `sums`, int32 `[bits, 8, W]`."""
    none = np.zeros(words.shape[1], np.uint64)
    fields = np.zeros((4, words.shape[1]), np.uint64)
    lanes = np.zeros((len(sums), words.shape[1]), np.uint64)
    for n in range(0, len(words), 3):
        y = words[n + 1] if n + 1 < len(words) else none
        z = words[n + 2] if n + 2 < len(words) else none
        _add_three(words[n], y, z, fields)
        done = n + 3
        if done % MOST_IN_FOUR_BITS == 0 or done >= len(words):
            _add_fields(fields, lanes)
            fields[:] = 0
        if done % MOST_IN_A_BYTE == 0 or done >= len(words):
            _add_lanes(lanes, sums)
            lanes[:] = 0


@inner
def _join(part):
    """Codes joined by OR, uint8."""
    joined = np.uint8(0)
    for i in range(len(part)):
        joined |= part[i]
    return joined


@inner
def _join_segments(codes, cuts, joined):
    """codes, `[pixels, channels]`; joined, `[segments, pixels]`."""
    for pixel in range(len(codes)):
        for s in range(len(cuts) - 1):
            joined[s, pixel] = _join(codes[pixel, cuts[s]:cuts[s + 1]])


@njit(cache=True, parallel=True)
def _see(words, codes, pixels, cuts, sums, joined, sources=SOURCES):
    """Both ways of counting, item by item of `pixels`, whose codes stay in the second-level cache from one to the other."""
    channels = codes.shape[2]
    step = pixels * channels // 8
    for item in prange((codes.shape[1] + pixels - 1) // pixels):
        _add_words(words[:, item * step:(item + 1) * step], sums[:, :, item * step:(item + 1) * step])
        for n in range(len(codes)):
            _join_segments(codes[n, item * pixels:(item + 1) * pixels], cuts, joined[n, :, item * pixels:(item + 1) * pixels])


class Ones:
    """Adds up how many codes have each bit set, in each place of an input of `pixels` and `channels`.

    Args: bits, of a code; cuts, the first channel of each segment, and the number of channels.
    """

    def __init__(self, pixels: int, channels: int, bits: int, cuts: Sequence[int] = ()) -> None:
        self.shape, self._cuts = (bits, pixels, channels), np.array(cuts, np.int64)
        self._sums = np.zeros((bits, 8, -(-pixels * channels // 8)), np.int32)  # of byte j of each word

    def add(self, codes: torch.Tensor) -> np.ndarray:
        """Args: codes, uint8 `[N, pixels, channels]`, contiguous. Returns: the codes of each segment joined by OR, uint8 `[N,
        segments, pixels]`."""
        _, pixels, channels = self.shape
        flat = codes.view(len(codes), -1)
        if flat.shape[1] % 8:
            flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
        joined = np.empty((len(codes), max(len(self._cuts) - 1, 0), pixels), np.uint8)
        item = 8 * -(-WORDS // channels)  # pixels of which any number of channels fill whole words
        set_threads()
        _see(flat.numpy().view(np.uint64), codes.numpy(), item, self._cuts, self._sums, joined)
        return joined

    @property
    def sums(self) -> np.ndarray:
        """How many of all codes had each bit set: int64 `[bits, pixels, channels]`."""
        bits, pixels, channels = self.shape
        return self._sums.transpose(0, 2, 1).reshape(bits, -1)[:, :pixels * channels].reshape(self.shape).astype(np.int64)


@njit(cache=True, parallel=True)
def _tap_codes(joined, spans, times, counts, sources=SOURCES):
    """`tap_codes`, counts `[N, 256]` of each image."""
    for n in prange(len(joined)):
        line = np.zeros(joined.shape[2], np.uint8)
        for p in range(len(spans)):
            part = joined[n, spans[p, 1]]
            for i in range(len(line)):
                line[i] |= part[i]
            if p + 1 == len(spans) or spans[p + 1, 0] != spans[p, 0]:  # the array is whole
                for i in range(len(line)):
                    counts[n, line[i]] += times[i]
                line[:] = 0


def tap_codes(joined: np.ndarray, spans: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How many reads there are of arrays whose codes, joined by OR, are 0, 1, ... 255, where each kernel position has arrays of its own:
    int64 `[256]`, without reads of nothing but padding.

    Args:
        joined: uint8 `[N, segments, pixels]`.
        spans: what the arrays of a kernel position consist of, in their order, int64 `[n, 2]`: (array, segment).
        times: how many output pixels and kernel positions see each pixel, int64 `[pixels]`.
    """
    counts = np.zeros((len(joined), 256), np.int64)
    set_threads()
    _tap_codes(joined, spans, times, counts)
    return counts.sum(0)


@inner
def _join_row(line, source, shift, step):
    """Join the pixels `x step + shift` of a row of the input, where it has them, to each x of `line`."""
    first = max(0, -(shift // step))
    last = min(len(line), (len(source) - 1 - shift) // step + 1)
    target = line[first:max(first, last)]
    part = source[first * step + shift:]
    for x in range(len(target)):
        target[x] |= part[x * step]


@njit(cache=True, parallel=True)
def _array_codes(joined, size, step, first, pieces, counts, sources=SOURCES):
    """`array_codes`, counts `[N, 256]` of each image."""
    height = joined.shape[2]
    for n in prange(len(joined)):
        line = np.zeros(size[1], np.uint8)
        for y in range(size[0]):
            for p in range(len(pieces)):
                row = y * step[0] - first[0] + pieces[p, 1]
                if 0 <= row < height:
                    _join_row(line, joined[n, pieces[p, 3], row], pieces[p, 2] - first[1], step[1])
                if p + 1 == len(pieces) or pieces[p + 1, 0] != pieces[p, 0]:  # the array is whole
                    for x in range(len(line)):
                        counts[n, line[x]] += 1
                    line[:] = 0


def array_codes(joined: np.ndarray, pieces: np.ndarray, size: tuple[int, int], step: tuple[int, int], first: tuple[int, int]) -> np.ndarray:
    """The same where arrays hold parts of several kernel positions, with the reads of nothing but padding.

    Args:
        joined: uint8 `[N, segments, H, W]`.
        pieces: what arrays consist of, in their order, int64 `[n, 4]`: (array, down, right, segment).
        size, step: of the output, in pixels. first: padding above and to the left.
    """
    counts = np.zeros((len(joined), 256), np.int64)
    set_threads()
    _array_codes(joined, np.array(size), np.array(step), np.array(first), pieces, counts)
    return counts.sum(0)
