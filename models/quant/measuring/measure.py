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
import functools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..cost import CostReport
from ..engines import set_engine
from ..layers.crossbar import crossbar_layers, give_ranges, on_crossbars, ranges_of
from ..layers.batches import Batch, called, tensors_of
from ..layers.loaders import Take
from ..layers.on_arrays import ADC_BUFFERS
from ..layers.prepared import fingerprint
from ..network import calibration as calibrating
from ..network.calibration import counted_cells
from ..network.counts import Counts, counting
from ..network.modes import hooked, in_mode, without_adc
from ..network.program import program as program_cells
from ..network.structure import structure
from .images import Images, Inputs, batches_of, in_order
from .last_chips import LastChips
from .metrics import Scale, chance_of_changes, metric_of
from .passes import Run
from .placing import Stored, engines_of, is_chip, on_adcs, place, program, use_cells
from .processes import ALONE, Processes
from .setting import Setting, reads_of


@dataclass(frozen=True, eq=False)
class Record:
    """What one measurement found.

    Attributes:
        setting: what was measured. None for the software, which is the same quantized network computed with exact sums, and for the
            float network that was converted.
        predictions: class of each image, int64 `[N]`, or `[N, ...]`; None where the metric has none.
        accuracy, software_accuracy: in percent of the images, or what the metric of `measure` gives; of several chips the mean.
        changed_predictions: images that are classified differently than by the software; of several chips the mean, rounded. None where
            there are no classes.
        seconds: time in the network, of all chips together, without loading, programming and calibration. With a plan by ones the
            first chip's time includes the counting of ones.
        engine: what ran the layers on crossbars; None for the software.
        mean_bits, conversions: mean bits of all reads, where a read that is not converted counts as 0, and the share of reads that
            are converted. None where there are no ADCs. With a plan by ones they are those of these images, on the first chip.
        layer_bits: `{layer: mean bits of its reads}`, counted likewise.
        cost: of the setting, in a technology; None where it was not asked for, as from `measure` itself (`cost.estimate`).
        chip_predictions, chip_accuracies, chip_changes: of each chip, int64 `[chips, N]`, percent, and images; `predictions` are
            those of the first. None for ideal cells, and where there are no classes.
        examples: how many images were measured; None: as many as have a prediction.
        metric: what the accuracy is, if it is another number than that.
        numbers: what the metric says of each image, float64 `[N, 2]` (`Metric.numbers`), on the first chip; None where it says nothing of
            one, and for accuracy of one class an image, which follows from the predictions.
        chance: how far the value may differ from the software's by the choice of the images alone, as a standard deviation
            (`Metric.chance`; of accuracy of one class an image `chance_of_changes`); of several chips the root of the mean square. None
            for the software, and where the metric says nothing of one image.
        float_accuracy, float_changes: of a converted network: the float network's accuracy, and how many images are classified
            differently than by it (of several chips the mean, rounded). Else None.
        is_float: whether the float network itself was measured.
    """

    setting: Setting | None
    predictions: torch.Tensor | None
    accuracy: float
    software_accuracy: float
    changed_predictions: int | None
    seconds: float
    engine: str | None
    mean_bits: float | None = None
    conversions: float | None = None
    layer_bits: Mapping[str, float] | None = None
    chip_predictions: torch.Tensor | None = None
    chip_accuracies: tuple[float, ...] | None = None
    chip_changes: tuple[int, ...] | None = None
    cost: CostReport | None = None
    float_accuracy: float | None = None
    float_changes: int | None = None
    is_float: bool = False
    examples: int | None = None
    metric: Scale = Scale()
    numbers: torch.Tensor | None = None
    chance: float | None = None

    def __str__(self) -> str:
        """As rows of a table name it."""
        if self.is_float:
            return "float"
        return str(self.setting or ("software" if self.float_accuracy is None else "quantized"))

    @property
    def n_images(self) -> int:
        """How many were measured."""
        return len(self.predictions) if self.examples is None else self.examples

    @property
    def images_per_s(self) -> float:
        """Of all chips, in the network alone."""
        return self.n_images * len(self.chip_accuracies or [None]) / self.seconds

    @property
    def bits_made(self) -> float | None:
        """Mean bits of the reads that are converted, so that those that are not flatter no setting; None where there are none."""
        return self.mean_bits / self.conversions if self.conversions else None

    @property
    def accuracy_std(self) -> float | None:
        """Deviation of the chips' accuracies, of n - 1; None where there is no second chip."""
        return statistics.stdev(self.chip_accuracies) if len(self.chip_accuracies or ()) > 1 else None

    @property
    def accuracy_lowest(self) -> float | None:
        """The accuracy of the worst chip; None for ideal cells."""
        return self.metric.worst(self.chip_accuracies) if self.chip_accuracies else None

    @property
    def band(self) -> float:
        """`sqrt(accuracy_std^2 + chance^2)`, how far one chip's value may be from another's on other images, as a standard deviation. It is
        rather too large: how much single images differ between chips is in both. Of ideal cells, or one chip, chance alone."""
        return math.hypot(self.accuracy_std or 0.0, self.chance or 0.0)


