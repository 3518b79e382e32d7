"""What is measured: one row of a table (`Setting`)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from ..arrays.spec import CrossbarSpec, hardware
from ..arrays.transfer import table_of
from ..network.calibration import Calibration
from .chips import Chips
from .weight_noise import WeightNoise

CROSSBAR_LAYERS = ("all", "conv")  # every layer that can be, or of these the convolutions only
PerLayer = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
LAYER_FIELDS = tuple(item.name for item in fields(CrossbarSpec) if item.metadata.get("of") != "network")
NOTES = sorted((item for item in fields(CrossbarSpec) if "note" in item.metadata), key=lambda item: item.metadata["note"])


def fits(name: str, pattern: str) -> bool:
    """Whether a layer is called so: layers of converted networks also by the name of the module that they stand for."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".crossbar"), pattern)


@dataclass(frozen=True)
class Setting:
    """One row of a table: the hardware, and how it is used.

    Attributes:
        spec: the hardware.
        crossbar_layers: "all", every layer that can be is on crossbars; "conv", the convolutions only. The others compute their
            sums of codes exactly, without an ADC.
        calibration: how the ranges of adc_range "calibrated" are chosen.
        chips: what the cells are, and how many chips are measured; None: ideal cells. Of `WeightNoise`, which is on no cells, the spec has
            only the bits of weights and inputs, and adc_range "ideal".
        per_layer: other hardware of some layers, `{name or pattern with * ? [...]: {field of the spec: value}}`. Where several fit
            a layer, the last one wins. Kept as tuples. A layer may have no ADC (adc_range "ideal") where the others have one.
    """

    spec: CrossbarSpec = CrossbarSpec()
    crossbar_layers: str = "all"
    calibration: Calibration = Calibration()
    chips: Chips | WeightNoise | None = None
    per_layer: PerLayer | Mapping[str, Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.crossbar_layers not in CROSSBAR_LAYERS:
            raise ValueError(f"crossbar_layers is {self.crossbar_layers!r}; allowed are {', '.join(CROSSBAR_LAYERS)}")
        changes = {pattern: dict(values) for pattern, values in dict(self.per_layer).items()}
        for pattern, values in changes.items():
            if unknown := values.keys() - {*LAYER_FIELDS}:
                raise ValueError(f"per_layer {pattern} has {', '.join(sorted(unknown))}; allowed are {', '.join(LAYER_FIELDS)}")
            if values.get("adc_range", "ideal") not in ("ideal", self.spec.adc_range):
                raise ValueError(f"per_layer {pattern}: adc_range is {values['adc_range']!r}; allowed are {self.spec.adc_range}, which "
                                 "the others have, and ideal")
            if "adc_transfer" in values:
                try:
                    values["adc_transfer"] = table_of(values["adc_transfer"])
                except ValueError as error:
                    raise ValueError(f"per_layer {pattern}: {error}") from None
        object.__setattr__(self, "per_layer", tuple((name, tuple(sorted(values.items()))) for name, values in changes.items()))
        if self.without_cells:
            if self.per_layer:
                raise ValueError("per_layer is given with weight_noise, which is on weights without cells and ADCs; leave it out")
            object.__setattr__(self, "spec", self.chips.on_no_cells(self.spec))

    @property
    def without_cells(self) -> bool:
        """Whether the weights lie on no cells, and have noise themselves."""
        return isinstance(self.chips, WeightNoise)

    def spec_of(self, name: str) -> CrossbarSpec:
        """The hardware of the layer `name`. Raises: ValueError where what several patterns say of it does not go together."""
        spec = self.spec
        for pattern, values in self.per_layer:
            if fits(name, pattern):
                try:
                    spec = replace(spec, **dict(values))
                except ValueError as error:
                    raise ValueError(f"per_layer {pattern}: {error}") from None
        return spec

    @property
    def plans(self) -> set[bool]:
        """Whether its layers have a plan of ADC bits; both where some of them may have one and some may not."""
        own = (dict(values).get("adc_plan") for _, values in self.per_layer)
        return {self.spec.planned, *(plan != "uniform" for plan in own if plan)}

    @property
    def of_ranges(self) -> "Setting":
        """The setting that has the same calibrated ranges: without a plan, whether idle reads are converted decides none."""
        if True in self.plans:
            return self
        return replace(self, spec=replace(self.spec, adc_idle=CrossbarSpec().adc_idle))

    @property
    def one_by_one(self) -> "tuple[Setting, ...]":
        """A setting for each of its chips; itself alone where it has one, or ideal cells."""
        if not self.chips or self.chips.chips == 1:
            return (self,)
        return tuple(replace(self, chips=replace(self.chips, chips=1, chip_seed=seed)) for seed in self.chips.seeds)

    def __str__(self) -> str:
        return self.text()

    def text(self, without: str | None = None) -> str:
        """As rows of a table name it. Args: without, a field of the hardware that the text leaves out."""
        spec = self.spec
        notes = [item.metadata["note"][1].format(value) for item in NOTES
                 if item.name != without and (value := getattr(spec, item.name)) != item.default]
        notes += [f"{self.crossbar_layers} layers only"] if self.crossbar_layers != "all" else []
        notes += [f"{pattern}: " + " ".join(f"{name} {value:.8}" if name == "adc_transfer" else f"{name} {value}" for name, value in values)
                  for pattern, values in self.per_layer]
        if self.without_cells:
            return ", ".join([self.chips.text(without), spec.adc_text, *notes])
        notes += [self.chips.text(without)] if self.chips else []
        notes += ["ranges of the chip"] if self.calibration.on == "chip" and spec.adc_range == "calibrated" else []
        cells = [] if without == "cell_bits" else [f"{spec.cell_bits}-bit cells"]
        adc = spec.adc_text.partition("-bit ")[2] if without == "adc_bits" and spec.adc_range != "ideal" else spec.adc_text
        return ", ".join([*cells, adc, *notes])


def reads_of(setting: Setting) -> tuple:
    """What decides which values the reads of a network have, but for its cells: where it is the same, histograms are shared."""
    of_adc = {name: getattr(CrossbarSpec, name) for name in hardware("adc")}
    of_classes = {"adc_plan": "ones" if setting.spec.adc_plan == "ones" else "uniform", "adc_idle": setting.spec.adc_idle}
    spec = replace(setting.spec, adc_range="ideal", **of_adc | of_classes)
    others = of_adc.keys() - of_classes.keys()
    per_layer = ((pattern, tuple((name, value) for name, value in values if name not in others)) for pattern, values in setting.per_layer)
    return setting.crossbar_layers, spec, tuple((pattern, values) for pattern, values in per_layer if values)
