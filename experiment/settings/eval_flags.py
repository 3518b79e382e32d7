"""The flags of eval.py: a dataclass a group, whose fields are the flags, and the parser that is made from them.

`eval_settings` makes a network, images and the rows of a table of what is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
import models
from models.quant import Calibration, CrossbarSpec, WeightNoise, engines
from models.quant.arrays.spec import hardware
from models.quant.layers.quantizers import WEIGHT_QUANTIZERS
from models.quant.measuring.chips import Chips
from models.quant.measuring.setting import Setting

from ..inputs import data, foreign
from ..program import flags
from ..program.flags import BITS, COUNT, COUNT_OR_0, ArgumentParser, Number, flag_name, option
from . import chips, costs
from .chips import DeviceSettings
from .conversion_settings import Conversion, ConversionFiles, Language
from .train_flags import NGPU, ThroughADC

MODELS = tuple(name for name in models.names() if name.endswith("_eval"))
# What has the flags that make the rows, and which of its fields they are (None: all), with their topic and title in --help.
OF_SETTINGS = (
    ("cells", "cells, arrays and inputs", CrossbarSpec, hardware("cells", "arrays", "inputs")),
    ("adc", "converters", CrossbarSpec, hardware("adc", "range")), ("cells", "layers on crossbars", ThroughADC, ("crossbar_layers",)),
    ("device", "cells of a device", DeviceSettings, None), ("device", "reads and wires", Chips, chips.OF_ROW),
    ("device", "noise on the weights, in place of cells", WeightNoise, chips.OF_ROW))
FIRST = {  # what --help alone shows
    "resume": "the trained network: a checkpoint of train.py or of the original code",
    "model": "or your own network: torchvision/NAME, timm/NAME, FILE.py:FUNCTION",
    "dataset": "digits, cifar10, cifar100, imagefolder; default that of the checkpoint",
    "data_path": "folder of the images",
    "limit": "only so many test images",
    "cell_bits": "bits of a memory cell; several values make several rows of the table",
    "rows": "word lines of an array",
    "weights": "offset: cells and a reference column; pair: two bit lines",
    "adc_bits": "bits of the ADC, such as 6, 4 5 6 or 3:8; with a plan their mean, such as 1.5",
    "adc_plan": "uniform; significance or ones: more bits where they count",
    "report": "say what the ADC does to each layer, with a picture",
    "device": "measured cells: a preset, a file of yours, or list",
    "device_time": "when cells are read, such as 1h or 1d",
    "chips": "how many chips are drawn and measured",
    "cost": "energy, latency and area in a technology, or list",
    "workers": "processes that measure at the same time",
    "dry_run": "say what would be measured, and end",
    "save_path": "folder of results",
    "config": "take flags from a JSON file; eval_config.json in save_path repeats a run"}
CALIBRATE_OTHERS = 64  # images that calibrate networks of others, whose images are large
CALIBRATION = tuple(flag_name(field.name) for field in fields(Calibration))


@dataclass(frozen=True, kw_only=True)
class Network:
    """network and data"""

    resume: str | None = option(None, "checkpoint of train.py, or of the original code. Several are evaluated one after the other",
                                metavar="PATH")
    model: str | None = option(None, f"{' or '.join(MODELS)}. Default: that of the checkpoint. Or your own network, which is "
                               f"converted: {foreign.KINDS}, or hf/FOLDER, a language model (--text)")
    w_bits: int | None = option(None, "bits of a weight. Default: those of the checkpoint; 8 for your own network", BITS)
    a_bits: int | None = option(None, "bits of an activation. Default: those of the checkpoint; 8 for your own network", BITS)
    wq: str | None = option(None, "weight quantizer. Default: that of the checkpoint", tuple(WEIGHT_QUANTIZERS))
    quantize_image: bool | None = option(None, "round the image to the activation grid. Default: as the checkpoint was trained. "
                                         "Networks of the original code need it", bool)
    dataset: str | None = option(None, "the images. Default: those of the checkpoint; cifar10 for an exported network of its classes; "
                                 "imagefolder for your own network", data.DATASETS)
    data_path: str | None = option(None, "folder of the data set. Default: that of the checkpoint's run, else ./data")
    batch_size: int = option(64, "images at a time; of up to 32 x 32 pixels 256, unless it is given. Only with --adc_range "
                             "dynamic, which keeps to 64, it changes results", COUNT)
    limit: int | None = option(None, "only LIMIT test images, spread evenly over the set. Default: all", COUNT)
    validation: bool = option(False, "measure on the validation images of the training, not on the test images. Choose settings with "
                              "these, because the test images must not choose. For networks that were not trained here they are those "
                              "in val/ beside test/, or a tenth of the training images", bool)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """single layers"""

    per_layer: list[str] = option([], "other hardware of some layers, in all rows. A layer's name or a pattern, and hardware flags: "
                                  "--per_layer \"features.3:adc_bits=5,cell_bits=2\" \"classifier.*:adc_range=ideal\"",
                                  metavar="LAYER:FLAG=VALUE")


@dataclass(frozen=True, kw_only=True)
class Table:
    """more settings"""

    also: list[str] = option([], "more settings in the same table. Each group of hardware flags stands in quotes. A flag that is left "
                             "out has its default: --also \"--cell_bits 1 2 --crossbar_layers conv\" \"--adc_bits 5\"", metavar="FLAGS")
    table: list[str] = option([], "the settings of the table, in groups as for --also, if no hardware flag is given", metavar="FLAGS")


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """calibration"""

    calib_images: int = option(256, "training images that calibrate the ADC. The first 256, as one batch, also measure the correction. "
                               f"Your own network takes {CALIBRATE_OTHERS} unless it is given. A checkpoint of train.py --adc_aware "
                               "keeps its own ranges on the hardware it was trained for, unless a flag of this group is given", COUNT)
    adc_ranges: str | None = option(None, "take the ranges, and their correction, from the adc_ranges.json of an earlier "
                                    "evaluation", metavar="FILE")
    report: bool = option(False, "say what the ADC does to each layer and slice, for each setting with calibrated or full ranges: a "
                          "table, a JSON file and a picture", bool)
    planes: str | None = option(None, "take the cells from files in DIR: bit_levels<i>_ideal.pt, or those of one chip, "
                                "bit_levels<i>_<device>_chip<seed>.pt",
                                metavar="DIR")


SHARD = Number(lambda text: tuple(map(int, text.split("/"))), "I/N, such as 2/8: I from 1 to N",
               lambda shard: len(shard) == 2 and 1 <= shard[0] <= shard[1])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """many settings"""

    dry_run: bool = option(False, "say what would be measured and what is measured already. Measure nothing", bool)
    workers: int | None = option(None, "processes that measure at the same time, each with its share of the cores. They run on this "
                                 "machine, or on the Ray cluster that RAY_ADDRESS names. Needs Ray (requirements-cluster.txt). Default: "
                                 "this process alone, with all cores", COUNT)
    shard: tuple[int, int] | None = option(None, "measure only the I-th of N parts of the settings, for job arrays that share a folder",
                                           SHARD, metavar="I/N")
    older_points: bool = option(False, "also use what was measured with other code, whose arithmetic may differ", bool)
    html: bool = option(False, "write results.html, one page with all that was measured in the results folder", bool)


@dataclass(frozen=True, kw_only=True)
class Search:
    """search"""

    search: int | None = option(None, "measure N of all combinations. About 16 are fixed or drawn at random; the others are proposed "
                                "from what is known so far. --per_layer may then give several values, and each layer gets one of them. "
                                "Settings are chosen on validation images, and the best are measured on the test images. Needs Optuna "
                                "(requirements-search.txt)", COUNT, metavar="N")
    objective: list[str] = option(["accuracy", "bits"], "what is best, one or more of: accuracy; changed, predictions that differ from "
                                  "the software's; bits, the mean of all reads; conversions; with --cost also energy, latency, area. "
                                  "Default accuracy bits")
    search_seed: int = option(0, "seed of the search. The same seed measures the same settings, with any number of workers",
                              Number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32))  # NumPy's seeds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """limits and bounds"""

    largest: list[str] = option([], "the largest value of a flag of the hardware at which the network keeps a bound, such as "
                                "--largest read_noise=0:20:0.1 --at_least accuracy=software-0.5. RESOLUTION may be 5log, steps of 5 %. A "
                                "bisection measures some of the values, or all of few, with as few chips and images as tell: at the most "
                                "--chips (10, or 36 where they differ) and all images. Each combination of the other flags has a limit of "
                                "its own",
                                metavar="FLAG=FIRST:LAST:RESOLUTION")
    smallest: list[str] = option([], "likewise the smallest value, of what is better with more, such as --smallest adc_bits=1:8:1",
                                 metavar="FLAG=FIRST:LAST:RESOLUTION")
    at_least: list[str] = option([], "bounds of a search, a limit, a sheet or remedies: accuracy=90, accuracy=software, "
                                 "accuracy=software-0.5", metavar="NAME=VALUE")
    at_most: list[str] = option([], "bounds likewise: bits=2, perplexity=software*1.03", metavar="NAME=VALUE")


@dataclass(frozen=True, kw_only=True)
class Specification:
    """specification sheet"""

    specify: bool = option(False, "make the specification sheet of the network, for losses of 0.5 and 1 point or the bounds of --at_least "
                           "and --at_most: the largest scatter, stuck cells, read noise, wires, errors of ADCs and retention of the "
                           "presets, the fewest ADC bits, the most rows, the least on/off ratio, each alone, and a joint corner. Values "
                           "are 50 % apart, and have at the most --chips (4). What is known is kept when it is interrupted", bool)
    only: list[str] = option([], "only the lines of these flags, without the corner: --only adc_bits,sigma,read_noise", metavar="FLAGS")
    refine: bool = option(False, "make it again from the limits of the sheet in --save_path on, with all images, and values that are 10 % "
                          "apart", bool)


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """what wins accuracy back"""

    remedy: bool = option(False, "for each setting beyond the bound, such as --at_least accuracy=software-0.5: measure what may win it "
                          "back, each alone, and the two that win most together. Pairs, the correction, ranges of the chip, smaller "
                          "arrays, more ADC bits, planned bits, fewer bits a cell", bool)
    remedy_by: str | None = option(None, "what the remedies are ordered by: points won for each microjoule, or square millimetre, more, or "
                                   "points alone. Default: energy with --cost, else points", ("energy", "area", "points"))
    remedy_epochs: int = option(0, "also train so many epochs on chips of the setting, which is slow. A training that was killed goes "
                                "on. For networks of train.py", COUNT_OR_0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """cost"""

    cost: str | None = option(None, "what each setting costs: energy, latency, area. In a technology, or in that of a file of your own "
                              f"(docs/cost.md). {costs.LIST} describes the technologies", metavar="NAME|FILE")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """machine and files"""

    engine: str = option("auto", f"{', '.join(engines.CHOICES)}. auto takes the fastest. Changes no result")
    ngpu: int | None = NGPU
    save_path: str | None = option(None, "folder for results. Default: that of the run; save/<its name> for an exported network")
    prob_path: str = option("prob", "folder for the bit-planes")
    save_cells: bool = option(False, "write what the cells of every chip hold to prob_path, beside the bit-planes. Also keep cells "
                              "behind --row_ohm or --driver_ohm there, which take minutes to solve", bool)
    log_file: str = option("eval.log", "name of the log inside save_path, or a full path")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Network, Conversion, ConversionFiles, Language, Table, Ranges, Cost, Sweep, Search, Limits, Specification, Remedies,
                   Machine):
    """Everything that decides an evaluation. Made by `eval_settings.parse`; no field is None that has a default.

    Attributes beyond the flags:
        given: `{flag: value}` of the command line and of --config: what a file that repeats the evaluation says.
        settings: the rows of the table; none where they follow from what is measured.
        hardware, of_chips: values of the hardware flags that were given, of which a search takes combinations, and those of all chips.
        calibration: how calibrated ranges are chosen, in all rows.
        trained_for: the setting that `train.py --adc_aware` trained for, if its ranges, which the checkpoint holds, are to be
            used; else None.
        part: of its images, those of the block of this number (`sequential.ends_of`); None: all.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    hardware: Mapping[str, list] = field(default_factory=dict)
    of_chips: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration = Calibration()
    trained_for: Setting | None = None
    part: int | None = None

    @property
    def limits(self) -> bool:
        """Whether limits are looked for."""
        return bool(self.largest or self.smallest)