@dataclass
class Cache:
    """What the measurements of one network share, so that it is made once: histograms of the reads (they do not depend on the ADC),
    ranges of settings with chips, moments of the layers' outputs without ADC, and the last chips, as far as `chips.most_bytes` goes. All
    are made anew where the weights, edited cells, calibration images or the network's `structure` have changed."""

    histograms: dict[str, Any] = field(default_factory=dict)
    ranges: dict[tuple, list] = field(default_factory=dict)  # of settings with chips, which share them, by what decides them
    counted_for: tuple | None = None  # hardware and nominal cells
    moments: dict[tuple, dict] = field(default_factory=dict)  # by the names of the layers that have an ADC
    chips: LastChips = field(default_factory=LastChips)
    made_of: list | None = None  # checksums of the network's state, its cells and the images

    def check(self, network: nn.Module, images: Iterable[Batch]) -> None:
        """Forget what was made of something else."""
        state = [value for key, value in network.state_dict().items() if isinstance(value, torch.Tensor) and not key.endswith(ADC_BUFFERS)]
        cells = [layer.w_codes() for _, layer in crossbar_layers(network)]
        made_of = [structure(network), fingerprint([*state, *cells, *(tensor for batch in images for tensor in tensors_of(batch))])]
        if made_of != self.made_of:
            self.histograms, self.ranges, self.counted_for, self.moments, self.made_of = {}, {}, None, {}, made_of
            self.chips = LastChips(self.chips.most_bytes)


