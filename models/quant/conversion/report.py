"""What became of a network that was put on crossbars: what is mapped, what is digital and why, what it costs in accuracy."""

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.batches import Batch, called, copied, first_tensor, output_of
from ..network.diagnostics import decibels
from ..network.filling import filling, together
from ..network.modes import hooked, without_adc


@dataclass
class ConversionReport:
    """Printed, a page for people; `as_dict()` for programs.

    Attributes: digital, `{name: reason}` of products with weights that stay digital; between, multiplications of two activations in the
        first batch; unused, matrices that entered no product (looked up, added, or not used at all); notes; images, of the
        first batch; layers, a dict for each layer on crossbars: name, weights, multiplications (of the first batch), row_blocks,
        fill (mean share of their rows that is used), way (of its reads through the engine, see `CrossbarLayer.way`), quantization_db and
        hardware_db (SQNR of the layer's output against the float product of the same input, quantized and then also through its ADC; None
        where nothing is lost); same_top1 and sqnr_db, of the network's output against the
        float network's: "quantized", and "hardware", which is the same where no layer `has_adcs` (same_top1 is empty where the output has
        one class); options, of the conversion.
    """

    digital: dict[str, str]
    between: int
    unused: list[str]
    notes: list[str] = field(default_factory=list)
    images: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    digital_multiplications: int = 0
    same_top1: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float | None] = field(default_factory=dict)
    has_adcs: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def measure(self, net: nn.Module, bound: dict, images: Batch, wanted: Any, shown: Batch, unrounded: Mapping[nn.Module, Tensor]) -> None:
        """Fill in what the first batch of images shows. Args: wanted, the float network's answers; shown, some of the images, on which the
        layers are compared; unrounded, the float kernels of layers whose weights were rounded."""
        self.has_adcs = any(layer.quantized and layer.spec.adc_range != "ideal" for layer, _ in bound.values())
        layers = [layer for layer, _ in bound.values() if layer.quantized]
        outputs, errors, ways = {}, {}, {}
        with without_adc(net):
            outputs["quantized"], errors["quantization_db"] = output_of(net, copied(images)), _against_float(net, layers, shown, unrounded)
        with hooked(layer.register_forward_hook(
                        lambda layer, inputs, _: ways.setdefault(layer, {"way": layer.way(inputs[0])}) and None) for layer in layers):
            outputs["hardware"] = output_of(net, copied(images))
        errors["hardware_db"] = _against_float(net, layers, shown, unrounded) if self.has_adcs else errors["quantization_db"]
        for name, (layer, product) in bound.items():
            entry = {"name": name, "weights": product.weight.numel(), "multiplications": product.multiplications}
            if layer.quantized:
                row_blocks, fill = filling(layer, layer.spec.mapping, layer.spec.rows)
                entry |= {"bits": [layer.weight_quant.wbit, layer.act_quant.abit],
                          "inputs": "unsigned" if not layer.act_quant.signed else layer.encoding, "row_blocks": row_blocks, "fill": fill}
                entry |= {key: of_layers[layer] for key, of_layers in errors.items()} | ways.get(layer, {})
            self.layers.append(entry)
        wanted = first_tensor(wanted).double()
        of_pixels = wanted.dim() == 4 or wanted.dim() > 2 and layers and layers[-1].channel_dim < -1
        classes = 1 if of_pixels else -1
        for name, y in outputs.items():
            if wanted.dim() > 1 and wanted.shape[classes] > 1:
                self.same_top1[name] = (y.argmax(classes) == wanted.argmax(classes)).double().mean().item()
            self.sqnr_db[name] = decibels(wanted.square().sum().item(), (y.double() - wanted).square().sum().item())

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def share(self) -> float:
        """Share of all multiplications that are on crossbars."""
        mapped = sum(layer["multiplications"] for layer in self.layers)
        return mapped / max(1, mapped + self.between + self.digital_multiplications)

    def __str__(self) -> str:
        return self.text()

    def text(self, row_blocks: bool = True, answers: bool = True, classes: bool = True) -> str:
        """The page. Args: row_blocks, whether it says how many there are; answers, what the conversion does to those of the network;
        classes, whether these are some."""
        weights = sum(layer["weights"] for layer in self.layers)
        lines = [f"{len(self.layers)} layers with {weights:,} weights on crossbars: {100 * self.share:.1f} % of the multiplications"]
        if self.between:
            lines.append(f"digital: {self.between / self.images:,.0f} multiplications of two activations an example")
        lines += [f"digital: {name}, {reason}" for name, reason in self.digital.items()]
        if self.unused:
            lines.append("in no product of matrices (looked up, added, multiplied element by element, or not used): "
                         + ", ".join(self.unused[:6]) + (f" and {len(self.unused) - 6} more" if len(self.unused) > 6 else ""))
        lines += self.notes
        quantized = "fill" in self.layers[0]
        if quantized and row_blocks:
            count, fill = together((layer["row_blocks"], layer["fill"]) for layer in self.layers)
            lines.append(f"{count:,} row blocks, {100 * fill:.0f} % of their rows in use")
        return "\n".join(lines + (self._answers(classes) if quantized and answers else []))

    def _answers(self, classes):
        same = {name: f"{100 * share:.1f} % of {self.images} examples classified as by the float network, "
                for name, share in self.same_top1.items() if classes}
        lines = [f"{text}: {same.get(name, '')}SQNR of the output {_db(self.sqnr_db[name])}"
                 for name, text in (("quantized", "quantized"), *([("hardware", "with ADCs")] if self.has_adcs else []))]
        worst = min(self.layers, key=lambda layer: math.inf if layer["hardware_db"] is None else layer["hardware_db"])
        lines.append(f"worst layer: {worst['name']}, {_db(worst['quantization_db'])} quantized"
                     + (f", {_db(worst['hardware_db'])} with its ADC" if self.has_adcs else ""))
        if ways := Counter(layer["way"] for layer in self.layers if "way" in layer):
            lines.append("computed by " + ", ".join(f"{way} ({count})" for way, count in ways.most_common()))
        return lines


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _against_float(net, layers, images, unrounded):
    """`{layer: SQNR in dB of its output against the float product of the same input}`."""
    if not layers:  # nothing is quantized
        return {}
    sums = {layer: [0.0, 0.0] for layer in layers}
    rounded = {layer: layer.weight.clone() for layer in unrounded}

    def turn(layer, quantized):
        layer.quantized = quantized
        if layer in unrounded:
            layer.set_weight((rounded if quantized else unrounded)[layer])

    def see(layer, inputs, y):
        if layer.quantized:  # the call below
            return
        turn(layer, True)
        error = layer(*inputs).double() - y.double()
        turn(layer, False)
        sums[layer][0] += y.double().square().sum().item()
        sums[layer][1] += error.square().sum().item()

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(turn, layer, True)
            turn(layer, False)
            stack.callback(layer.register_forward_hook(see).remove)
        called(net, copied(images))
    return {layer: decibels(*of_layer) for layer, of_layer in sums.items()}
