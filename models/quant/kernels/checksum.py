"""A checksum of a tensor's memory: every change of one number alters it, and any other change but for a chance of 2^-32.

Fast enough to be taken at each call of a layer: it reads memory once, at the speed of memory, on all threads. A block of
`BLOCK` words of 64 bits, with halves h and l, and a random key of each position in it, with halves k and m, has the sum

    sum of (2^32 + (h ^ k)) (2^32 + (l ^ m))    modulo 2^64

(NH of UMAC, Black et al., CRYPTO 1999, made for machine words). Another l changes its factor by d, 0 < |d| < 2^32, and the sum
by d times a number from 2^32 to 2^33 - 1, which is no multiple of 2^64. Words that change places meet other keys.
"""

import numpy as np
from numba import njit, prange

from .cache import SOURCES
from .inner import inlined
from .simd import set_threads

BLOCK = 2**13  # words: 64 KB, a work item
MANY = 64  # blocks: to wait for other threads takes longer than to do with fewer
KEYS = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, BLOCK, np.uint64)  # not those of a training run
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)


@inlined
def _block_sum(words, keys, block):
    """The sum of one block of words, uint64, modulo 2^64."""
    part = words[block * BLOCK:(block + 1) * BLOCK]
    total = np.uint64(0)
    for i in range(len(part)):
        mixed = part[i] ^ keys[i]
        high, low = mixed >> _HALF, mixed & _LOW
        total += high * low + ((high + low) << _HALF)  # the product modulo 2^64
    return total


@njit(cache=True)
def _on_one_thread(words, keys, sums, sources=SOURCES):
    """Sums of all blocks of `words`, uint64 `[blocks]`."""
    for block in range(len(sums)):
        sums[block] = _block_sum(words, keys, block)


@njit(cache=True, parallel=True)
def _on_all_threads(words, keys, sums, sources=SOURCES):
    """Sums of all blocks of `words`, uint64 `[blocks]`."""
    for block in prange(len(sums)):
        sums[block] = _block_sum(words, keys, block)


def block_sums(words: np.ndarray) -> np.ndarray:
    """The sum of each block of `words`, uint64 and contiguous: uint64 `[ceil(words / BLOCK)]`."""
    sums = np.empty(-(-len(words) // BLOCK), np.uint64)
    if len(sums) < MANY:
        _on_one_thread(words, KEYS, sums)
    else:
        set_threads()
        _on_all_threads(words, KEYS, sums)
    return sums
