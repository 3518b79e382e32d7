"""A network on the hardware of a setting: its layers' specs, their cells, the engines that will run them.

    place(network, setting)             # ideal cells, no ranges yet where the hardware is another
    program(network, setting, seed)     # a chip of it
"""

from collections.abc import Mapping

import torch
from torch import nn

from .. import engines
from ..arrays.cells import Chip
from ..arrays.spec import CrossbarSpec
from ..layers.crossbar import Qconv2dDoreFa, crossbar_layers
from ..network.program import off_currents, program as program_cells
from .setting import Setting, fits

Stored = Mapping[str, torch.Tensor | Chip]  # {layer: weight codes that its cells hold, or the cells of a chip}


def place(network: nn.Module, setting: Setting, cells: Stored | None = None) -> None:
    """Put the layers of a network on the hardware of a setting, with these `cells` (see `measure`), as yet ideal ones; those that
    the setting leaves out compute without an ADC. A layer that is on this hardware already keeps its ranges."""
    use_cells(network, cells)
    put(network, setting, cells)


def put(network: nn.Module, setting: Setting, cells: Stored | None = None) -> None:
    """As `place`, with the weight codes that the cells hold already.

    Raises: ValueError for a pattern of `per_layer` that fits no layer with an ADC, and hardware that cannot be.
    """
    program_cells(network, None)
    names = [name for name, layer in crossbar_layers(network) if _on_crossbars(layer, setting)]
    for pattern, _ in setting.per_layer:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"per_layer {pattern}: no layer on crossbars is called so; there are {', '.join(names)}")
    if not names:
        raise ValueError(f"crossbar_layers is {setting.crossbar_layers!r}, which is for networks of this project, and leaves no layer of "
                         "this one on crossbars; name layers that stay digital by convert(..., skip=[...])")
    for name, layer in crossbar_layers(network):
        spec = setting.spec_of(name)
        if not _on_crossbars(layer, setting):
            layer.set_codes(None)
            spec = setting.spec
            alike = {"cell_bits": spec.cell_bits, "weights": spec.weights} if setting.chips else {}  # for devices that have these alone
            spec = CrossbarSpec(spec.w_bits, spec.a_bits, adc_range="ideal", **alike)
        if layer.spec != layer.fitted(spec):
            layer.set_spec(spec)
        if is_chip(cells) and _on_crossbars(layer, setting):
            layer.set_cells(cells[name].cells, cells[name].nominal, None)  # which refuses those of another layer
            layer.chip = cells[name]


def program(network: nn.Module, setting: Setting, seed: int, progress: bool = False) -> None:
    """Program a chip of a setting that a network is placed on. Layers that the setting leaves out keep ideal cells."""
    setting.chips.program(network, seed, progress)
    for _, layer in crossbar_layers(network):
        if not _on_crossbars(layer, setting):
            layer.set_cells(None)


def check_chips(network: nn.Module, setting: Setting) -> None:
    """Refuse a device whose cells cannot be those of a setting that a network is placed on, without drawing any.

    Raises: ValueError.
    """
    for _, layer in crossbar_layers(network):
        setting.chips.check(layer)
        cells, nominal = layer.ideal_cells(), None
        if layer.spec.reference == "digital":  # which sees the off-current
            cells = nominal = cells.raised(off_currents(layer, setting.chips.drawn))
        layer.set_cells(cells, nominal, None)  # engines are chosen as for the chip's


def use_cells(network: nn.Module, cells: Stored | None) -> None:
    """Let the cells of a network be programmed to these codes, or to those of its weights."""
    for name, layer in crossbar_layers(network):
        if cells and name not in cells:
            raise ValueError(f"no cells are given for layer {name}")
        layer.set_codes(cells[name] if cells and not is_chip(cells) else None)


def is_chip(cells: Stored | None) -> bool:
    """Whether these are the cells of a chip, not weight codes."""
    return bool(cells) and isinstance(next(iter(cells.values())), Chip)


def on_adcs(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a network that its setting has put on crossbars; all of them where no layer has an ADC."""
    layers = crossbar_layers(network)
    return [(name, layer) for name, layer in layers if layer.spec.adc_range != "ideal"] or layers


def _on_crossbars(layer: nn.Module, setting: Setting) -> bool:
    return setting.crossbar_layers == "all" or isinstance(layer, Qconv2dDoreFa)


def engines_of(network: nn.Module, engine: str = "auto") -> str:
    """Names of the engines that run the layers of a network that is placed on a setting, joined by "+"; costs nothing.

    Raises: ValueError for an engine that cannot run here.
    """
    chosen = (engines.choose(engine, layer.mapped("ideal"), layer.weight.device)[0] for _, layer in on_adcs(network))
    return "+".join(dict.fromkeys(map(engines.name_of, chosen)))
