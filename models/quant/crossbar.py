"""Layers on crossbars, and the calls that set the hardware and the engine of a whole network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import adc, engines, pair
from .cells import Cells, Chip, fraction_bits
from .eager import outside_graphs
from .engines.cpu import elementwise
from .engines.cpu.output import ToCodes
from .layers import Pair, Qconv2d, QLinear
from .mapping import MappedLayer, w_rows
from .prepared import Prepared
from .quantizers import act_codes, warn_of_nan
from .readout import Readout
from .spec import ADC_GRID, CrossbarSpec, Geometry

LARGEST_STEP = 2**32  # of a plan: far beyond all reads, and engines multiply it by 64 and the place of its reads in 64 bits
ADC_BUFFERS = ("adc_delta", "adc_q_min", "adc_gain", "adc_offset", "adc_bits_plan")  # endings of keys


class _StraightThrough(torch.autograd.Function):
    """The simulated output forward, the gradient of the quantized layer backward: straight through the ADC. That gradient
    does not depend on the layer's output, which is not computed."""

    @staticmethod
    def forward(ctx, codes, weight, bias, x, layer, scale):
        ctx.save_for_backward(codes, weight)
        ctx.layer, ctx.scale = layer, scale
        # The type of the quantized layer's output: autocast makes codes of 16 bits, and a float32 bias float32 of their sums.
        dtype = codes.dtype if bias is None else torch.promote_types(codes.dtype, bias.dtype)
        simulated = layer.simulate(x).to(dtype)
        return simulated.new_empty(0).set_(simulated)  # no view: what follows may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        layer, (codes, weight) = ctx.layer, ctx.saved_tensors
        of_bias = None
        if layer.bias is not None:
            of_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1]) * layer.out_scale
        grad = grad.to(codes.dtype) * ctx.scale
        return *layer._operation_gradients(grad, codes, weight, ctx.needs_input_grad[:2]), of_bias, None, None, None


