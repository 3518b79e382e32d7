"""The vector type of the CPU kernels: every operation against NumPy, and that the machine's vector registers are used."""

import llvmlite.binding
import numpy as np
import pytest
from numba import njit

from models.quant.kernels import simd

LANES = simd.LANES


def words(seed):
    return np.random.default_rng(seed).integers(0, 2**16, LANES).astype(np.uint16)


def signed(x):
    return x.view(np.int16).astype(np.int64)


def wrap(x):
    return (np.asarray(x, dtype=np.int64) & 0xFFFF).astype(np.uint16)


SHIFTS = np.arange(LANES, dtype=np.uint16) % 16
BINARY = {
    "and": (lambda a, b: a & b, lambda a, b: a & b),
    "or": (lambda a, b: a | b, lambda a, b: a | b),
    "xor": (lambda a, b: a ^ b, lambda a, b: a ^ b),
    "add": (lambda a, b: a + b, lambda a, b: wrap(a.astype(int) + b)),
    "sub": (lambda a, b: a - b, lambda a, b: wrap(a.astype(int) - b)),
    "mul": (lambda a, b: a * b, lambda a, b: wrap(a.astype(np.int64) * b)),
    "vmin": (lambda a, b: simd.vmin(a, b), lambda a, b: wrap(np.minimum(signed(a), signed(b)))),
    "vmax": (lambda a, b: simd.vmax(a, b), lambda a, b: wrap(np.maximum(signed(a), signed(b)))),
    "mulhi": (lambda a, b: simd.mulhi(a, b), lambda a, b: wrap(signed(a) * signed(b) >> 16)),
}
SHIFTED = {
    "shl": (lambda a, b: a << b, lambda a, b: wrap(a.astype(np.int64) << b)),
    "shr": (lambda a, b: a >> b, lambda a, b: a >> b),
    "sar": (lambda a, b: simd.sar(a, b), lambda a, b: wrap(signed(a) >> b)),
}


@pytest.mark.parametrize("name", [*BINARY, *SHIFTED])
def test_operation_equals_numpy(name):
    operation, expected = (BINARY | SHIFTED)[name]
    compiled = njit(operation)

    @njit
    def kernel(a, b, out):
        simd.store(out.ctypes.data, 0, compiled(simd.load(a.ctypes.data, 0), simd.load(b.ctypes.data, 0)))

    a, b, out = words(1), SHIFTS.copy() if name in SHIFTED else words(2), np.zeros(LANES, np.uint16)
    kernel(a, b, out)
    assert np.array_equal(out, expected(a, b))


def test_majority_is_the_carry_of_a_full_adder():
    @njit
    def kernel(a, b, c, out):
        x, y, z = simd.load(a.ctypes.data, 0), simd.load(b.ctypes.data, 0), simd.load(c.ctypes.data, 0)
        simd.store(out.ctypes.data, 0, simd.majority(x, y, z))

    a, b, c, out = words(1), words(2), words(3), np.zeros(LANES, np.uint16)
    kernel(a, b, c, out)
    bits = [(x[:, None] >> np.arange(16)) & 1 for x in (a, b, c, out)]
    assert np.array_equal(bits[3], (bits[0] + bits[1] + bits[2]) >> 1)


@pytest.mark.parametrize("value", [-1, 0, 7, -32768, 65535 + 12])
def test_splat_takes_the_low_16_bits(value):
    @njit
    def kernel(value, out):
        simd.store(out.ctypes.data, 0, simd.splat(value))

    out = np.zeros(LANES, np.uint16)
    kernel(value, out)
    assert (out == value % 2**16).all()


def test_wide_addition_extends_by_sign_or_by_zero():
    @njit
    def kernel(a, plus, zeros):
        simd.add_signed(plus.ctypes.data, 0, simd.load(a.ctypes.data, 0), 3)
        simd.add_unsigned(zeros.ctypes.data, 0, simd.load(a.ctypes.data, 0), 3)

    a, start = words(4), np.arange(LANES, dtype=np.int32)
    plus, zeros = start.copy(), start.copy()
    kernel(a, plus, zeros)
    assert np.array_equal(plus, start + signed(a) * 3)
    assert np.array_equal(zeros, start + a.astype(np.int64) * 3)


def test_bits_of_bytes_and_their_positions():
    @njit
    def kernel(codes, bit):
        return simd.bit_of_bytes(codes.ctypes.data, 0, bit)

    @njit
    def position(bits):
        return simd.trailing_zeros(bits)

    codes = np.random.default_rng(5).integers(0, 256, LANES).astype(np.uint8)
    for bit in range(8):
        assert kernel(codes, bit) == sum(int(code >> bit & 1) << i for i, code in enumerate(codes))
    assert [position(np.uint32(1 << i)) for i in range(32)] == list(range(32))


