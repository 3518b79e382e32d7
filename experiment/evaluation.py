"""Measuring: what accuracy a network keeps on crossbars.

    cache = Cache()
    software = measure(network, images, labels, None)
    for bits in (3, 4, 5):
        setting = Setting(CrossbarSpec(adc_bits=bits))
        record = measure(network, images, labels, setting, calibration=training_images, software=software, cache=cache)
        print(setting, record.accuracy, record.changed_predictions)

Nothing here reads flags or touches files, and nothing is kept between calls but in the `Cache` that the caller holds.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from models import quant
from models.quant import Calibration, CrossbarSpec, engines
from models.quant.calibration import in_mode
from models.quant.cost import CostReport
from models.quant.prepared import fingerprint
from models.building import CROSSBAR_LAYERS

from . import distributed
from .chips import Chips
from .data import Batches

PerLayer = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
OF_ADC = ("adc_bits", "adc_plan", "adc_max_bits")  # fields of the spec that make no other reads
LAYER_FIELDS = tuple(item.name for item in fields(CrossbarSpec) if item.name not in ("w_bits", "a_bits"))  # the network has those
Images = torch.Tensor | Iterable[torch.Tensor]  # network inputs [N, ...], or batches of them that can be gone through again
Stored = Mapping[str, torch.Tensor | quant.Chip]  # {layer: weight codes that its cells hold, or the cells of a chip}


@dataclass(frozen=True)
class Setting:
    """One row of a table: the hardware, and how it is used.

    Attributes:
        spec: the hardware.
        crossbar_layers: "all", every layer that can be is on crossbars; "conv", the convolutions only. The others compute their
            sums of codes exactly, without an ADC.
        calibration: how the ranges of adc_range "calibrated" are chosen.
        chips: what the cells are, and how many chips are measured; None: ideal cells.
        per_layer: other hardware of some layers, `{name or pattern with * ? [...]: {field of the spec: value}}`; of several that fit
            a layer the later ones win. Kept as tuples. A layer may be without an ADC (adc_range "ideal") where the others have one.
    """

    spec: CrossbarSpec = CrossbarSpec()
    crossbar_layers: str = "all"
    calibration: Calibration = Calibration()
    chips: Chips | None = None
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
        object.__setattr__(self, "per_layer", tuple((name, tuple(sorted(values.items()))) for name, values in changes.items()))

    def spec_of(self, name: str) -> CrossbarSpec:
        """The hardware of the layer `name`. Raises: ValueError where what several patterns say of it does not go together."""
        spec = self.spec
        for pattern, values in self.per_layer:
            if fnmatchcase(name, pattern):
                try:
                    spec = replace(spec, **dict(values))
                except ValueError as error:
                    raise ValueError(f"per_layer {pattern}: {error}") from None
        return spec

    def __str__(self) -> str:
        return self.text()

    def text(self, without: str | None = None) -> str:
        """As rows of a table name it. Args: without, a flag of the chips that the text leaves out."""
        spec, usual = self.spec, CrossbarSpec()
        adc = f"{spec.adc_bits:g}-bit ADC, {'planned' if spec.planned else spec.adc_range}"
        adc = "no ADC" if spec.adc_range == "ideal" else adc
        notes = [f"{name} {getattr(spec, name)}" for name in ("weights", "rows", "mapping", "reference", "dac_bits", "adc_max_bits")
                 if getattr(spec, name) != getattr(usual, name)]
        notes += [f"{self.crossbar_layers} layers only"] if self.crossbar_layers != "all" else []
        notes += [f"{pattern}: " + " ".join(f"{name} {value}" for name, value in values) for pattern, values in self.per_layer]
        notes += [self.chips.text(without)] if self.chips else []
        notes += ["ranges of the chip"] if self.calibration.on == "chip" and spec.adc_range == "calibrated" else []
        return ", ".join([f"{spec.cell_bits}-bit cells, {adc}", *notes])


@dataclass(frozen=True, eq=False)
class Record:
    """What one measurement found.

    Attributes:
        setting: that which was measured; None for the software, the same quantized network computed with exact sums, and for the
            float network that was converted.
        predictions: class of each image, int64 `[N]`.
        accuracy, software_accuracy: in percent of the images; of several chips the mean.
        changed_predictions: images that are classified differently than by the software; of several chips the mean, rounded.
        seconds: time in the network, without loading, programming and calibration; of all chips together.
        engine: what ran the layers on crossbars; None for the software.
        mean_bits, conversions: mean bits of all reads, those that are not converted counted as 0, and the share of reads that are
            converted; None where there are no ADCs.
        cost: of the setting, in a technology; None where it was not asked for. `measure` leaves it to `costs.Costs`.
        chip_predictions, chip_accuracies, chip_changes: of each chip, int64 `[chips, N]`, percent, and images; `predictions` are
            those of the first. None for ideal cells.
        float_accuracy, float_changes: of a converted network: that of the float network, and images that are classified differently
            than by it; of several chips the mean, rounded. Else None.
        is_float: whether it is that float network itself that was measured.
    """

    setting: Setting | None
    predictions: torch.Tensor
    accuracy: float
    software_accuracy: float
    changed_predictions: int
    seconds: float
    engine: str | None
    mean_bits: float | None = None
    conversions: float | None = None
    chip_predictions: torch.Tensor | None = None
    chip_accuracies: tuple[float, ...] | None = None
    chip_changes: tuple[int, ...] | None = None
    cost: CostReport | None = None
    float_accuracy: float | None = None
    float_changes: int | None = None
    is_float: bool = False

    def __str__(self) -> str:
        """As rows of a table name it."""
        if self.is_float:
            return "float"
        return str(self.setting or ("software" if self.float_accuracy is None else "quantized"))

    @property
    def n_images(self) -> int:
        return len(self.predictions)

    @property
    def images_per_s(self) -> float:
        return self.n_images * len(self.chip_accuracies or [None]) / self.seconds

    @property
    def accuracy_std(self) -> float | None:
        """Deviation of the chips' accuracies, of n - 1; None where there is no second chip."""
        return statistics.stdev(self.chip_accuracies) if len(self.chip_accuracies or ()) > 1 else None

    @property
    def accuracy_lowest(self) -> float | None:
        """The accuracy of the worst chip; None for ideal cells."""
        return min(self.chip_accuracies) if self.chip_accuracies else None


