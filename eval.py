"""Run a trained network bit by bit on simulated RRAM crossbars. Print its accuracy for each setting.

    python eval.py --resume save/digits_vgg7_quant_w4a4/model_best.pth.tar \\
        --cell_bits 1 2 --adc_bits 6 5

Every hardware flag that takes several values takes part in the product: the line above evaluates four settings, each on
the whole test set. The software baseline is the same quantized network computed with exact integer arithmetic, so every
difference to it comes from the ADC, and from the cells where these are of a device: ten chips of measured cells, after an hour,

    python eval.py --resume ... --cell_bits 2 --adc_bits 5 --device techA --device_time 1h --chips 10
    python eval.py --device list

and what it costs, in energy, time and area, in a technology:

    python eval.py --resume ... --cell_bits 1 2 --adc_bits 4 6 --cost rram_32nm
    python eval.py --cost list

A network that was not made here is converted first, and the table begins with the float network (docs/networks.md):

    python eval.py --model torchvision/resnet18 --dataset imagefolder --data_path path/to/images --cell_bits 1 --adc_bits 8

A setting that was measured before, with the same weights, images, hardware, seeds and code, is not measured again: every one is a file,
points/<key>.json in --save_path (the checkpoint's folder unless given). So a run that was killed goes on when it is started again,
and several may share a folder: by --workers, by --shard on several machines, or by starting eval.py twice.

    python eval.py --resume ... --cell_bits 1 2 4 --adc_bits 3:8 --workers 8        # --dry_run says what that would measure
    python eval.py --resume ... --adc_plan significance --adc_bits 1:3:0.25 --search 50 --objective accuracy bits

One setting on many GPUs, or in many processes, with the same result (docs/cluster.md):

    python eval.py --resume ... --cell_bits 1 --adc_bits 5 --ngpu 4
    torchrun --standalone --nproc_per_node 2 eval.py --resume ... --cell_bits 1 --adc_bits 5 --ngpu 0

Also in --save_path:
    results.jsonl, results.csv    a line for each setting, written as soon as it is known
    table.json                    the rows of this table
    eval_config.json              the flags, for --config
    adc_ranges.json               all ranges that were calibrated, for --adc_ranges
    reports.csv                   with --report or --cost: what each of their files is of
    results.html                  with --html
    accuracy_over_*.png           for several ADC precisions, or values of a device
    remedies.json, .csv, .png     with --remedy
    limits.json, limits.csv       with --largest or --smallest
    specification.json, .csv, .png    with --specify
    parts/                        with these: points of blocks of the images
    cost.json, cost.csv, cost_by_layer.png, accuracy_over_energy.png    with --cost
    eval.log
The bit-planes of the weights go to --prob_path, prob/<model>_w<w>_c<c>/bit_levels<i>_ideal.pt: plain uint8 tensors for torch.load.
To evaluate planes that you changed, copy the folder, edit the files, and pass --planes FOLDER. Several networks with one
--save_path have a folder each there, named after the path of its checkpoint.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; train.py says why

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiment.report import cost_report, html_report, report, says
from experiment.report.index import add_to_index
from experiment.report.tables import settings_table
from experiment.program import config_file, distributed, machine
from experiment.sweep import reports
from experiment.sweep.bench import Bench, benches_of
from experiment.program.cli import check_writable, get_logger, user_error
from experiment.settings.eval_flags import EvalSettings
from experiment.settings.eval_settings import parse_all
from experiment.sweep.limits import cases_of, find_limits
from experiment.sweep.parts import check_numbers, parts_of
from experiment.sweep.worklist import Job, Worklist
from experiment.sweep.remedies import Remedies, bound_for
from experiment.sweep.specification import Specification, asked_of, sheet_of
from experiment.sweep.search import Search, check_search, validation_bench
from experiment.settings.train_settings import trained_for
from experiment.sweep.workers import Pool, check_workers
from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting
from models.quant.storage.files import write_text


def check_folders(settings: EvalSettings) -> None:
    """Refuse folders that cannot be written to, before hours of work."""
    for folder in (settings.save_path, *([settings.prob_path] if settings.save_cells or not settings.planes else [])):
        check_writable(folder)
    path = Path(settings.save_path, "results.jsonl")
    with user_error(lambda error: f"cannot write to {path}: {error.strerror or error}", OSError):
        open(path, "a").close()


@contextlib.contextmanager
def logging_to(settings: EvalSettings) -> Iterator[logging.Logger]:
    """Within `with`, console and log file, beside a progress bar."""
    silent = settings.dry_run or not distributed.is_first()
    log = get_logger(None if silent else Path(settings.save_path, settings.log_file))
    package_log = logging.getLogger("models")  # says which engine runs, and why
    package_log.handlers[:], package_log.level = log.handlers, logging.INFO
    with logging_redirect_tqdm([log, package_log]):
        yield log


def say_what_is_measured(bench: Bench, log: logging.Logger) -> None:
    """The network and its images, and what `train.py --adc_aware` trained it for."""
    settings, shown, config, ranges = bench.settings, bench.shown, bench.checkpoint["config"], bench.ranges
    source = settings.resume or settings.state
    log.info(f"{f'{source}: ' if source else ''}{settings.model.removesuffix('_eval')}, {settings.w_bits}-bit weights, "
             f"{settings.a_bits}-bit activations; {bench.looked_at}; {'CPU' if bench.device.type == 'cpu' else 'GPU'}")
    of_pixels = [] if bench.task else [
        says.normalization(shown.batches.mean, shown.batches.std, bench.others and bench.others.transform)]
    for line in (*of_pixels, *bench.fillings, *says.on_off(settings)):
        log.info(line)
    if config.get("adc_aware"):
        text = f"trained through the ADC of {trained_for(config)}"
        if ranges.trained_for:
            used = ranges.trained_for in settings.settings
            text += ", whose ranges " + ("it holds and keeps" if used else "are not used: the settings are of other hardware")
        log.info(text)


def measure_missing(work: Worklist, pool: Pool, log: logging.Logger) -> None:
    """Measure what a list of work lacks, under one progress bar."""
    log.info(work.text(pool.workers or 1))
    several = sys.stderr.isatty() and len(work.missing) > 1  # of one, its images alone are shown
    with tqdm(total=len(work.missing), desc="settings", unit="point", dynamic_ncols=True, leave=False, disable=not several) as bar:

        def say(records: Sequence[Record]) -> None:
            for record in records:
                table = f"\n{cost_report.layers_table(record.cost)}" if record.cost else ""
                log.info(f"{record}: {record.metric.said(record.accuracy)}{table}")

        def done(job: Job) -> None:
            bar.update()
            if job.of_several:
                chip = work.benches[job.bench].record_of_chip(job.setting)
                log.info(f"{job}: {chip.metric.said(chip.accuracy)}")
            say(work.complete(job))

        say(work.complete())
        pool.measure(work.missing, done)


def measure_settings(bench: Bench, pool: Pool, log: logging.Logger, settings: Sequence[Setting]) -> None:
    """Measure what some settings of a bench, and its software, lack."""
    measure_missing(Worklist(pool.benches, {bench: (None, *settings)}), pool, log)


def specify(bench: Bench, parts: Sequence[Bench], pool: Pool, log: logging.Logger) -> None:
    """Make the specification sheet of a network, and the page with it."""
    Specification(bench, parts, pool, functools.partial(measure_settings, bench, pool, log), log).run()
    rows = bench.points.write_tables()
    if bench.settings.html:
        log.info(f"page: {html_report.write(bench.settings.save_path, rows)}")


def write_results(bench: Bench, work: Worklist, log: logging.Logger) -> None:
    """The table and the files that follow from the points of a network's settings."""
    of, folder, settings = bench.settings, Path(bench.settings.save_path), work.settings_of(bench)
    bench.write_ranges()
    for setting in settings:
        if of.report and setting and setting.spec.adc_range in ("calibrated", "full"):
            reports.write(bench, setting, log)
    if of.save_cells:
        bench.write_cells(work.chips_of(bench), log)
    records = [*filter(None, [bench.of_float(), *(bench.record(setting) for setting in settings)])]
    if costed := [record for record in records if record.cost]:
        log.info(f"sources of the costs in {bench.costs.technology.name}:\n{cost_report.sources_table(costed)}")
    log.info("\n" + settings_table(records, bench.shown.of_all, bench.shown.kind, of.planes))
    write_text(bench.folder / "table.json", json.dumps([point["row"] for point in map(bench.point, settings) if point], indent=1))
    title = (f"{of.model.removesuffix('_eval')}, {of.w_bits}-bit weights, {of.a_bits}-bit activations: "
             f"{bench.looked_at}")
    for path in report.plots([record for record in records if record.setting], title, bench.folder):
        log.info(f"plot: {path}")
    paths = cost_report.write(records, bench.costs.technology, title, bench.folder, bench.costs.technology and bench.net)
    for path in paths:
        log.info(f"costs: {path}")
    if paths:
        add_to_index(bench.folder, {path.name: f"costs of {len(costed)} settings in {bench.costs.technology.name}" for path in paths})
    rows = bench.points.write_tables()
    if of.html:
        log.info(f"page: {html_report.write(folder, rows)}")
    log.info(f"results: {folder / 'results.jsonl'}")


