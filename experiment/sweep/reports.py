"""The report of a setting that a `Bench` measured (`write`), for `eval.py --report`."""

import json
import logging
from pathlib import Path

from models import quant
from models.quant.measuring.measure import count_reads
from models.quant.measuring.placing import is_chip, place
from models.quant.measuring.setting import Setting
from models.quant.network import diagnostics
from models.quant.storage.files import write_text

from ..measure.ranges import AdcRanges
from ..report import chip_report, report
from ..report.index import add_to_index, report_name, report_text
from .bench import Bench


def write(bench: Bench, setting: Setting, log: logging.Logger) -> None:
    """Table, JSON and picture of what the ADC, or a chip, does to each layer."""
    of, shown, text = bench.settings, bench.shown, report_text(setting, bench.settings.planes)
    path = Path(bench.folder, report_name(setting, text))
    title = f"{of.model.removesuffix('_eval')} on {of.dataset}: {text}"
    place(bench.net, setting, bench.cells)
    if all(layer.spec.adc_range == "ideal" for _, layer in quant.crossbar_layers(bench.net)):  # --per_layer says so
        return
    if setting.chips or is_chip(bench.cells):
        table = chip_report.write(path, bench.net, setting, title, shown.report, [*shown.calibration.inputs()], bench.cache, bench.cells,
                                  of.engine)
    else:
        table = _of_adcs(bench, setting, path, title)
    add_to_index(bench.folder, {f"{path.name}{end}": text for end in (".json", ".png")})
    log.info(f"{text}:\n{table}\npicture: {path.with_suffix('.png')}")


def _of_adcs(bench: Bench, setting: Setting, path: Path, title: str) -> str:
    """Write that of a setting with ideal cells, on which the network is placed. Returns: its table."""
    if bench.ranges.to_calibrate(setting):
        kept = AdcRanges()
        kept.add_of(setting, bench.point(setting)["ranges"])
        kept.restore(bench.net, setting, str(bench.points.path(bench.key(setting))))
    else:
        bench.ranges.give(bench.net, setting)
    histograms = count_reads(bench.net, setting, [*bench.shown.calibration.inputs()], bench.cache, progress=True)
    layers = diagnostics.report(bench.net, bench.shown.report, histograms, setting.calibration.rule, setting.calibration.per)
    write_text(path.with_suffix(".json"), json.dumps({"title": title, "setting": str(setting), "layers": layers}))
    report.report_plot(path.with_suffix(".png"), title, layers, setting.spec.adc_bits)
    return report.layers_table(layers)
