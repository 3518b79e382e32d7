"""The ADC: codes of the reads of one block, added to the sums of their digit, and the shift-add at the end.

P stands in bytes (`counts.to_bytes`), the low ones of 16 vectors and, with more than 8 bit planes, the high ones. Vectors come
in pairs, even and odd columns; a lane of 16 bits holds a byte of each.
"""

from ....kernels.inner import inlined
from ....kernels.simd import (LANES, add_bytes_up_to_255, add_signed, add_signed_short, add_unsigned, int64_at, load, lookup, mulhi, sar,
                              splat, store, sub_bytes_down_to_0, vmax, vmin)
from ..common.buffers import BY_ONES, DYNAMIC
from ..common.layout import PAIR, PAIR_END, RUN, SLICE
from .converter import CENTRE, CLIP_HIGH, CLIP_LOW, FACTOR, FORM, FRACTION, LAST_CENTRE, LIMITS, LOW, OFFSET, Q_MAX, Q_MIN, SHIFT, SPAN, TIE
from .counts import to_bytes
from .fixed_point import EVEN, TOWARDS_ZERO


@inlined
def _pair(at, pair, depth):
    """P of the two vectors of a pair: low bytes and high bytes of one vector, with 16 bits from a second one."""
    b = load(at.bytes, pair * LANES)
    even, odd = b & splat(0xFF), b >> splat(8)
    if depth > 8:
        b = load(at.bytes, (pair + 8) * LANES)
        even, odd = even | (b << splat(8)), odd | (b & splat(0xFF00))
    return even, odd