def measure_all(benches: Sequence[Bench], choosing: Sequence[Bench], pool: Pool, log: logging.Logger) -> None:
    """Search, measure, and write what was found. Args: choosing, the benches whose images choose, for a search."""
    first = benches[0].settings
    searches = [Search(each) for each in choosing]  # all of them, before the first is run, as one may be of what cannot be
    for bench, search in zip(benches, searches):
        search.run(functools.partial(measure_settings, search.bench, pool, log), log)
        bench.settings = replace(bench.settings, settings=tuple(search.front))
    work = Worklist(pool.benches, {bench: (None, *bench.settings.settings) for bench in benches}, first.shard)
    if first.dry_run:
        log.info(f"{work.listing()}\n{work.text(first.workers or 1)}")
        return
    for bench in benches:
        bench.folder.mkdir(parents=True, exist_ok=True)
        config_file.write(bench.folder / "eval_config.json", bench.settings.given, but=("dry_run", "shard"))
        bench.write_planes(log)
    measure_missing(work, pool, log)
    remedies = [Remedies(bench, functools.partial(measure_settings, bench, pool, log), pool.benches, log)
                for bench in benches if first.remedy]
    for found in remedies:
        found.run()
    for bench in benches:
        write_results(bench, work, log)
    for found in remedies:
        log.info(f"\n{found}")
    for search, bench in zip(searches, benches):
        log.info(f"search: {', '.join(map(str, search.write(bench)))}")


