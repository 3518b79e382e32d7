"""Cells in files: `eval.py --save_cells` writes those of each chip beside the bit-planes, `--planes` takes them, or bit-planes."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from models import quant
from models.quant.arrays.spec import hardware
from models.quant.measuring.placing import Stored, place
from models.quant.measuring.setting import Setting

from .keys import digest, of_code, parts_of

log = logging.getLogger(__name__)


def stored_cells(folder: str, network: nn.Module, settings: Sequence[Setting], w_bits: int) -> Stored:
    """What `eval.py --planes FOLDER` has for the cells of each layer: weight codes from edited bit-planes, or a chip's cells.

    Raises: ValueError for what does not fit the network or a setting, or for cells of several chips.
    """
    chips = quant.chips_in(folder)
    if Path(folder, "bit_levels0_ideal.pt").exists():
        if chips:
            log.warning("%s holds bit-planes, which are taken, and the cells of chips too, which are not: copy those of one chip, with "
                        "manifest.json, into a folder of their own", folder)
        chips = []
    if len(chips) > 1:
        raise ValueError(f"{folder} holds the cells of {len(chips)} chips; keep those of one: " + ", ".join(
            f"{device} chip{seed}" for device, seed in chips))
    if chips:
        return _of_a_chip(folder, network, settings, *chips[0])
    if any(setting.spec.weights == "pair" for setting in settings):
        raise ValueError(f"{folder} holds no cells of a chip; weights 'pair' needs them, because bit-planes hold the codes of offset cells")
    layers = [(name, layer.w_codes().shape) for name, layer in quant.crossbar_layers(network)]
    codes = quant.read_planes(folder, layers, w_bits, settings[0].spec.cell_bits)
    return {name: each for (name, _), each in zip(layers, codes)}


def _of_a_chip(folder, network, settings, device, seed):
    if any(setting.chips for setting in settings):
        raise ValueError(f"{folder} holds the cells of a chip, and --device draws other cells: give one of them")
    kinds = {(*(getattr(each.spec, name) for name in hardware("cells", "arrays")), each.per_layer): each for each in settings}
    for setting in kinds.values():  # the cells must fit the hardware of each
        place(network, replace(setting, crossbar_layers="all"))
        found = quant.load_cells(folder, network, device, seed)
    return found


def save_cells(network: nn.Module, setting: Setting, folder: Path) -> int:
    """Write what the cells of each chip of a setting hold, on which all layers of the network are placed; see `quant.write_cells`.
    Returns: the number of files that were not there."""
    chips, spec, written = setting.chips, setting.spec, 0
    label = chips.label() + ("_digital" if spec.reference == "digital" else "") + ("_pair" if spec.weights == "pair" else "")
    facts = {"chip": chips.label(), "data": digest(replace(chips.drawn, read_noise=None)), "code": of_code(*parts_of(setting))}
    if chips.wires:  # for which arrays matter
        of_arrays = {name: getattr(spec, name) for name in hardware("arrays")}
        facts |= of_arrays | {"access": chips.access}
        label += "".join(f"_{name}{value}" for name, value in of_arrays.items() if value != getattr(quant.CrossbarSpec, name))
    for seed in chips.seeds:
        path = quant.network.cell_files.cell_path(folder, 0, label, seed)
        if quant.network.cell_files.manifest_or_none(folder).get(path.name, facts).get("data") not in (None, facts["data"]):
            log.warning("%s and the like held cells of another device called %s, and hold those of this one now", path, chips.name)
        if not quant.network.cell_files.cells_are_written(folder, network, label, seed, facts):
            try:
                chips.program(network, seed)
                written += quant.write_cells(folder, network, label, seed, facts)
            finally:
                quant.program(network, None)
    return written
