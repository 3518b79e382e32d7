"""Devices: what the cells of a crossbar do, measured or from literature, and what its wires do (`wires`)."""

from .device import Device
from .joint import raw_folder
from .laws import Decades, Law, Polynomial, PowerLaw, Relaxation
from .listing import describe
from .presets import presets
from .tables import Cells, Samples, Series, Table
from .times import parse_time
from .wires import ROW_OHM, WIRE_OHM, Wires

__all__ = ["Device", "presets", "describe", "parse_time", "Law", "Polynomial", "Relaxation", "PowerLaw", "Decades", "Table", "Series",
           "Samples", "Cells", "Wires", "WIRE_OHM", "ROW_OHM", "raw_folder"]
