"""Output pixels side by side: what of a layer the kernel (`pixels_kernel`) reads, and which layers it can run.

A lane of a vector is an output pixel, so that vectors are full however few columns a layer has. What up to six rows of one column add to
u depends on as many input bits: it is looked up in a table of 2^6 bytes, or of 2^5 numbers of 16 bits where bytes do not hold that. There
are six forms: in bytes from the table to the code (`NARROW`); in bytes up to the sum of so many sets as bytes hold, and from there on in
16 bits (`TALL`), for arrays of hundreds of rows; in 16 bits from the table on, and codes in float32 (`BROAD`); and u in bytes, from
which and the class of n what a code is worth is looked up (`BY_ONES`). Where reads have noise, gains or offsets besides (`READ_OUT`), they
are `BROAD` ones. Where codes follow from thresholds (`COMPARED`), they stay in 16 bits from the table to what codes are worth.

    u = sum over sets of rows  table[set, column][input bits of the rows]

Input bits that belong to a set are one byte a pixel, in *planes*: of one input bit, channel interval and phase, all pixels of the padded
input in the order of memory, from one row to the next without a gap. A tap is then nothing but a distance. With a stride s an input
has s x s phases, `[y mod s, x mod s]`, each a plane with a pixel for each output pixel.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple

import numpy as np

from ....arrays.mapping import MappedLayer
from ....arrays.readout import APART, COLUMN_KEY, SHARING, column_numbers, signed
from ....kernels.simd import LANES, aligned
from ...reach import read_range
from ..grid.cells_forms import HIGHEST, LOWEST, static_forms
from ..common.layout import segments_of, step_of_slice
from ..grid.cells_layout import curve_and_current, gains_and_offsets
from ..grid.cells_thresholds import added_by_codes
from ..planes.converter import LIMITS, LOW, static_form
from ..vectors.picks import BYTE_ROWS, SHORT_ROWS, TABLE
from ..vectors.wide_noise import IN_STEPS, ROUNDER, SIGNED, STEP
from .pixels_compared import NO_TREES, trees_of

TABLES = 2 * TABLE  # codes of two tables of bytes
VALUES = 256  # entries of a table of what codes are worth
NARROW, TALL, BROAD, BY_ONES, READ_OUT, COMPARED = range(6)  # forms
SHORT_FORM = LOW + LIMITS  # fields of a converter in 16 bits: those of `fixed_point` and of `converter.Adc.limits`

# A layer as the kernel sees it; the names that `finish` uses mean what they mean in `layout.ColumnShape`.
PixelShape = namedtuple("PixelShape", """
    form divide out_channels channels groups arrays digits slices steps slice_vectors input_bits intervals sets
    stride_y stride_x pad_top pad_left clip small together flush at_once noisy curved paired analog gained moved deviations levels""")
# form       see above; divide: BROAD, whether codes are those of a quotient
# intervals  channel intervals, of as many rows as a set has; sets: of one column
# clip       whether u must be brought into the window of a table of codes (of a class) first
# small      whether tables of codes have 64 entries, not 128
# together   arrays whose codes a byte can add up
# flush      TALL: sets whose sum a byte holds; BY_ONES: arrays whose sum 16 bits hold
# at_once    TALL: whether 16 bits hold the sums of codes over all digits
# noisy, curved, analog, gained, moved   READ_OUT, COMPARED: what reads have besides, as in `cells_layout.Besides`
# paired       READ_OUT, COMPARED: whether curves need what both lines of a pair hold together
# deviations   READ_OUT, COMPARED: of each kind of read, one, or one for each n
# levels       COMPARED: of the trees of thresholds (`pixels_compared.Trees`)

# tables         int8 `[group, out, slice, set, 64]`, or int16 `[.., 32]`
# set_start      first set of each array, and the end of the last
# first, size    channels of each interval
# plane          interval of each set; down, right: of its tap, in input pixels
# digit_start    first input bit of each digit
# step_of_slice  which of the ADC steps each slice has
# codes          narrow: int8 `[digit, slice, 128]`, entry `u mod 128`, or `u mod 64` where `small`
# ends           narrow: the window of u, int64 `[digit, slice, 2]`
# forms          BROAD: `cells_forms.Forms.singles`; shorts: TALL, int64 `[digit, slice, SHORT_FORM]`
# value_bytes    BY_ONES: bytes `[digit, slice, low and high byte, 256]` of `q 64 delta` over what all these have in common
# windows        BY_ONES: bytes `[3, 64]` of each class: what u is moved by to its entry there, and the window of u
# noise          READ_OUT, COMPARED: `(deviation, lift)` of `wide_noise.with_noise` for each n, float32 `[digit, slice, n, 2]`
# drawn          READ_OUT, COMPARED: key of the word, signs and start of each column, int32 `[group, out, 3]`; seed: of `Readout`
# gains, offsets   READ_OUT, COMPARED: of each converter, float64 and int32 `[slice, group, array, out]`
# curve, current   READ_OUT, COMPARED: as in `cells_layout.Besides`; references: sums of reference cells, int32 `[group, slice, set, 32]`
# both, least    READ_OUT, COMPARED: where paired the like of `tables`, of what both lines hold together, uint16, and the least of a read
# trees, tree_of, code_values   COMPARED: of `pixels_compared.Trees`
# factors        what a code is worth among those of its slice, int64 `[digit, slice]`; 0 without a conversion; worth: of the slice's
PixelLayout = namedtuple("PixelLayout", """
    tables set_start first size plane down right digit_start step_of_slice codes ends forms shorts value_bytes
    windows noise drawn seed gains offsets curve current references both least trees tree_of code_values factors worth""")


# Sets of rows of one tap.
# rows        of each set: (first, end) in the layer
# interval    that of its channels, by its number in `intervals`; taps: (down, right)
# start       first set of each array, and the end of the last
# intervals   (first, end) of channels, each once
Sets = namedtuple("Sets", "rows interval taps start intervals")


def sets_of(layer: MappedLayer, most: int) -> Sets:
    """The arrays of a layer cut into sets of at most `most` rows, which lie in one tap."""
    intervals, segments = segments_of(layer, most)
    parts = [(first + row, down, right, v) for (first, _), of_array in zip(layer.arrays, segments) for down, right, v, row in of_array]
    rows = [(row, row + intervals[v][1] - intervals[v][0]) for row, _, _, v in parts]
    start = [0, *itertools.accumulate(map(len, segments))]
    return Sets(rows, [v for *_, v in parts], [(down, right) for _, down, right, _ in parts], start, intervals)


# codes, ends: of `PixelLayout`; clip, small, together: of `PixelShape`; largest: |code| of `[digit, slice]`
Narrow = namedtuple("Narrow", "codes ends clip small together")


def _narrow(layer, factors):
    """The codes of a layer as tables of bytes, None where bytes do not hold u and codes, or 16 bits the sums of a slice."""
    low, high = layer.u_span
    kinds = factors.shape
    if low < -128 or high > 127:
        return None
    u, codes = np.arange(low, high + 1), np.zeros((*kinds, TABLES), np.int8)
    found = [layer.converter(z, k).table(low, high, layer.unit) for z, k in np.ndindex(kinds)]
    largest = np.array([max(1, np.abs(values).max()) for values in found]).reshape(kinds)
    # Beyond these all codes are alike.
    first = [int(u[np.flatnonzero(values == values[0])[-1]]) for values in found]
    last = [max(start, int(u[np.flatnonzero(values == values[-1])[0]])) for start, values in zip(first, found)]
    span = max(end - start for start, end in zip(first, last)) + 1
    if span > TABLES or largest.max() > 127 or (len(layer.arrays) * largest * factors).sum(0).max() >= 2**15:
        return None
    small = min(span, len(u)) <= TABLE
    clip = len(u) > (TABLE if small else TABLES)
    ends = np.ascontiguousarray(np.array([first, last] if clip else [[low] * len(found), [high] * len(found)]).T)
    for place, (values, (start, end)) in enumerate(zip(found, ends)):
        codes[np.unravel_index(place, kinds)][np.arange(start, end + 1) % (TABLE if small else TABLES)] = values[start - low:end + 1 - low]
    return Narrow(codes, ends, clip, small, 127 // int(largest.max()))


# shorts: of `PixelLayout`; flush, at_once: of `PixelShape`
Tall = namedtuple("Tall", "shorts flush at_once")


def _tall(layer, factors, weights, sets):
    """The converters of a layer in 16 bits; None where these do not hold u, codes and their sums, or bytes not what a set of rows adds."""
    first = [start for start, _ in sets.rows]
    largest_entry = max(1, *(int(np.add.reduceat(part.clip(min=0), first, axis=2).max()) for part in (weights, -weights)))
    if largest_entry > 127 or max(abs(end) for end in layer.u_span) >= 2**15:
        return None
    shorts, largest = np.zeros((*factors.shape, SHORT_FORM), np.int64), np.zeros(factors.shape, np.int64)
    for z, k in np.ndindex(*factors.shape):
        if factors[z, k]:
            converter = layer.converter(z, k)
            form = static_form(*layer.u_range(k), layer.unit, converter)
            if form is None:
                return None
            shorts[z, k] = *form.form, *form.clip, converter.q_min, converter.q_max
            largest[z, k] = len(layer.arrays) * form.largest
    if largest.max() >= 2**15 or factors.max() >= 2**15:
        return None
    return Tall(shorts, 127 // largest_entry, bool((largest * factors).sum(0).max() < 2**15))


# value_bytes, windows: of `PixelLayout`; clip, flush: of `PixelShape`; common: what 1 of the values is worth
ByOnes = namedtuple("ByOnes", "value_bytes windows clip flush common")


def _by_ones(layer):
    """What the codes of all classes are worth, as tables of bytes; None where bytes do not hold u or n, or the tables all windows."""
    kinds = list(np.ndindex(len(layer.spec.digit_bits), len(layer.spec.slice_bits)))
    if layer.u_span[0] < -128 or layer.u_span[1] > 127 or layer.most_ones(-1) > 127:
        return None
    adcs = [[layer.converter(z, k, j) for j in range(layer.classes)] for z, k in kinds]
    common = math.gcd(*(adc.factor for of_kind in adcs for adc in of_kind if adc.bits)) or 1
    spans, found = [], []  # of each class: the u that it can have; of each kind what they are worth
    for j in range(layer.classes):
        low, high = np.array([layer.u_range(k, j) for _, k in kinds]).T
        spans.append((int(low.min()), int(high.max())))
        found.append(np.array([of_kind[j].table(*spans[-1], layer.unit) * (of_kind[j].factor // common) for of_kind in adcs]))
    windows = np.array(spans)
    if clip := sum(high - low + 1 for low, high in spans) > VALUES:  # beyond the windows all codes are alike
        for j, ((low, _), of_class) in enumerate(zip(spans, found)):
            changes = np.flatnonzero((np.diff(of_class, axis=1) != 0).any(0))
            windows[j] = (low + changes[0], low + changes[-1] + 1) if len(changes) else (0, 0)
    start = np.cumsum([0, *(windows[:, 1] - windows[:, 0] + 1)])
    largest = max(int(np.abs(of_class).max()) for of_class in found)
    if start[-1] > VALUES or largest >= 2**15:
        return None
    values = np.zeros((len(kinds), VALUES), np.int16)
    for (low, _), (first, last), place, of_class in zip(spans, windows, start, found):
        values[:, place:place + last - first + 1] = of_class[:, first - low:last - low + 1]
    tables = np.zeros((3, TABLE), np.uint8)
    tables[:, :layer.classes] = np.array([start[:-1] - windows[:, 0], *windows.T]) & 0xFF
    parts = np.stack([values & 0xFF, values >> 8 & 0xFF], 1).astype(np.uint8)
    return ByOnes(np.ascontiguousarray(parts), tables, clip, (2**15 - 1) // max(largest, 1), common)


# noise .. least: of `PixelLayout`
Drawn = namedtuple("Drawn", "noise drawn seed gains offsets curve current references both least")
NOT_DRAWN = Drawn(np.zeros((0,) * 4, np.float32), np.zeros((0,) * 3, np.int32), 0, np.zeros((0,) * 4), np.zeros((0,) * 4, np.int32),
                  np.zeros((0,) * 2, np.float32), np.zeros(0), np.zeros((0,) * 4, np.int32), np.zeros(0, np.uint16), 0)


def _drawn(layer, sets):
    """What the reads of a layer have besides, whose noise depends on nothing but n; None where 16 bits do not hold what pairs do."""
    readout, spec, groups = layer.readout, layer.spec, layer.geometry.groups
    out, slices = len(layer.w_codes) // groups, len(spec.slice_bits)
    columns = column_numbers(groups, out).numpy()
    words = columns // SHARING * APART + columns % APART
    drawn = np.concatenate([(words * COLUMN_KEY & 0xFFFFFFFF).astype(np.uint32).view(np.int32)[..., None],
                            SIGNED[columns % SHARING // APART]], axis=2)
    own = np.array([c0 * (1 + m) for c0, _, m in readout.cell_noise or [(0.0, 0.0, 0.0)] * slices])
    n = np.arange(layer.tallest + 1 if own.any() else 1)
    variance = (layer.base_noise.numpy()[..., -1:] + own[:, None] * n).astype(np.float32)
    deviation = np.rint(np.sqrt(np.maximum(variance, np.float32(0))) * IN_STEPS) * STEP
    both, least = NOT_DRAWN.both, 0
    if readout.needs_both:
        cells = readout.both.cpu().numpy()
        least = min(int(cells[:, :, first:end].clip(max=0).sum(2).min()) for first, end in layer.arrays)
        most = max(int(cells[:, :, first:end].clip(min=0).sum(2).max()) for first, end in layer.arrays)
        if most - least >= 2**16:
            return None
        both = tables_of(cells, sets, SHORT_ROWS, np.uint16).ravel()
    references = tables_of(layer.cells.reference.cpu().numpy()[..., None], sets, SHORT_ROWS, np.int32)[:, 0]
    return Drawn(np.stack([deviation, ROUNDER - ROUNDER * deviation], axis=3), drawn, signed(readout.seed),
                 *gains_and_offsets(layer, out), *curve_and_current(layer), references, both, least)


def _largest_sum(layer):
    """What the codes of a column come to, at the most, which are added up in 32 bits."""
    spec, total = layer.spec, 0
    for z, k in np.ndindex(len(spec.digit_bits), len(spec.slice_bits)):
        largest = 0
        for j in range(layer.classes):
            converter, ends = layer.converter(z, k, j), layer.u_range(k, j) if layer.readout is None else read_range(layer, k)
            if converter.bits:
                added = added_by_codes(converter) if layer.compares else converter.added(converter.encode(np.array(ends), layer.unit))
                largest = max(largest, int(np.abs(added).max()))
        total += largest << (spec.dac_bits * z + spec.cell_bits * k)
    return len(layer.arrays) * total


def lay_out(layer: MappedLayer) -> tuple[PixelShape, PixelLayout] | None:
    """(`PixelShape`, `PixelLayout`) of a layer with fixed ranges, None where no form holds its reads or gives its codes."""
    layer = layer.in_levels if layer.readout is None else layer
    if _largest_sum(layer) >= 2**31:
        return None
    spec, geometry, groups = layer.spec, layer.geometry, layer.geometry.groups
    low, high = layer.u_span
    digits, slices = np.arange(len(spec.digit_bits)), np.arange(len(spec.slice_bits))
    ones = _by_ones(layer) if layer.by_ones else ByOnes(np.zeros(0, np.uint8), np.zeros(0, np.uint8), False, 0, 0)
    if ones is None:
        return None
    adcs = [[max((layer.converter(z, k, j) for j in range(layer.classes)), key=lambda adc: adc.bits) for k in slices] for z in digits]
    factors = np.array([[(ones.common or adc.factor) << spec.dac_bits * z if adc.bits else 0 for adc in of_digit]
                        for z, of_digit in enumerate(adcs)])
    trees = trees_of(layer) if layer.compares else NO_TREES
    if trees is None:
        return None
    whole = layer.readout is None and not layer.compares and (layer.cells is None or layer.cells.fraction_bits == 0)
    weights = layer.row_weights.cpu().numpy()
    narrow, tall, form, sets = None, None, BY_ONES, sets_of(layer, BYTE_ROWS)
    if not ones.common:
        narrow, form = _narrow(layer, factors) if whole else None, NARROW
    if narrow is None and form == NARROW:
        tall, form = _tall(layer, factors, weights, sets) if whole else None, TALL
    if narrow is None and tall is None and form != BY_ONES:
        form, sets = COMPARED if layer.compares else BROAD if layer.readout is None else READ_OUT, sets_of(layer, SHORT_ROWS)
    shorts = form in (BROAD, READ_OUT, COMPARED)  # of 16 bits are the tables
    if shorts and (low < -2**15 or high >= 2**15):
        return None
    singles = np.zeros((1, *factors.shape, 0), np.float32)
    divide = False
    if form == COMPARED:
        factors = trees.factors
    elif shorts:
        forms = static_forms(layer)
        if forms.broad or len(layer.arrays) * np.abs(forms.singles[..., [LOWEST, HIGHEST]]).max() >= 2**24:
            return None
        singles, divide = np.ascontiguousarray(forms.singles[..., -1, :]), bool(forms.divide)
    out, step = len(layer.w_codes) // groups, step_of_slice(layer)
    intervals, (down, right) = np.array(sets.intervals, np.int64), np.array(sets.taps, np.int64).T
    narrow = narrow or Narrow(np.zeros(0, np.int8), np.zeros(0, np.int64), False, False, 1)
    tall = tall or Tall(np.zeros(0, np.int64), 0, False)
    read_out = form in (READ_OUT, COMPARED)
    drawn = _drawn(layer, sets) if read_out else NOT_DRAWN
    if drawn is None:
        return None
    shape = PixelShape(
        form=form, divide=divide, out_channels=out, channels=layer.group_channels, groups=groups,
        arrays=len(layer.arrays), digits=len(digits), slices=len(slices), steps=int(step.max()) + 1, slice_vectors=-(-out // LANES),
        input_bits=spec.a_bits, intervals=len(intervals), sets=len(sets.rows), stride_y=geometry.stride[0],
        stride_x=geometry.stride[1], pad_top=geometry.padding[0], pad_left=geometry.padding[2], clip=narrow.clip or ones.clip,
        small=narrow.small, together=narrow.together, flush=tall.flush or ones.flush, at_once=tall.at_once,
        noisy=read_out and layer.readout.noisy, curved=read_out and layer.readout.curve is not None,
        paired=read_out and layer.readout.needs_both, analog=spec.reference == "analog", gained=bool((drawn.gains != 1).any()),
        moved=bool(drawn.offsets.any()), deviations=drawn.noise.shape[2], levels=trees.levels)
    return shape, PixelLayout(
        tables=tables_of(weights, sets, *((SHORT_ROWS, np.int16) if shorts else (BYTE_ROWS, np.int8))),
        set_start=np.array(sets.start, np.int64),
        first=intervals[:, 0].copy(), size=intervals[:, 1] - intervals[:, 0], plane=np.array(sets.interval, np.int64), down=down.copy(),
        right=right.copy(), digit_start=np.cumsum([0, *spec.digit_bits], dtype=np.int64), step_of_slice=step, codes=narrow.codes,
        ends=narrow.ends, forms=singles[0], shorts=tall.shorts, value_bytes=ones.value_bytes, windows=ones.windows,
        **drawn._asdict(), trees=trees.trees, tree_of=trees.tree_of, code_values=trees.code_values,
        factors=factors.ravel(), worth=1 << spec.cell_bits * slices)


def tables_of(weights, sets, most, dtype):
    """What each set of rows adds for each pattern of its input bits, `[group, out, slice, set, pattern]`."""
    slices, groups, _, out = weights.shape
    padded = np.zeros((slices, groups, len(sets.rows), most, out), np.int32)
    for number, (first, end) in enumerate(sets.rows):
        padded[:, :, number, :end - first] = weights[:, :, first:end]
    tables = aligned(groups * out * slices * len(sets.rows) * 2**most, np.empty(0, dtype))
    tables = tables.reshape(groups, out, slices, len(sets.rows), 2**most)
    tables[..., 0] = 0
    for bit in range(most):  # of patterns with this bit as the highest: those without it, and what its row adds
        tables[..., 2**bit:2 ** (bit + 1)] = tables[..., :2**bit] + padded[:, :, :, bit].transpose(1, 3, 0, 2)[..., None]
    return tables
