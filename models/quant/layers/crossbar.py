"""Layers on crossbars, and the calls that set the hardware and the engine of a whole network."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import engines
from ..arrays import adc
from ..arrays.cells import Cells
from ..arrays.mapping import MappedLayer
from ..arrays.readout import next_call
from ..arrays.spec import CrossbarSpec, Geometry, check_is_spec
from ..kernels import elementwise
from ..kernels.output import ToCodes
from . import channels
from .eager import outside_graphs
from .layers import Pair, Qconv2d, QLinear
from .on_arrays import ADC_BUFFERS, OnArrays
from .quantizers import act_codes, warn_of_nan


class _StraightThrough(torch.autograd.Function):
    """The simulated output forward, the gradient of the quantized layer backward: straight through the ADC. That gradient
    does not depend on the layer's output, which is computed only where a chip is corrected to it."""

    @staticmethod
    def forward(ctx, codes, weight, bias, x, layer, scale):
        ctx.save_for_backward(codes, weight)
        ctx.layer, ctx.scale = layer, scale
        # The type of the quantized layer's output: autocast makes codes of 16 bits, and a float32 bias float32 of their sums.
        dtype = codes.dtype if bias is None else torch.promote_types(codes.dtype, bias.dtype)
        simulated = layer.simulate(x)
        if layer.correct_batches and layer.chip and layer.spec.adc_range == "calibrated" and len(x):
            simulated = layer._corrected_to_batch(simulated, codes, weight, scale)
        simulated = simulated.to(dtype)
        return simulated.new_empty(0).set_(simulated)  # no view: what follows may change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        layer, (codes, weight) = ctx.layer, ctx.saved_tensors
        of_bias = None if layer.bias is None else grad.sum([dim for dim in range(grad.dim()) if dim != 1]) * layer.out_scale
        grad = grad.to(codes.dtype) * ctx.scale
        return *layer._operation_gradients(grad, codes, weight, ctx.needs_input_grad[:2]), of_bias, None, None, None


class NoGradient(torch.autograd.Function):
    """The output of arrays in evaluation mode, which have no gradient: whoever asks for one is told, where PyTorch would say that there is
    none, or give that of the digital layers behind alone."""

    @staticmethod
    def forward(ctx, y, *_):
        return y.new_empty(0).set_(y)  # no view, see `_StraightThrough`

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a layer on crossbars has gradients in training mode only: call network.train() before the forward pass. Batch "
                           "norms and dropout, if they are to stay as they are, can be put back with .eval()")