class CrossbarLayer:
    """What both layers share: the spec, the ADC ranges and their correction as buffers, the mapped weights, the scaling.

    `y = gain out_scale (s_a s_w sum A (2 W - L) + bias) + offset`, the sum taken by an engine read by read; gain 1 and
    offset 0 until `correct` sets them, and with any adc_range but "calibrated". In training mode the gradient is that of
    the quantized layer without arrays: straight through the ADC and its correction.
    """

    EXACT = ADC_BUFFERS  # what keeps its type
    channel_dim = 1  # of the output
    shared = False  # whether the network calls it more than once

    def _init_crossbar(self, spec):
        self.register_buffer("adc_bits_plan", None)
        self.register_buffer("adc_delta", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("adc_q_min", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("adc_gain", torch.ones(len(self.weight), dtype=torch.float32))
        self.register_buffer("adc_offset", torch.zeros(len(self.weight), dtype=torch.float32))
        self._w_codes = None
        self.chip: Chip | None = None  # None: ideal cells
        self.watch: Callable[..., None] | None = None  # is shown all codes that reach the arrays: `cost.count`
        self._prepared = Prepared()
        self._spec = spec
        self.set_spec(spec)

    @property
    def spec(self) -> CrossbarSpec:
        """The hardware; setting it is `set_spec`."""
        return self._spec

    @spec.setter
    def spec(self, spec: CrossbarSpec) -> None:
        self.set_spec(spec)

    @property
    def cell_spec(self) -> CrossbarSpec:
        """The hardware with the bits that cells hold: fewer than the weight's in some pairs (`pair.on_cells`)."""
        return self._on_cells(self.spec)

    def _on_cells(self, spec):
        return pair.on_cells(spec, self.weight_quant.zero_twice) if spec.weights == "pair" else spec

    @property
    def slice_bits(self) -> tuple[int, ...]:
        """Bits of the cells of each slice, LSB first."""
        return self.cell_spec.slice_bits

    def set_spec(self, spec: CrossbarSpec) -> None:
        """Put the layer on other hardware of the same bits; ranges of another hardware are dropped, and cells of other slices,
        another reference or other lines: they are ideal again.

        Raises: ValueError for other bits than those of the layer's quantizers.
        """
        spec = self.fitted(spec)
        if any(getattr(spec, name) != getattr(self._spec, name) for name in ("cell_bits", "reference", "weights")):
            self.chip = None
        self._spec = spec
        self._forget_ranges()

    def fitted(self, spec: CrossbarSpec) -> CrossbarSpec:
        """The hardware of a network as this layer has it.

        Raises: ValueError for other bits than those of the layer's quantizers.
        """
        if (spec.w_bits, spec.a_bits) != (self.weight_quant.wbit, self.act_quant.abit):
            raise ValueError(f"the spec has {spec.w_bits}-bit weights and {spec.a_bits}-bit activations, the layer "
                             f"{self.weight_quant.wbit} and {self.act_quant.abit}")
        return spec

    def _forget_ranges(self):
        if self.spec.planned:
            none = np.zeros((len(self.spec.digit_bits), len(self.slice_bits)))
            self.set_plan(adc.Plan(none, none, none))
        else:
            self.set_ranges([(0.0, 0)] * len(self.slice_bits))

    def set_ranges(self, ranges: Sequence[tuple[float, int]]) -> None:
        """Set `(delta, q_min)` of each slice; `delta` in units of the read value, 0 for not calibrated. A correction, which
        belongs to other ranges, is dropped.

        Raises: ValueError for another number of ranges, or on hardware with a plan.
        """
        if self.spec.planned:
            raise ValueError("ranges of slices are given where the spec has adc_plan 'significance'; give a plan (`set_plan`)")
        if len(ranges) != len(self.slice_bits):
            raise ValueError(f"{len(ranges)} ADC ranges are given for {len(self.slice_bits)} slices")
        delta, q_min = zip(*ranges)
        self.adc_delta = torch.tensor(delta, dtype=torch.float64, device=self.adc_delta.device)
        self.adc_q_min = torch.tensor(q_min, dtype=torch.int64, device=self.adc_q_min.device)
        self.adc_bits_plan = None
        self.set_correction(torch.ones_like(self.adc_gain), torch.zeros_like(self.adc_offset))

    def set_plan(self, plan: adc.Plan) -> None:
        """Set bits and range of each digit and slice, on hardware with adc_plan "significance"; steps of 0 are not calibrated. A
        correction, which belongs to other ranges, is dropped.

        Raises: ValueError for another shape, or on hardware without a plan.
        """
        shape = len(self.spec.digit_bits), len(self.slice_bits)
        if not self.spec.planned or any(np.shape(values) != shape for values in plan):
            raise ValueError(f"a plan of {list(np.shape(plan.bits))} digits and slices is given; {list(shape)} is expected, and a "
                             "spec with adc_plan 'significance'")
        device = self.adc_delta.device
        self.adc_bits_plan, self.adc_q_min = (torch.tensor(np.asarray(values), dtype=torch.int64, device=device)
                                              for values in (plan.bits, plan.q_min))
        self.adc_delta = torch.tensor(np.asarray(plan.delta), dtype=torch.float64, device=device)
        self.set_correction(torch.ones_like(self.adc_gain), torch.zeros_like(self.adc_offset))

    def set_correction(self, gain: Tensor, offset: Tensor) -> None:
        """Set the digital `gain` and `offset` of each output channel, `[out]`, the offset in units of the output.

        Raises: ValueError for another number of channels, or one that is not finite.
        """
        for values in (gain, offset):
            if values.shape != self.adc_gain.shape:
                raise ValueError(f"a correction of shape {list(values.shape)} is given for {len(self.adc_gain)} channels")
            if not values.isfinite().all():
                raise ValueError("a gain or an offset of the correction is not a finite number")
        self.adc_gain = gain.to(self.adc_gain, copy=True)
        self.adc_offset = offset.to(self.adc_offset, copy=True)

    def set_codes(self, w_codes: Tensor | None) -> None:
        """Use these weight codes, uint8 `[out, in / groups, kh, kw]`, in place of the weight's, until weights are loaded; None
        takes those of the weight again.

        Raises: ValueError for another type or shape, or codes above `2^w - 1`.
        """
        if w_codes is None:
            self._w_codes = None
            return
        if w_codes.dtype != torch.uint8 or w_codes.numel() and int(w_codes.max()) > self.weight_quant.levels:
            raise ValueError(f"weight codes are {w_codes.dtype} up to {w_codes.max()}; torch.uint8 up to "
                             f"{self.weight_quant.levels} is expected")
        if w_codes.shape != self._weight4().shape:
            raise ValueError(f"weight codes have shape {list(w_codes.shape)}, the layer {list(self._weight4().shape)}")
        self._w_codes = w_codes

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation, groups."""
        return self._geometry()

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight codes, `[out, in / groups, kh, kw]`."""
        return tuple(self._weight4().shape)

    @property
    def w_source(self) -> Tensor:
        """What the weight codes are made of: the weight, or the codes that stand in its place."""
        return self.weight if self._w_codes is None else self._w_codes

    def w_codes(self) -> Tensor:
        """Weight codes that the cells hold, uint8 `[out, in / groups, kh, kw]`."""
        if self._w_codes is not None:
            return self._w_codes.to(self.weight.device)
        return self.weight_quant.codes(self._weight4().detach())

    def cells(self) -> Cells:
        """What the cells hold: those of the chip that was programmed (`program`, `set_cells`), else ideal ones.

        Ideal: `values = 2^F C_k`, `reference = 2^F r_k`; of pairs `values = 2^F (X+ - X-)`, `reference = 0`.
        """
        return self.chip.cells if self.chip else self.ideal_cells()

    def ideal_cells(self) -> Cells:
        """Cells that hold exactly the digits of the weight codes, see `cells`."""
        fraction = fraction_bits(self.cell_spec.cell_bits)
        if self.spec.weights == "pair":
            return self._ideal_pairs(fraction)
        spec, codes = self.spec, self._w_rows().int()
        values = torch.stack([((codes >> (spec.cell_bits * k)) & (2**bits - 1)) << fraction for k, bits in enumerate(spec.slice_bits)])
        twice = torch.tensor(self._reference_twice(spec), dtype=torch.int32, device=values.device)
        reference = (twice << (fraction - 1)).view(-1, 1, 1).expand(values.shape[:3]).contiguous()
        return Cells(values, reference, fraction)

    def _ideal_pairs(self, fraction):
        """Pairs on a grid of `2^-fraction` levels."""
        values = pair.signed_digits(self._w_rows(), self.weight_quant.zero_twice, self.cell_spec) << fraction
        return Cells(values, torch.zeros(values.shape[:3], dtype=torch.int32, device=values.device), fraction)

    def _w_rows(self):
        return w_rows(self.w_codes(), self._geometry().groups)

    def _reference_twice(self, spec):
        return (0,) * len(spec.slice_bits) if spec.weights == "pair" else self.weight_quant.reference_twice(spec.slice_bits)

    def set_cells(self, cells: Cells | None, nominal: Cells | None = None, readout: Readout | None = None) -> None:
        """Let the cells hold these, until weights are loaded or the hardware's slices change; None: ideal cells again.

        They stay what they are when the weight changes, as on a chip that was programmed. Tensors that are handed over must not be
        changed afterwards: hand over others.

        Args: nominal, the same cells without scatter, on which ADC ranges are chosen (None: ideal ones); readout, see `Readout`.
        Raises: ValueError for cells of another shape.
        """
        shape = list(self._w_rows().shape)
        for each in (cells, nominal):
            if each is not None and list(each.values.shape) != [len(self.slice_bits), *shape]:
                raise ValueError(f"cells have shape {list(each.values.shape)}, the layer "
                                 f"{[len(self.slice_bits), *shape]}: slices, groups, rows, outputs of a group")
        self.chip = None if cells is None else Chip(cells, nominal, readout)

    def mapped(self, adc_range: str | None = None, cells: Cells | str | None = "own") -> MappedLayer:
        """The layer as engines see it, with the spec's ADC range or another, with its own cells, others, or ideal ones (None).

        Raises: ValueError for "calibrated" without ranges, or with those of another ADC.
        """
        spec = self._on_cells(self.spec if adc_range is None else replace(self.spec, adc_range=adc_range))
        ranges = self.adc_delta.cpu(), self.adc_q_min.cpu(), self.adc_bits_plan.cpu() if spec.planned else None
        if self.spec.planned and not spec.planned:  # those of a plan are none of slices
            none = torch.zeros(len(spec.slice_bits))
            ranges = none.double(), none.long(), None
        worth = pair.worth(self.weight_quant.zero_twice) if spec.weights == "pair" else 2
        layer = MappedLayer(spec, self._geometry(), self.w_codes(), self._reference_twice(spec), *ranges, *self._chip_parts(cells), worth)
        if spec.adc_range == "full":
            delta, q_min = zip(*adc.full_ranges(replace(layer, cells=self.chip.nominal if self.chip else None, readout=None)))
            return replace(layer, adc_delta=torch.tensor(delta, dtype=torch.float64), adc_q_min=torch.tensor(q_min))
        if spec.adc_range == "calibrated":
            self._check_ranges(layer)
        return layer

    def _chip_parts(self, cells):
        """(cells, readout) of a mapped layer. Ideal pairs are cells too, on a grid of whole levels."""
        if isinstance(cells, str) and self.chip:
            return self.chip.cells, self.chip.readout
        cells = None if isinstance(cells, str) else cells
        return self._ideal_pairs(0) if cells is None and self.spec.weights == "pair" else cells, None

    @staticmethod
    def _check_ranges(layer):
        if not bool((layer.adc_delta > 0).all()):
            raise ValueError("this layer's ADC range is not calibrated; call models.quant.calibrate(model, batches), "
                             "load a checkpoint that holds ranges, or take another adc_range")
        if layer.spec.planned:
            CrossbarLayer._check_plan(layer)
            return
        lowest = 1 - 2**layer.spec.adc_bits
        if not bool(((layer.adc_q_min >= lowest) & (layer.adc_q_min <= 0) & layer.adc_delta.isfinite()).all()):
            raise ValueError(f"this layer's ADC ranges (steps {layer.adc_delta.tolist()}, lowest codes "
                             f"{layer.adc_q_min.tolist()}) are not of an ADC of {layer.spec.adc_bits} bits with a code "
                             f"for zero, whose lowest code lies between {lowest} and 0; calibrate again")

    @staticmethod
    def _check_plan(layer):
        bits, delta, q_min, most = layer.adc_bits_plan, layer.adc_delta, layer.adc_q_min, layer.spec.adc_max_bits
        if not bool(((bits >= 0) & (bits <= most) & (q_min <= 0) & (q_min >= 1 - 2**bits)).all()):
            raise ValueError(f"this layer's ADC plan (bits {bits.tolist()}, lowest codes {q_min.tolist()}) is not one of 0 to "
                             f"{most} bits with a code for zero; calibrate again")
        if not bool(((delta < LARGEST_STEP) & (delta * ADC_GRID == (delta * ADC_GRID).round())).all()):
            raise ValueError(f"this layer's ADC steps {delta.tolist()} are not multiples of 1/{ADC_GRID} below {LARGEST_STEP}, as "
                             "those of a plan are; calibrate again")

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """The simulated output for input x, in the type of x (autocast aside); with gradients in training mode only."""
        self._check_input(x)
        if not (self.training and torch.is_grad_enabled()):
            return self.simulate(x)
        codes, weight, scale = self._operands(x)
        if torch.is_autocast_enabled(x.device.type):
            codes, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (codes, weight))
        return _StraightThrough.apply(codes, weight, self.bias, x.detach(), self, scale)

    def simulate(self, x: Tensor) -> Tensor:
        """The layer's output as the arrays give it, in the type of x; no gradient."""
        return self.of_codes(self.a_codes(x)).to(x.dtype)

    def gives_codes(self, device: torch.device) -> bool:
        """Whether `of_codes` can make the codes of the next layer; its weights do not matter."""
        engine, layer, *_ = self._prepare(device, any_weight=True)
        return hasattr(engine, "scaled") and not self._subtracts_behind(layer)

    @staticmethod
    def _subtracts_behind(layer):
        return layer.spec.reference == "digital" and layer.spec.adc_range != "ideal"

    def of_codes(self, codes: Tensor, to_codes: ToCodes | None = None) -> Tensor:
        """The layer's output for activation codes, uint8 `[N, H, W, in]`, in float32; or, with `to_codes` and where
        `gives_codes`, the codes that the next layer makes of it, uint8 `[N, H', W', out]`.

        Raises: ValueError for codes of other channels, or of fewer pixels than the kernel has.
        """
        channels = self._weight4().shape[1] * self._geometry().groups
        if codes.shape[3] != channels:
            raise ValueError(f"the input has {codes.shape[3]} channels; {channels} are expected")
        size = self._geometry().output_size(*codes.shape[1:3], self._weight4().shape[2:])
        if self.watch is not None:
            self.watch(codes)
        if not len(codes):  # a range of no images is none
            shape = 0, *size, len(self.weight)
            return codes.new_empty(shape) if to_codes is not None else self._output(
                torch.empty(shape, device=codes.device, dtype=torch.float32).permute(0, 3, 1, 2))
        with torch.autocast(codes.device.type, enabled=False):  # sums of codes are exact in float32, not in bfloat16
            return self._of_codes(codes, to_codes)

    def _of_codes(self, codes, to_codes):
        made = engine, layer, prepared, scale = self._prepare(codes.device)
        values, (gain, offset) = engines.value(layer), self._correction()
        scale = scale * gain.double()
        if self._subtracts_behind(layer):
            y = self._exact_sums(made, codes).float() * scale.float() + offset
        else:
            if len(values) == 1:  # exactly the value of one plane may be put into the scale
                values, scale = [1.0], scale * values[0]
            if to_codes is not None:
                return engine.scaled(prepared, codes, values, scale.float(), offset, to_codes)
            y = engines.scaled(engine, prepared, codes, values, scale.float(), offset)
        return self._output(y.permute(0, 3, 1, 2))

    def _correction(self):
        """(gain, offset) of each output channel behind the ADC; the offset with the bias."""
        gain, offset = self.adc_gain, self.adc_offset
        if self.spec.adc_range != "calibrated":
            gain, offset = torch.ones_like(gain), torch.zeros_like(offset)
        if self.bias is not None:
            offset = offset + gain * (self.bias.detach().float() * self.out_scale)
        return gain, offset

    def _exact_sums(self, made, codes):
        """`sum A (2 W - L)` as the arrays give it, float64 `[N, H', W', out]`: exact wherever the ADC is, so that a lossless ADC equals
        the integer convolution. Args: made, result of `_prepare`."""
        engine, layer, prepared, _ = made
        acc = engine.accumulate(prepared, codes)
        total = sum(plane.double() * value for plane, value in zip(acc, engines.value(layer)))
        return total - _reference_sum(layer, codes) if self._subtracts_behind(layer) else total

    def parts(self, x: Tensor) -> list[Tensor]:
        """All codes that the arrays see of input `x`, uint8 `[N, H, W, in]` each, one read after the other."""
        return [self.a_codes(x)]

    def a_codes(self, x: Tensor) -> Tensor:
        """Activation codes of the layer's input, uint8 `[N, H, W, in]`. What is not a number gets a code, with a warning."""
        x = x.detach()
        warn_of_nan(x)
        x = self._input(x.float()).permute(0, 2, 3, 1)
        alpha, levels = self.act_quant.act_alpha.detach().float(), self.act_quant.levels
        if x.device.type == "cpu":
            return elementwise.act_codes(x, alpha, levels)
        return act_codes(x, alpha, levels).to(torch.uint8).contiguous()

    def binned(self, cells: Cells | None) -> Cells | None:
        """The cells in whose bins reads of these cells are counted: ideal ones (None), in whose fewer bins ranges are found sooner,
        but with a digital reference, where an off-current takes reads beyond them."""
        return cells if self.spec.reference == "digital" else None

    def counter(self, device: torch.device, cells: Cells | None = None) -> Callable[[Tensor], Tensor]:
        """`f(x)` that returns the exact counts of the read values of these cells, or of ideal ones, for inputs `x`; see `engines` and
        `binned`.

        Raises: ValueError where more values are possible than can be counted.
        """
        layer = self.mapped("ideal", cells)
        low, high = layer.u_span
        if high - low >= engines.MAX_BINS:
            raise ValueError(f"{high - low + 1} possible read values are too many for a histogram; take fewer rows, "
                             "cell bits or dac bits, or adc_range full")
        engine, _ = engines.choose(engines.selected(), layer, device)
        prepared = engine.prepare(layer)

        def count(x):
            with torch.autocast(device.type, enabled=False):
                counts = sum(engine.histogram(prepared, codes) for codes in self.parts(x))
            binned = self.binned(cells)
            return counts if cells is binned else _in_bins_of(counts, layer, self.mapped("ideal", binned))
        return count

    def _prepare(self, device, any_weight=False):
        """(engine, layer, prepared weights, `s_a s_w` in float64); made once, reused while nothing changes."""
        quantizers = type(self.weight_quant), self.weight_quant.levels, self.act_quant.levels, self.weight_quant.training
        settings = engines.selected(), device, self.spec, self._geometry(), self.out_scale, quantizers, self.chip
        numbers = [*self._numbers(), self.adc_delta, self.adc_q_min, *self.weight_quant.buffers(),
                   *([] if self.adc_bits_plan is None else [self.adc_bits_plan])]
        return self._prepared.get(settings, numbers, self.w_source, lambda: self._make(device), any_weight)

    def _make(self, device: torch.device) -> tuple[ModuleType, MappedLayer, object, Tensor]:
        layer = self.mapped()
        engine, reason = engines.choose(engines.selected(), layer, device)
        if adc.is_lossless(layer):
            layer = self.mapped("ideal")
            reason += ", one integer convolution where the ADC changes no read"
        if layer.spec.adc_range == "ideal" and not self.chip:
            layer = self._with_offset_cells(layer)
        engines.announce(engine, reason)
        return engine, layer, engine.prepare(layer), self._scale()

    def _numbers(self):
        """What decides the scale, beside the weight quantizer."""
        return [self.act_quant.act_alpha]

    def _scale(self):
        """What `A (2 W - L) = 1` is worth in the output, float64."""
        return self.act_quant.act_alpha.detach().double() / self.act_quant.levels * self.weight_quant.step * self.out_scale

    def _with_offset_cells(self, layer):
        """A layer with ideal cells that has no ADC: pairs and offset cells give the same sums, and those of codes are faster."""
        if layer.spec.weights == "offset":
            return layer
        spec = replace(self.spec, adc_range="ideal", weights="offset")
        return replace(layer, spec=spec, reference_twice=self._reference_twice(spec), cells=None, worth=2)

    def _apply(self, fn, recurse=True):
        exact = {name: getattr(self, name) for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, values in exact.items():  # in the type they have: half() would move ties
            setattr(self, name, None if values is None else values.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "adc_delta" in state_dict:  # other ranges: a correction comes with them, or there is none
            self._forget_ranges()
        for name in ADC_BUFFERS:  # those made in inference mode cannot be written to
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and own is not None and stored.shape == own.shape:
                setattr(self, name, torch.empty_like(own))
        self._w_codes = self.chip = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Qconv2dDoreFa(CrossbarLayer, Qconv2d):
    """A convolution on crossbars: any kernel, stride, padding (numbers, pairs, 'same'), dilation, groups, bias.

    Args: those of `nn.Conv2d`; `spec`, a `CrossbarSpec`; `alpha_init`, PACT clipping level; `wq`, weight quantizer.
    Buffers: `adc_delta` (float64) and `adc_q_min` (int64), `[slices]`; `adc_gain` and `adc_offset`, `[out]`.
    Shapes: `[N, in, H, W]` to `[N, out, H', W']` (channels last in memory).
    Raises: ValueError at the first call with adc_range "calibrated" and no ranges.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair | str = 0,
                 dilation: Pair = 1, groups: int = 1, bias: bool = True, spec: CrossbarSpec = CrossbarSpec(),
                 alpha_init: float = 10.0, wq: str = "dorefa") -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                         wbit=spec.w_bits, abit=spec.a_bits, alpha_init=alpha_init, wq=wq)
        self._init_crossbar(spec)

    def _weight4(self):
        return self.weight

    def _input(self, x):
        return x

    def _output(self, y):
        return y


class QLinearDoreFa(CrossbarLayer, QLinear):
    """A linear layer on crossbars: a 1x1 convolution of a 1x1 image; see `Qconv2dDoreFa`.

    Shapes: `[N, in]` to `[N, out]`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, spec: CrossbarSpec = CrossbarSpec(),
                 alpha_init: float = 10.0, wq: str = "dorefa", out_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias, wbit=spec.w_bits, abit=spec.a_bits, alpha_init=alpha_init,
                         wq=wq, out_scale=out_scale)
        self._init_crossbar(spec)

    def _geometry(self):
        return Geometry()

    def _weight4(self):
        return self.weight[:, :, None, None]

    def _input(self, x):
        return x[:, :, None, None]

    def _output(self, y):
        return y.flatten(1)


def _in_bins_of(counts, layer, ideal):
    """Counts of the reads of cells on a grid, in the bins of ideal cells that are nearest, or the outermost."""
    (low, high), (first, last) = layer.u_span, ideal.u_span
    bins = torch.arange(low, high + 1, dtype=torch.float64) * (layer.unit / ideal.unit)
    bins = (bins.round().clamp(first, last) - first).long().expand(counts.shape)
    return counts.new_zeros(*counts.shape[:2], last - first + 1).scatter_add_(2, bins.to(counts.device), counts)


def _reference_sum(layer, codes):
    """What a digital reference subtracts under each output pixel, `L sum A`, or twice the sum of A times the reference cells:
    float64 `[N, H', W', out]`."""
    top, bottom, left, right = layer.geometry.padding
    groups, (kh, kw) = layer.geometry.groups, layer.kernel
    x = F.pad(codes.permute(0, 3, 1, 2).double(), (left, right, top, bottom))
    if layer.cells is None:
        weight = torch.full((groups, layer.group_channels, kh, kw), float(layer.zero_twice), dtype=x.dtype, device=x.device)
    else:
        rows = sum(2.0 ** (layer.spec.cell_bits * k) * part.double() for k, part in enumerate(layer.cells.reference))
        weight = 2 * layer.unit * rows.view(groups, kh, kw, -1).permute(0, 3, 1, 2).to(x.device)
    sums = F.conv2d(x, weight, None, layer.geometry.stride, 0, layer.geometry.dilation, groups)
    return sums.permute(0, 2, 3, 1).repeat_interleave(len(layer.w_codes) // groups, dim=3)


def crossbar_layers(model: nn.Module) -> list[tuple[str, CrossbarLayer]]:
    """`[(name, layer), ...]` of all layers on crossbars, in the order of the network."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CrossbarLayer)]


def set_spec(model: nn.Module, spec: CrossbarSpec) -> None:
    """Put every crossbar layer of `model` on `spec`; calibrated ranges are dropped.

    Raises: ValueError for other bits than those of a layer.
    """
    for _, layer in crossbar_layers(model):
        layer.set_spec(spec)