@dataclass
class Cache:
    """What the measurements of one network share: histograms of the reads, which do not depend on the ADC, and the moments of the
    layers' outputs without ADC. Both are made anew where weights, edited cells or calibration images are others."""

    histograms: dict[str, Any] = field(default_factory=dict)
    counted_for: tuple | None = None  # hardware and nominal cells
    moments: dict[tuple, dict] = field(default_factory=dict)  # by the names of the layers that have an ADC
    made_of: list | None = None  # checksums of the network's state, its cells and the images

    def check(self, network: nn.Module, images: Iterable[torch.Tensor]) -> None:
        """Forget what was made of something else."""
        ranges = tuple(quant.ADC_BUFFERS)
        state = [value for key, value in network.state_dict().items() if not key.endswith(ranges)]
        cells = [layer.w_codes() for _, layer in quant.crossbar_layers(network)]
        made_of = fingerprint([*state, *cells, *images])
        if made_of != self.made_of:
            self.histograms, self.counted_for, self.moments, self.made_of = {}, None, {}, made_of


def measure(network: nn.Module, images: Images, labels: torch.Tensor, setting: Setting | None, *,
            calibration: Images | None = None, software: Record | None = None, cache: Cache | None = None,
            cells: Stored | None = None, engine: str = "auto", batch_size: int = 64, progress: bool = False,
            passing: contextlib.AbstractContextManager | None = None, original: Record | None = None) -> Record:
    """Accuracy of a network on crossbars of one setting.

    With `setting.chips` each chip is programmed in turn. The first one's reads choose the ADC ranges, by its nominal cells, which all
    chips share, or with `Calibration(on="chip")` each chip's own; the digital correction is measured on each chip.

    Args:
        network: one with crossbar layers, in evaluation mode; it is left on the setting, calibrated, with ideal cells. For the
            software it is left as it was.
        images, labels: network inputs `[N, ...]` or a re-iterable of batches of them; int64 `[N]`.
        setting: the hardware; None for the software, every layer without an ADC.
        calibration: training inputs that choose the ranges of adc_range "calibrated"; None where the network holds ranges for
            this hardware, which are used as they are, with the correction that belongs to them, whatever the chip.
        software: the record of the software on the same images; None to measure it here.
        cache: shared by measurements of this network with these calibration images.
        cells: `{layer: weight codes}` that the cells hold, or are programmed to, in place of those of the weights; or `{layer: Chip}`,
            what the cells hold (`quant.load_cells`), for a setting without chips of its own.
        engine: one of `engines.CHOICES`; changes no result.
        batch_size: images at a time where `images` is a tensor; changes no result but those of adc_range "dynamic".
        progress: show a progress bar.
        passing: a context that is open while the images pass the software, such as one that counts (`quant.cost.counting`).
        original: the record of the float network that was converted (`measure_float`), on the same images; None where there is none.
    Raises: ValueError for an engine that cannot run here, ranges that are missing, or reads of too many values to calibrate on.
    """
    labels = torch.as_tensor(labels)
    ran = mean_bits = conversions = None
    with quant.set_engine(engine), in_mode(network, training=False):
        if setting is None:
            use_cells(network, None)
            with quant.without_adc(network):
                predictions, seconds = predict(network, batches_of(images, batch_size), "software", progress, passing)
            found = [predictions]
        else:
            if software is None:
                software = measure(network, images, labels, None, engine=engine, batch_size=batch_size, progress=progress,
                                   original=original)
            place(network, setting, cells)
            chosen = None if calibration is None else batches_of(calibration, batch_size)
            found, seconds = [], 0.0
            try:
                for title in _each_chip(network, setting, chosen, cache or Cache(), progress):
                    if not found:
                        ran = engines_of(network, setting, engine)
                        mean_bits, conversions = conversions_of(network, next(iter(batches_of(images, batch_size)))[:1])
                    predictions, taken = predict(network, batches_of(images, batch_size), title, progress)
                    found, seconds = [*found, predictions], seconds + taken
            finally:
                if setting.chips:
                    quant.program(network, None)
    if len(found[0]) != len(labels):
        raise ValueError(f"{len(found[0])} images have {len(labels)} labels")
    baseline = found[0] if software is None else software.predictions
    accuracies = [_accuracy(predictions, labels) for predictions in found]
    changes = [_changes(predictions, baseline) for predictions in found]
    of_float = {} if original is None else {
        "float_accuracy": original.accuracy,
        "float_changes": round(statistics.fmean(_changes(predictions, original.predictions) for predictions in found))}
    of_chips = {} if setting is None or not setting.chips else {
        "chip_predictions": torch.stack(found), "chip_accuracies": tuple(accuracies), "chip_changes": tuple(changes)}
    return Record(
        setting=setting, predictions=found[0], accuracy=statistics.fmean(accuracies), software_accuracy=_accuracy(baseline, labels),
        changed_predictions=round(statistics.fmean(changes)), seconds=seconds, engine=ran, mean_bits=mean_bits,
        conversions=conversions, **of_chips, **of_float)