class CrossbarLayer(OnArrays):
    """What both layers share: what lies on their arrays (`OnArrays`), and what these make of an input.

    `y = gain out_scale (s_a s_w sum A (2 W - L) + bias) + offset`, the sum taken by an engine read by read; gain 1 and
    offset 0 until `correct` sets them, and with any adc_range but "calibrated". In training mode the gradient is that of
    the quantized layer without arrays: straight through the ADC and its correction.

    Attributes: correct_batches, in training mode and on a chip each channel of the output is brought to the mean and the deviation
    that it has for this batch without arrays, as `correct` does for the chip that is used. For trainings that see many chips: the
    correction that the layer has belongs to one of them, and what batch norm does not make up for (the last layer has none) would
    be off in each step. Of several processes each corrects to its part of the batch.
    """

    channel_dim = 1  # of the output
    shared = False  # whether the network calls it more than once
    correct_batches = False

    def _weight4(self):
        return self.weight

    def _input(self, x):
        return x

    def _output(self, y):
        return y

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """The simulated output for input x, in the type of x (autocast aside); with gradients in training mode only."""
        self._check_input(x)
        if not torch.is_grad_enabled():
            return self.simulate(x)
        if not self.training:
            return NoGradient.apply(self.simulate(x), x, self.weight)
        codes, weight, scale = self._operands(x)
        if torch.is_autocast_enabled(x.device.type):
            codes, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (codes, weight))
        return _StraightThrough.apply(codes, weight, self.bias, x.detach(), self, scale)

    def extra_repr(self) -> str:
        spec, slices, blocks = self.cell_spec, len(self.slice_bits), len(self.arrays) * self.geometry.groups
        rows = max(stop - start for start, stop in self.arrays)
        missing = spec.adc_range == "calibrated" and not bool(self.adc_delta.all())
        return ", ".join([
            *filter(None, [super().extra_repr()]),
            f"{'pairs of ' if spec.weights == 'pair' else ''}{spec.cell_bits}-bit cells in {slices} slice{'s' * (slices > 1)}",
            f"{blocks} row blocks of up to {rows} rows" if blocks > 1 else f"a row block of {rows} rows",
            spec.adc_text + (", without ranges as yet" if missing else ""), *(["on a chip"] if self.chip else [])])

    def simulate(self, x: Tensor) -> Tensor:
        """The layer's output as the arrays give it, in the type of x; no gradient."""
        return self.of_codes(self.a_codes(x)).to(x.dtype)

    @torch.no_grad()
    def unquantized(self, x: Tensor) -> Tensor:
        """The layer's output if neither input nor weight were quantized, in float32: an input below zero is still zero, as PACT is the
        network's ReLU, and one above the clipping level is what it is. Of weights that came as codes these are the weights."""
        with torch.autocast(x.device.type, enabled=False):
            return self._finish(self._operation(x.detach().float().clamp_min(0), self.unquantized_weight()), self.out_scale)

    def unquantized_weight(self) -> Tensor:
        """The weight that was rounded to the codes, of DoReFa `t / max|t|`; codes are worth `weight_quant.step (2 W - L)` beside it. Of
        weights that came as codes what these are worth."""
        if self._w_codes is None:
            return self.weight_quant.unrounded(self.weight.detach().float())
        step = torch.as_tensor(self.weight_quant.step, device=self.weight.device).reshape(-1, *[1] * (self.weight.dim() - 1))
        return ((2 * self.w_codes().float() - self.weight_quant.zero_twice) * step).view(self.weight.shape)

    def _corrected_to_batch(self, simulated, codes, weight, scale):
        """See `correct_batches`; codes, weight and scale are the layer's `_operands`."""
        with torch.autocast(codes.device.type, enabled=False):  # sums of codes go beyond what 16 bits hold
            exact = self._finish(self._operation(codes.float(), weight.float()), scale)
        wanted, found = (channels.std_mean(y, self.channel_dim) for y in (exact, simulated))
        return channels.scaled(simulated, *channels.towards(wanted, found), self.channel_dim)

    def gives_codes(self, device: torch.device) -> bool:
        """Whether `of_codes` can make the codes of the next layer; its weights do not matter."""
        engine, layer, *_ = self._prepare(device, any_weight=True)
        return hasattr(engine, "scaled") and not self._subtracts_behind(layer)

    @staticmethod
    def _subtracts_behind(layer):
        """Whether what a digital reference takes off is in the engine's sums: in those of reads, with an ADC or not, as `engines` says."""
        return layer.spec.reference == "digital" and (layer.spec.adc_range != "ideal" or layer.readout is not None)

    def of_codes(self, codes: Tensor, to_codes: ToCodes | None = None) -> Tensor:
        """The layer's output for activation codes, uint8 `[N, H, W, in]`, in float32; or, with `to_codes` and where
        `gives_codes`, the codes that the next layer makes of it, uint8 `[N, H', W', out]`.

        Raises: ValueError for codes of other channels, or of fewer pixels than the kernel has.
        """
        size = self._output_size(codes)
        if self.watch is not None:
            self.watch(codes)
        if not len(codes):  # a range of no images is none
            shape = 0, *size, len(self.weight)
            return codes.new_empty(shape) if to_codes is not None else self._output(
                torch.empty(shape, device=codes.device, dtype=torch.float32).permute(0, 3, 1, 2))
        with torch.autocast(codes.device.type, enabled=False), next_call(self):  # sums of codes are exact in float32, not in bfloat16
            return self._of_codes(codes, to_codes)

    def _check_channels(self, channels):
        expected = self.w_shape[1] * self._geometry().groups
        if channels != expected:
            raise ValueError(f"the input has {channels} channels; {expected} are expected")

    def _output_size(self, codes):
        """Height and width of the output. Raises: see `of_codes`."""
        self._check_channels(codes.shape[3])
        return self._geometry().output_size(*codes.shape[1:3], self.w_shape[2:])

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
        if self.spec.adc_range != "calibrated":
            return torch.ones_like(self.adc_gain), self._own_offset()
        return self.adc_gain, self.adc_offset + self.adc_gain * self._own_offset()

    def _own_offset(self):
        """What the output is where all codes are 0, `[out]`."""
        return torch.zeros_like(self.adc_offset) if self.bias is None else self.bias.detach().float() * self.out_scale

    def scale_and_offset(self) -> tuple[Tensor, Tensor]:
        """Those of each output channel, float64 `[out]`: without an ADC the output is `scale sum A (2 W - L) + offset`."""
        offset = self._own_offset().double()
        return self._scale().expand_as(offset), offset

    def _exact_sums(self, made, codes):
        """`sum A (2 W - L)` as the arrays give it, float64 `[N, H', W', out]`: exact wherever the ADC is, so that a lossless ADC equals
        the integer convolution. Args: made, result of `_prepare`."""
        engine, layer, prepared, _ = made
        acc = engine.accumulate(prepared, codes)
        total = sum(plane.double() * value for plane, value in zip(acc, engines.value(layer)))
        return total - _reference_sum(layer, codes) if self._subtracts_behind(layer) else total

    def parts(self, x: Tensor) -> list[Tensor]:
        """All codes that the arrays see of input `x`, uint8 `[N, H, W, in]` each, one read after the other. Raises: as the layer does for
        an input that it does not take."""
        self._check_input(x)
        codes = self.a_codes(x)
        self._output_size(codes)
        return [codes]

    def a_codes(self, x: Tensor) -> Tensor:
        """Activation codes of the layer's input, uint8 `[N, H, W, in]`. What is not a number gets a code, with a warning."""
        x = x.detach()
        images = self._input(x.float()).permute(0, 2, 3, 1)
        alpha, levels = self.act_quant.act_alpha.detach().float(), self.act_quant.levels
        if x.device.type == "cpu":
            codes, unknown = elementwise.act_codes(images, alpha, levels)
        else:
            codes, unknown = act_codes(images, alpha, levels).to(torch.uint8).contiguous(), True
        if unknown:
            warn_of_nan(x)
        return codes

    def check_reads(self, curved: bool, depends_on_level: bool) -> None:
        """Refuse reads that the inputs of the layer cannot have: here none. Raises: ValueError."""

    def binned(self, cells: Cells | None) -> Cells | None:
        """The cells in whose bins reads of these cells are counted: ideal ones (None), in whose fewer bins ranges are found sooner,
        but with a digital reference, where an off-current takes reads beyond them."""
        return cells if self.cell_spec.reference == "digital" else None

    def counter(self, device: torch.device, cells: Cells | None = None) -> Callable[[Tensor], Tensor]:
        """`f(x)` that returns the exact counts of the read values of these cells, or of ideal ones, for inputs `x`; see `engines` and
        `binned`."""
        layer = self.mapped("ideal", cells)
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
        numbers = [self.adc_delta, self.adc_q_min, *self.weight_quant.numbers(),
                   *([] if self.adc_bits_plan is None else [self.adc_bits_plan])]

        def make():  # a conversion changes scales of the same cells some times
            return *self._laid_out.get(settings, numbers, self.w_source, lambda: self._lay_out(device)), self._scale()
        return self._prepared.get(settings, [*self._numbers(), *numbers], self.w_source, make, any_weight)

    def way(self, x: Tensor) -> str:
        """The engine, and which way through it the (first) reads of input x go, for people."""
        engine, _, prepared, _ = self._prepare(x.device)
        name, of = engines.name_of(engine), getattr(engine, "way", None)
        return name if of is None or isinstance(prepared, list) else f"{name}: {of(prepared, self._first_codes(x))}"

    def _first_codes(self, x):
        return self.parts(x)[0]

    def _lay_out(self, device: torch.device) -> tuple[ModuleType, MappedLayer, object]:
        warn_of_nan(self.w_source.detach(), "weight")
        if not self.training:
            self.check_versions()
        layer = self.mapped()
        engine, reason = engines.choose(engines.selected(), layer, device)
        if adc.is_lossless(layer):
            layer = self.mapped("ideal")
            reason += ", one integer convolution where the ADC changes no read"
        if layer.spec.adc_range == "ideal" and not self.chip:
            layer = self._with_offset_cells(layer)
        engines.announce(engine, reason)
        return engine, layer, engine.prepare(layer)

    def _numbers(self):
        """What decides the scale, beside the weight quantizer."""
        return [self.act_quant.act_alpha]

    def _scale(self):
        """What `A (2 W - L) = 1` is worth in the output, float64. Raises: ValueError for a clipping level that is none."""
        alpha = self.act_quant.act_alpha.detach()
        if not 0 < alpha.item() < float("inf"):
            raise ValueError(f"act_alpha, the clipping level of this layer's inputs, is {alpha.item():g}; it must be above 0 and finite")
        return alpha.double() / self.act_quant.levels * self.weight_quant.step * self.out_scale

    def _with_offset_cells(self, layer):
        """A layer with ideal cells that has no ADC: pairs and offset cells give the same sums, and those of codes are faster."""
        if layer.spec.weights == "offset":
            return layer
        spec = replace(self.spec, adc_range="ideal", weights="offset")
        return replace(layer, spec=spec, reference_twice=self._reference_twice(spec), cells=None, worth=2)


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
        self._put_on(spec)


