"""Independent oracle of the crossbar arithmetic in NumPy int64; it shares no code with the package.

Every array is an explicit list of word lines `(ky, kx, channel)`, every input code is fetched by index, and every read
is one integer dot product, as a person would compute it by hand. `spec` is anything with the attributes of
`CrossbarSpec`, `geometry` anything with `stride`, `padding` (top, bottom, left, right), `dilation`, `groups` and `planes`.
Only for small shapes.
"""

import numpy as np


def split(bits, size):
    """`[(shift, bits), ...]`, LSB first; the last part holds what is left."""
    parts, low = [], 0
    while low < bits:
        parts.append((low, min(size, bits - low)))
        low += size
    return parts


def arrays(mapping, kernel, channels, rows, planes=1):
    """Word lines of each array of one group: lists of `(ky, kx, channel)`; planes, kernel positions whose channels follow one another."""
    kh, kw = kernel
    found = []
    if mapping == "tap":
        for ky in range(kh):
            for kx in range(kw):
                for plane in range(planes):
                    lines = [(ky, kx, channel) for channel in range(channels) if channel * planes // channels == plane]
                    while lines:
                        found.append(lines[:rows])
                        lines = lines[rows:]
    elif mapping == "im2col":
        lines = [(ky, kx, channel) for ky in range(kh) for kx in range(kw) for channel in range(channels)]
        while lines:
            found.append(lines[:rows])
            lines = lines[rows:]
    else:
        raise AssertionError(mapping)
    return found


def output_size(a_codes, kernel, geometry):
    """`(H', W')`, by counting the positions at which the dilated kernel fits into the padded image."""
    top, bottom, left, right = geometry.padding
    sizes = []
    for size, taps, dilation, stride in zip(
            (a_codes.shape[1] + top + bottom, a_codes.shape[2] + left + right), kernel,
            geometry.dilation, geometry.stride):
        reach = dilation * (taps - 1)
        sizes.append(len([first for first in range(0, size, stride) if first + reach < size]))
    return tuple(sizes)


def word_lines(a_codes, kernel, spec, geometry):
    """Yield `(group, t, lines, codes)`: the codes on the word lines of each array, int64 `[N, H', W', lines]`; 0 in the padding."""
    groups, in_channels, (out_height, out_width) = geometry.groups, a_codes.shape[3], output_size(a_codes, kernel, geometry)
    assert in_channels % groups == 0
    group_in = in_channels // groups
    top, bottom, left, right = geometry.padding
    padded = np.pad(a_codes.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    for group in range(groups):
        for t, lines in enumerate(arrays(spec.mapping, kernel, group_in, spec.rows, geometry.planes)):
            ky, kx, channel = np.array(lines).T
            y = geometry.stride[0] * np.arange(out_height)[:, None, None] + geometry.dilation[0] * ky
            x = geometry.stride[1] * np.arange(out_width)[:, None] + geometry.dilation[1] * kx
            yield group, t, lines, padded[:, y, x, group * group_in + channel]


def reads(a_codes, w_codes, spec, geometry, reference_twice):
    """Yield `(group, t, z, k, u)`, u int64 `[N, H', W', out / groups]`: 2 P - 2 r_k n (analog), P (digital)."""
    w_codes = np.asarray(w_codes).astype(np.int64)
    out_channels, group_in, kh, kw = w_codes.shape
    assert a_codes.shape[3] == group_in * geometry.groups and out_channels % geometry.groups == 0
    group_out = out_channels // geometry.groups
    for group, t, lines, codes in word_lines(np.asarray(a_codes), (kh, kw), spec, geometry):
        ky, kx, channel = np.array(lines).T
        weights = w_codes[group * group_out:(group + 1) * group_out, channel, ky, kx].T
        slices = [weights // 2**w_shift % 2**w_bits for w_shift, w_bits in split(spec.w_bits, spec.cell_bits)]
        for z, (a_shift, a_bits) in enumerate(split(spec.a_bits, spec.dac_bits)):
            digits = codes // 2**a_shift % 2**a_bits
            active = digits.sum(axis=-1)[..., None]
            for k, cells in enumerate(slices):
                bit_line = digits @ cells
                if spec.reference == "analog":
                    yield group, t, z, k, 2 * bit_line - int(reference_twice[k]) * active
                else:
                    yield group, t, z, k, bit_line


def line_cells(cells, group, k, lines, kernel, group_in):
    """What stands on these word lines, int64 `[lines, out / groups]`, and their reference, `[lines]`. Args: cells, `(values,
    reference, F)`, arrays `[slices, groups, rows, out / groups]` and `[slices, groups, rows]`, rows tap after tap."""
    values, reference, _ = cells
    rows = [(ky * kernel[1] + kx) * group_in + channel for ky, kx, channel in lines]
    return values[k, group, rows].astype(np.int64), reference[k, group, rows].astype(np.int64)


def cell_reads(a_codes, kernel, spec, geometry, cells, subtract=None):
    """Yield `(group, t, z, k, u)` of cells on a grid: `sum a (value - reference)` with an analog reference, or where `subtract`
    says so, else `sum a value`."""
    subtract = spec.reference == "analog" if subtract is None else subtract
    group_in = a_codes.shape[3] // geometry.groups
    for group, t, lines, codes in word_lines(np.asarray(a_codes), kernel, spec, geometry):
        slices = [line_cells(cells, group, k, lines, kernel, group_in) for k in range(len(split(spec.w_bits, spec.cell_bits)))]
        for z, (a_shift, a_bits) in enumerate(split(spec.a_bits, spec.dac_bits)):
            digits = codes // 2**a_shift % 2**a_bits
            for k, (values, reference) in enumerate(slices):
                u = digits @ values
                if subtract:
                    u = u - (digits @ reference)[..., None]
                yield group, t, z, k, u


def pair_lines(w_codes, zero_twice, cell_bits):
    """What the cells of the positive and of the negative bit line of each weight hold: `(bits of each slice, plus, minus)`, int64
    `[slices, out, in / groups, kh, kw]`; digits of |2 W - L| for odd L, else of |W - L / 2|."""
    numbers = 2 * np.asarray(w_codes).astype(np.int64) - zero_twice
    if zero_twice % 2 == 0:
        numbers //= 2
    most = zero_twice if zero_twice % 2 else zero_twice // 2
    slices = split(len(f"{most:b}"), cell_bits)
    plus, minus = (np.zeros((len(slices), *numbers.shape), np.int64) for _ in range(2))
    for place, number in np.ndenumerate(numbers):
        for k, (shift, bits) in enumerate(slices):
            (plus if number > 0 else minus)[(k, *place)] = abs(number) // 2**shift % 2**bits
    return [bits for _, bits in slices], plus, minus


def pair_reads(a_codes, spec, geometry, lines):
    """Yield `(group, t, z, k, u)`: what the positive bit line of each pair carries less the negative one. Args: lines, of `pair_lines`."""
    _, plus, minus = lines
    _, out_channels, group_in, kh, kw = plus.shape
    group_out = out_channels // geometry.groups
    for group, t, word, codes in word_lines(np.asarray(a_codes), (kh, kw), spec, geometry):
        pairs = [[np.array([line[k, group * group_out:(group + 1) * group_out, channel, ky, kx] for ky, kx, channel in word])
                  for line in (plus, minus)] for k in range(len(plus))]
        for z, (a_shift, a_bits) in enumerate(split(spec.a_bits, spec.dac_bits)):
            digits = codes // 2**a_shift % 2**a_bits
            for k, (positive, negative) in enumerate(pairs):
                yield group, t, z, k, digits @ positive - digits @ negative


def static_code(u, parts, delta, q_min, bits):
    """`clip(rint(v / delta), q_min, q_min + 2^B - 1)`, v = u / parts, in float64; NumPy's rint takes ties to even."""
    v = u / float(parts)
    return np.minimum(np.maximum(np.rint(v / np.float64(delta)), q_min), q_min + 2**bits - 1).astype(np.int64)


def dynamic_value(u, adc_bits):
    """Value of each read of one (group, t, z, k) over the whole batch, in units of `u / 2^B`."""
    u_a, u_b = int(u.min()), int(u.max())
    if u_a == u_b:
        return 2**adc_bits * u
    step = np.float32(u_b - u_a) / np.float32(2**adc_bits)
    q = np.rint((u - u_a).astype(np.float32) / step)
    assert q.dtype == np.float32
    q = np.minimum(np.maximum(q, 0), 2**adc_bits - 1).astype(np.int64)
    return q * (u_b - u_a) + 2**adc_bits * u_a


def steps(delta):
    """Distinct ADC steps in order of the first slice that has each."""
    found = []
    for step in (float(d) for d in delta):
        if step not in found:
            found.append(step)
    return found


def class_count(spec, kernel, channels, planes=1):
    """How many classes of n there are: one, idle reads and others, or by ones 1 more than the largest n has bits."""
    tallest = max(map(len, arrays(spec.mapping, kernel, channels, spec.rows, planes)))
    largest = tallest * max(2**bits - 1 for _, bits in split(spec.a_bits, spec.dac_bits))
    return 1 + len(f"{largest:b}") if spec.adc_plan == "ones" else 1 + (spec.adc_idle == "skip")


def classes_of(a_codes, kernel, spec, geometry, count):
    """`{(group, t, z): int64 [N, H', W', 1]}`: the bits that n has, the sum of the digits on the word lines, `count - 1` at most."""
    found = {}
    for group, t, _, codes in word_lines(np.asarray(a_codes), kernel, spec, geometry):
        for z, (shift, bits) in enumerate(split(spec.a_bits, spec.dac_bits)):
            n = (codes // 2**shift % 2**bits).sum(axis=-1, keepdims=True)
            found[group, t, z] = sum(n >= 2**j for j in range(count - 1)) + 0 * n
    return found


def planned_value(u, parts, delta, q_min, bits, classes):
    """Value of each read in units of 1/64, by its class where there are numbers for each; one without bits is no conversion, whatever its
    step."""
    if np.ndim(bits):
        return sum((classes == j) * planned_value(u, parts, *numbers, classes) for j, numbers in enumerate(zip(delta, q_min, bits)))
    if bits == 0:
        return np.zeros_like(u)
    size = int(delta * 64)
    assert size == delta * 64
    return static_code(u, parts, delta, int(q_min), int(bits)) * size


def accumulate(a_codes, w_codes, spec, geometry, reference_twice, delta=None, q_min=None, bits=None, cells=None,
               pairs=None):
    """Accumulators of a layer, int64 `[G, N, H', W', out]`.

    Args: a_codes uint8 `[N, H, W, in]`; w_codes uint8 `[out, in / groups, kh, kw]`; reference_twice, delta and q_min
    one number a slice (`delta`, `q_min` for "calibrated" and "full" only); with a plan delta, q_min and bits `[digit][slice]`,
    by ones `[digit][slice][class]`; cells on a grid `(values, reference, F)`, see `line_cells`; ideal pairs as `pair_lines` gives them.
    """
    if spec.adc_range == "ideal" and cells is not None:
        return ideal_cells(a_codes, w_codes.shape, spec, geometry, cells)[None]
    if spec.adc_range == "ideal":
        return integer_convolution(a_codes, w_codes, spec, geometry, reference_twice)[None]
    one_plane = spec.adc_range == "dynamic" or bits is not None
    found = [0.0] if one_plane else steps(delta)
    out_channels, groups = len(w_codes), geometry.groups
    group_out = out_channels // groups
    total = np.zeros((len(found), len(a_codes), *output_size(a_codes, w_codes.shape[2:], geometry), out_channels), np.int64)
    every_read, parts = reads(a_codes, w_codes, spec, geometry, reference_twice), 2 if spec.reference == "analog" else 1
    if cells is not None:
        every_read, parts = cell_reads(a_codes, w_codes.shape[2:], spec, geometry, cells), 2 ** cells[2]
    if pairs is not None:
        every_read, parts = pair_reads(a_codes, spec, geometry, pairs), 1
    by_ones = np.ndim(bits) == 3
    classes = classes_of(a_codes, w_codes.shape[2:], spec, geometry, np.shape(bits)[2]) if by_ones else {}
    for group, t, z, k, u in every_read:
        if spec.adc_range == "dynamic":
            plane, value = 0, dynamic_value(u, spec.adc_bits)
        elif bits is not None:
            plane, value = 0, planned_value(u, parts, delta[z][k], q_min[z][k], bits[z][k], classes.get((group, t, z)))
        else:
            plane, value = found.index(float(delta[k])), static_code(u, parts, delta[k], int(q_min[k]), spec.adc_bits)
        weight = 2 ** (spec.dac_bits * z + spec.cell_bits * k)
        total[plane, ..., group * group_out:(group + 1) * group_out] += weight * value
    return total


def ideal_cells(a_codes, w_shape, spec, geometry, cells):
    """`sum over reads of 2^(d z + c k) sum a (value - reference)`, int64 `[N, H', W', out]`."""
    group_out = w_shape[0] // geometry.groups
    total = np.zeros((len(a_codes), *output_size(a_codes, w_shape[2:], geometry), w_shape[0]), np.int64)
    for group, _, z, k, u in cell_reads(a_codes, w_shape[2:], spec, geometry, cells, subtract=True):
        total[..., group * group_out:(group + 1) * group_out] += 2 ** (spec.dac_bits * z + spec.cell_bits * k) * u
    return total


def integer_convolution(a_codes, w_codes, spec, geometry, reference_twice):
    """`sum A (2 W - L)`, int64 `[N, H', W', out]`, without arrays, digits or slices; L the doubled zero level."""
    a_codes = np.asarray(a_codes).astype(np.int64)
    level = sum(int(r) * 2 ** (spec.cell_bits * k) for k, r in enumerate(reference_twice))
    weights = 2 * np.asarray(w_codes).astype(np.int64) - level
    _, height, width, _ = a_codes.shape
    out_channels, group_in, kh, kw = weights.shape
    group_out = out_channels // geometry.groups
    out_height, out_width = output_size(a_codes, w_codes.shape[2:], geometry)
    total = np.zeros((len(a_codes), out_height, out_width, out_channels), np.int64)
    for out in range(out_channels):
        first = out // group_out * group_in
        for oy in range(out_height):
            for ox in range(out_width):
                for ky in range(kh):
                    for kx in range(kw):
                        y = oy * geometry.stride[0] + ky * geometry.dilation[0] - geometry.padding[0]
                        x = ox * geometry.stride[1] + kx * geometry.dilation[1] - geometry.padding[2]
                        if 0 <= y < height and 0 <= x < width:
                            total[:, oy, ox, out] += a_codes[:, y, x, first:first + group_in] @ weights[out, :, ky, kx]
    return total


def u_span(w_codes, spec, reference_twice):
    """Smallest and largest `u` over all slices of the tallest array, by trying both extremes of every cell."""
    tallest = max(map(len, arrays(spec.mapping, w_codes.shape[2:], w_codes.shape[1], spec.rows)))
    drive = tallest * max(2**bits - 1 for _, bits in split(spec.a_bits, spec.dac_bits))
    values = [0]
    for k, (_, bits) in enumerate(split(spec.w_bits, spec.cell_bits)):
        for cell in (0, 2**bits - 1):
            analog = spec.reference == "analog"
            values.append(drive * (2 * cell - int(reference_twice[k])) if analog else drive * cell)
    return min(values), max(values)


def cell_span(w_shape, spec, geometry, cells):
    """Smallest and largest `u` of any read of cells on a grid: on each array every input is off or at its largest, as suits."""
    drive, values = max(2**bits - 1 for _, bits in split(spec.a_bits, spec.dac_bits)), [0]
    for group in range(geometry.groups):
        for lines in arrays(spec.mapping, w_shape[2:], w_shape[1], spec.rows):
            for k in range(len(cells[0])):
                held, reference = line_cells(cells, group, k, lines, w_shape[2:], w_shape[1])
                added = held - reference[:, None] if spec.reference == "analog" else held
                for column in added.T.tolist():
                    values += [drive * sum(x for x in column if x < 0), drive * sum(x for x in column if x > 0)]
    return min(values), max(values)


def in_bins(counts, low, most):
    """Counts of each u from `low` on, in no more than `most` bins of 2^s values, those around the multiples of 2^s, s the smallest."""
    u, size = low + np.arange(counts.shape[-1]), 1
    while (place := np.floor(u / size + 0.5).astype(np.int64))[-1] - place[0] >= most:
        size *= 2
    found = np.zeros((*counts.shape[:-1], place[-1] - place[0] + 1), np.int64)
    for i, at in enumerate(place - place[0]):
        found[..., at] += counts[..., i]
    return found


def histogram(a_codes, w_codes, spec, geometry, reference_twice, cells=None, most=2**22):
    """Counts of the reads, int64 `[digits, slices, classes, u]`; bin i is `u = u_span(...)[0] + i`, or `cell_span(...)[0] + i`, where there
    are no more than `most`, else see `in_bins`."""
    kernel, count = w_codes.shape[2:], class_count(spec, w_codes.shape[2:], w_codes.shape[1], geometry.planes)
    if cells is None:
        low, high = u_span(w_codes, spec, reference_twice)
        every_read = reads(a_codes, w_codes, spec, geometry, reference_twice)
    else:
        low, high = cell_span(w_codes.shape, spec, geometry, cells)
        every_read = cell_reads(a_codes, kernel, spec, geometry, cells)
    counts = np.zeros((len(split(spec.a_bits, spec.dac_bits)), len(split(spec.w_bits, spec.cell_bits)), count, high - low + 1), np.int64)
    classes = classes_of(a_codes, kernel, spec, geometry, count)
    for group, t, z, k, u in every_read:
        np.add.at(counts[z, k], (classes[group, t, z], u - low), 1)
    return in_bins(counts, low, most) if counts.shape[3] > most else counts
