"""What all networks share: the options that say how they are quantized and mapped, and the layers that these make."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from models.quant import CrossbarSpec, Qconv2d, Qconv2dDoreFa, QLinear, QLinearDoreFa
from models.quant.layers.quantizers import OFF
from models.quant.measuring.setting import CROSSBAR_LAYERS


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Attributes:
        wbit, abit: weight and activation bits, 1..8, 32 for off.
        alpha_init: first PACT clipping level of every layer, in units of its input.
        wq: weight quantizer, "dorefa" or "sawb".
        quantize_image: round the image to the activation grid.
        spec: a `CrossbarSpec` puts layers on crossbars; None computes them as they are trained, without arrays.
        crossbar_layers: with `spec`, "all" puts every layer but the first on crossbars, "conv" the convolutions only.
    Raises: ValueError for values that are not allowed, or a spec of other bits.
    """

    wbit: int = 4
    abit: int = 4
    alpha_init: float = 10.0
    wq: str = "dorefa"
    quantize_image: bool = False
    spec: CrossbarSpec | None = None
    crossbar_layers: str = "all"

    def __post_init__(self) -> None:
        if self.crossbar_layers not in CROSSBAR_LAYERS:
            raise ValueError(f"crossbar_layers is {self.crossbar_layers!r}; allowed are {', '.join(CROSSBAR_LAYERS)}")
        if self.spec is not None and (self.spec.w_bits, self.spec.a_bits) != (self.wbit, self.abit):
            raise ValueError(f"the spec has {self.spec.w_bits}-bit weights and {self.spec.a_bits}-bit activations, "
                             f"the network wbit={self.wbit}, abit={self.abit}; make them equal")

    @property
    def spread_levels(self) -> bool:
        """Whether weights reach +-1 whatever they are, as DoReFa's levels do: logits would be far too large."""
        return self.wbit != OFF and self.wq == "dorefa"

    def image_conv(self, out_channels: int) -> nn.Module:
        """The first layer, 3x3, which sees the picture: it is no PACT activation, and the layer is not on crossbars."""
        return Qconv2d(3, out_channels, 3, padding=1, bias=False, image=True, quantize_image=self.quantize_image, **self._bits)

    def conv(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        """A convolution without bias that keeps the image's size, but for its stride."""
        shape: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": False}
        if self.spec is not None:
            return Qconv2dDoreFa(in_channels, out_channels, kernel, spec=self.spec, **shape, **self._shared)
        return Qconv2d(in_channels, out_channels, kernel, **shape, **self._bits)

    def linear(self, in_features: int, out_features: int, out_scale: float = 1.0) -> nn.Module:
        """A linear layer, its result times `out_scale`."""
        if self.spec is not None and self.crossbar_layers == "all":
            return QLinearDoreFa(in_features, out_features, spec=self.spec, out_scale=out_scale, **self._shared)
        return QLinear(in_features, out_features, out_scale=out_scale, **self._bits)

    @property
    def _shared(self) -> dict[str, Any]:
        return {"alpha_init": self.alpha_init, "wq": self.wq}

    @property
    def _bits(self) -> dict[str, Any]:
        return {"wbit": self.wbit, "abit": self.abit, **self._shared}


def layers_of(network: str, options: Mapping[str, Any]) -> Layers:
    """`Layers(**options)`. Raises: ValueError for an unknown option of a `network`, or values that are not allowed."""
    known = [field.name for field in fields(Layers)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"a {network} has no option {', '.join(unknown)}; known are config, num_classes, {', '.join(known)}")
    return Layers(**options)


def on_crossbars(network: type[nn.Module], config: str = "", wbit: int = 4, abit: int = 4, spec: CrossbarSpec | None = None,
                 **options: Any) -> nn.Module:
    """A `network` of a configuration on crossbars; without a `spec`, on the default hardware for its bits."""
    return network(config, wbit=wbit, abit=abit, spec=spec or CrossbarSpec(w_bits=wbit, a_bits=abit), **options)