def measure(network: nn.Module, images: Images, labels: torch.Tensor | Sequence | None, setting: Setting | None, *,
            calibration: Images | None = None, software: Record | None = None, cache: Cache | None = None,
            cells: Stored | None = None, engine: str = "auto", batch_size: int = 64, progress: bool = False,
            passing: contextlib.AbstractContextManager | None = None, original: Record | None = None, metric: Any = None,
            take: Take | None = None, processes: Processes = ALONE) -> Record:
    """Accuracy of a network on crossbars of one setting.

    With `setting.chips` each chip is programmed in turn. The reads of nominal cells, which all chips share, choose the ADC ranges once.
    With `Calibration(on="chip")` each chip's own reads choose its ranges. The digital correction is measured on each chip.

    Args:
        network: one with crossbar layers, in evaluation mode. Afterwards it is on the setting, calibrated, with ideal cells. The
            software leaves it as it was, except that `set_codes` is undone: cells are those of its weights again, see `cells`.
        images: network inputs `[N, ...]`, or a re-iterable of batches of what `forward` takes: tensors, tuples, or mappings, such as a
            DataLoader, with or without targets (`loaders.apart`).
        labels: the target of each image, such as int64 `[N]`; None where they come with the batches, or the metric needs none.
        setting: the hardware; None for the software, every layer without an ADC.
        calibration: training inputs that choose the ranges of adc_range "calibrated". None where the network holds ranges for
            this hardware: these are used as they are, with their correction, on every chip.
        software: the record of the software on the same images; None to measure it here.
        cache: shared by measurements of this network with these calibration images.
        cells: `{layer: weight codes}` that the cells hold, or are programmed to, in place of those of the weights; or `{layer: Chip}`,
            what the cells hold (`load_cells`), and what their reads have besides, for a setting without chips of its own.
        engine: one of `engines.CHOICES`; changes no result.
        batch_size: images at a time where `images` is a tensor; changes no result but those of adc_range "dynamic".
        progress: show a progress bar.
        passing: a context that is open while the software runs on the images, such as one that counts (`cost.counting`).
        original: the record of the float network that was converted (`measure_float`), on the same images; None where there is none.
        metric: what stands for the accuracy of every record: one of `metrics` or its name, a torchmetrics.Metric, or a function of the
            outputs and the targets of a batch, which returns a number for each image, or one, the mean of the batch. None: percent of the
            images whose class is that of the largest output.
        take: a function of a batch that returns (inputs, target), where it is not clear which part of it is what.
        processes: those that measure this network together, each of which calls this; every one has some of the batches.
    Raises: ValueError for a setting that is none, a network without crossbars on one, an engine that cannot run here, cells of a layer
        that are missing, cells of a chip beside others, ranges that are missing, or reads of too many values to calibrate on.
    """
    if isinstance(labels, Mapping):
        raise ValueError(f"the labels are a {type(labels).__name__}; give one for each example, or batches with targets")
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # such as names, or boxes
        labels = labels if labels is None else torch.as_tensor(labels)
    run = Run(network, in_order(batches_of(images, batch_size)), labels, metric_of(metric), take, progress, processes)
    for what, record in (("software", software), ("original", original)):
        if record is not None and record.metric != run.metric.scale:
            raise ValueError(f"{what} is measured by {record.metric.name}, and the metric is {run.metric.scale.name}: measure both by one")
    if not isinstance(setting, (Setting, type(None))):
        raise ValueError(f"the setting is a {type(setting).__name__}; give Setting(CrossbarSpec(...)), or None for the software")
    if setting:
        on_crossbars(network)
    if is_chip(cells) and setting and setting.chips:
        raise ValueError("the cells are those of a chip, and the setting has chips too; give only one of them")
    with set_engine(engine), in_mode(network, training=False):
        if setting is None:
            use_cells(network, None)
            with without_adc(network):
                baseline = "software" if original is None else "quantized"
                passes = [run.through(baseline if crossbar_layers(network) else "float", passing)]
                common = {"engine": None}
        else:
            if software is None:
                software = measure(network, images, labels, None, engine=engine, batch_size=batch_size, progress=progress,
                                   original=original, metric=metric, take=take, processes=processes)
            place(network, setting, cells)
            chosen = None if calibration is None else Inputs(batches_of(calibration, batch_size), network, take)
            passes, common = _on_crossbars(run, setting, cells, chosen, cache or Cache(), engine)
    records = [_record(setting, found, common, run.metric, software, original) for found in passes]
    return of_chips(setting, records) if setting and setting.chips else records[0]


def _on_crossbars(run, setting, cells, calibration, cache, engine):
    """What `Run.through` finds for each chip, or on ideal cells, and other fields of the record, which are taken at the first."""
    network, found, common = run.network, [], {}
    try:
        for title in _each_chip(network, setting, calibration, cache, run.progress, run.processes):
            ran = None if common else engines_of(network, engine)
            counts: list[Counts] = []
            found.append(run.through(title, None if common else _counting_reads(network, counts, run.processes)))
            common = common or {"engine": ran, **conversions_of(network, run.first()[0], counts)}
    finally:
        if setting.chips or is_chip(cells):
            program_cells(network, None)
    return found, common


