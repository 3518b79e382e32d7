"""A layer on crossbars that stands for one product of a network of any code (`convert`)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import engines
from ..arrays import adc
from ..arrays.cells import Cells
from ..arrays.mapping import MappedLayer
from ..arrays.readout import first_image, image_count, image_numbers, next_call
from ..arrays.spec import MOST_ROWS, CrossbarSpec, Geometry
from ..kernels import elementwise
from ..layers.convolution import convolution
from ..layers.crossbar import CrossbarLayer, NoGradient
from ..layers.eager import outside_graphs
from ..layers.on_arrays import ADC_BUFFERS
from ..layers.prepared import fingerprint
from . import encodings
from .binding import Bound, plain
from .linear_quantizers import InputQuantizer, LinearWQ
from .products import Form
from .straight_through import Product

LOADED = ["loaded"]  # `_made_of`, until the whole state is


class ConvertedLayer(CrossbarLayer, nn.Module):
    """`y_c = gain_c (g_c (s_a s_c sum A (2 W - L) / 2 + bias_c) + o_c) + offset_c`: a product with quantized weight and input.

    `g_c`, `o_c` make up for what quantization does to the float network's channels (`convert`), gain and offset for what ADCs do
    (`calibrate`). In training it is a `Product`, with straight-through gradients: of the quantized input and weight, or what arrays make of
    them (`through`).

    Args: form, the product; root, the parameter, a `Bound`, and path, how the weight follows from it; weight, as the product takes it;
        sources, of one that is computed at each call and kept as a buffer (`tracing.Product`), else None; spec, the hardware, whose bits
        are those of the network; bits, (w, a) of this layer; encoding, one of `encodings.ENCODINGS`; quantized, False computes the float
        product.
    Shapes: those of the product.
    """

    EXACT = (*ADC_BUFFERS, "quant_gain", "quant_offset")
    contiguous = False  # whether outputs are, as those of PyTorch are: for networks that view them in other shapes
    bias = None  # comes with each call
    _made_of: list | None = None  # what the sources of `made` were, see `fingerprint`; None: whatever they are now, `made` is outdated
    out_scale = 1.0
    through = "quantizers"  # what a forward pass in training goes through, one of `training.WAYS`

    def __init__(self, form: Form, root: Bound, path: str, weight: Tensor, sources: tuple[tuple[nn.Module, str], ...] | None,
                 spec: CrossbarSpec, encoding: str, quantized: bool = True) -> None:
        super().__init__()
        self.form, self.path, self.encoding, self.quantized = form, path, encoding, quantized
        self._root = (root,)  # in a tuple: it is no parameter of this layer, nor are modules of the sources its children
        self._sources, self._w_shape = sources, tuple(form.kernel(weight).shape)
        self.view = None if sources is not None or not path else (
            tuple(weight.shape), weight.stride(), weight.storage_offset() - root.storage_offset(), root.stride())
        self.register_buffer("made", None if sources is None else weight.detach().clone())
        self.weight_quant, self.act_quant = LinearWQ(spec.w_bits), InputQuantizer(spec.a_bits, encoding)
        self.register_buffer("quant_gain", torch.ones(len(self.weight), dtype=torch.float32))
        self.register_buffer("quant_offset", torch.zeros(len(self.weight), dtype=torch.float32))
        self._bias: Tensor | None = None
        self._put_on(self.fitted(spec))

    @property
    def root(self) -> Bound:
        """The parameter."""
        return self._root[0]

    def facts(self, names: Mapping[nn.Module, str]) -> dict[str, Any]:
        """What `installing.bound_again` makes this layer of, plain values. Args: names, of the network's modules."""
        return {"path": self.path, "form": asdict(self.form), "view": self.view, "shared": self.shared, "contiguous": self.contiguous,
                "made": None if self.made is None else ([*self.made.shape], str(self.made.dtype)), "encoding": self.encoding,
                "sources": self._sources and [(names[module], key) for module, key in self._sources],
                "bits": (self.weight_quant.wbit, self.act_quant.abit) if self.quantized else None}

    # -- the weight

    @property
    def operand(self) -> Tensor:
        """The weight as the product takes it, as it was last seen where it is computed at each call."""
        if self.made is not None:
            return self.made
        with torch._C.DisableTorchFunctionSubclass():
            root = plain(self.root.detach())
            if self.view is None:
                return root
            shape, stride, start, root_stride = self.view
            if root.stride() != root_stride:  # in another order of memory the parts lie elsewhere
                root = torch.empty_strided(root.shape, root_stride, dtype=root.dtype, device=root.device).copy_(root)
            return root.as_strided(shape, stride, root.storage_offset() + start)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in / groups, kh, kw]`, float32."""
        return self.form.kernel(self.operand).float()

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight codes, `[out, in / groups, kh, kw]`; asked for at each call, so not of a weight that is made anew."""
        return self._w_shape

    @property
    def w_source(self) -> Tensor:
        """What the weight codes are made of."""
        return self.operand if self._w_codes is None else self._w_codes

    def see(self, weight: Tensor) -> None:
        """Take note of the weight as the network has it at this call."""
        if self.made is not None:
            self.made = weight.detach()
            self._made_of = self._sources_now()

    def settle(self) -> None:
        """A weight that is computed at each call was loaded, with all that it is computed from, where that was loaded at all."""
        if self._made_of == LOADED:
            self._made_of = self._sources_now()

    def _sources_now(self):
        sources = (getattr(module, name, None) for module, name in self._sources)
        return fingerprint([plain(each.detach()).contiguous() for each in sources if isinstance(each, Tensor)])

    def w_codes(self) -> Tensor:
        """See `OnArrays.w_codes`. Raises: ValueError where the weight is computed at each call, and what it is computed from has changed
        since the last one."""
        if self.made is not None and self._w_codes is None:
            self.settle()
            if self._made_of != self._sources_now():
                raise ValueError(f"the weight that is made of {self.root.label} is computed anew at each call, and what it is made of "
                                 "has changed since the last call; run the network on an input in evaluation mode first")
        return super().w_codes()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "made" in state_dict:
            self._made_of, self.made = LOADED, torch.empty_like(self.made)  # the last one may be a tensor of inference mode
        self.act_quant.load_window(state_dict, prefix + "act_quant.")
        if self.fitted(self._spec) != self._spec:  # other codes have other digits, of which each has its place in a plan
            self.set_spec(self._spec)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def fit(self, sample: Tensor, lowest: float, largest: float, weight_scale: str | Tensor | float,
            activations: str | tuple[float, int, int]) -> None:
        """Choose the scales, or take those that are given. Args: see `fit`, `set_scale` and `set_window` of the quantizers."""
        if isinstance(weight_scale, str):
            self.weight_quant.fit(self.weight, weight_scale)
        else:
            self.weight_quant.set_scale(weight_scale, len(self.weight))
        if isinstance(activations, str):
            self.act_quant.fit(sample, lowest, largest, activations)
        else:
            self.act_quant.set_window(activations)
        self.set_spec(self.spec)

    @torch.no_grad()
    def set_weight(self, kernel: Tensor) -> None:
        """Write other values into the network's weight, which is not one that is computed anew at each call."""
        self.operand.copy_(self.form.matrix(kernel))

    @torch.no_grad()
    def clip_weight(self, deviations: float, of_channel: bool) -> None:
        """Clip the network's weight to so many standard deviations of all of it, or of its output channel. One that is computed anew at
        each call stays as it is."""
        if self.made is None:
            kernel, weight = self.weight, self.operand
            most = kernel.flatten(1).std(1, correction=0) if of_channel else kernel.std(correction=0).expand(len(kernel))
            most = self.form.beside(deviations * most, weight).to(weight.dtype)
            weight.copy_(torch.clamp(weight, -most, most))

    # -- the hardware

    def fitted(self, spec: CrossbarSpec) -> CrossbarSpec:
        """The hardware of a network with this layer's bits; an input of signed codes has as many as its parts have."""
        w_bits, a_bits = self.weight_quant.wbit, self.act_quant.bits
        tallest = max(stop - start for start, stop in self._arrays_on(spec))
        if self._ternary and tallest > MOST_ROWS // 2:
            raise ValueError(f"rows is {spec.rows} with inputs 'ternary', and an array of this layer has {tallest} of them; allowed are at "
                             f"most {MOST_ROWS // 2}")
        if self.encoding == "twos" and spec.dac_bits > 1 and self.act_quant.signed:
            raise ValueError("inputs 'twos' needs dac_bits 1, because its negative digit has one bit; take dac_bits 1, or inputs "
                             "phases")
        return replace(spec, w_bits=w_bits, a_bits=a_bits, cell_bits=min(spec.cell_bits, w_bits), dac_bits=min(spec.dac_bits, a_bits))

    def _geometry(self) -> Geometry:
        geometry = self.form.geometry
        return replace(geometry, padding=(0, 0, 0, 0)) if self.act_quant.signed and self.encoding == "offset" else geometry

    def mapped(self, adc_range: str | None = None, cells: Cells | str | None = "own") -> MappedLayer:
        """The layer as engines see it; see `CrossbarLayer.mapped`. Ternary inputs have two rows of cells for each word line."""
        layer = super().mapped(adc_range, cells)
        if not self._ternary:
            return layer
        layer = self._with_signed_rows(layer)
        if layer.spec.adc_range == "full":
            nominal = self._with_signed_rows(super().mapped("ideal", self.chip.nominal if self.chip else None))
            delta, q_min = zip(*adc.full_ranges(replace(nominal, spec=layer.spec)))
            layer = replace(layer, adc_delta=torch.tensor(delta, dtype=torch.float64), adc_q_min=torch.tensor(q_min))
        return layer

    def check_reads(self, curved: bool, depends_on_level: bool) -> None:
        """Refuse reads behind the curve of gate access, or whose noise depends on the level, where lines of both signs have none."""
        if self._ternary and (curved or depends_on_level):
            raise ValueError("inputs 'ternary' have no gate access and no read noise that grows with conductance; take inputs 'phases'")

    @property
    def _most_rows(self):
        return super()._most_rows * (2 if self._ternary else 1)

    @property
    def _ternary(self):
        return self.encoding == "ternary" and self.act_quant.signed

    def _with_signed_rows(self, layer):
        if layer.cells is None:  # ideal ones, on a grid of whole levels: on a finer one ranges would take a step below a level for exact
            layer = replace(layer, cells=self.ideal_cells()).in_levels
        cells, readout = layer.cells, layer.readout
        self.check_reads(readout is not None and readout.curve is not None, readout is not None and readout.depends_on_level)
        # For each word line a row of cells that adds and one that takes off, next to each other.
        values, reference = (torch.stack([part, -part], 3).flatten(2, 3) for part in (cells.values, cells.reference))
        spec = replace(layer.spec, rows=min(2 * layer.spec.rows, MOST_ROWS))
        return replace(layer, spec=spec, w_codes=layer.w_codes.repeat_interleave(2, 1), cells=Cells(values, reference, cells.fraction_bits))

    def _lay_out(self, device):
        engine, layer, prepared = super()._lay_out(device)
        if self._sums_at_once(layer):
            layer = self._with_offset_cells(super().mapped("ideal", None))
            spec = replace(layer.spec, a_bits=self.act_quant.abit, dac_bits=1)
            layer = replace(layer, spec=spec, geometry=replace(layer.geometry, padding=(0, 0, 0, 0)))
            engine, _ = engines.choose(engines.selected(), layer, device)
            prepared = engine.prepare(layer)
        elif self._top_is_apart(layer):
            prepared = [(part, engine.prepare(part)) for part in self._low_and_top(layer)]
        return engine, layer, prepared

    def _first_codes(self, x):
        if self._sums_at_once(self._prepare(x.device)[1]):
            return self._parts(plain(x.detach()), "offset")[0].codes
        return super()._first_codes(x)

    def _top_is_apart(self, layer):
        """Whether the digit that counts negative is read apart from the others: where a converter's noise or offset makes something of
        reads without word lines too, so that taking the top digit off twice would take off those of the others."""
        return self.encoding == "twos" and self.act_quant.signed and (layer.readout is not None or layer.compares)

    def _low_and_top(self, layer):
        """The layer of the digits below the top one, and that of the top one; without the first where there is but one digit."""
        digits, planned = len(layer.spec.digit_bits), layer.spec.planned
        found = []
        for first, last in ((0, digits - 1), (digits - 1, digits)):
            adcs = {name: getattr(layer, name)[first:last] for name in ("adc_delta", "adc_q_min", "adc_bits_plan")} if planned else {}
            if last > first:
                found.append(replace(layer, spec=replace(layer.spec, a_bits=last - first), **adcs))
        return found

    def _low_and_top_sums(self, x, made):
        """`sum A (2 W - L)`, float64, of an input in two's complement whose top digit is read apart."""
        engine, layer, prepared, scale = made
        top = 2 ** (layer.spec.a_bits - 1)
        codes = self._parts(x, self.encoding)[0].codes
        parts = [encodings.Part(codes & (top - 1)), encodings.Part(codes // top, -top, encodings.OTHER_PHASE)][-len(prepared):]
        return sum(part.factor * self._numbered(x, part, partial(self._exact_sums, (engine, of_digits, ready, scale)))
                   for part, (of_digits, ready) in zip(parts, prepared))

    def _sums_at_once(self, layer):
        """Whether one sum of codes with an offset does for both signs: where no ADC sees it."""
        return self.act_quant.signed and layer.spec.adc_range == "ideal" and not self.chip

    @property
    def channel_dim(self) -> int:
        """Dimension of the output's channels."""
        return self.form.channel_dim

    def _numbers(self):
        return [self.act_quant.scale, self.quant_gain]

    def _scale(self):
        return self.act_quant.scale.detach().double() * self.weight_quant.step.double() * self.quant_gain.double()

    def _own_offset(self):
        return self.quant_offset if self._bias is None else self.quant_offset + self.quant_gain * self._bias.detach().float()

    def extra_repr(self) -> str:
        return f"{self.form}, weights {list(self.w_shape)}, {super().extra_repr()}"

    # -- the product

    @outside_graphs
    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The product of `x` and the weight, plus the bias, in the type of `x`. Args: weight, as the network computed it, which `see` was
        shown; None: as it was last seen."""
        if not self.quantized:
            return self._in_float(x, self.form.kernel(self.operand if weight is None else weight), bias)
        self._bias = None if bias is None else plain(bias.detach())  # no parameter of this layer
        if not torch.is_grad_enabled():
            return self.simulate(x)
        if not self.training:
            return NoGradient.apply(self.simulate(x), x, weight, bias)
        x = plain(x)
        arrays = self.through != "quantizers" and x.numel()
        y = Product.apply(self.form.images(x), self.form.kernel(self.operand if weight is None else weight), bias, self.act_quant.scale,
                          self.weight_quant.scale, self, x.detach() if arrays else None)
        return self._shaped(y, x)

    def simulate(self, x: Tensor) -> Tensor:
        """The product as the arrays give it, in the type of `x`; no gradient."""
        x = plain(x.detach())
        if not x.numel():
            return self.form.empty(x, self.operand)
        y = self._shaped(self.reads(x), x)
        if self.watch is not None:
            passes = [part for part in self._parts(x, self.encoding) if not part.repeats]
            for number, part in enumerate(passes):
                self.watch(part.pulses, again=number > 0, inputs=x.numel(), multiplications=self.form.multiplications(x, self.operand, y))
        return y

    def reads(self, x: Tensor) -> Tensor:
        """What the arrays make of `x`, as pixels: float32 `[N, H', W', out]`."""
        with torch.autocast(x.device.type, enabled=False), next_call(self):
            return self._signed(x) if self.act_quant.signed else self._numbered(
                x, self._parts(x)[0], lambda codes: self._of_codes(codes, None)).contiguous()

    def _shaped(self, y, x):
        """`[N, H', W', out]` as the product with `x` has it."""
        y = self.form.outputs(y, x).to(x.dtype)
        return y.contiguous() if self.contiguous else y

    def _signed(self, x):
        """`[N, H', W', out]` of an input with codes below zero."""
        made = engine, layer, prepared, scale = self._prepare(x.device)
        gain, offset = self._correction()
        scale = (scale * gain.double()).float()
        if self._sums_at_once(layer):
            [part] = self._parts(x, "offset")
            return engines.scaled(engine, prepared, part.codes, [1.0], scale, offset, self._of_an_offset(layer))
        if self._top_is_apart(layer):
            return self._low_and_top_sums(x, made).float() * scale + offset
        values, parts = engines.value(layer), self._parts(x, self.encoding)
        if len(values) > 1 or self.encoding == "offset" or self._subtracts_behind(layer):
            total = self._total(x, parts, lambda codes: self._exact_sums(made, codes))
            if self.encoding == "offset":
                total = total + self._of_an_offset(layer)
            return total.float() * scale + offset
        return scaled(self._total(x, parts, lambda codes: engine.accumulate(prepared, codes)[0]), scale * values[0], offset)

    def _total(self, x, parts, run):
        """`sum of factor run(codes)` over the parts, int64 or float64: as few passes over memory as there are parts."""
        total = None
        for part in parts:
            sums = self._numbered(x, part, run)
            if total is None:
                sums = sums if sums.is_floating_point() else sums.long()
                total = sums if part.factor == 1 else sums * part.factor
            else:
                total.add_(sums, alpha=part.factor)
        return total

    def _numbered(self, x, part, run):
        """`run(codes)` with the numbers that the images of a part have for the noise of its reads: the network's images may be several of
        a layer each, planes or windows."""
        images, whole = len(part.codes), image_count()
        several = -(-images // whole) if whole else self.form.planes_of(x)  # rounded up: no two of a batch are alike
        with image_numbers(first_image() * several + part.image_shift):
            return run(part.codes)

    def parts(self, x: Tensor) -> list[Tensor]:
        """All codes that the arrays see of input `x`, uint8 `[N, H, W, in]` each, one read after the other."""
        return [part.codes for part in self._parts(plain(x.detach()), self.encoding) if not part.repeats]

    def _parts(self, x, encoding=encodings.ENCODINGS[0]):
        images = self.form.images(x)
        self._check_channels(images.shape[3])
        codes = partial(self.act_quant.codes, images)
        return encodings.parts(codes, self.act_quant.window[0], encoding, self.form.geometry.padding, self.act_quant.abit)

    def _of_an_offset(self, layer):
        """`lo sum (2 W - L)` of each output channel, int64: what codes `A - lo` in place of A have too little."""
        if self.chip and self.chip.code_sums is not None:
            return self.act_quant.window[0] * self.chip.code_sums.to(self.act_quant.scale.device)
        return self.act_quant.window[0] * (2 * layer.w_totals - self.weight_quant.zero_twice * layer.w_codes[0].numel())

    def _output(self, y):
        return y.permute(0, 2, 3, 1)  # `outputs` does the rest

    @torch.no_grad()
    def unquantized(self, x: Tensor) -> Tensor:
        """The product of input and weight as the network has them, with the bias of the last call, in the type of `x`."""
        x = plain(x.detach())
        with torch.autocast(x.device.type, enabled=False):
            return self._in_float(x, self.unquantized_weight().to(x.dtype), self._bias)

    def _in_float(self, x, kernel, bias):
        """The product of the numbers as they are."""
        y = convolution(self.form.images(x).permute(0, 3, 1, 2), kernel, self.form.geometry).permute(0, 2, 3, 1)
        y = y.contiguous()  # channels last, as arrays give it: what suits one of both suits the other
        return self._shaped(y if bias is None else y + bias, x)


def scaled(sums: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`float32(sums) scale + offset` of integers `[N, H, W, out]`, contiguous; may be written over them."""
    if sums.device.type == "cpu":
        return elementwise.scaled(sums, scale, offset)
    return sums.float() * scale + offset
