"""Noise on the weights in place of cells (`WeightNoise`): chips of a setting without a device.

    Setting(CrossbarSpec(w_bits=8, a_bits=8, adc_range="ideal"), chips=WeightNoise(0.02, chips=10))
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..arrays.spec import CrossbarSpec, check, hardware, number
from ..network.weight_noise import NOISE, PCM, add_weight_noise, check_noisy
from .chips import Draws


@dataclass(frozen=True)
class WeightNoise(Draws):
    """Noise on the weights themselves, drawn once for each chip: `network.weight_noise` has its laws and their source.

    Attributes: weight_noise, a share of the largest weight of each output channel, or "pcm"; chips, how many; chip_seed, the seed of the
        first one.
    Raises: ValueError for impossible values.
    """

    weight_noise: float | str = number(
        None, "Gaussian noise on the weights themselves, without cells and ADCs: its standard deviation, as a share of the largest weight "
        f"of the output channel. It is drawn once for a chip. {PCM}: the published noise of phase-change memory, which depends on the "
        "weight. Default: none", NOISE, of="cells")
    device: ClassVar[None] = None
    name: ClassVar[None] = None
    wires: ClassVar[None] = None

    def __post_init__(self) -> None:
        check(self)
        if self.weight_noise is None:
            raise ValueError(f"weight_noise is None; allowed is {NOISE.text}")

    def on_no_cells(self, spec: CrossbarSpec) -> CrossbarSpec:
        """The hardware of a setting: each weight in one piece, on no cells. Raises: ValueError where it says more than bits of weights and
        inputs, and that there is no ADC."""
        bare = CrossbarSpec(spec.w_bits, spec.a_bits, cell_bits=spec.w_bits, adc_bits=1, adc_range="ideal")
        for name in hardware("cells", "arrays", "inputs", "range"):
            value, usual = getattr(spec, name), getattr(bare, name)
            if value not in (usual, CrossbarSpec.cell_bits if name == "cell_bits" else usual):
                raise ValueError(f"{name} is {value!r} with weight_noise, which is on weights without cells and ADCs; allowed is {usual!r}")
        return bare

    def check(self, layer: nn.Module) -> None:
        """Refuse a layer whose weights lie on cells. Raises: ValueError."""
        check_noisy(layer)

    def program(self, network: nn.Module, seed: int, progress: bool = False) -> None:
        """Draw the chip of this seed, for all layers on crossbars. Args: progress, of none: it takes no time. Raises: see
        `add_weight_noise`."""
        add_weight_noise(network, self.weight_noise, seed)

    def __str__(self) -> str:
        return self.text()

    def text(self, without: str | None = None) -> str:
        """As rows of a table name it, without how many there are. Args: without, a flag that the text leaves out."""
        if self.weight_noise == PCM:
            return "PCM noise on weights (no cells)"
        share = "" if without == "weight_noise" else f"of {100 * self.weight_noise:g} % "
        return f"noise {share}on weights (no cells)"

    def value(self, name: str) -> Any:
        """What a flag means here; None for those of cells."""
        return getattr(self, name, None)
