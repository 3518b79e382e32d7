"""Quantization and crossbar simulation: what users of the package call."""

from .bitplanes import PlaneStore, compose, decompose, read_planes
from .crossbar import (Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, crossbar_layers, set_engine,
                       set_spec)
from .layers import Qconv2d, QLinear
from .mapping import CrossbarSpec, MappedLayer
from .quantizers import AQ, WQ

__all__ = ["AQ", "WQ", "Qconv2d", "QLinear", "CrossbarSpec", "MappedLayer", "Qconv2dDoreFa", "QLinearDoreFa",
           "calibrate", "collect_histograms", "crossbar_layers", "set_engine", "set_spec", "decompose", "compose",
           "PlaneStore", "read_planes"]