def build_parser(about: str | None = None) -> ArgumentParser:
    """The parser of eval.py; `about`, the text at the top of its help."""
    parser = ArgumentParser(prog="eval.py", description=about, first=FIRST)
    network = parser.topic("network", Network.__doc__)
    flags.add_flags(network, Network, ["resume"], several=True)
    flags.add_flags(network, Network, [field.name for field in fields(Network) if field.name != "resume"])
    others = parser.topic("network", Conversion.__doc__)
    for part in (Conversion, ConversionFiles):
        flags.add_flags(others, part)
    flags.add_flags(parser.topic("network", Language.__doc__), Language)
    add_hardware(parser)
    flags.add_flags(parser.topic("sweep", Table.__doc__), Table)
    flags.add_flags(parser.topic("device", "how many chips"), Chips, chips.OF_RUN)
    calibration = parser.topic("adc", Ranges.__doc__)
    flags.add_flags(calibration, Calibration)
    flags.add_flags(calibration, Ranges)
    for cls, topic in ((Cost, "cost"), (Sweep, "sweep"), (Search, "sweep"), (Limits, "sweep"),
                       (Specification, "sweep"), (Remedies, "sweep"), (Machine, "files")):
        flags.add_flags(parser.topic(topic, cls.__doc__), cls)
    return parser


def add_hardware(parser: ArgumentParser) -> None:
    """The flags whose values make the settings: several values of several flags are every combination."""
    for topic, title, cls, names in OF_SETTINGS:
        flags.add_flags(parser.topic(topic, f"{title} (several values: every combination)"), cls, names, several=True)
    flags.add_flags(parser.topic("cells", Layers.__doc__), Layers)


def hardware_defaults() -> dict[str, list]:
    """The default of each flag whose values make the settings, as a list of one."""
    return {name: [value] for _, _, cls, names in OF_SETTINGS for name, value in flags.defaults(cls, names).items()}