def main(argv: list[str] | None = None) -> int:
    networks = parse_all(argv, __doc__)
    first, command = networks[0][0], shlex.join(["eval.py", *(sys.argv[1:] if argv is None else argv)])
    if distributed.must_start(first.ngpu):
        return distributed.start(first.ngpu, argv)
    check_workers(first.workers)
    check_search(first)
    machine.keep_freed_memory()
    benches = benches_of(networks, command)
    choosing = [validation_bench(bench) for bench in benches if first.search]
    for bench in benches:
        bench.check(bench.settings.settings)
        if first.remedy:
            bound_for(bench)
        if first.limits or first.specify:
            check_numbers(bench.metric)
        if first.limits:
            cases_of(bench)
        if first.specify:
            asked_of(bench)
        if first.refine:
            sheet_of(bench)
        if not first.dry_run and distributed.is_first():
            check_folders(bench.settings)
    with logging_to(first) as log, Pool([*benches, *choosing], first.workers) as pool:
        for bench in pool.benches:
            bench.load(log)
            say_what_is_measured(bench, log)
        parts = {bench: parts_of(bench) for bench in benches if first.limits or first.specify}
        pool.benches += itertools.chain(*parts.values())
        for text in dict.fromkeys(filter(None, (bench.points.says_older() for bench in pool.benches))):
            log.info(text)
        with distributed.led(pool.benches) as leads:  # the other processes measure what the first one does, and write nothing
            if leads and parts:
                for bench in benches:
                    bench.folder.mkdir(parents=True, exist_ok=True)
                    config_file.write(bench.folder / "eval_config.json", bench.settings.given)
                    (specify if first.specify else find_limits)(bench, parts[bench], pool, log)
            elif leads:
                measure_all(benches, choosing, pool, log)
    return 0


if __name__ == "__main__":
    distributed.run(main)