class QLinearDoreFa(CrossbarLayer, QLinear):
    """A linear layer on crossbars: a 1x1 convolution of a 1x1 image; see `Qconv2dDoreFa`.

    Shapes: `[N, in]` to `[N, out]`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, spec: CrossbarSpec = CrossbarSpec(),
                 alpha_init: float = 10.0, wq: str = "dorefa", out_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias, wbit=spec.w_bits, abit=spec.a_bits, alpha_init=alpha_init,
                         wq=wq, out_scale=out_scale)
        self._put_on(spec)

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
    u = torch.from_numpy(layer.bins.values).double() * (layer.unit / ideal.unit)
    place = ideal.bins.index(u.round().clamp(*ideal.u_span).long()).expand(counts.shape)
    return counts.new_zeros(*counts.shape[:3], ideal.bins.count).scatter_add_(3, place.to(counts.device), counts)


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


def on_crossbars(model: nn.Module) -> list[tuple[str, CrossbarLayer]]:
    """`crossbar_layers`. Raises: ValueError where there are none."""
    if layers := crossbar_layers(model):
        return layers
    raise ValueError("this network has no layers on crossbars: convert(model, spec, images) makes one that has")


def ranges_of(model: nn.Module) -> list[list[Tensor | None]]:
    """ADC ranges, plans and corrections of the crossbar layers of `model`: the values of `ADC_BUFFERS`, layer by layer."""
    return [[getattr(layer, name) for name in ADC_BUFFERS] for _, layer in crossbar_layers(model)]


def give_ranges(model: nn.Module, ranges: list[list[Tensor | None]]) -> None:
    """Give the crossbar layers of `model` what `ranges_of` returned, for a model on the same hardware."""
    for (_, layer), values in zip(crossbar_layers(model), ranges):
        for name, value in zip(ADC_BUFFERS, values):
            setattr(layer, name, None if value is None else value.to(layer.weight.device, copy=True))
        layer.ranges_of = None


def set_spec(model: nn.Module, spec: CrossbarSpec) -> None:
    """Put every crossbar layer of `model` on `spec`; calibrated ranges are dropped. Layers of a converted network keep the bits of their
    weights and inputs.

    Raises: ValueError for a network without crossbars, and for other bits than those of a layer that was not converted.
    """
    check_is_spec(spec)
    for _, layer in on_crossbars(model):
        layer.set_spec(spec)