def measure_float(network: nn.Module, images: Images, labels: torch.Tensor, *, batch_size: int = 64, progress: bool = False) -> Record:
    """Accuracy of a float network that is, or will be, converted; it has no crossbar layers. Args: see `measure`."""
    found = measure(network, images, labels, None, batch_size=batch_size, progress=progress)
    return replace(found, float_accuracy=found.accuracy, float_changes=0, is_float=True)


def _changes(predictions: torch.Tensor, baseline: torch.Tensor) -> int:
    return int((predictions != baseline).sum())


def _accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (predictions == labels).double().mean().item()


def _each_chip(network: nn.Module, setting: Setting, calibration: Iterable[torch.Tensor] | None, cache: Cache, progress: bool
               ) -> Iterator[str]:
    """Bring a network that is placed on a setting to each of its chips, calibrated: a title for each; one for ideal cells."""
    if not setting.chips:
        calibrate(network, setting, calibration, cache, progress)
        yield str(setting)
        return
    seeds, watched = setting.chips.seeds, sys.stderr.isatty()
    shown = tqdm(seeds, desc=str(setting), unit="chip", leave=False, dynamic_ncols=True, disable=not progress or len(seeds) < 2,
                 mininterval=0.5 if watched else 60, delay=0 if watched else 60)
    for seed in shown:
        program(network, setting, seed)
        calibrate(network, setting, calibration, cache, progress, ranges=seed == seeds[0] or setting.calibration.on == "chip")
        yield f"chip {seed}" if len(seeds) > 1 else str(setting)


