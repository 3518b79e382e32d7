"""`eval.py --save_cells`: what the cells of each chip hold, beside the bit-planes."""

from pathlib import Path

from torch import nn

from models import quant

from .evaluation import Setting


def save_cells(network: nn.Module, setting: Setting, folder: Path) -> int:
    """Write what the cells of each chip of a setting hold, on which the network was measured last; see `quant.write_cells`. Returns:
    the number of files that were not there."""
    chips, spec, written = setting.chips, setting.spec, 0
    facts = {"chip": chips.text()} | ({"rows": spec.rows, "mapping": spec.mapping} if chips.wires else {})  # arrays matter for wires
    label = chips.label() + ("_digital" if spec.reference == "digital" else "") + ("_pair" if spec.weights == "pair" else "")
    for seed in chips.seeds:
        if not quant.cell_files.cells_are_written(folder, network, label, seed, facts):
            try:
                chips.program(network, seed)  # of all layers, also those that a setting leaves out
                written += quant.write_cells(folder, network, label, seed, facts)
            finally:
                quant.program(network, None)
    return written
