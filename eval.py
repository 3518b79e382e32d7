"""Run a trained network bit by bit on simulated RRAM crossbars and print what accuracy is left.

    python eval.py --resume save/digits_vgg7_quant_w4a4/model_best.pth.tar --cellBit 1 2 --adc_prec 6 5

Every hardware flag that takes several values takes part in the product: the line above evaluates four settings, each on
the whole test set. The software baseline is the same quantized network computed with exact integer arithmetic, so every
difference to it comes from the ADC, and from the cells where these are of a device: ten chips of measured cells, after an hour,

    python eval.py --resume ... --cellBit 2 --adc_prec 5 --device techA --device_time 1h --chips 10
    python eval.py --device list

and what it costs, in energy, time and area, in a technology:

    python eval.py --resume ... --cellBit 1 2 --adc_prec 4 6 --cost rram_32nm
    python eval.py --cost list

Written to --save_path (the checkpoint's folder unless given): results.jsonl, one line a setting, appended as soon as it
is known; adc_ranges.json, all ranges that were calibrated, for --adc_ranges; report_<setting>.json and .png with
--report; accuracy_over_adc_bits.png when several ADC precisions are given, accuracy_over_device_time.png and the like for
several values of a device; cost.json, cost.csv, cost_by_layer.png and accuracy_over_energy.png with --cost; eval.log. The
bit-planes of the weights go to --prob_path, prob/<model>_w<w>_c<c>/bit_levels<i>_ideal.pt: plain uint8 tensors to look at
with torch.load. To evaluate planes that you changed, copy the folder, edit the files, and pass --planes FOLDER.
"""

import logging
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; train.py says why

from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from experiment import chip_report, cost_report, images, machine, report, results
from experiment.chip_files import save_cells, stored_cells
from experiment.cli import UserError, check_writable, get_logger, run_main
from experiment.costs import Costs
from experiment.eval_settings import EvalSettings, parse
from experiment.evaluation import Cache, Record, Setting, Stored, check_chips, count_reads, engines_of, is_chip, measure, place
from experiment.images import EvalImages
from experiment.ranges import RangesOfRun
from experiment.starting import crossbar_network
from experiment.train_settings import trained_for
from models import quant
from models.quant import diagnostics

FROZEN = "calibrated", "full"  # ADC ranges that --report describes


def check_settings(settings: EvalSettings, net: nn.Module, cells: Stored | None, ranges: RangesOfRun, costs: Costs) -> None:
    """Refuse, before any work, settings that cannot run here, or whose ranges are not where they should be."""
    if is_chip(cells) and settings.adc_ranges:
        raise ValueError("--adc_ranges are of ideal cells, and those of a chip in --planes are corrected for it: give one of them")
    for setting in settings.settings:
        place(net, setting, cells)
        if setting.chips:
            check_chips(net, setting)
        engines_of(net, setting, settings.engine, counted=settings.report and setting.spec.adc_range in FROZEN)
        ranges.give(net, setting)
        costs.check(net, setting)


def write_planes(settings: EvalSettings, net: nn.Module, log: logging.Logger) -> None:
    """The bit-planes of the weights for the cells of every setting but those of pairs, where they are not in their folder already."""
    for cell_bits in dict.fromkeys(setting.spec.cell_bits for setting in settings.settings if setting.spec.weights == "offset"):
        store = quant.PlaneStore(settings.prob_path, settings.model, settings.wbit, cell_bits)
        if store.write([(name, layer.w_codes()) for name, layer in quant.crossbar_layers(net)]):
            log.info(f"bit-planes of the weights written to {store.folder}")


def evaluate(settings: EvalSettings, net: nn.Module, cells: Stored | None, ranges: RangesOfRun, costs: Costs,
             shown: EvalImages,
             log: logging.Logger, argv: list[str] | None) -> list[Record]:
    """Measure the software and every setting; each record is on the disk as soon as it is known."""
    facts = machine.machine_info() | {"command": shlex.join(["eval.py", *(sys.argv[1:] if argv is None else argv)])}
    records, cache = [], Cache()
    for setting in (None, *settings.settings):
        source = chosen = None
        if setting:
            place(net, setting, cells)
            source = ranges.give(net, setting)
            chosen = shown.calibration if ranges.to_calibrate(setting) else None
        try:
            record = measure(net, shown.batches, shown.labels, setting, calibration=chosen, cells=cells, cache=cache,
                             software=records[0] if records else None, engine=settings.engine, progress=True,
                             passing=costs.counting(net))
            record = replace(record, cost=costs.of(net, setting))
        except ValueError as error:
            if setting and setting.chips:  # cells that the grid does not hold
                raise UserError(f"{setting}: {error}") from None
            raise
        if chosen and not setting.chips and not is_chip(cells):
            ranges.keep(net, setting, chosen.count)
        row = results.row(record, settings, chosen.count if chosen else None, source)
        results.append(Path(settings.save_path, "results.jsonl"), row | facts)
        records.append(record)
        if settings.save_cells and setting and setting.chips:
            folder = quant.PlaneStore(settings.prob_path, settings.model, settings.wbit, setting.spec.cell_bits).folder
            if save_cells(net, setting, folder):
                log.info(f"cells of {setting.chips} written to {folder}")
        if settings.report and setting and setting.spec.adc_range in FROZEN:
            write_report(settings, net, setting, shown, cache, log, cells)
        log.info(f"{setting or 'software'}: {record.accuracy:.2f} %")
        if record.cost:
            log.info(cost_report.layers_table(record.cost))
    return records