def program(network: nn.Module, setting: Setting, seed: int) -> None:
    """Program a chip of a setting that a network is placed on. Layers that the setting leaves out keep ideal cells."""
    setting.chips.program(network, seed)
    for _, layer in quant.crossbar_layers(network):
        if not _on_crossbars(layer, setting):
            layer.set_cells(None)


def check_chips(network: nn.Module, setting: Setting) -> None:
    """Refuse a device whose cells cannot be those of a setting that a network is placed on, without drawing any.

    Raises: ValueError.
    """
    for _, layer in quant.crossbar_layers(network):
        setting.chips.check(layer)
        cells = layer.ideal_cells()
        if layer.spec.reference == "digital":  # which sees the off-current
            off = [round(2**cells.fraction_bits * setting.chips.device.levels(bits)[0] / setting.chips.device.step(bits))
                   for bits in layer.slice_bits]
            shift = torch.tensor(off, dtype=torch.int32, device=cells.values.device)
            cells = quant.Cells(cells.values + shift.view(-1, 1, 1, 1), cells.reference + shift.view(-1, 1, 1), cells.fraction_bits)
        layer.set_cells(cells, cells if layer.spec.reference == "digital" else None)  # engines are chosen as for the chip's


def place(network: nn.Module, setting: Setting, cells: Stored | None = None) -> None:
    """Put the layers of a network on the hardware of a setting, with these `cells` (see `measure`), as yet ideal ones; those that
    the setting leaves out compute without an ADC. A layer that is on this hardware already keeps its ranges."""
    use_cells(network, cells)
    put(network, setting, cells)


def put(network: nn.Module, setting: Setting, cells: Stored | None = None) -> None:
    """As `place`, with the weight codes that the cells hold already.

    Raises: ValueError for a pattern of `per_layer` that fits no layer with an ADC, and hardware that cannot be.
    """
    quant.program(network, None)
    names = [name for name, layer in quant.crossbar_layers(network) if _on_crossbars(layer, setting)]
    for pattern, _ in setting.per_layer:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"per_layer {pattern}: no layer on crossbars is called so; there are {', '.join(names)}")
    for name, layer in quant.crossbar_layers(network):
        spec = setting.spec_of(name)
        if not _on_crossbars(layer, setting):
            layer.set_codes(None)
            spec = setting.spec
            alike = {"cell_bits": spec.cell_bits, "weights": spec.weights} if setting.chips else {}  # for devices that have these alone
            spec = CrossbarSpec(spec.w_bits, spec.a_bits, adc_range="ideal", **alike)
        if layer.spec != layer.fitted(spec):
            layer.set_spec(spec)
        if is_chip(cells) and _on_crossbars(layer, setting):
            layer.set_cells(cells[name].cells, cells[name].nominal)