def test_bit_length():
    @njit
    def kernel(value):
        return simd.bit_length(value)

    for value in (0, 1, 2, 3, 255, 256, 2**40):
        assert kernel(value) == value.bit_length()


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512bw"), reason="the processor has no AVX-512")
def test_avx512_registers_and_instructions_are_used():
    @njit
    def kernel(a, b, c, out):
        x, y, z = simd.load(a.ctypes.data, 0), simd.load(b.ctypes.data, 0), simd.load(c.ctypes.data, 0)
        simd.store(out.ctypes.data, 0, simd.majority(x, y, z))
        simd.store(out.ctypes.data, LANES, simd.mulhi(x, y) + z)

    kernel(words(1), words(2), words(3), np.zeros(2 * LANES, np.uint16))
    code = "\n".join(kernel.inspect_asm().values())
    assert "zmm" in code and "vpternlog" in code and "vpmulhw" in code


@pytest.mark.skipif(not simd.has_byte_tables(), reason="this machine has no byte tables")
def test_lookup():
    """Every table entry, and indices that are taken modulo 128."""
    @njit
    def kernel(table, index, out):
        low, high = simd.load(table.ctypes.data, 0), simd.load(table.ctypes.data, LANES)
        simd.store(out.ctypes.data, 0, simd.lookup(low, high, simd.load(index.ctypes.data, 0)))
        table[0] = table[0]  # keeps the arrays until here

    table = np.random.default_rng(6).integers(-128, 128, 128).astype(np.int8)
    for first in range(0, 256, 64):
        index, out = np.arange(first, first + 64).astype(np.uint8), np.empty(64, np.int8)
        kernel(table, index, out)
        assert np.array_equal(out, table[index % 128])


@pytest.mark.parametrize("name, expected", [("add_bytes_up_to_255", lambda a, b: np.minimum(a + b, 255)),
                                            ("sub_bytes_down_to_0", lambda a, b: np.maximum(a - b, 0))])
def test_operations_on_bytes_saturate(name, expected):
    operation = getattr(simd, name)

    @njit
    def kernel(a, b, out):
        simd.store(out.ctypes.data, 0, operation(simd.load(a.ctypes.data, 0), simd.load(b.ctypes.data, 0)))

    a, out = np.arange(0, 256, 4).astype(np.uint8), np.empty(64, np.uint8)
    for value in (0, 1, 100, 128, 255):
        b = np.full(64, value, np.uint8)
        kernel(a, b, out)
        assert np.array_equal(out, expected(a.astype(int), value))


@pytest.mark.skipif(not simd.can_compress(), reason="the processor has no AVX-512")
@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0xFFFFFFFF, 0x0000FFFF, 0xFFFF0000, 0x8A310C05])
def test_put_compressed(bits):
    @njit
    def kernel(out, index, bits, first, step):
        return simd.put_compressed(out.ctypes.data, index, bits, first, step)

    out = np.full(64, 7, np.uint32)
    places = [i for i in range(32) if bits >> i & 1]
    assert kernel(out, 5, np.uint32(bits), 1000, 64) == len(places)
    assert out[5:5 + len(places)].tolist() == [1000 + 64 * i for i in places]
    assert (out[:5] == 7).all() and (out[5 + len(places) + 16:] == 7).all()


def test_by_bit():
    @njit
    def kernel(x, out):
        simd.store(out.ctypes.data, 0, simd.by_bit(simd.load(x.ctypes.data, 0)))

    x, out = np.random.default_rng(0).integers(0, 2**16, LANES, dtype=np.uint16), np.empty(LANES, np.uint16)
    kernel(x, out)
    bits = [[x.view(np.uint8)[byte] >> bit & 1 for byte in range(64)] for bit in range(8)]
    assert out.view(np.uint64).tolist() == [sum(int(one) << byte for byte, one in enumerate(each)) for each in bits]


def test_any_bit():
    @njit
    def kernel(x):
        return simd.any_bit(simd.load(x.ctypes.data, 0))

    x = np.zeros(LANES, np.uint16)
    assert not kernel(x)
    for bit in range(512):
        x[:] = 0
        x[bit // 16] = 1 << bit % 16
        assert kernel(x)


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("fma", True), reason="no such instruction here")
def test_fused_multiply_add_rounds_once():
    @njit
    def run(x, y, z, out):
        for i in range(len(x)):
            out[i] = simd.fused_multiply_add(x[i], y[i], z[i])

    x, y, z = np.random.default_rng(0).normal(size=(3, 10_000)).astype(np.float32)
    out = np.empty_like(x)
    run(x, y, z, out)
    once = (x.astype(np.float64) * y + z).astype(np.float32)  # float64 holds the product
    assert np.array_equal(out, once) and not np.array_equal(out, x * y + z)
