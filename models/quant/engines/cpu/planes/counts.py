"""Positional population counts: P, the sum of the active rows, of 512 columns at once, in bit planes.

Plane m is one vector and holds bit m of the P of each column.

A tree of carry-save adders adds sixteen rows in 30 logical instructions of AVX-512.
Klarqvist, Mula, Lemire, "Efficient computation of positional population counts using SIMD instructions", arXiv 1911.02696.
"""

from ....kernels.inner import inlined
from ....kernels.simd import LANES, any_bit, int64_at, load, majority, splat, store, uint32_at
from ..common.layout import TURN


@inlined
def _full_add(x, y, z):
    """(carry, sum) of three bits, in each of 512 columns."""
    return majority(x, y, z), x ^ y ^ z


@inlined
def _row(at, cells, r):
    """The cells of the row that stands in entry `r` of the lists."""
    return load(at.weights, cells + uint32_at(at.lists, r))


@inlined
def _add_rows(at, cells, r, p0, p1, p2, p3):
    """Add the rows of `TURN` entries of the lists, from `r` on, to four bit planes: (carry of sixteens, p0, p1, p2, p3).

    A tree, in which the planes come last: the next turn's additions need not wait for those of this one.
    """
    two_a, a = _full_add(_row(at, cells, r), _row(at, cells, r + 1), _row(at, cells, r + 2))
    two_b, b = _full_add(_row(at, cells, r + 3), _row(at, cells, r + 4), _row(at, cells, r + 5))
    two_c, c = _full_add(_row(at, cells, r + 6), _row(at, cells, r + 7), _row(at, cells, r + 8))
    two_d, d = _full_add(_row(at, cells, r + 9), _row(at, cells, r + 10), _row(at, cells, r + 11))
    two_e, e = _full_add(_row(at, cells, r + 12), _row(at, cells, r + 13), _row(at, cells, r + 14))
    two_f, a = _full_add(a, b, c)
    two_g, b = _full_add(d, e, _row(at, cells, r + 15))
    two_h, p0 = _full_add(a, b, p0)
    four_a, a = _full_add(two_a, two_b, two_c)
    four_b, b = _full_add(two_d, two_e, two_f)
    four_c, a = _full_add(a, b, two_g)
    four_d, p1 = _full_add(a, two_h, p1)
    eight_a, a = _full_add(four_a, four_b, four_c)
    eight_b, p2 = _full_add(a, four_d, p2)
    carry, p3 = _full_add(eight_a, eight_b, p3)
    return carry, p0, p1, p2, p3


@inlined
def _add_few_rows(at, cells, r, p0, p1, p2):
    """As `_add_rows`, for the last `TURN / 2` entries or fewer: (carry of eights, p0, p1, p2)."""
    two_a, a = _full_add(_row(at, cells, r), _row(at, cells, r + 1), _row(at, cells, r + 2))
    two_b, b = _full_add(_row(at, cells, r + 3), _row(at, cells, r + 4), _row(at, cells, r + 5))
    two_c, a = _full_add(a, b, _row(at, cells, r + 6))
    two_d, p0 = _full_add(a, _row(at, cells, r + 7), p0)
    four_a, a = _full_add(two_a, two_b, two_c)
    four_b, p1 = _full_add(a, two_d, p1)
    carry, p2 = _full_add(four_a, four_b, p2)
    return carry, p0, p1, p2


@inlined
def count(shape, at, read, block):
    """P of one block of a read, to `at.planes`: `P = sum_i sum_s 2^(i + s) (cells' bit s of the rows active in input bit i)`,
    i over the input bits of the digit.

    Bits of a cell that stand side by side are added later, by `codes.cells`.
    """
    bit, bit_end = int64_at(at.digit_start, read.digit), int64_at(at.digit_start, read.digit + 1)
    single = bit_end - bit == 1 and shape.passes == 1  # all is one sum: planes 0 to 6 start in registers
    if not single:
        clear(at.planes, 0, 7)
    clear(at.planes, 7, 8)
    if read.depth > 8:
        clear(at.planes, 8, max(read.depth, 16))
    for i in range(bit, bit_end):
        for s in range(shape.passes):
            cells = read.cells + block * LANES + s * read.pass_stride
            _add_list(at, cells, int64_at(at.row_at, i), int64_at(at.row_count, i), i - bit + s, read.depth, single)


@inlined
def clear(address, first, end):
    """Set vectors `first` to `end - 1` of those at an address to 0: bit planes, or 16-bit sums."""
    for i in range(first, end):
        store(address, i * LANES, splat(0))