def write_report(settings: EvalSettings, net: nn.Module, setting: Setting, shown: EvalImages, cache: Cache,
                 log: logging.Logger, cells: Stored | None) -> None:
    """Table, JSON and picture of what the ADC, or a chip, does to each layer, for the setting that was measured last."""
    path = Path(settings.save_path, "report_" + re.sub(r"[^0-9a-z]+", "_", str(setting).lower()))
    title = f"{settings.model.removesuffix('_eval')} on {settings.dataset}: {setting}"
    if setting.chips or is_chip(cells):
        table = chip_report.write(path, net, setting, title, shown.report, shown.calibration, cache, cells, settings.engine)
        log.info(f"{setting}:\n{table}\npicture: {path.with_suffix('.png')}")
        return
    histograms = count_reads(net, setting, shown.calibration, cache, progress=True)
    layers = diagnostics.report(net, shown.report, histograms, setting.calibration.rule, setting.calibration.per)
    report.write_report(path.with_suffix(".json"), str(setting), layers)
    report.report_plot(path.with_suffix(".png"), title, layers, setting.spec.adc_bits)
    log.info(f"{setting}:\n{report.layers_table(layers)}\npicture: {path.with_suffix('.png')}")


def say_what_is_measured(settings: EvalSettings, ranges: RangesOfRun, config: dict, shown: EvalImages, log: logging.Logger) -> None:
    """The network and its images, and what `train.py --adc_aware` trained it for."""
    log.info(f"{settings.resume}: {settings.model.removesuffix('_eval')}, {settings.wbit}-bit weights, {settings.abit}-bit "
             f"activations; {shown.batches.count} {shown.kind} of {settings.dataset}; "
             f"{'CPU' if shown.report.device.type == 'cpu' else 'GPU'}")
    if config.get("adc_aware"):
        text = f"trained through the ADC of {trained_for(config)}"
        if ranges.trained_for:
            used = ranges.trained_for in settings.settings
            text += ", whose ranges " + ("it holds and keeps" if used else "are not used: the settings are of other hardware")
        log.info(text)


def main(argv: list[str] | None = None) -> int:
    settings, checkpoint = parse(argv, __doc__)
    machine.keep_freed_memory()
    device = machine.pick_device(settings.ngpu)
    net = crossbar_network(settings, checkpoint, device)
    try:
        cells, ranges = None, RangesOfRun(settings, checkpoint)
        if settings.planes:
            cells = stored_cells(settings.planes, net, settings.settings, settings.wbit)
        costs = Costs(settings.cost, settings.settings)
        check_settings(settings, net, cells, ranges, costs)
    except ValueError as error:  # what the package refuses: engines, planes, reads of too many values
        raise UserError(str(error)) from None
    for folder in (settings.save_path, *([settings.prob_path] if settings.save_cells or not settings.planes else [])):
        check_writable(folder)
    folder = Path(settings.save_path)
    results.check_can_append(folder / "results.jsonl")
    log = get_logger(folder / settings.log_file)
    package_log = logging.getLogger("models")  # says which engine runs, and why
    package_log.handlers[:], package_log.level = log.handlers, logging.INFO

    with logging_redirect_tqdm([log, package_log]):
        shown = images.load(settings, checkpoint, device, log)
        say_what_is_measured(settings, ranges, checkpoint["config"], shown, log)
        if not settings.planes:
            write_planes(settings, net, log)
        with quant.keep_effective_cells(Path(settings.prob_path, "effective") if settings.save_cells else None):
            records = evaluate(settings, net, cells, ranges, costs, shown, log, argv)
    log.info("\n" + report.settings_table(records, shown.of_all, shown.kind, settings.planes))
    title = (f"{settings.model.removesuffix('_eval')}, {settings.wbit}-bit weights, {settings.abit}-bit activations: "
             f"{shown.batches.count} {shown.kind} of {settings.dataset}")
    for path in report.plots(records[1:], title, folder):
        log.info(f"plot: {path}")
    for path in cost_report.write(records, costs.technology, title, folder):
        log.info(f"costs: {path}")
    log.info(f"results: {folder / 'results.jsonl'}")
    return 0


if __name__ == "__main__":
    run_main(main)
