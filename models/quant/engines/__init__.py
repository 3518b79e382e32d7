"""The engines: implementations of one function, and the choice between them.

An engine is a module with

    unsupported(layer, device) -> str or None      why it cannot run this `MappedLayer` there
    prepare(layer) -> object                       all work that does not depend on the input
    accumulate(prepared, a_codes) -> integers      the layer's accumulators
    histogram(prepared, a_codes) -> int64          counts of the read values, [digits, slices, classes, bin]

and, where it has a faster way than `scaled` below,

    scaled(prepared, a_codes, values, scale, offset, to_codes=None, shift=None)
        the same; with `to_codes` (`output.ToCodes`) the codes that the next layer makes of it, uint8 `[N, H', W', out]`

`a_codes` is uint8 `[N, H, W, in]`, contiguous. Classes are those of n, the sum of a read's digits (`MappedLayer.classes`): each has
converters of its own.

`accumulate` returns integers `[G, N, H', W', out]`. `value` says what they are worth. q is the level of the ADC code of array t, digit z,
slice k (`converter`; of a linear one the code itself). By `adc_range`:

    calibrated, full   `sum_t sum_z sum_k 2^(d z + c k) q`, over the slices k of each ADC step: G steps
    with a plan        `sum_t sum_z sum_k 2^(d z + c k) q (64 delta)`, delta that of (z, k, class); G = 1. Reads of 0 bits add nothing
    dynamic            `sum_t sum_z sum_k 2^(d z + c k) (q (u_b - u_a) + 2^B u_a)`, `u_a`, `u_b` smallest and largest
                       `u` of that (t, z, k) in the batch; `q = clip(rint((u - u_a) / ((u_b - u_a) / 2^B)), 0, 2^B - 1)`
                       in float32, and `u` itself where `u_a = u_b`, so that `step q + lb` is exact; G = 1
    ideal              `sum A (2 W - L)`, L twice the level that stands for zero; G = 1; with cells on a grid
                       `sum_t sum_z sum_k 2^(d z + c k) sum_rows a (values - reference)`; with a readout the same sum of all u as
                       they are read: a digital reference is not taken off yet

`histogram` counts every read of every output pixel of a layer without a readout, those in the padding too, in `layer.bins`.
All of this is exact, so engines agree bit for bit. Integers are int32, or int64 where int32 could overflow (`accumulator_dtype`).
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import itertools
import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import forks as forks  # what a forked child needs

if TYPE_CHECKING:
    from ..arrays.mapping import MappedLayer

log = logging.getLogger(__name__)


class Engine(NamedTuple):
    """Where an engine is (the module, below this package or by its full name), and on what "auto" tries it: a type of device; None: any."""

    module: str
    device: str | None = None

    @property
    def path(self) -> str:
        """Full name of the module."""
        return importlib.util.resolve_name(self.module, __name__)


# The later, the faster: "auto" takes the last that can run a layer.
ENGINES = {"reference": Engine(".reference"), "numba": Engine(".cpu.engine", "cpu"), "triton": Engine(".gpu.triton_gpu", "cuda")}
CHOICES = ("auto", *ENGINES)


class EngineError(ValueError):
    """A forced engine cannot run; the message says why."""


_selected = contextvars.ContextVar("engine", default="auto")


def selected() -> str:
    """The name that `set_engine` chose, one of `CHOICES`."""
    return _selected.get()


class set_engine:
    """`set_engine(name)` chooses the engine of all crossbar layers. As a `with` block it does so for the block only.

    The choice belongs to the running context (`contextvars`). A thread that is started begins with "auto".

    Args: name, one of `CHOICES`. Raises: EngineError for an unknown name, or an engine whose library is missing.
    """

    def __init__(self, name: str) -> None:
        if name != "auto":
            load(name)
        self._before = selected()
        _selected.set(name)

    def __enter__(self) -> set_engine:
        return self

    def __exit__(self, *error: object) -> None:
        _selected.set(self._before)


def load(name: str) -> ModuleType:
    """The engine's module. Raises EngineError for an unknown name or one whose library is missing."""
    if name not in ENGINES:
        raise EngineError(f"no engine is named {name!r}; known are {', '.join(CHOICES)}")
    try:
        return importlib.import_module(ENGINES[name].path)
    except ImportError as error:
        raise EngineError(f"engine {name} cannot run: {error}") from None


