"""Counting ones: how often each bit of each code is set, and how long the sums n of the digits on the word lines of arrays are.

Eight codes stand in a word of 64 bits. Their bits are added up where they stand, in fields that grow as the sums do: of three words
in fields of two bits, of fifteen in four bits, of up to 255 in bytes. Of the word lines of an array the ones of each bit are counted, word
by word, whatever the digits: n of one is the sum of its bits' ones, each as often as it counts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange

from .cache import SOURCES
from .inner import inner
from .simd import population, set_threads

WORDS = 512  # of one work item: their sums stay in the first-level cache
MOST_IN_FOUR_BITS, MOST_IN_A_BYTE = 15, 255
_TWO, _FOUR, _EIGHT = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_1, _2 = np.uint64(1), np.uint64(2)
_BIT = np.uint64(0x0101010101010101)  # the lowest of each code


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
def _four(word):
    """How many of eight codes have bit 0, 1, 2, 3."""
    return (population(word & _BIT), population(word & _BIT << _1), population(word & _BIT << _2),
            population(word & _BIT << np.uint64(3)))


@inner
def _ones_of(words, first, end, shift):
    """How many of the codes from `first` to `end - 1` have the bits from `shift` on: four numbers."""
    n0 = n1 = n2 = n3 = 0
    for w in range(first // 8, (end + 7) // 8):
        of_word = _four(words[w] >> shift)
        n0, n1, n2, n3 = n0 + of_word[0], n1 + of_word[1], n2 + of_word[2], n3 + of_word[3]
    last = end - 1
    before = _four((words[first // 8] & (_1 << np.uint64(first % 8 * 8)) - _1) >> shift)  # in the first word,
    behind = _four(words[last // 8] >> np.uint64(last % 8 * 8) >> np.uint64(8) >> shift)  # and in the last one
    return n0 - before[0] - behind[0], n1 - before[1] - behind[1], n2 - before[2] - behind[2], n3 - before[3] - behind[3]


@inner
def _count_segments(words, pixels, cuts, ones):
    """Args: words, of one image; pixels, the first and the one behind the last; cuts, channels; ones, `[segments, bits, pixels]`."""
    for pixel in range(*pixels):
        for s in range(len(cuts) - 1):
            for b in range(0, ones.shape[1], 4):
                found = _ones_of(words, pixel * cuts[-1] + cuts[s], pixel * cuts[-1] + cuts[s + 1], np.uint64(b))
                for i in range(min(4, ones.shape[1] - b)):
                    ones[s, b + i, pixel] = found[i]


@njit(cache=True, parallel=True)
def _see(words, channels, pixels, cuts, sums, ones, sources=SOURCES):
    """Both ways of counting, item by item of `pixels`, whose codes stay in the second-level cache from one to the other."""
    step = pixels * channels // 8
    for item in prange((ones.shape[3] + pixels - 1) // pixels):
        _add_words(words[:, item * step:(item + 1) * step], sums[:, :, item * step:(item + 1) * step])
        for n in range(len(ones)):
            _count_segments(words[n], (item * pixels, min((item + 1) * pixels, ones.shape[3])), cuts, ones[n])


class Ones:
    """Adds up how many codes have each bit set, in each place of an input of `pixels` and `channels`.

    Args: bits, of a code; cuts, the first channel of each segment, and the number of channels.
    """

    def __init__(self, pixels: int, channels: int, bits: int, cuts: Sequence[int] = ()) -> None:
        self.shape, self._cuts = (bits, pixels, channels), np.array(cuts, np.int64)
        self._sums = np.zeros((bits, 8, -(-pixels * channels // 8)), np.int32)  # of byte j of each word

    def add(self, codes: torch.Tensor) -> np.ndarray:
        """Args: codes, uint8 `[N, pixels, channels]`, contiguous. Returns: how many codes of each segment, of at most 65535 channels, have
        each bit, uint16 `[N, segments, bits, pixels]`."""
        bits, pixels, channels = self.shape
        flat = codes.view(len(codes), -1)
        if flat.shape[1] % 8:
            flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
        ones = np.empty((len(codes), max(len(self._cuts) - 1, 0), bits, pixels), np.uint16)
        item = 8 * -(-WORDS // channels)  # pixels of which any number of channels fill whole words
        set_threads()
        _see(flat.numpy().view(np.uint64), channels, item, self._cuts, self._sums, ones)
        return ones

    @property
    def sums(self) -> np.ndarray:
        """How many of all codes had each bit set: int64 `[bits, pixels, channels]`."""
        bits, pixels, channels = self.shape
        return self._sums.transpose(0, 2, 1).reshape(bits, -1)[:, :pixels * channels].reshape(self.shape).astype(np.int64)


@inner
def _add_lengths(line, digits, times, counts):
    """Args: line, how many word lines of an array have each bit, `[bits, reads]`; digits, `[digits, 2]`, (first bit, bits); times, how
    often each of the reads is made; counts, `[digits, lengths]`."""
    n = np.empty(line.shape[1], np.int32)
    for z in range(len(digits)):
        n[:] = line[digits[z, 0]]
        for b in range(1, digits[z, 1]):
            ones = line[digits[z, 0] + b]
            for i in range(len(n)):
                n[i] += np.int32(ones[i]) << b
        longer = times.sum()
        for length in range(counts.shape[1]):
            counts[z, length] += longer
            least, longer = 1 << length, 0
            for i in range(len(n)):
                longer += times[i] if n[i] >= least else 0
            if longer == 0:
                break
            counts[z, length] -= longer


@njit(cache=True, parallel=True)
def _tap_lengths(ones, spans, times, digits, counts, sources=SOURCES):
    """`tap_lengths`, counts `[N, digits, lengths]` of each image."""
    for n in prange(len(ones)):
        line = np.zeros(ones.shape[2:], np.uint16)
        for p in range(len(spans)):
            line += ones[n, spans[p, 1]]
            if p + 1 == len(spans) or spans[p + 1, 0] != spans[p, 0]:  # the array is whole
                _add_lengths(line, digits, times, counts[n])
                line[:] = 0


def tap_lengths(ones: np.ndarray, spans: np.ndarray, times: np.ndarray, digits: np.ndarray, lengths: int) -> np.ndarray:
    """How many reads of each digit there are whose n has 0, 1, ... bits, where each kernel position has arrays of its own: int64
    `[digits, lengths]`, without reads of nothing but padding.

    Args:
        ones: uint16 `[N, segments, bits, pixels]`, of arrays of at most 65535 rows.
        spans: what the arrays of a kernel position consist of, in their order, int64 `[n, 2]`: (array, segment).
        times: how many output pixels and kernel positions see each pixel, int64 `[pixels]`.
        digits: first bit and bits of each digit, int64 `[digits, 2]`. lengths: more than the bits of the largest n.
    """
    counts = np.zeros((len(ones), len(digits), lengths), np.int64)
    set_threads()
    _tap_lengths(ones, spans, times, digits, counts)
    return counts.sum(0)


@inner
def _add_row(line, source, shift, step):
    """Add the pixels `x step + shift` of a row of the input, where it has them, to each x of `line`."""
    first = max(0, -(shift // step))
    last = min(len(line), (len(source) - 1 - shift) // step + 1)
    target = line[first:max(first, last)]
    part = source[first * step + shift:]
    if step == 1:  # in vectors
        target += part[:len(target)]
    else:
        for x in range(len(target)):
            target[x] += part[x * step]


@njit(cache=True, parallel=True)
def _array_lengths(ones, size, step, first, pieces, digits, counts, sources=SOURCES):
    """`array_lengths`, counts `[N, digits, lengths]` of each image."""
    bits, height, once = ones.shape[2], ones.shape[3], np.ones(size[0] * size[1], np.int64)
    for n in prange(len(ones)):
        line = np.zeros((bits, size[0], size[1]), np.uint16)
        for p in range(len(pieces)):
            for y in range(size[0]):
                row = y * step[0] - first[0] + pieces[p, 1]
                if 0 <= row < height:
                    for b in range(bits):
                        _add_row(line[b, y], ones[n, pieces[p, 3], b, row], pieces[p, 2] - first[1], step[1])
            if p + 1 == len(pieces) or pieces[p + 1, 0] != pieces[p, 0]:  # the array is whole
                _add_lengths(line.reshape(bits, -1), digits, once, counts[n])
                line[:] = 0


def array_lengths(ones: np.ndarray, pieces: np.ndarray, size: tuple[int, int], step: tuple[int, int], first: tuple[int, int],
                  digits: np.ndarray, lengths: int) -> np.ndarray:
    """The same where arrays hold parts of several kernel positions, with the reads of nothing but padding.

    Args:
        ones: uint16 `[N, segments, bits, H, W]`.
        pieces: what arrays consist of, in their order, int64 `[n, 4]`: (array, down, right, segment).
        size, step: of the output, in pixels. first: padding above and to the left.
    """
    counts = np.zeros((len(ones), len(digits), lengths), np.int64)
    set_threads()
    _array_lengths(ones, np.array(size), np.array(step), np.array(first), pieces, digits, counts)
    return counts.sum(0)
