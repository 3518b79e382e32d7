"""Energy and area of an ADC by a fit to published converters, as Accelergy's plug-in has it: `energy`, `area`.

    FOM  = min(213.7807 - 2.8719 ln f, 128.3068 + 3.2205 B)                                       dB, f in samples/s
    SNDR = 6.0206 B + 1.761                                                                       dB
    E    = exp(26.0496 + 1.88004 ln nm - 2.82913 ln B - 1.47020) / (2 10^((FOM - SNDR) / 10))     pJ a conversion
    A    = exp(0.99328 ln nm + 0.18072 ln f + 0.29912 ln E + 1.34619)                             um2

Sources: B. Murmann, ADC performance survey; Andrulis, Chen, Lee, Emer, Sze, "Modeling analog-digital-converter energy and area for
compute-in-memory accelerator design", arXiv 2404.06553. From 4 bits on: few converters of fewer bits are published.
"""

import math


def energy(bits: int, node_nm: float, rate: float) -> float:
    """Joules of one conversion. Args: rate, samples/s."""
    fom = min(213.7807 - 2.8719 * math.log(rate), 128.3068 + 3.2205 * bits)
    sndr = 6.0206 * bits + 1.761
    size = math.exp(26.0496 + 1.88004 * math.log(node_nm) - 2.82913 * math.log(bits) - 1.47020)
    return 1e-12 * size / (2 * 10 ** ((fom - sndr) / 10))


def area(bits: int, node_nm: float, rate: float) -> float:
    """Square metres of the converter."""
    picojoules = 1e12 * energy(bits, node_nm, rate)
    return 1e-12 * math.exp(0.99328 * math.log(node_nm) + 0.18072 * math.log(rate) + 0.29912 * math.log(picojoules) + 1.34619)
