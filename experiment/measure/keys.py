"""What decides the result of a measurement, and the key that follows from it.

Two measurements have the same key if they must have the same result: time, machine, engine and threads are no part of it, nor are names of
files and devices; the batch size is, where ranges are those of a batch, and so is the code that computes (`CODE`).
"""

import functools
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

import models
from models import quant
from models.quant.arrays.spec import BEFORE
from models.quant.devices import Law
from models.quant.layers.prepared import resolved
from models.quant.measuring.chips import Chips
from models.quant.measuring.setting import Setting
from models.quant.storage import sources

from ..inputs.data import Batches
from ..inputs.tasks import Examples
from ..program.cli import user_error
from ..start.starting import quantized_layers

# The code that a result follows from: of the package by names relative to it, with ".*" all modules that no other part names. Every result
# follows from that of "measuring"; those of chips, of their wires, of noise on weights, of a conversion, of a language model and of costs
# follow from a part more. Engines but the reference decide nothing, as they agree with it bit for bit; kernels that the package calls
# whatever the engine do.
CODE = {
    "measuring": (
        ".arrays.*", ".layers.quantizers", ".layers.layers", ".layers.channels", ".layers.on_arrays", ".layers.crossbar", ".layers.fusion",
        ".layers.batches", ".layers.loaders", ".network.modes", ".network.counts", ".network.calibration", ".engines", ".engines.reference",
        ".kernels.elementwise", ".kernels.image", ".kernels.moments", ".kernels.ones", ".kernels.output", ".kernels.simd",
        ".measuring.*", *models.modules()),
    "chips": (".devices.*", ".network.program", ".measuring.chips"),
    "wires": (".devices.wires",),
    "weight_noise": (".network.weight_noise", ".measuring.weight_noise"),
    "conversion": (".conversion.*", ".layers.convolution", ".kernels.steps", "experiment.start.conversion"),
    "language": ("experiment.inputs.language",),
    "costs": (".cost.*", "experiment.settings.costs"),
}
NAMES = ("name", "source", "certainty", "note", "n")  # of devices and laws: what they are called and where they come from
OF_MODULES = vars(nn.Module()).keys()  # what every module has: its state, its children and its hooks

_laws: dict[int, str] = {}  # digests of data that many devices share, by the id of a law as long as there is that law


def key_of(decides: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, in whatever order they stand."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@functools.cache
def digests(package: str = quant.__name__) -> dict[str, str]:
    """The digest of each part of the code. All at once, as somebody may edit a file while a program runs."""
    modules = {part: modules_of(part, package) for part in CODE}
    own = {name.partition(".")[0] for names in modules.values() for name in names}
    return {part: sources.digest(names, own) for part, names in modules.items()}


def modules_of(part: str, package: str = quant.__name__) -> tuple[str, ...]:
    """Full names of the modules of a part of the code."""
    others = {package + name for other, names in CODE.items() if other != part for name in names}
    return tuple(name for name in sources.resolved(CODE[part], package) if name not in others)


def of_code(*parts: str) -> dict[str, str]:
    """Digests of the code that a result follows from. Args: parts, beside that of every result."""
    return {part: digests()[part] for part in ("measuring", *parts)}


def parts_of(setting: Setting, stored_chip: bool = False) -> list[str]:
    """The parts of the code that a setting needs for its cells. Args: stored_chip, whether these are of a chip in files."""
    parts = {"chips": setting.chips or stored_chip, "wires": setting.chips and setting.chips.wires, "weight_noise": setting.without_cells}
    return [part for part, needed in parts.items() if needed]


def is_current(decides: Any) -> bool:
    """Whether what a point's key follows from is of this code. Args: decides, whatever a file holds."""
    code = decides.get("code") if isinstance(decides, dict) else None
    return isinstance(code, dict) and bool(code) and all(digests().get(part) == found for part, found in code.items())


def without_code(decides: Mapping[str, Any]) -> str:
    """As `key_of`, the same whatever the code was. Older points have numbers called arithmetic, and lack younger fields of a spec."""
    def plain(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: plain(each) for name, each in value.items() if name != "code" and not name.startswith("arithmetic")}

    setting = decides.get("setting")
    return key_of(plain(decides) | ({"setting": plain(setting) | {"spec": BEFORE | setting["spec"]}} if setting else {}))


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


def of_images(images: Batches | Examples, labels: torch.Tensor | None = None) -> str:
    """Digest of network inputs, and of their classes."""
    return digest([*images.content, labels])


def of_setting(setting: Setting) -> dict[str, Any]:
    """A setting as plain values: a device by the digest of its data, how ranges are chosen only where they are."""
    chosen = asdict(setting.calibration) if setting.spec.adc_range == "calibrated" else None
    references = {setting.spec.reference, *(dict(changes).get("reference") for _, changes in setting.per_layer)}
    return {"spec": _plain(asdict(setting.spec)), "crossbar_layers": setting.crossbar_layers, "calibration": chosen,
            "per_layer": [[pattern, _plain(dict(changes))] for pattern, changes in setting.per_layer],
            "chips": _plain(asdict(setting.chips)) if setting.without_cells else setting.chips and of_chips(
                setting.chips, "analog" in references)}


def of_chips(chips: Chips, with_reference: bool = True) -> dict[str, Any]:
    """Chips as plain values. Args: with_reference, whether arrays have reference columns, which scatter or do not."""
    values = {field.name: getattr(chips, field.name) for field in fields(chips) if field.name not in NAMES}
    noisy = chips.read_noise or chips.drawn.read_noise is not None
    values["read_noise"] = chips.read_noise or None
    if chips.wires is None:
        values["access"] = Chips.access
    values = {name: value for name, value in values.items() if name not in _unused(chips)}
    if not (noisy or chips.adc_noise or chips.comparator_noise):  # nothing is drawn at a read
        values["noise_seed"] = Chips.noise_seed
    if not with_reference:
        values["reference_cells"] = Chips.reference_cells
    return _plain(values | {"device": digest(chips.drawn)})


def _unused(thing: Any) -> set[str]:
    """Fields of a dataclass that are younger than some results, and have the value that these have without them."""
    of = fields(thing) if is_dataclass(thing) else ()
    return {item.name for item in of if item.metadata.get("younger") and getattr(thing, item.name) == item.default}


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
            with user_error(lambda error: f"results of the law {value.name} cannot be kept ({error}): its attributes must be numbers, "
                                          "texts, arrays or lists of them", TypeError):
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
    hidden = "_" if not getattr(thing, "code", ()) else "__"  # what a user's law keeps to itself decides, too
    left_out = {*NAMES, *_unused(thing)}
    found = {name: value for name, value in vars(thing).items() if name not in left_out and not name.startswith(hidden)}
    return {"": type(thing).__name__} | found
