"""The command-line flags that describe the hardware, and the `CrossbarSpec`s they stand for."""

import itertools

import utils
from models.quant import CrossbarSpec, adc
from models.quant.spec import MAPPINGS, REFERENCES
from models.vgg import CROSSBAR_LAYERS as MAPS
from utils import UserError

# Flags named as in the original scripts, and the field of the spec that each sets.
FIELDS = {"cellBit": "cell_bits", "adc_prec": "adc_bits", "subArray": "rows", "mapping": "mapping",
          "reference": "reference", "dac_bits": "dac_bits"}
CALIBRATION = ("adc_calib", "adc_per", "adc_correct")
TRAINED_FOR = (*FIELDS, "map", *CALIBRATION)  # flags that train.py --adc_aware uses


def add_flags(group, several):
    """Add the flags to an argparse group; with `several`, each takes a list of values."""

    def add(name, default, text, **options):
        if several:
            options["nargs"] = "+"
        options["default"] = [default] if several else default
        group.add_argument(f"--{name}", help=f"{text} Default {default}", **options)

    add("cellBit", 1, "c, bits of one memory cell: W = sum_k 2^(c k) C_k.", type=utils.COUNT)
    add("adc_prec", 6, "B, bits of the ADC: q = clip(rint(v / delta), q_min, q_min + 2^B - 1).", type=utils.COUNT)
    add("subArray", 128, "rows of one array: v = sum over the rows of a_z C_k - r_k a_z.", type=utils.COUNT)
    add("mapping", "tap", "tap: every kernel position on arrays of its own. im2col: kernel positions laid end to end.",
        choices=MAPPINGS)
    add("reference", "analog", "analog: the ADC sees the difference to a reference column, v = P - r_k n. digital: it sees "
        "v = P, and r_k n is subtracted behind it.", choices=REFERENCES)
    add("dac_bits", 1, "d, bits of one input digit: A = sum_z 2^(d z) a_z.", type=utils.COUNT)
    add("map", "all", "all: every layer but the first on crossbars. conv: the convolutions only.", choices=MAPS)


def add_calibration_flags(group):
    group.add_argument(
        "--adc_calib", default="mse", choices=adc.RULES, help="how a calibrated range follows from the reads of training "
        "images; zero is always a code. minmax: the smallest range that covers all. percentile: the smallest that covers the "
        "middle 99.9 %% of those that are not zero. mse: the one of least squared error, weighed by significance. Default mse")
    group.add_argument(
        "--adc_per", default="reference", choices=adc.PER, help="which slices of a layer share a calibrated range. reference: "
        "those whose reference column is filled alike, all of them with DoReFa, all but the highest with SAWB and 1-bit "
        "cells. layer: all. slice: each has its own. Default reference")
    group.add_argument(
        "--adc_correct", default="channel", choices=("channel", "none"), help="channel: each output channel is scaled and "
        "shifted digitally, so that its mean and deviation on training images are those without ADC; batch norm takes both "
        "in. none: ranges alone, which lose more, most of all with few bits. Default channel")


def combinations(args, w_bits, a_bits, adc_ranges):
    """[(spec, map), ...] for every combination of the flags' values, in the order of a table."""
    flags = ("map", "mapping", "reference", "dac_bits", "subArray", "cellBit", "adc_prec")
    values = [value if isinstance(value, list) else [value] for value in (getattr(args, flag) for flag in flags)]
    try:
        return [(CrossbarSpec(w_bits, a_bits, cell, bits, rows, mapping, reference, dac, adc_range), map)
                for map, mapping, reference, dac, rows, cell, adc_range, bits in itertools.product(
                    *values[:-1], adc_ranges, values[-1])]
    except ValueError as error:
        message = str(error)
        for flag, field in FIELDS.items():
            if message.startswith(field):
                message = f"--{flag}" + message.removeprefix(field)
        message = message.replace("(w_bits)", "(the weight bits)").replace("(a_bits)", "(the activation bits)")
        raise UserError(message) from None