@inlined
def cells(shape, at, pair, depth):
    """P of the two vectors of a pair, the bits of a cell put together: `P = sum_s 2^s P_s`."""
    even, odd = _pair(at, pair, depth)
    for s in range(1, shape.packed):
        more_even, more_odd = _pair(at, pair + s * (shape.slices * shape.slice_vectors // 2), depth)
        even, odd = even + (more_even << splat(s)), odd + (more_odd << splat(s))
    return even, odd


@inlined
def _small_cells(shape, at, pair):
    """P of the two vectors of a pair as bytes, for P below 256: the first vector's in the low half of each lane."""
    stride = shape.slices * shape.slice_vectors // 2
    b = load(at.bytes, (pair + (shape.packed - 1) * stride) * LANES)
    for s in range(shape.packed - 2, -1, -1):
        b = b + b + load(at.bytes, (pair + s * stride) * LANES)
    return b


@inlined
def _code(scaled, offset, factor, fraction, tie):
    """ADC code of u: `floor((floor((2^s u + c) M / 2^16) + t) / 2^f)`, `scaled + offset = 2^s u + c`; see `fixed_point`."""
    y = mulhi(scaled + offset, factor)
    if tie == EVEN:
        y = y + (sar(y, fraction) & splat(1))
    elif tie == TOWARDS_ZERO:
        y = y + (y >> splat(15))
    return sar(y, fraction)


@inlined
def _form(shape, form, zero):
    """What `_code` takes for reads with `u = read_scale P - zero`: (shift of P, offset, factor, fraction, tie)."""
    a = int64_at(form, SHIFT)
    return (splat(a + shape.read_scale - 1), splat(int64_at(form, OFFSET) - (zero << a)), splat(int64_at(form, FACTOR)),
            splat(int64_at(form, FRACTION)), int64_at(form, TIE))


@inlined
def _sums(shape, at, read, block):
    """Address of the sums of one digit and block."""
    return at.sums + 2 * LANES * (read.digit * shape.blocks + block) * 16


@inlined
def _add(sums, pair, even, odd):
    """Add the codes of the even and the odd columns of a pair, int16, to their sums."""
    lane = 2 * pair * LANES
    store(sums, lane, load(sums, lane) + even)
    store(sums, lane + LANES, load(sums, lane + LANES) + odd)


@inlined
def converted_runs(shape, at, read, block):
    """Where the runs of one block that are converted for this digit and class begin and end; none where a plan gives them no bits."""
    entry = read.kind * shape.blocks + block
    return int64_at(at.merged_start, entry), int64_at(at.merged_start, entry + 1)


@inlined
def add_static(shape, at, read, block, op):
    """ADC codes of one block, ranges fixed, added to the sums of its digit; where `Adc.relative`, codes less u / s; BY_ONES, times what
    they are worth."""
    to_bytes(at, read.depth)
    if read.ones <= int64_at(at.table_ones, read.kind):
        first, end = converted_runs(shape, at, read, block)
        for run in range(first, end):
            _add_static_by_table(shape, at, read, block, run, op)
    else:
        for run in range(int64_at(at.run_start, block), int64_at(at.run_start, block + 1)):
            _add_static_by_form(shape, at, read, block, run, op)


@inlined
def _add_static_by_table(shape, at, read, block, run, op):
    """Codes of a run of slices with one reference and one range, looked up in `converter.code_table`."""
    k = int64_at(at.merged, RUN * run + SLICE)
    zero = int64_at(at.reference, k) * read.ones
    k += read.kind * shape.slices
    worth = splat(int64_at(at.forms, FORM * k + SPAN))
    up = splat(0x0101 * (LAST_CENTRE - (zero >> 1 if shape.read_scale == 2 else CENTRE)))
    codes = at.codes + 256 * k + 128 * (zero & 1)
    table, beyond = load(codes, 0), load(codes, LANES)
    sums = _sums(shape, at, read, block)
    for pair in range(int64_at(at.merged, RUN * run + PAIR), int64_at(at.merged, RUN * run + PAIR_END)):
        # P - centre + 64, but no less than 0 and no more than 127
        index = sub_bytes_down_to_0(add_bytes_up_to_255(_small_cells(shape, at, pair), up), splat(0x8080))
        q = lookup(table, beyond, index)
        even, odd = sar(q << splat(8), splat(8)), sar(q, splat(8))
        if op == BY_ONES:
            even, odd = even * worth, odd * worth
        _add(sums, pair, even, odd)


@inlined
def _add_static_by_form(shape, at, read, block, run, op):
    """Codes of a run of one slice in 16-bit arithmetic; reads beyond all steps are clipped first, as 16 bits may not hold
    what the arithmetic would make of them."""
    k = int64_at(at.runs, RUN * run + SLICE)
    zero = int64_at(at.reference, k) * read.ones
    k += read.kind * shape.slices
    limits = at.limits + 8 * LIMITS * k
    if int64_at(limits, Q_MIN) == int64_at(limits, Q_MAX):  # the one code is that of zero: no bits
        return
    shift, offset, factor, fraction, tie = _form(shape, at.forms + 8 * FORM * k, zero)
    low = splat((int64_at(limits, CLIP_LOW) + zero) // shape.read_scale)
    high = splat(-(-(int64_at(limits, CLIP_HIGH) + zero) // shape.read_scale))
    bottom, top, worth = splat(int64_at(limits, Q_MIN)), splat(int64_at(limits, Q_MAX)), splat(int64_at(at.forms, FORM * k + SPAN))
    sums = _sums(shape, at, read, block)
    for pair in range(int64_at(at.runs, RUN * run + PAIR), int64_at(at.runs, RUN * run + PAIR_END)):
        even, odd = cells(shape, at, pair, read.depth)
        q_even = _code(vmax(vmin(even, high), low) << shift, offset, factor, fraction, tie)
        q_odd = _code(vmax(vmin(odd, high), low) << shift, offset, factor, fraction, tie)
        q_even, q_odd = vmax(vmin(q_even, top), bottom), vmax(vmin(q_odd, top), bottom)
        if at.relative:
            exact, scale = splat(zero >> (at.relative - 1)), splat(shape.read_scale - at.relative)  # u / s = 2^scale P - exact
            q_even, q_odd = q_even + exact - (even << scale), q_odd + exact - (odd << scale)
        if op == BY_ONES:
            q_even, q_odd = q_even * worth, q_odd * worth
        _add(sums, pair, q_even, q_odd)


@inlined
def add_dynamic(shape, at, read, block):
    """`q span` of one block, ranges of the batch, added to the sums of its digit; the constant `2^B u_a` of every read is added
    at the end (`Adc.constant`)."""
    to_bytes(at, read.depth)
    for run in range(int64_at(at.run_start, block), int64_at(at.run_start, block + 1)):
        form = at.forms + 8 * FORM * (read.first + int64_at(at.runs, RUN * run + SLICE))
        zero = int64_at(at.reference, int64_at(at.runs, RUN * run + SLICE)) * read.ones + int64_at(form, LOW)
        if read.ones <= int64_at(at.table_ones, read.digit):
            _add_dynamic_by_table(shape, at, read, block, run, form, zero)
        else:
            _add_dynamic_by_form(shape, at, read, block, run, form, zero)


@inlined
def _add_dynamic_by_table(shape, at, read, block, run, form, zero):
    """Codes of reads with `u - u_a = read_scale P - zero`, looked up."""
    span, sums = int64_at(form, SPAN), _sums(shape, at, read, block)
    codes = at.codes + 256 * span + (128 * (zero & 1) if shape.read_scale == 2 else 0)
    table, beyond = load(codes, 0), load(codes, LANES)
    least = splat(0x0101 * (zero >> (shape.read_scale - 1)))  # no P is below it
    for pair in range(int64_at(at.runs, RUN * run + PAIR), int64_at(at.runs, RUN * run + PAIR_END)):
        q = lookup(table, beyond, _small_cells(shape, at, pair) - least)
        _add(sums, pair, (q & splat(0xFF)) * splat(span), (q >> splat(8)) * splat(span))


@inlined
def _add_dynamic_by_form(shape, at, read, block, run, form, zero):
    """Codes of reads with `u - u_a = read_scale P - zero`, in 16-bit arithmetic."""
    span, sums, top = splat(int64_at(form, SPAN)), _sums(shape, at, read, block), splat(at.q_max)
    shift, offset, factor, fraction, tie = _form(shape, form, zero)
    for pair in range(int64_at(at.runs, RUN * run + PAIR), int64_at(at.runs, RUN * run + PAIR_END)):
        even, odd = cells(shape, at, pair, read.depth)
        q_even = vmin(_code(even << shift, offset, factor, fraction, tie), top)
        q_odd = vmin(_code(odd << shift, offset, factor, fraction, tie), top)
        _add(sums, pair, q_even * span, q_odd * span)


@inlined
def shift_add(shape, at, op):
    """The 16-bit sums of each digit and slice times what their codes are worth (`Adc.factors`), added to the accumulators of the
    slice's step."""
    for z in range(shape.digits):
        for k in range(shape.slices):
            factor = int64_at(at.factors, z * shape.slices + k)
            lane = int64_at(at.step_of_slice, k) * shape.slice_vectors * LANES
            for v in range(shape.slice_vectors):
                total = load(at.sums, (z * shape.blocks * 16 + k * shape.slice_vectors + v) * LANES)
                if op == DYNAMIC:
                    add_unsigned(at.acc, lane + v * LANES, total, factor)
                elif factor < 2**15:
                    add_signed_short(at.acc, lane + v * LANES, total, factor)
                else:
                    add_signed(at.acc, lane + v * LANES, total, factor)