def _record(setting, found, common, metric, software, original):
    """That of one pass, on one chip where there are any."""
    predictions, accuracy = found.predictions, found.accuracy
    changes, chance = _changes(predictions, predictions if software is None else software.predictions), None
    if software is not None and found.numbers is not None and software.numbers is not None and len(found.numbers) > 1:
        chance = metric.chance(found.numbers, software.numbers)
    elif software is not None and changes is not None and metric.scale == Scale():
        chance = chance_of_changes(changes, found.examples)
    of_float = {} if original is None else {
        "float_accuracy": original.accuracy, "float_changes": _changes(predictions, original.predictions)}
    of_chip = {} if setting is None or not setting.chips else {"chip_accuracies": (accuracy,)}
    if of_chip and predictions is not None:
        of_chip |= {"chip_predictions": predictions[None], "chip_changes": (changes,)}
    return Record(setting=setting, software_accuracy=accuracy if software is None else software.accuracy, changed_predictions=changes,
                  metric=metric.scale, chance=chance, **found._asdict(), **common, **of_chip, **of_float)


def of_chips(setting: Setting, found: Sequence[Record]) -> Record:
    """The record of a setting with several chips, from those of its chips, `Setting.one_by_one`: what `measure` finds."""
    first, of_classes = found[0], {}
    if first.predictions is not None:
        changes = [record.chip_changes[0] for record in found]
        of_classes = {"changed_predictions": round(statistics.fmean(changes)), "chip_changes": tuple(changes),
                      "chip_predictions": torch.cat([record.chip_predictions for record in found])}
    if first.float_changes is not None:
        of_classes["float_changes"] = round(statistics.fmean(record.float_changes for record in found))
    if first.chance is not None:
        of_classes["chance"] = math.sqrt(statistics.fmean(record.chance**2 for record in found))
    values = tuple(record.accuracy for record in found)
    return replace(first, setting=setting, accuracy=statistics.mean(values), chip_accuracies=values,
                   seconds=sum(record.seconds for record in found), **of_classes)


def measure_float(network: nn.Module, images: Images, labels: torch.Tensor | Sequence | None, *, batch_size: int = 64,
                  progress: bool = False, metric: Any = None, take: Take | None = None, processes: Processes = ALONE) -> Record:
    """Accuracy of a float network that is, or will be, converted; it has no crossbar layers. Args: see `measure`."""
    found = measure(network, images, labels, None, batch_size=batch_size, progress=progress, metric=metric, take=take,
                    processes=processes)
    return replace(found, float_accuracy=found.accuracy, float_changes=found.changed_predictions, is_float=True)


def _changes(predictions: torch.Tensor | None, baseline: torch.Tensor | None) -> int | None:
    """Images of which any prediction is another; None where there are none."""
    if predictions is None or baseline is None:
        return None
    return int((predictions != baseline).reshape(len(predictions), -1).any(1).sum())


def _each_chip(network: nn.Module, setting: Setting, calibration: Iterable[Batch] | None, cache: Cache, progress: bool,
               processes: Processes) -> Iterator[str]:
    """Bring a network that is placed on a setting to each of its chips, calibrated: a title for each; one for ideal cells."""
    if not setting.chips:
        calibrate(network, setting, calibration, cache, progress, processes=processes)
        yield str(setting)
        return
    seeds, watched = setting.chips.seeds, sys.stderr.isatty()
    shown = tqdm(seeds, desc=str(setting), unit="chip", leave=False, dynamic_ncols=True, disable=not progress or len(seeds) < 2,
                 mininterval=0.5 if watched else 60, delay=0 if watched else 60)
    if calibration is not None and cache.chips.most_bytes:
        cache.check(network, calibration)  # before a chip is given
    for seed in shown:
        one = replace(setting, chips=replace(setting.chips, chips=1, chip_seed=seed))
        if calibration is None or not cache.chips.give(network, one):
            program(network, setting, seed, progress)
        calibrate(network, setting, calibration, cache, progress, seed == seeds[0] or setting.calibration.on == "chip", processes, one)
        if calibration is not None:
            cache.chips.keep(network, one)
        yield f"chip {seed}" if len(seeds) > 1 else str(setting)


@contextlib.contextmanager
def _counting_reads(network: nn.Module, found: list[Counts], processes: Processes) -> Iterator[None]:
    """Within the block reads are counted where bits depend on n; the counts are added to `found`."""
    if all(not layer.spec.skips_idle for _, layer in on_adcs(network)):
        yield
        return
    with counting(network) as counts:
        yield
    found += processes.gathered(counts)


