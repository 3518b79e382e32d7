"""The hardware (`CrossbarSpec`) and the shape of a convolution (`Geometry`); the only place of their defaults."""

from dataclasses import dataclass, fields

MAPPINGS = ("tap", "im2col")
REFERENCES = ("analog", "digital")
ADC_RANGES = ("calibrated", "full", "dynamic", "ideal")


@dataclass(frozen=True)
class CrossbarSpec:
    """One hardware setting.

    Attributes:
        w_bits: bits of a weight code (1..8).
        a_bits: bits of an activation code (1..8).
        cell_bits: bits of one memory cell (1..w_bits); a weight takes `ceil(w_bits / cell_bits)` cells (slices).
        adc_bits: bits of one ADC code (1..12).
        rows: word lines of one array that are read together (1..1024).
        mapping: "tap", each kernel position on arrays of its own (NeuroSim V1.2), or "im2col", taps laid end to end.
        reference: "analog", the ADC sees the difference to a reference column; "digital", it sees the bit line and the
            reference is subtracted behind it.
        dac_bits: bits of one input digit (1..a_bits); inputs take `ceil(a_bits / dac_bits)` reads.
        adc_range: "calibrated", frozen after calibration on training images; "full", all values that the array can
            produce; "dynamic", minimum and maximum of the batch at hand; "ideal", no ADC.
    """

    w_bits: int = 4
    a_bits: int = 4
    cell_bits: int = 1
    adc_bits: int = 6
    rows: int = 128
    mapping: str = "tap"
    reference: str = "analog"
    dac_bits: int = 1
    adc_range: str = "calibrated"

    def __post_init__(self):
        limits = {"w_bits": 8, "a_bits": 8, "cell_bits": self.w_bits, "adc_bits": 12, "rows": 1024,
                  "dac_bits": self.a_bits}
        allowed = {"mapping": MAPPINGS, "reference": REFERENCES, "adc_range": ADC_RANGES}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in limits:
                top = limits[field.name]
                of = {"cell_bits": " (w_bits)", "dac_bits": " (a_bits)"}.get(field.name, "")
                if type(value) is not int or not 1 <= value <= top:
                    raise ValueError(f"{field.name} is {value!r}; allowed are whole numbers from 1 to {top}{of}")
            elif value not in allowed[field.name]:
                raise ValueError(f"{field.name} is {value!r}; allowed are {', '.join(allowed[field.name])}")

    @property
    def slice_bits(self):
        """Bits of each slice, LSB first; the last holds what is left: 4-bit weights on 3-bit cells give (3, 1)."""
        return _split(self.w_bits, self.cell_bits)

    @property
    def digit_bits(self):
        """Bits of each input digit, LSB first."""
        return _split(self.a_bits, self.dac_bits)

    @property
    def unit(self):
        """Value of `u = 1` in units of `v`: 1/2 or 1."""
        return 0.5 if self.reference == "analog" else 1.0


def _split(bits, size):
    return tuple(min(size, bits - start) for start in range(0, bits, size))


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution; a linear layer is a 1x1 convolution of a 1x1 image.

    Pairs are (vertical, horizontal); `padding` is (top, bottom, left, right), in pixels of code 0.
    """

    stride: tuple = (1, 1)
    padding: tuple = (0, 0, 0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def output_size(self, height, width, kernel):
        top, bottom, left, right = self.padding
        sizes = (height + top + bottom, width + left + right)
        return tuple((size - d * (k - 1) - 1) // s + 1
                     for size, d, k, s in zip(sizes, self.dilation, kernel, self.stride))
