"""What decides the result of a measurement, and the key that follows from it.

Two measurements have the same key if they must have the same result: time, machine, engine and threads are no part of it, nor are names of
files and devices; the batch size is, where ranges are those of a batch.
"""

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from models import quant
from models.quant import CrossbarSpec
from models.quant.cost import Technology
from models.quant.devices import Law, Table
from models.quant.prepared import resolved
from models.quant.measuring.chips import Chips
from models.quant.measuring.setting import Setting

from .data import Batches
from .starting import quantized_layers
from .streamed import Streamed

ARITHMETIC = 1  # raise it where a setting's result is no longer what it was: no older point is used then
# The same where it is those settings alone that changed: with chips, their cells and reads; with chips behind a digital reference, plans;
# with chips whose reads have more than their cells; with gate access; with word lines that resist; with reference cells that are ideal;
# with faults of cells that a table describes; with costs; of networks that were converted; with inputs in two's complement.
ARITHMETIC_OF_CHIPS = 2
ARITHMETIC_OF_PLANS = 2
ARITHMETIC_OF_READOUTS = 4
ARITHMETIC_OF_GATES = 5
ARITHMETIC_OF_WORD_LINES = 2
ARITHMETIC_OF_REFERENCES = 2
ARITHMETIC_OF_FAULTS = 2
ARITHMETIC_OF_COSTS = 4
ARITHMETIC_OF_CONVERTED = 3
ARITHMETIC_OF_TWOS = 4
NAMES = ("name", "source", "certainty", "note", "n")  # of devices and laws: what they are called and where they come from
OF_MODULES = vars(nn.Module()).keys()  # what every module has: its state, its children and its hooks
LATER = ("adc_idle",)  # fields of a spec that older keys do not have: in no key where they are as they always were

_laws: dict[int, str] = {}  # digests of data that many devices share, by the id of a law as long as there is that law


