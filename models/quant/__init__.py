"""Quantization and crossbar simulation: what users of the package call."""

from .bitplanes import PlaneStore, compose, decompose, read_planes, sha256
from .crossbar import (ADC_BUFFERS, CORRECTION_IMAGES, Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, correct,
                       crossbar_layers, set_engine, set_spec, without_adc)
from .layers import Qconv2d, QLinear
from .mapping import CrossbarSpec, MappedLayer
from .quantizers import AQ, SAWB, WQ

__all__ = ["AQ", "WQ", "SAWB", "Qconv2d", "QLinear", "CrossbarSpec", "MappedLayer", "Qconv2dDoreFa", "QLinearDoreFa",
           "ADC_BUFFERS", "CORRECTION_IMAGES", "calibrate", "collect_histograms", "correct", "crossbar_layers",
           "set_engine", "set_spec", "without_adc", "decompose", "compose", "PlaneStore", "read_planes", "sha256"]