@inlined
def _add_list(at, cells, r, n, first, depth, fresh):
    """Add the rows of `n` entries of the lists from `r` on to the bit planes from `first` on; seven of them are 0 if `fresh`.

    Sixteen rows a turn go through fifteen carry-save adders (ones, twos, fours, eights), the last eight or fewer through
    seven, and the carry ripples up: through three planes in registers, then through memory.
    """
    low = first * LANES
    p0 = p1 = p2 = p3 = p4 = p5 = p6 = splat(0)
    if not fresh:
        p0, p1, p2 = load(at.planes, low), load(at.planes, low + LANES), load(at.planes, low + 2 * LANES)
        p3, p4, p5 = (load(at.planes, low + 3 * LANES), load(at.planes, low + 4 * LANES),
                      load(at.planes, low + 5 * LANES))
        p6 = load(at.planes, low + 6 * LANES)
    end = r + n
    while r < end:
        if end - r > TURN // 2:
            carry, p0, p1, p2, p3 = _add_rows(at, cells, r, p0, p1, p2, p3)
        else:
            carry, p0, p1, p2 = _add_few_rows(at, cells, r, p0, p1, p2)
            carry, p3 = p3 & carry, p3 ^ carry
        r += TURN
        carry, p4 = p4 & carry, p4 ^ carry
        carry, p5 = p5 & carry, p5 ^ carry
        carry, p6 = p6 & carry, p6 ^ carry
        for m in range(low + 7 * LANES, depth * LANES, LANES):
            p = load(at.planes, m)
            store(at.planes, m, p ^ carry)
            carry = p & carry
    store(at.planes, low, p0)
    store(at.planes, low + LANES, p1)
    store(at.planes, low + 2 * LANES, p2)
    store(at.planes, low + 3 * LANES, p3)
    store(at.planes, low + 4 * LANES, p4)
    store(at.planes, low + 5 * LANES, p5)
    store(at.planes, low + 6 * LANES, p6)


@inlined
def any_outside(shape, at, read, low, high, columns):
    """Whether u lies outside low..high in any of the `columns` of a block (a vector, one bit each), seen on its bit planes.

    For slices of one reference and cells whose bits do not stand side by side.
    """
    zero, most = int64_at(at.reference, 0) * read.ones, (1 << read.depth) - 1
    low = min(max(-(-(low + zero) // shape.read_scale), 0), most + 1)  # from here on: smallest and largest P
    high = min((high + zero) // shape.read_scale, most)
    if low > most or high < 0:
        return True
    below = above = splat(0)
    for m in range(read.depth):  # a bit that differs overrules the lower ones
        p = load(at.planes, m * LANES)
        below = majority(below, p ^ splat(-1), splat(-(low >> m & 1)))
        above = majority(above, p, splat((high >> m & 1) - 1))
    return any_bit((below | above) & columns)


@inlined
def _swap(a, b, distance, mask):
    """Exchange the bits of `a` above and of `b` below: one step of a bit-matrix transposition."""
    d, low, high = splat(distance), splat(mask), splat(~mask)
    return (a & low) | ((b << d) & high), ((a >> d) & low) | (b & high)


@inlined
def to_bytes(at, depth):
    """P of one block from bit planes to bytes, the low ones of all vectors and, with more than 8 planes, the high ones."""
    _transpose(at.planes, 0, at.bytes, 0)
    if depth > 8:
        _transpose(at.planes, 8 * LANES, at.bytes, 8 * LANES)


@inlined
def _transpose(planes, source, bytes_, target):
    """8 bit planes to bytes: byte j of vector i becomes the 8 bits that the planes hold at bit i of byte j."""
    p0, p4 = _swap(load(planes, source), load(planes, source + 4 * LANES), 4, 0x0F0F)
    p1, p5 = _swap(load(planes, source + LANES), load(planes, source + 5 * LANES), 4, 0x0F0F)
    p2, p6 = _swap(load(planes, source + 2 * LANES), load(planes, source + 6 * LANES), 4, 0x0F0F)
    p3, p7 = _swap(load(planes, source + 3 * LANES), load(planes, source + 7 * LANES), 4, 0x0F0F)
    p0, p2 = _swap(p0, p2, 2, 0x3333)
    p1, p3 = _swap(p1, p3, 2, 0x3333)
    p4, p6 = _swap(p4, p6, 2, 0x3333)
    p5, p7 = _swap(p5, p7, 2, 0x3333)
    p0, p1 = _swap(p0, p1, 1, 0x5555)
    p2, p3 = _swap(p2, p3, 1, 0x5555)
    p4, p5 = _swap(p4, p5, 1, 0x5555)
    p6, p7 = _swap(p6, p7, 1, 0x5555)
    store(bytes_, target, p0)
    store(bytes_, target + LANES, p1)
    store(bytes_, target + 2 * LANES, p2)
    store(bytes_, target + 3 * LANES, p3)
    store(bytes_, target + 4 * LANES, p4)
    store(bytes_, target + 5 * LANES, p5)
    store(bytes_, target + 6 * LANES, p6)
    store(bytes_, target + 7 * LANES, p7)
