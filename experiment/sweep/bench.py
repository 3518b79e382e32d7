"""A trained network with its images and the folder of its results (`Bench`): what measures settings, each of them once."""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from models import quant
from models.quant import CrossbarSpec
from models.quant.measuring.measure import Cache, Record, measure, measure_float, of_chips
from models.quant.measuring.placing import check_chips, engines_of, is_chip, place, put, use_cells
from models.quant.measuring.setting import Setting, reads_of

from ..inputs import data, foreign, tasks
from ..measure import columns, keys, points
from ..measure.answers import answers_of
from ..measure.chip_files import save_cells, stored_cells
from ..measure.columns import Measured
from ..measure.points import Points
from ..measure.ranges import RangesOfRun, entry_of
from ..program import distributed, flags, machine
from ..program.cli import UserError, user_error
from ..report import says
from ..settings import per_layer
from ..settings.conversion_settings import OPTIONS
from ..settings.costs import Costs
from ..settings.eval_flags import EvalSettings
from ..settings.eval_settings import checkpoint_of
from ..settings.remedies import all_remedied
from ..start import conversion, images
from ..start.starting import crossbar_network

FLOAT = "float"  # in place of a setting: the float network that was converted


class Bench:
    """The network of some settings on its device. `check` refuses what cannot run, before `load` reads the images; a network of others
    is checked only then, and converted when it is needed, since images decide how.

    Args: checkpoint, of `settings.resume`, if it is loaded already; command, what stands in results.jsonl; of_several, whether other
        networks have the same `save_path`.
    Attributes: folder, where its reports, pictures, costs and adc_ranges.json go; fillings, what its log says of its arrays.
    Raises: UserError for weights, planes and ranges that are not as they should be.
    """

    def __init__(self, settings: EvalSettings, checkpoint: dict | None = None, command: str = "", of_several: bool = False) -> None:
        self.settings = settings
        own = re.sub(r"[^0-9A-Za-z]+", "_", str(Path(settings.resume).with_suffix(""))).strip("_") if of_several else ""
        self.folder = Path(settings.save_path, own)
        self.checkpoint = checkpoint or checkpoint_of(settings.resume)
        self.device = machine.pick_device(settings.ngpu)
        self.others = conversion.network_of(settings, settings.resume)
        self.task = self.others and self.others.task
        self.metric = columns.metric_for(self.task)
        if self.task:
            images.check_flags_of_task(settings, self.task)
            self.settings = replace(settings, dataset=self.task.kind)
        self._net = None if self.others else crossbar_network(settings, self.checkpoint, self.device)
        self.log: logging.Logger | None = None
        self.original: nn.Module | None = None  # the float network that was converted
        # Before it has run, which may leave things in its attributes.
        self.code = [*foreign.identity(settings.model), *([keys.of_attributes(self.others.network)] if self.others else [])]
        remedied = [each for setting in settings.settings if settings.remedy for each in all_remedied(setting)]
        self.costs = Costs(settings.cost, [*settings.settings, *remedied] or search_layouts(settings))
        with user_error(str):
            self.cells = settings.planes and stored_cells(settings.planes, self._net, settings.settings, settings.w_bits)
        if is_chip(self.cells) and settings.adc_ranges:
            raise UserError("--adc_ranges are for ideal cells, and --planes holds a chip with a correction of its own: give one of them")
        self.ranges, self.points, self.cache = RangesOfRun(settings, self.checkpoint, self.folder), Points(settings.save_path), Cache()
        self.facts = machine.machine_info() | {"command": command}
        self.sha256: dict[str, str] = {}  # of the weight codes of each layer's cells
        self.keys: dict[Setting | str | None, str] = {}
        self.known: dict[tuple[str, bool], dict[str, Any]] = {}  # points that were read, by key and whether of one of several chips
        self.shown: images.EvalImages | None = None
        self.fillings: list[str] = []

    @property
    def net(self) -> nn.Module:
        """The network on crossbars. Raises: UserError for one of others that cannot be converted, or its settings, see `check`."""
        if self._net is None:
            self._convert()
        return self._net

    @distributed.together
    def _convert(self) -> None:
        self._net = conversion.for_evaluation(self.others, self.settings, self.shown, self.checkpoint, self.log,
                                              self.metric.predict is not None)
        distributed.same_weights(self._net)  # scales that were fitted have the last bits of the machine
        self.check(self.settings.settings)
        self.log.info(says.conversion(self._net))

    def check(self, settings: Iterable[Setting], draft: nn.Module | None = None) -> None:
        """Refuse settings that cannot run here, or whose ranges are not where they should be; those of a network of others behind its
        conversion. Args: draft, what stands for it before: it has other scales. Raises: UserError."""
        net = self._net if draft is None else draft
        if net is None:
            return
        seen = set()
        with user_error(lambda error: flags.of_layers(str(error))):  # what the package refuses, such as engines
            use_cells(net, self.cells)
            for setting in settings:
                kept = setting.spec.adc_range == "calibrated" and not self.ranges.to_calibrate(setting)
                same = reads_of(setting), setting.spec.adc_range, setting.chips, setting.calibration.on
                if same in seen and not setting.per_layer and not kept and not self.costs.technology:
                    continue  # ADCs of other bits
                seen.add(same)
                put(net, setting, self.cells)
                if setting.chips:
                    check_chips(net, setting)
                self.costs.check(net, setting)
                if draft is None:
                    engines_of(net, self.settings.engine)
                    self.ranges.give(net, setting)

    def load(self, log: logging.Logger) -> None:
        """The images, and what decides the results of all settings."""
        of, self.log = self.settings, log
        if self.others:
            chosen_here = of.validation and not of.resume  # who trained it here had a part of the training images held out
            if self.task:
                self.others.network.to(self.device)
                self.shown = images.of_task(self.task, self.metric, of, partial(keys.digest, others=True))
            else:
                shown = conversion.images_of(self.others, of, self.device, log, chosen_here)
                self.shown = images.choose(shown, of, self.checkpoint, self.device)
            distributed.same_weights(self.others.network)
            self.original = None if of.resume else self.others.network  # else its weights were trained with the quantizers
            draft = conversion.draft(self.others, of, self.shown)
            if draft is None:
                self._convert()  # which says why
            else:
                self.check(of.settings, draft)
        else:
            shown, draft = data.load(of.dataset, of.data_path, log.info), None
            self.shown = images.choose(shown, of, self.checkpoint, self.device)
        self.fillings = says.fillings(self.net if draft is None else draft, of.settings or search_layouts(of))
        self.points.images = self.shown.batches.count
        made_of = self.net if self.original is None else self.original
        self.points.expect(lambda: answers_of(made_of, self.shown.batches, of.engine), log)
        self.points.look_for_older(of.older_points)
        self.decides_all = {"code": self._code_of(), "images": keys.of_images(self.shown.batches, self.shown.labels),
                            "network": self._key_of(made_of)}
        if self.task:
            self.decides_all["metric"] = [type(self.metric).__name__, *self.metric.scale]
        self.decides_hardware = {"cells": keys.digest(self.cells)} if self.cells else {}
        self.decides_ranges = {"calibration_images": keys.of_images(self.shown.calibration)}

    def _key_of(self, made_of: nn.Module) -> str:
        """What tells the network from others: of one that is converted the float network, and what decides that, as its scales have
        the last bits of the machine."""
        of = self.settings
        facts = [*self.code, of.w_bits, of.a_bits, of.wq, of.quantize_image, *(getattr(of, name) for name in OPTIONS if self.others)]
        if self.original is not None:
            facts += [of.calibration.correct, keys.of_images(self.shown.calibration)]
        return keys.of_network(made_of, facts)

    def _code_of(self, *parts: str) -> dict[str, str]:
        """Digests of the code that results of the network follow from. Args: parts, beside that of all of them."""
        of_others = ["conversion"] if self.others else []
        return keys.of_code(*of_others, *(["language"] if foreign.is_language_model(self.settings.model) else []), *parts)

    def decides(self, setting: Setting | str | None) -> dict[str, Any]:
        """What decides the result of a setting, or of `FLOAT`; None: of the software."""
        if setting is None:
            return self.decides_all
        if setting is FLOAT:
            return self.decides_all | {"network": keys.of_network(self.original, [FLOAT, *self.code]), "code": keys.of_code()}
        parts, costed = keys.parts_of(setting, is_chip(self.cells)), self.costs.technology and setting.spec.adc_range != "ideal"
        code = self._code_of(*parts, *(["costs"] if costed else []))
        found = self.decides_all | self.decides_hardware | {"setting": keys.of_setting(setting), "code": code}
        if costed:
            found["cost"] = keys.digest(self.costs.technology)
        if setting.spec.adc_range == "dynamic":
            found["batch_size"] = self.settings.batch_size
        if self.ranges.to_calibrate(setting):
            found |= self.decides_ranges
        elif setting.spec.adc_range == "calibrated":
            found["ranges"] = keys.digest(self.ranges.given(setting))
        return found

    @property
    def _as_run(self) -> EvalSettings:
        """The settings with as many images at a time as are taken."""
        return self.settings if self.task else replace(self.settings, batch_size=self.shown.batches.batch_size)

    @property
    def looked_at(self) -> str:
        """How many examples of what are measured, of how many."""
        count, of_all = self.shown.batches.count, self.shown.of_all
        count = f"{count if count == of_all else f'{count} of {of_all}'} {self.shown.kind}"
        return count if self.task else f"{count} of {self.settings.dataset}"

    @property
    def baseline(self) -> str:
        """What the network without ADCs is called beside others."""
        return "software" if self.original is None else "quantized"

    def of_float(self) -> Record | None:
        """What was measured of the float network that was converted, now where no process has done it; None where there is none."""
        if self.original is None:
            return None

        def make() -> dict[str, Any]:
            record = self._measure_float(progress=True)
            return points.of_record(record, columns.line(Measured(record, self._as_run)) | self.facts, self.decides(FLOAT), None)

        if not self.point(FLOAT):
            self.points.measure(self.key(FLOAT), make, wait=True)
        return points.record_of(self.point(FLOAT), None)

    def key(self, setting: Setting | str | None) -> str:
        """The key of the point of a setting, or of `FLOAT`."""
        if setting not in self.keys:
            self.keys[setting] = self.points.key(self.decides(setting))
        return self.keys[setting]

    def point(self, setting: Setting | str | None, of_several: bool = False) -> dict[str, Any] | None:
        """The point of a setting, or of `FLOAT`; None where none was measured, here or elsewhere."""
        place = self.key(setting), of_several
        if place not in self.known and (point := self.points.current(*place)):
            self.known[place] = point
        return self.known.get(place)

    def chip(self, setting: Setting | None) -> dict[str, Any] | None:
        """The point of a setting with one chip, measured as one of several or by itself; None where it was neither."""
        return self.point(setting, of_several=True) or self.point(setting)

    def record_of_chip(self, setting: Setting) -> Record:
        """What was measured of a setting with one chip, whose point is there."""
        return points.record_of(self.chip(setting), setting)

    def record(self, setting: Setting | None) -> Record | None:
        """What was measured of a setting, or None."""
        point = self.point(setting)
        return point and points.record_of(point, setting)

    def measure(self, setting: Setting | None, wait: bool = False, progress: bool = False, of_several: bool = False) -> bool:
        """Measure a setting, or the software, unless its point is there; of several chips those whose points are not. Args and result:
        see `Points.measure`."""
        alone = (setting,) if setting is None else setting.one_by_one
        if len(alone) > 1 and self.point(setting) is None:
            for chip in alone:
                if self.chip(chip) is None:
                    self.measure(chip, wait=True, progress=progress, of_several=True)
            return self.points.measure(self.key(setting), lambda: self._of_chips(setting), wait)
        if self._net is None:
            self._convert()  # before anything is measured, as it may refuse
        software, original = None, self.of_float()
        if setting is not None:
            if not self.point(None):
                self.measure(None, wait=True, progress=progress)
            software = self.record(None)

        def make() -> dict[str, Any]:
            if there := setting and self.chip(setting):  # the other point of this chip
                return there
            if setting and self.costs.technology and not self.costs.counts:  # which were made where the software was measured
                self._measure(None, None, original, progress=progress)
            return self._make(setting, software, original, progress)

        return self.points.measure(self.key(setting), make, wait, of_several)

    def _of_chips(self, setting: Setting) -> dict[str, Any]:
        """The point of a setting with several chips, whose points are there."""
        found = [self.chip(chip) for chip in setting.one_by_one]
        record = of_chips(setting, [points.record_of(point, chip) for point, chip in zip(found, setting.one_by_one)])
        first = found[0]["row"]
        row = columns.line(Measured(record, self._as_run, first.get("calib_images"), first.get("adc_ranges")))
        return points.of_record(record, row | self.facts, self._decides_from(setting, found), None) | {
            "took_s": sum(point["took_s"] for point in found)}

    def _make(self, setting: Setting | None, software: Record | None, original: Record | None, progress: bool) -> dict[str, Any]:
        record, source = self._measure(setting, software, original, progress=progress)
        kept, chosen = None, self._calibration(setting)
        if chosen and not setting.chips and not is_chip(self.cells):  # a chip's correction is of no use to another
            self.sha256 = self.sha256 or {name: quant.sha256(layer.w_codes().cpu()) for name, layer in quant.crossbar_layers(self.net)}
            kept = entry_of(self.net, setting, chosen.count, self.sha256)
        row = columns.line(Measured(record, self._as_run, chosen.count if chosen else None, source))
        beside = [setting and self.point(None), original and self.point(FLOAT)]
        return points.of_record(record, row | self.facts, self._decides_from(setting, filter(None, beside)), kept)

    def _decides_from(self, setting: Setting | None, made_from: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """As `decides`, of a point that was made from others; where one of these is of other code, it is of no code."""
        current = all(keys.is_current(point["decides"]) for point in made_from)
        return self.decides(setting) | ({} if current else {"code": {}})

    def _calibration(self, setting: Setting | None) -> data.Batches | tasks.Examples | None:
        """The images that choose the ranges of a setting, where they are to be chosen."""
        return self.shown.calibration if setting and self.ranges.to_calibrate(setting) else None

    @distributed.together
    def _measure_float(self, progress: bool = False) -> Record:
        with self._said_of(FLOAT):
            return measure_float(self.original, self.shown.batches, self.shown.labels, progress=progress, metric=self.metric,
                                 take=self.task and self.task.take, processes=distributed)

    def _said_of(self, what: Setting | str) -> contextlib.AbstractContextManager[None]:
        """Answers that a metric does not take, and cells that the grid does not hold, as one line."""
        expected = self.task or isinstance(what, Setting) and what.chips
        return user_error(lambda error: f"{what}: {error}") if expected else contextlib.nullcontext()

    @distributed.together
    def _measure(self, setting: Setting | None, software: Record | None, original: Record | None, progress: bool = False
                 ) -> tuple[Record, str | None]:
        """The record of a setting, with its costs, and where ranges come from that are not chosen here. Args: see `measure`."""
        source = None
        if setting:
            place(self.net, setting, self.cells)
            source = self.ranges.give(self.net, setting)
        with self._said_of(setting or self.baseline):
            with quant.keep_effective_cells(self._effective):
                record = measure(self.net, self.shown.batches, self.shown.labels, setting, cells=self.cells, cache=self.cache,
                                 engine=self.settings.engine, passing=self.costs.counting(self.net), original=original,
                                 calibration=self._calibration(setting), software=software, progress=progress,
                                 metric=self.metric, take=self.task and self.task.take, processes=distributed)
            machine.give_back_memory()
            return replace(record, cost=self.costs.of(self.net, setting)), source

    @property
    def _effective(self) -> Path | None:
        """Where cells behind word lines are kept."""
        return Path(self.settings.prob_path, "effective") if self.settings.save_cells else None

    # ---- files beside the points ------------------------------------------------------------------------------------------

    def write_planes(self, log: logging.Logger) -> None:
        """The bit-planes of the weights for the cells of every setting but those of pairs, where they are not in their folder already."""
        if self.others or self.settings.planes:
            return
        layers = quant.crossbar_layers(self.net)
        specs = (setting.spec_of(name) for setting in self.settings.settings if not setting.without_cells for name, _ in layers)
        for cell_bits in dict.fromkeys(spec.cell_bits for spec in specs if spec.weights == "offset"):
            store = self._planes(cell_bits)
            if store.write([(name, layer.w_codes()) for name, layer in layers]):
                log.info(f"bit-planes of the weights written to {store.folder}")

    def _planes(self, cell_bits: int) -> quant.PlaneStore:
        return quant.PlaneStore(self.settings.prob_path, self.settings.model, self.settings.w_bits, cell_bits)

    def write_ranges(self) -> None:
        """The ranges of the settings' points, in adc_ranges.json."""
        found = {setting: self.point(setting) for setting in self.settings.settings
                 if self.ranges.to_calibrate(setting) and not setting.chips and not is_chip(self.cells)}
        self.ranges.keep({setting: point["ranges"] for setting, point in found.items() if point})

    def write_cells(self, settings: Iterable[Setting], log: logging.Logger) -> None:
        """What the cells of the chips of some settings, each by itself, hold, beside the bit-planes."""
        written = {}
        for setting in settings:
            if setting.chips and not setting.without_cells:
                place(self.net, replace(setting, crossbar_layers="all"), self.cells)  # files hold the cells of all layers, on one hardware
                folder = self._planes(setting.spec.cell_bits).folder
                with quant.keep_effective_cells(self._effective):
                    if save_cells(self.net, setting, folder):
                        written[str(setting.chips), folder] = True
        for chips, folder in written:
            log.info(f"cells of {chips} written to {folder}")


def benches_of(networks: Sequence[tuple[EvalSettings, dict | None]], command: str) -> list[Bench]:
    """The networks of an evaluation, with their checkpoints. Raises: UserError as `Bench`, and for two that have one folder."""
    folders = [Path(settings.save_path).resolve() for settings, _ in networks]
    sharing = Counter(folders)
    made = [Bench(*network, command, sharing[folder] > 1) for network, folder in zip(networks, folders)]
    owners: dict[Path, str] = {}
    for bench in made:
        if (other := owners.setdefault(bench.folder.resolve(), bench.settings.resume)) != bench.settings.resume:
            raise UserError(f"{other} and {bench.settings.resume} would share the folder {bench.folder}: evaluate them one by one, each "
                            "with a --save_path")
    return made


def search_layouts(settings: EvalSettings) -> list[Setting]:
    """Settings with all mappings, rows and digits that a search may take, whose reads are counted."""
    usual, names = CrossbarSpec(8, 8), ("mapping", "rows", "dac_bits")
    of_layers = per_layer.parse(settings.hardware.get("per_layer", ())).values()
    values = ([*settings.hardware.get(name, [getattr(usual, name)]),
               *(value for values in of_layers for value in values.get(name, ()))] for name in names)
    return [Setting(replace(usual, **dict(zip(names, each)))) for each in itertools.product(*values)]
