"""What the log says of a network before it is measured."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from models.quant import CrossbarSpec, Qconv2dDoreFa, crossbar_layers
from models.quant.arrays.spec import MAPPINGS
from models.quant.measuring.setting import Setting
from models.quant.network.filling import filling, together

from ..settings.eval_flags import EvalSettings
from ..settings.limits import spans_of


def on_off(of: EvalSettings) -> list[str]:
    """A line where an on/off ratio is asked for and an analog reference, or pairs, take the off-current out."""
    named = "on_off" in {*of.hardware, *(span.flag for span in spans_of(of))}
    analog = named and CrossbarSpec.reference in of.hardware.get("reference", [CrossbarSpec.reference])
    in_rows = any(getattr(setting.chips, "on_off", None) and setting.spec.reference == CrossbarSpec.reference for setting in of.settings)
    return ["on/off ratio: an analog reference and pairs take the off-current out. With them ideal cells give the same at any ratio, and "
            "errors in uS grow as the range of the levels shrinks; --reference digital has the off-current in its reads"
            ] if in_rows or analog and not of.settings else []


def normalization(mean: Sequence[float], deviation: Sequence[float], transform: Any = None) -> str:
    """What is done to the numbers of an image. Args: transform, what a network of others brings, which does it then."""
    if transform is not None:
        of = next((each for each in (transform, *getattr(transform, "transforms", ())) if hasattr(each, "mean") and hasattr(each, "std")),
                  None)
        if of is None:
            return "normalization: that of the network's own transform"
        mean, deviation = of.mean, of.std
    numbers = (" ".join(f"{float(each):.3g}" for each in np.ravel(values)) for values in (mean, deviation))
    return "normalization of the images' channels: mean {}, deviation {}".format(*numbers)


def fillings(network: nn.Module, settings: Iterable[Setting]) -> list[str]:
    """How far each setting fills its row blocks, and how many row blocks the other mapping would need: a line for each way."""
    found: dict[tuple, list[nn.Module]] = {}
    layers = crossbar_layers(network)
    for setting in settings:
        if setting.without_cells:
            continue
        own: dict[tuple[str, int], list[nn.Module]] = {}
        for name, layer in layers:
            if setting.crossbar_layers == "all" or isinstance(layer, Qconv2dDoreFa):
                spec = setting.spec_of(name)
                own.setdefault((spec.mapping, spec.rows), []).append(layer)
        found |= {(*way, *map(id, some)): some for way, some in own.items()}
    several = len({rows for _, rows, *_ in found}) > 1
    lines = []
    for (mapping, rows, *_), some in found.items():
        other = next(each for each in MAPPINGS if each != mapping)
        (blocks, share), (others, _) = (together(filling(layer, each, rows) for layer in some) for each in (mapping, other))
        way = mapping + (f", {rows} rows" if several else "")
        way += f", {len(some)} layer{'s' if len(some) > 1 else ''}" if len(some) < len(layers) else ""
        need = f"{others:,} row blocks in place of {blocks:,}" if others != blocks else f"as many row blocks, {blocks:,}"
        lines.append(f"{way}: {100 * share:.0f} % of the rows in use; {other} would need {need}")
    return lines


def conversion(network: nn.Module) -> str:
    """What a conversion chose: bits, how inputs drive word lines, and which inputs are not clipped."""
    layers = crossbar_layers(network)
    bits = Counter((layer.weight_quant.wbit, layer.act_quant.abit) for _, layer in layers)
    inputs = Counter(layer.encoding if layer.act_quant.signed else "unsigned" for _, layer in layers)
    ranges = sorted(((name, *(code * float(layer.act_quant.step) for code in layer.act_quant.window)) for name, layer in layers),
                    key=lambda each: each[2] - each[1])
    ends = [f"{low:.3g}..{high:.3g} (layer {name.removesuffix('.crossbar')})" for name, low, high in (ranges[0], ranges[-1])]
    of_bits = ", ".join(f"{w} and {a}{_count(count, layers)}" for (w, a), count in bits.most_common())
    of_inputs = ", ".join(f"{way}{_count(count, layers)}" for way, count in inputs.most_common())
    return f"conversion chose: bits of weights and inputs {of_bits}; inputs {of_inputs}; ranges of inputs from {ends[0]} to {ends[1]}"


def _count(count: int, layers: Sequence[Any]) -> str:
    return f" in {count} of {len(layers)} layers" if count < len(layers) else ""