def is_chip(cells: Stored | None) -> bool:
    """Whether these are the cells of a chip, not weight codes."""
    return bool(cells) and isinstance(next(iter(cells.values())), quant.Chip)


def use_cells(network: nn.Module, cells: Stored | None) -> None:
    """Let the cells of a network be programmed to these codes, or to those of its weights."""
    for name, layer in quant.crossbar_layers(network):
        layer.set_codes(cells[name] if cells and not is_chip(cells) else None)


def _on_crossbars(layer: nn.Module, setting: Setting) -> bool:
    return setting.crossbar_layers == "all" or isinstance(layer, quant.Qconv2dDoreFa)


def engines_of(network: nn.Module, setting: Setting, engine: str = "auto", counted: bool = False) -> str:
    """Names of the engines that run the layers of a network that is placed on a setting, joined by "+"; costs nothing.

    Args: counted, the reads will be counted whatever the ADC's range, as for a report.
    Raises: ValueError for an engine that cannot run here, or reads of too many values to count.
    """
    names = []
    for name, layer in on_adcs(network):
        mapped = layer.mapped("ideal")
        low, high = layer.mapped("ideal", _counted_cells(layer, setting)).u_span
        if (counted or setting.spec.adc_range == "calibrated") and high - low >= engines.MAX_BINS:
            raise ValueError(f"{setting}: a read of {name} has {high - low + 1} possible values, too many to calibrate on or to "
                             "report; take adc_range full, or fewer rows, cell bits or dac bits")
        names.append(engines.name_of(engines.choose(engine, mapped, layer.weight.device)[0]))
    return "+".join(dict.fromkeys(names))


def _counted_cells(layer: nn.Module, setting: Setting) -> quant.Cells | None:
    """The cells whose reads choose a layer's ranges; None: ideal ones."""
    return layer.chip and (layer.chip.cells if setting.calibration.on == "chip" else layer.chip.nominal)


