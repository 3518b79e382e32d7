"""The last chips that a network was on (`LastChips`): who measures one of them on more images need not program and correct it again."""

from collections.abc import Hashable

from torch import nn

from ..arrays.cells import Chip
from ..layers.crossbar import crossbar_layers


class LastChips:
    """Chips of one network, with the correction of their outputs. Args: most_bytes, of their cells; older ones are let go."""

    def __init__(self, most_bytes: int = 0) -> None:
        self.most_bytes = most_bytes
        self._kept = {}  # (chip, gain, offset) of each layer

    def keep(self, network: nn.Module, key: Hashable) -> None:
        """Remember the chip that the network is on. Args: key, all that it follows from, but for the network."""
        if not self.most_bytes:
            return
        key = _where(network, key)
        self._kept.pop(key, None)
        self._kept[key] = [(layer.chip, layer.adc_gain.clone(), layer.adc_offset.clone()) for _, layer in crossbar_layers(network)]
        while sum(_bytes(chip) for kept in self._kept.values() for chip, *_ in kept) > self.most_bytes:
            del self._kept[next(iter(self._kept))]

    def give(self, network: nn.Module, key: Hashable) -> bool:
        """Put the network on a chip that is remembered; whether there is one."""
        kept = self._kept.get(_where(network, key))
        for (_, layer), (chip, *_) in zip(crossbar_layers(network), kept or ()):
            layer.chip = chip
        return kept is not None

    def correct(self, network: nn.Module, key: Hashable) -> bool:
        """Correct the outputs of the network as those of that chip were; whether there is one."""
        kept = self._kept.get(_where(network, key))
        for (_, layer), (_, *correction) in zip(crossbar_layers(network), kept or ()):
            layer.set_correction(*correction)
        return kept is not None


def _bytes(chip: Chip | None) -> int:
    if chip is None:
        return 0
    cells, both = (chip.cells, chip.nominal), chip.readout and chip.readout.both
    return sum(each.values.nbytes for each in cells if each is not None) + (0 if both is None else both.nbytes)


def _where(network, key):
    """The key of a chip, whose tensors lie where those of the network do."""
    return key, next(network.parameters()).device