@torch.no_grad()
def conversions_of(network: nn.Module, image: Batch, counts: Sequence[Counts]) -> dict[str, Any]:
    """mean_bits, conversions and layer_bits of the `Record` of a network on a setting; none of them without ADCs.

    Args: image, one network input: how many reads a layer makes depends on its size; counts, of all images, where bits of layers
        depend on n.
    """
    found: dict[str, np.ndarray] = {}  # bits, conversions, reads
    whole = functools.reduce(Counts.__add__, counts, Counts())
    names = {layer: name for name, layer in on_adcs(network) if layer.spec.adc_range != "ideal"}

    def count(layer: nn.Module, args: tuple, kwargs: dict[str, Any], y: torch.Tensor) -> None:
        x = (*args, *kwargs.values())[0]
        mapped = layer.mapped()
        digits, slices, classes = len(layer.spec.digit_bits), len(layer.slice_bits), mapped.classes
        bits = np.array([mapped.converter(*kind).bits for kind in np.ndindex(digits, slices, classes)]).reshape(digits, slices, classes)
        each = y.numel() * len(mapped.arrays) * len(layer.parts(x))  # reads of one digit and slice, in all phases of signed inputs
        share = whole.layers[names[layer]].shares(layer.spec, classes) if classes > 1 else np.ones((digits, 1))
        of_kind = each * share[:, None]
        of_call = np.array([(of_kind * bits).sum(), (of_kind * (bits > 0)).sum(), each * digits * slices], float)
        found[names[layer]] = found.get(names[layer], 0) + of_call

    if not names:
        return {}
    with hooked(layer.register_forward_hook(count, with_kwargs=True) for layer in names):
        called(network, image)
    bits, converted, reads = sum(found.values())
    return {"mean_bits": float(bits / reads), "conversions": float(converted / reads),
            "layer_bits": {name: float(of_layer[0] / of_layer[2]) for name, of_layer in found.items()}}


def count_reads(network: nn.Module, setting: Setting, images: Iterable[Batch], cache: Cache, progress: bool = False
                ) -> dict[str, Any]:
    """Histograms of the reads on the hardware of a setting: `{layer: int64 [digits, slices, u]}`; counted once for all ADCs, and
    all chips that have the same nominal cells."""
    cache.check(network, images)
    key = reads_of(setting)
    own = [cells for _, layer in on_adcs(network) if (cells := counted_cells(layer, setting.calibration.on))]
    if own:
        key = *key, tuple(fingerprint([part for cells in own for part in (cells.values, cells.reference)]))
    if cache.counted_for != key:
        shown = tqdm(images, desc="calibrating", unit="batch", leave=False, disable=None if progress else True)
        cache.histograms, cache.counted_for = calibrating.collect_histograms(network, shown, setting.calibration.on), key
    return cache.histograms


def calibrate(network: nn.Module, setting: Setting, images: Iterable[Batch] | None, cache: Cache, progress: bool = False,
              ranges: bool = True, processes: Processes = ALONE, chip: Setting | None = None) -> None:
    """Choose the ADC ranges of a network that is placed on a setting (or, without `ranges`, keep those that it has), and correct
    the outputs on the cells that it has. Does nothing where the setting has no calibrated ranges, or images are None. Of several
    processes the first does it for all. Args: chip, the setting with the one chip that the network is on."""
    if images is None or all(layer.spec.adc_range != "calibrated" for _, layer in on_adcs(network)):
        return
    if processes.is_first():
        chosen = setting.calibration
        if ranges:
            histograms = count_reads(network, setting, images, cache, progress)
            decides = cache.counted_for, replace(setting, chips=None)
            if not setting.chips or decides not in cache.ranges:
                calibrating.calibrate(network, images, chosen.rule, chosen.per, histograms, correct=None, share=chosen.share, on=chosen.on)
            if setting.chips:
                give_ranges(network, cache.ranges.setdefault(decides, ranges_of(network)))
        if chosen.correct == "channel" and not cache.chips.correct(network, chip):
            converted = tuple(name for name, _ in on_adcs(network))
            cache.moments[converted] = calibrating.correct(network, images, cache.moments.get(converted))
    processes.same_ranges(network)