def on_adcs(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a network that its setting has put on crossbars; all of them where no layer has an ADC."""
    layers = quant.crossbar_layers(network)
    return [(name, layer) for name, layer in layers if layer.spec.adc_range != "ideal"] or layers


@torch.no_grad()
def conversions_of(network: nn.Module, image: torch.Tensor) -> tuple[float | None, float | None]:
    """(mean bits of all reads, share of them that are converted) of a network on a setting; (None, None) without ADCs.

    Args: image, one network input: how many reads a layer makes depends on its size.
    """
    bits = converted = reads = 0.0

    def count(layer: nn.Module, _: Any, y: torch.Tensor) -> None:
        nonlocal bits, converted, reads
        mapped = layer.mapped()
        kinds = [mapped.converter(z, k).bits for z in range(len(layer.spec.digit_bits)) for k in range(len(layer.slice_bits))]
        each = y.numel() * len(mapped.arrays)  # reads of one kind
        bits, converted, reads = bits + each * sum(kinds), converted + each * sum(b > 0 for b in kinds), reads + each * len(kinds)

    hooks = [layer.register_forward_hook(count) for _, layer in quant.crossbar_layers(network) if layer.spec.adc_range != "ideal"]
    if not hooks:
        return None, None
    network(image)
    for hook in hooks:
        hook.remove()
    return bits / reads, converted / reads


def batches_of(images: Images, batch_size: int) -> Iterable[torch.Tensor]:
    """Batches of network inputs, which can be gone through more than once."""
    return images.split(batch_size) if isinstance(images, torch.Tensor) else images


@torch.no_grad()
def predict(network: nn.Module, batches: Iterable[torch.Tensor], title: str = "", progress: bool = False,
            passing: contextlib.AbstractContextManager | None = None) -> tuple[torch.Tensor, float]:
    """(predicted class of each image, seconds in the network); of several processes, each of which has whole batches, those of the
    slowest. Args: passing, see `measure`."""
    predictions, seconds, watched = [], 0.0, sys.stderr.isatty()
    if iter(batches) is batches:
        raise ValueError("the images are gone through more than once: give a tensor or a list of batches, not a generator")
    network(next(iter(batches))[:1])  # prepares the weights, and the first time compiles
    shown = tqdm(_mine(batches), desc=title, unit="batch", dynamic_ncols=True, leave=False, disable=not progress,
                 total=-(-len(batches) // distributed.world()) if isinstance(batches, Sized) else None,
                 mininterval=0.5 if watched else 60, delay=0 if watched else 60)
    with passing or contextlib.nullcontext():
        for first, batch in shown:
            started = time.perf_counter()
            with quant.image_numbers(first):  # noise of reads does not depend on the batches
                predictions.append(network(batch).argmax(1).cpu())
            seconds += time.perf_counter() - started
    return torch.cat(distributed.in_order(predictions)), max(distributed.gathered(seconds))


def _mine(batches: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of its first image, batch) of the batches that are this process's. Those of `Batches` that are not are not made."""
    if isinstance(batches, Batches):
        yield from ((number * batches.batch_size, batches[number]) for number in range(len(batches)) if distributed.mine(number))
        return
    first = 0
    for number, batch in enumerate(batches):
        if distributed.mine(number):
            yield first, batch
        first += len(batch)


def count_reads(network: nn.Module, setting: Setting, images: Iterable[torch.Tensor], cache: Cache, progress: bool = False
                ) -> dict[str, Any]:
    """Histograms of the reads on the hardware of a setting: `{layer: int64 [digits, slices, u]}`; counted once for all ADCs, and
    all chips that have the same nominal cells."""
    cache.check(network, images)
    key = reads_of(setting)
    own = [cells for _, layer in on_adcs(network) if (cells := _counted_cells(layer, setting))]
    if own:
        key = *key, tuple(fingerprint([part for cells in own for part in (cells.values, cells.reference)]))
    if cache.counted_for != key:
        shown = tqdm(images, desc="calibrating", unit="batch", leave=False, disable=None if progress else True)
        on = {"on": setting.calibration.on} if own else {}
        cache.histograms, cache.counted_for = quant.collect_histograms(network, shown, **on), key
    return cache.histograms


def reads_of(setting: Setting) -> tuple:
    """What decides which values the reads of a network have, but for its cells: where it is the same, histograms are shared."""
    spec = replace(setting.spec, adc_bits=1, adc_range="ideal", adc_plan="uniform", adc_max_bits=CrossbarSpec.adc_max_bits)
    per_layer = ((pattern, tuple((name, value) for name, value in values if name not in OF_ADC)) for pattern, values in setting.per_layer)
    return setting.crossbar_layers, spec, tuple((pattern, values) for pattern, values in per_layer if values)


def calibrate(network: nn.Module, setting: Setting, images: Iterable[torch.Tensor] | None, cache: Cache, progress: bool = False,
              ranges: bool = True) -> None:
    """Choose the ADC ranges of a network that is placed on a setting (or, without `ranges`, keep those that it has), and correct
    the outputs on the cells that it has. Does nothing where the setting has no calibrated ranges, or images are None. Of several
    processes the first does it for all."""
    if images is None or setting.spec.adc_range != "calibrated":
        return
    if distributed.is_first():
        chosen = setting.calibration
        if ranges:
            histograms = count_reads(network, setting, images, cache, progress)
            quant.calibrate(network, images, chosen.rule, chosen.per, histograms, correct=None, share=chosen.share)
        if chosen.correct == "channel":
            converted = tuple(name for name, _ in on_adcs(network))
            cache.moments[converted] = quant.correct(network, images, cache.moments.get(converted))
    distributed.same_ranges(network)
