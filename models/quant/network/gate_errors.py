"""How far the curves of gate access are off the exact ladders, on reads that a network makes."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays.cells import Cells
from ..devices import Device
from ..devices.wires import gate_exact
from ..engines.reference import between_curves, input_rows, through_curve
from ..layers.crossbar import CrossbarLayer, crossbar_layers
from .diagnostics import ideal_pass

IMAGES = 2  # that are looked at, and of each layer's reads of them
PIXELS, ARRAYS, COLUMNS = 64, 8, 128  # at most so many, of all digits and slices of the first group


@torch.no_grad()
def gate_errors(model: nn.Module, images: Tensor, device: Device, straight: Mapping[str, Cells],
                wire_ohm: float, both: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, tuple[float, float]]:
    """Errors of the read values v of a chip with gate access, `sqrt(sum 4^(z + c k) (v - exact)^2 / sum 4^(z + c k) exact^2)` over the
    network's own reads of digits z and slices k, which count 2^(z + c k) in the output: `exact` by `devices.wires.gate_exact` of the
    column and of its reference column, or of both lines of a pair, the inputs of each layer those of software.

    Args:
        images: network inputs, such as those of a calibration.
        device: of the chip. straight: what the chip's cells hold without wires, by layer (`program` without resistance).
        wire_ohm: ohms from cell to cell. both: of pairs, `Readout.both` without wires (`program` with gate access).
    Returns: for each layer on a chip (error of the chip's v, error of v if wires had no resistance).
    """
    layers = [(name, layer) for name, layer in crossbar_layers(model) if layer.chip and layer.chip.readout and layer.chip.readout.curve]
    inputs, _ = ideal_pass(model, layers, images[:IMAGES])
    return {name: _of_layer(layer, torch.cat(layer.parts(inputs[name])), device, straight[name], wire_ohm, both.get(name))
            for name, layer in layers}


def _of_layer(layer: CrossbarLayer, a_codes: Tensor, device: Device, straight: Cells, wire_ohm: float,
              both: Tensor | None) -> tuple[float, float]:
    mapped = layer.mapped("ideal")
    referred, digital = both is None and mapped.spec.reference == "analog", layer.spec.reference == "digital"
    rows, scale = input_rows(mapped, a_codes)[0].cpu(), 2**straight.fraction_bits
    drawn = np.random.Generator(np.random.PCG64(0))  # the same reads each time
    pixels = np.sort(drawn.permutation(len(rows))[:PIXELS])
    arrays = [mapped.arrays[i] for i in np.sort(drawn.permutation(len(mapped.arrays))[:ARRAYS])]
    totals = np.zeros(3)  # of the curve's errors, of those of the wires, of what is exact
    for k, bits in enumerate(layer.slice_bits):
        g_min, step, curve = device.levels(bits)[0], device.step(bits), layer.chip.readout.curve[k]
        values, reference = (part[k, 0].cpu().double() for part in (layer.chip.cells.values, layer.chip.cells.reference))
        held, held_reference = (part[k, 0].cpu().double() for part in (straight.values, straight.reference))
        off = round(scale * g_min / step) if digital else 0.0  # what values have of the off-current
        for start, stop in arrays:
            seen = np.s_[start:stop, :COLUMNS]
            line, plus = reference[start:stop, None] if referred else None, held[seen]
            beside = held_reference[start:stop, None] if referred else plus[:, :0]  # the lines whose current is taken off
            if both is not None:
                sums, seen_sums = (part[k, 0].cpu().double()[seen] for part in (both, layer.chip.readout.both))
                plus, beside = (sums + plus) / 2, (sums - plus) / 2
            siemens = 1e-6 * (g_min + step * (torch.cat([beside, plus], 1) - off) / scale).clamp_min(0)
            for z in range(len(layer.spec.digit_bits)):
                a = ((rows[pixels, start:stop] >> z) & 1).double()
                current = torch.from_numpy(1e6 * gate_exact(siemens.numpy(), a.numpy(), wire_ohm)) * (scale / step)
                missing = a.sum(1, keepdim=True) * curve[3]  # a digital reference's column has it, and u has not
                exact = current[:, beside.shape[1]:] - (current[:, :beside.shape[1]] if beside.shape[1] else missing)
                u = a @ values[seen] - (a @ line if referred else 0)
                found = through_curve(curve, u, a, line) if both is None else between_curves(curve, u, a, seen_sums)
                plain = a @ held[seen] - (a @ held_reference[start:stop, None] if referred else 0)
                squares = [float(each.square().sum()) for each in (found - exact, plain - exact, exact)]
                totals += 4.0 ** (z + layer.spec.cell_bits * k) * np.array(squares)
    return tuple(float(error / totals[2]) ** 0.5 if totals[2] else 0.0 for error in totals[:2])