def choose(name: str, layer: MappedLayer, device: torch.device) -> tuple[ModuleType, str]:
    """(module, reason) for `layer` on `device`; "auto" takes the fastest that can run it, by `ENGINES`.

    Raises: EngineError when a forced engine cannot run the layer there.
    """
    if name != "auto":
        module = load(name)
        reason = module.unsupported(layer, device)
        if reason:
            raise EngineError(f"engine {name} cannot run here: {reason}")
        return module, "asked for"
    refusals = []
    for candidate in reversed([name for name, engine in ENGINES.items() if engine.device in (None, device.type)]):
        try:
            module = load(candidate)
            reason = module.unsupported(layer, device)
        except EngineError as error:
            reason = str(error)
        if reason is None:
            return module, "fastest for this device" + (f" that can run ({'; '.join(refusals)})" if refusals else "")
        refusals.append(f"{candidate}: {reason}")
    raise EngineError("no engine can run this layer: " + "; ".join(refusals))


def name_of(module: ModuleType) -> str:
    """The name by which `load` finds an engine's module."""
    return next(name for name, engine in ENGINES.items() if module.__name__ == engine.path)


@functools.cache
def announce(module: ModuleType, reason: str) -> None:
    """Log which engine was chosen and why, each such line once: the layers of a network mostly have the same."""
    log.info(f"engine {name_of(module)}: {reason}")


def value(layer: MappedLayer) -> list[float]:
    """What one unit of each step of accumulators is worth in `sum A (2 W - L)`: a list of G floats."""
    spec = layer.spec
    if spec.adc_range == "ideal":
        return [1.0 if layer.cells is None else layer.worth * layer.unit]
    if spec.adc_range == "dynamic":
        return [layer.worth * layer.unit / 2**spec.adc_bits]
    return [layer.worth * worth for worth, _ in layer.delta_groups]


def scaled(engine: ModuleType, prepared: object, a_codes: Tensor, values: Sequence[float], scale: Tensor,
           offset: Tensor, shift: Tensor | None = None) -> Tensor:
    """`float32(sum_g acc_g values_g) scale + offset`, the sum in float64: float32 `[N, H', W', out]`.

    Args: values, a float for each step of accumulators; scale, offset, float32 `[out]`; shift, integers `[out]` that are added to the
        sums of a layer without an ADC, of ideal cells.
    """
    if hasattr(engine, "scaled"):
        return engine.scaled(prepared, a_codes, values, scale, offset, shift=shift)
    acc = engine.accumulate(prepared, a_codes)
    if values == [1.0]:
        return (acc[0] if shift is None else acc[0] + shift) * scale + offset
    return sum(plane.double() * value for plane, value in zip(acc, values)).float() * scale + offset


def accumulator_dtype(layer: MappedLayer) -> torch.dtype:
    """int32 where no accumulator of this layer can overflow it, else int64."""
    spec = layer.spec
    if spec.adc_range in ("ideal", "dynamic") and layer.readout is not None:
        return torch.int64  # noise goes beyond what cells alone can give
    if spec.adc_range == "ideal" and layer.cells is None:
        terms, largest = layer.group_channels * math.prod(layer.kernel), 2 * (2**spec.w_bits - 1)
        bound = terms * (2**spec.a_bits - 1) * max(layer.zero_twice, largest - layer.zero_twice)
    else:
        low, high = layer.u_span
        largest = 2**spec.adc_bits * 2 * max(-low, high)
        if spec.adc_range == "ideal":
            largest = max(-low, high) + int(layer.cells.reference.abs().max()) * layer.tallest * (2**spec.a_bits - 1)
        elif spec.adc_range != "dynamic":
            kinds = itertools.product(range(len(spec.digit_bits)), range(len(spec.slice_bits)), range(layer.classes))
            largest = max(layer.converter(*kind).largest for kind in kinds)
        bound = len(layer.arrays) * (2**spec.a_bits - 1) * (2**spec.w_bits - 1) * largest
    return torch.int32 if bound < 2**31 else torch.int64
