"""What a layer has on its arrays: its hardware, ADC ranges and correction, weight codes and cells."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..arrays import adc, pair
from ..arrays.cells import Cells, Chip, fraction_bits
from ..arrays.mapping import MappedLayer, array_bounds, w_rows
from ..arrays.plans import Plan
from ..arrays.readout import Readout
from ..arrays.spec import ADC_GRID, CrossbarSpec, Geometry
from .prepared import Prepared, fingerprint

LARGEST_STEP = 2**32  # of a plan: far beyond all reads, and engines multiply it by 64 and the place of its reads in 64 bits
ADC_BUFFERS = ("adc_delta", "adc_q_min", "adc_gain", "adc_offset", "adc_bits_plan")  # endings of keys


class KeepsTypes:
    """A module whose buffers `EXACT` keep their types in a network that gets another: `half()` would move codes."""

    def _apply(self, fn, recurse=True):
        exact = {name: None if getattr(self, name) is None else getattr(self, name).detach() for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            own = getattr(self, name)
            if isinstance(own, torch.nn.Parameter):
                own.data = values.to(own.device)
            else:
                setattr(self, name, None if values is None else values.to(own.device))
        return self


class OnArrays(KeepsTypes):
    """The part of a layer that hardware holds: the spec, the ADC ranges and their correction as buffers, the codes of its weight or
    others in their place, and the cells of a chip. `mapped()` is all of it as engines see it.

    A layer adds its quantizers, `weight`, `bias`, `_weight4()`, the weight as `[out, in / groups, kh, kw]`, and `_geometry()`.
    """

    EXACT = ADC_BUFFERS

    def _put_on(self, spec):
        self.register_buffer("adc_bits_plan", None)
        self.register_buffer("adc_delta", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("adc_q_min", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("adc_gain", torch.ones(len(self.weight), dtype=torch.float32))
        self.register_buffer("adc_offset", torch.zeros(len(self.weight), dtype=torch.float32))
        self._w_codes = None
        self.chip: Chip | None = None  # None: ideal cells
        self.watch: Callable[..., None] | None = None  # is shown all codes that reach the arrays: `counts`
        self.ranges_of: str | None = None  # `version` of the weight that ADC ranges and correction were chosen with; None: the next one
        self._codes = Prepared()  # of the weight
        self._laid_out, self._prepared = Prepared(), Prepared()  # what the engine holds, and that with the scale of its sums
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
        """The hardware as reads have it: with the bits that cells hold, fewer than the weight's in some pairs (`pair.on_cells`), and with
        an analog reference where the ADC's range moves (`CrossbarSpec.moves_range`)."""
        return self._on_cells(self.spec)

    def _on_cells(self, spec):
        if spec.moves_range:
            return replace(spec, reference="analog")
        return pair.on_cells(spec, self.weight_quant.zero_twice) if spec.weights == "pair" else spec

    @property
    def slice_bits(self) -> tuple[int, ...]:
        """Bits of the cells of each slice, LSB first."""
        return self.cell_spec.slice_bits

    def set_spec(self, spec: CrossbarSpec) -> None:
        """Put the layer on other hardware of the same bits; ranges of another hardware are dropped, and a chip that is none of the new
        one (`Chip.fits`): its cells are ideal again.

        Raises: ValueError for other bits than those of the layer's quantizers.
        """
        spec = self.fitted(spec)
        if self.chip and not self.chip.fits(self._spec, spec):
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
            none = np.zeros(self._plan_shape)
            self.set_plan(Plan(none, none, none))
        else:
            self.set_ranges([(0.0, 0)] * len(self.slice_bits))

    def set_ranges(self, ranges: Sequence[tuple[float, int]]) -> None:
        """Set `(delta, q_min)` of each slice; `delta` in units of the read value, 0 for not calibrated. A correction, which
        belongs to other ranges, is dropped.

        Raises: ValueError for another number of ranges, or on hardware with a plan.
        """
        if self.spec.planned:
            raise ValueError("ranges of slices are given where the spec has an adc_plan; give a plan (`set_plan`)")
        if len(ranges) != len(self.slice_bits):
            raise ValueError(f"{len(ranges)} ADC ranges are given for {len(self.slice_bits)} slices")
        delta, q_min = zip(*ranges)
        self._take(delta, q_min)

    def _take(self, delta, q_min, bits=None):
        self.adc_delta = self.adc_delta.new_tensor(np.asarray(delta))
        self.adc_q_min, self.adc_bits_plan = (None if codes is None else self.adc_q_min.new_tensor(np.asarray(codes))
                                              for codes in (q_min, bits))
        self.set_correction(torch.ones_like(self.adc_gain), torch.zeros_like(self.adc_offset))
        self.ranges_of = self.version() if np.any(delta) else None

    @property
    def classes(self) -> int:
        """How many classes of n its reads have; see `CrossbarSpec.classes`."""
        return self.spec.classes(self._most_rows)

    @property
    def _plan_shape(self):
        """That of a plan: digits, slices, and classes of n where these are more than two, idle reads and others."""
        return len(self.spec.digit_bits), len(self.slice_bits), *([self.classes] if self.classes > 2 else [])

    @property
    def _most_rows(self):
        """Rows of the fullest array, as engines see it."""
        return max(stop - start for start, stop in self.arrays)

    def set_plan(self, plan: Plan) -> None:
        """Set bits and range of each kind of read (`Plan`), on hardware with an adc_plan; steps of 0 are not calibrated. A correction,
        which belongs to other ranges, is dropped.

        Raises: ValueError for another shape, bits or lowest codes that are not whole numbers, and on hardware without a plan.
        """
        shape = self._plan_shape
        if not self.spec.planned or any(np.shape(values) != shape for values in plan):
            raise ValueError(f"a plan of {list(np.shape(plan.bits))} digits, slices and perhaps classes is given; {list(shape)} is "
                             "expected, and a spec with adc_plan 'significance' or 'ones'")
        for name, values in (("bits", plan.bits), ("q_min", plan.q_min)):
            if (odd := np.asarray(values)[np.asarray(values) % 1 != 0]).size:
                raise ValueError(f"{name} of a plan are whole numbers, and {odd[0]} is given: a mean such as 2.5 is adc_bits of the spec")
        self._take(plan.delta, plan.q_min, plan.bits)

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
        return self._known_codes().clone()

    def _known_codes(self):
        """`w_codes`, not to be changed."""
        if self._w_codes is not None:
            return self._w_codes.to(self.weight.device)
        quantizer = self.weight_quant
        settings, numbers = (type(quantizer), quantizer.levels, quantizer.training), quantizer.numbers()
        return self._codes.get(settings, numbers, self.w_source, lambda: quantizer.codes(self._weight4().detach()))

    def version(self) -> str:
        """What tells the weight codes from others."""
        return hashlib.sha256(fingerprint([self._known_codes()])[0][3]).hexdigest()

    def check_versions(self) -> None:
        """Compare the weight with the one that the chip was programmed with and that ADC ranges were chosen with. Warns where ranges, plan
        and correction are of other codes; those of training lag behind, so who trains does not ask.

        Raises: ValueError for a chip of other codes, which would answer for another network.
        """
        if not self.chip and self.spec.adc_range != "calibrated":
            return
        version = self.version()
        if self.chip and self.chip.of not in (None, version):
            raise ValueError("a layer is on a chip that was programmed with other weights than the layer has now; program the chip anew "
                             "(program), or take ideal cells: program(network, None)")
        if self.spec.adc_range == "calibrated":
            if self.ranges_of not in (None, version):
                warnings.warn("weights have changed since ADC ranges, plans and corrections were chosen for them; choose them anew: "
                              "calibrate(network, images)", RuntimeWarning, 2)
            self.ranges_of = self.ranges_of or version

    def code_sums(self) -> Tensor:
        """`sum (2 W - L)` of each output channel, int64 `[out]`."""
        return (2 * self.w_codes().long() - self.weight_quant.zero_twice).sum((1, 2, 3))

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

    def set_cells(self, cells: Cells | None, nominal: Cells | str | None = "own", readout: Readout | str | None = "own") -> None:
        """Let the cells hold these, until weights are loaded or the hardware's slices change; None: ideal cells again.

        They stay what they are when the weight changes, as on a chip that was programmed. Tensors that are handed over must not be
        changed afterwards: hand over others.

        Args: nominal, the same cells without scatter, on which ADC ranges are chosen (None: ideal ones); readout, what reads have
            besides, see `Readout` (None: nothing). "own": those of the chip that the layer is on, if it is on one.
        Raises: ValueError for cells of another shape.
        """
        if cells is None:
            self.chip = None
            return
        chip, shape = self.chip or Chip(cells), list(self._w_rows().shape)
        nominal, readout = (own if isinstance(given, str) else given
                            for given, own in ((nominal, chip.nominal), (readout, chip.readout)))
        for each in (cells, nominal):
            if each is not None and list(each.values.shape) != [len(self.slice_bits), *shape]:
                raise ValueError(f"cells have shape {list(each.values.shape)}, the layer "
                                 f"{[len(self.slice_bits), *shape]}: slices, groups, rows, outputs of a group")
        own = {} if cells is chip.cells and self.chip else {"code_sums": self.code_sums(), "of": self.version()}
        self.chip = replace(chip, cells=cells, nominal=nominal, readout=readout, **own)

    @property
    def arrays(self) -> list[tuple[int, int]]:
        """Word lines (first, last + 1) of each array of a group, whatever stands for them in what engines see (`mapped`)."""
        return self._arrays_on(self.spec)

    def _arrays_on(self, spec):
        channels, kh, kw = self._weight4().shape[1:]
        return array_bounds(spec.mapping, kh * kw, channels, spec.rows, self._geometry().planes)

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
        if spec.adc_range == "dynamic" and layer.readout is not None and layer.readout.circuits is not None:
            raise ValueError("adc_range is 'dynamic' on a chip whose converters have thresholds or noise in steps, which are others in "
                             "each batch; allowed are calibrated and full")
        return layer

    def _chip_parts(self, cells):
        """(cells, readout) of a mapped layer. Ideal pairs are cells too, on a grid of whole levels."""
        if isinstance(cells, str) and self.chip:
            return self.chip.cells, self.chip.readout
        cells = None if isinstance(cells, str) else cells
        return self._ideal_pairs(0) if cells is None and self.spec.weights == "pair" else cells, None

    @staticmethod
    def _check_ranges(layer):
        if not bool(layer.adc_delta.all()):
            raise ValueError("this layer's ADC range is not calibrated; call calibrate(model, batches), or give `measure` its calibration "
                             "images, load a checkpoint that holds ranges, or take another adc_range")
        if layer.spec.planned:
            OnArrays._check_plan(layer)
            return
        lowest = 1 - 2**layer.spec.adc_bits
        if not bool(((layer.adc_q_min >= lowest) & (layer.adc_q_min <= 0) & (layer.adc_delta > 0) & layer.adc_delta.isfinite()).all()):
            raise ValueError(f"this layer's ADC ranges (steps {layer.adc_delta.tolist()}, lowest codes "
                             f"{layer.adc_q_min.tolist()}) are not of an ADC of {layer.spec.adc_bits} bits with a code "
                             f"for zero, whose lowest code lies between {lowest} and 0; calibrate again")

    @staticmethod
    def _check_plan(layer):
        bits, delta, q_min, most = layer.adc_bits_plan, layer.adc_delta, layer.adc_q_min, layer.spec.adc_max_bits
        on_grid = (delta > 0) & (delta < LARGEST_STEP) & (delta * ADC_GRID == (delta * ADC_GRID).round())
        for right, words in (((bits >= 0) & (bits <= most) & (q_min <= 0) & (q_min >= 1 - 2**bits),
                              f"0 to {most} bits with a code for zero"),
                             (on_grid, f"steps that are multiples of 1/{ADC_GRID} below {LARGEST_STEP}")):
            for kind in (~right).nonzero()[:1]:  # one read of maybe a thousand kinds says enough
                found = [values[tuple(kind)].item() for values in (bits, q_min, delta)]
                raise ValueError("this layer's ADC plan ({} bits, lowest code {}, step {} of digit, slice and perhaps class {}) is not one "
                                 "of {}; calibrate again".format(*found, kind.tolist(), words))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "adc_delta" in state_dict:  # other ranges: a correction comes with them, or there is none
            self._forget_ranges()  # and the weight that they are of is the one that comes with them
        for name in ADC_BUFFERS:  # those made in inference mode cannot be written to
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and own is not None and stored.shape == own.shape:
                setattr(self, name, torch.empty_like(own))
        if any(name.startswith(prefix) for name in state_dict):  # else nothing of this layer is loaded
            self._w_codes = self.chip = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