def key_of(decides: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, in whatever order they stand."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def of_network(network: nn.Module, facts: Sequence[Any]) -> str:
    """Digest of what a network computes, without its ADC ranges. Of quantized weights only the codes count, so that an exported
    network is the one that it was exported from. Args: facts, plain values that its tensors do not say, such as its model's name."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith(quant.ADC_BUFFERS)}
    for name, layer in quantized_layers(network).items():
        if layer.weight_quant.on:
            state[f"{name}.weight"] = layer.weight_quant.codes(state[f"{name}.weight"])
    return digest([list(facts), state], others=True)


def of_attributes(network: nn.Module) -> str:
    """Digest of what a network computes with beside its state: for each module its class, its plain attributes, such as a number that was
    read from a file, and its buffers, of which some are in no state."""
    return digest([[name, type(module), {key: value for key, value in vars(module).items() if key not in OF_MODULES},
                    dict(module.named_buffers(recurse=False))]
                   for name, module in network.named_modules()], others=True)


def of_images(images: Batches, labels: torch.Tensor | None = None) -> str:
    """Digest of network inputs, and of their classes."""
    shown = images.images.identity() if isinstance(images.images, Streamed) else images.images
    return digest([shown, list(images.mean), list(images.std), labels])


def of_setting(setting: Setting, stored_chip: bool = False) -> dict[str, Any]:
    """A setting as plain values: a device by the digest of its data, how ranges are chosen only where they are. Args: stored_chip, whether
    its cells are those of a chip in files."""
    chosen = asdict(setting.calibration) if setting.spec.adc_range == "calibrated" else None
    spec = {name: value for name, value in asdict(setting.spec).items() if name not in LATER or value != getattr(CrossbarSpec(), name)}
    references = {setting.spec.reference, *(dict(changes).get("reference") for _, changes in setting.per_layer)}
    on_chip = setting.chips or stored_chip
    of_plans = {"arithmetic_of_plans": ARITHMETIC_OF_PLANS} if on_chip and True in setting.plans and "digital" in references else {}
    return of_plans | {"spec": _plain(spec), "crossbar_layers": setting.crossbar_layers, "calibration": chosen,
            "per_layer": [[pattern, _plain(dict(changes))] for pattern, changes in setting.per_layer],
            "chips": setting.chips and of_chips(setting.chips, "analog" in references)}


def of_chips(chips: Chips, with_reference: bool = True) -> dict[str, Any]:
    """Chips as plain values. Args: with_reference, whether arrays have reference columns, which scatter or do not."""
    values = {field.name: getattr(chips, field.name) for field in fields(chips) if field.name not in NAMES}
    noisy = chips.read_noise or chips.device.read_noise is not None
    values["read_noise"] = chips.read_noise or None
    if chips.wires is None:
        values["access"] = Chips.access
    if not (noisy or chips.adc_noise):  # nothing is drawn at a read
        values["noise_seed"] = Chips.noise_seed
    if noisy or values["access"] == "gate" or chips.adc_noise or chips.adc_offset or chips.adc_gain:
        values["arithmetic_of_readouts"] = ARITHMETIC_OF_GATES if values["access"] == "gate" else ARITHMETIC_OF_READOUTS
    if chips.row_ohm or chips.driver_ohm:
        values["arithmetic_of_word_lines"] = ARITHMETIC_OF_WORD_LINES
    if not with_reference:
        values["reference_cells"] = Chips.reference_cells
    elif chips.reference_cells == "ideal":
        values["arithmetic_of_references"] = ARITHMETIC_OF_REFERENCES
    if isinstance(chips.device.law, Table) and (chips.device.stuck_on or chips.device.stuck_off):
        values["arithmetic_of_faults"] = ARITHMETIC_OF_FAULTS
    return _plain(values | {"device": digest(chips.device), "arithmetic": ARITHMETIC_OF_CHIPS})


def arithmetic_of(chips: Chips) -> dict[str, int]:
    """The constants above that the cells of chips follow from."""
    return {name: value for name, value in of_chips(chips).items() if name.startswith("arithmetic") and "readouts" not in name} | (
        {"arithmetic_of_gates": ARITHMETIC_OF_GATES} if chips.access == "gate" else {})


def of_costs(technology: Technology) -> str:
    """Digest of what costs follow from, beside the setting."""
    return digest([ARITHMETIC_OF_COSTS, technology])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers as such, 3.0 bits are 3 bits, and NumPy's as Python's."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in values.items()}


def digest(value: Any, others: bool = False) -> str:
    """SHA-256 of numbers, texts, arrays, tensors, devices, and of what is made of these. Args: others, of code of others: functions and
    classes count by their names, and objects that are none of these by their classes'. Raises: TypeError for anything else."""
    found = hashlib.sha256()
    for part in _parts(value, others):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any, others: bool):
    """Bytes that tell a value from every other one."""
    if isinstance(value, torch.Tensor):
        yield from _parts_of_tensor(value.detach())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"array {value.dtype.str} {value.shape} ".encode()
        yield np.ascontiguousarray(value).data if value.size else b""
    elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic, type(None))):
        yield f"{type(value).__name__} {value!r} ".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for name in sorted(value, key=repr):
            yield from _parts(name, others)
            yield from _parts(value[name], others)
    elif isinstance(value, (Sequence, range)):
        yield f"list {len(value)} ".encode()
        for each in value:
            yield from _parts(each, others)
    elif isinstance(value, Set):
        yield f"set {len(value)} {sorted(digest(each, others) for each in value)} ".encode()
    elif isinstance(value, Law):
        if id(value) not in _laws:
            _laws[id(value)] = digest(_attributes(value))
            weakref.finalize(value, _laws.pop, id(value), None)
        yield _laws[id(value)].encode()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(_attributes(value), others)
    elif others and isinstance(value, partial):
        yield from _parts(["partial", value.func, value.args, value.keywords], others)
    elif others and isinstance(value, (Enum, torch.dtype, torch.device)):
        yield f"{type(value).__qualname__} {value} ".encode()
    elif others:
        named = value if hasattr(value, "__qualname__") else type(value)
        yield f"{named.__module__}.{named.__qualname__} ".encode()
    else:
        raise TypeError(f"no digest of {type(value).__name__}")


def _parts_of_tensor(tensor: torch.Tensor):
    tensor = resolved(tensor.cpu())
    try:
        yield from _parts(tensor.numpy(), others=False)
    except TypeError:  # NumPy has no such type
        yield f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        yield from _parts_of_tensor(tensor.contiguous().view(-1).view(torch.uint8))


def _attributes(thing: Any) -> dict[str, Any]:
    found = {name: value for name, value in vars(thing).items() if name not in NAMES and not name.startswith("_")}
    return {"": type(thing).__name__} | found
