"""Quantization and crossbar simulation: what users of the package call."""

from .version import __version__  # noqa: F401 - first: it refuses a second copy of all below

from .arrays.cells import Cells, Chip
from .arrays.mapping import MappedLayer
from .arrays.readout import Readout, image_numbers
from .arrays.spec import CrossbarSpec, Geometry
from .conversion import Training, convert, recalibrate, recalibrate_every, train_through
from .devices import Device, Wires
from .engines import set_engine
from .layers.crossbar import Qconv2dDoreFa, QLinearDoreFa, crossbar_layers, give_ranges, ranges_of, set_spec
from .layers.layers import Qconv2d, QLinear
from .layers.on_arrays import ADC_BUFFERS
from .layers.quantizers import AQ, SAWB, WQ
from .measuring.chips import Chips
from .measuring.measure import Cache, Record, measure, measure_float
from .measuring.metrics import Metric, cross_entropy, perplexity, signal_to_error, top5
from .measuring.setting import Setting
from .measuring.task import Task
from .measuring.weight_noise import WeightNoise
from .network.calibration import CORRECTION_IMAGES, Calibration, calibrate, collect_histograms, correct, error_weights
from .network.cell_files import chips_in, load_cells, read_cells, write_cells
from .network.modes import without_adc
from .network.program import MOST_LEVELS, check_chip, program
from .network.weight_noise import add_weight_noise
from .saving import load, save
from .storage.bitplanes import PlaneStore, compose, decompose, read_planes, sha256
from .storage.effective import keep_effective_cells

__all__ = ["AQ", "WQ", "SAWB", "Qconv2d", "QLinear", "CrossbarSpec", "Calibration", "Geometry", "MappedLayer", "Qconv2dDoreFa",
           "QLinearDoreFa", "ADC_BUFFERS", "CORRECTION_IMAGES", "calibrate", "collect_histograms", "correct", "error_weights",
           "crossbar_layers", "ranges_of", "give_ranges", "set_engine", "set_spec", "without_adc", "decompose", "compose", "PlaneStore",
           "read_planes", "sha256", "Cells", "Chip", "Device", "Wires", "Readout", "check_chip", "program", "image_numbers",
           "chips_in", "keep_effective_cells", "load_cells", "read_cells", "write_cells", "convert", "MOST_LEVELS", "Cache",
           "Chips", "Record", "Setting", "WeightNoise", "add_weight_noise", "load", "measure", "measure_float", "Metric",
           "cross_entropy", "perplexity", "signal_to_error", "top5", "Task", "save",
           "Training", "recalibrate", "recalibrate_every", "train_through"]
