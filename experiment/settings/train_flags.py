"""The flags of train.py: a dataclass a group, whose fields are the flags, and the parser that is made from them.

`train_settings` makes the settings of a run of what is given.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import models
from models.building import CROSSBAR_LAYERS
from models.quant import Calibration, CrossbarSpec
from models.quant.arrays.spec import hardware
from models.quant.layers.quantizers import OFF, WEIGHT_QUANTIZERS
from models.quant.measuring.chips import Chips

from ..inputs import data, foreign
from ..program import flags
from ..program.flags import (ANY_INT, AT_LEAST_2, BITS, COUNT, COUNT_OR_0, FIT_OR_POSITIVE, POSITIVE, POSITIVE_OR_0, SHARE, SHARE_OR_ALL,
                             ArgumentParser, flag_name, option)
from . import chips
from .chips import TrainingChips
from .conversion_settings import Conversion, ConversionFiles, LearnedScales

CHECKPOINT, BEST, CONFIG = "checkpoint.pth.tar", "model_best.pth.tar", "config.json"  # in the folder of a run
MODELS = tuple(name for name in models.names() if not name.endswith("_eval"))  # --adc_aware trains the others
HARDWARE = hardware("cells", "arrays", "inputs", "adc")  # of CrossbarSpec

# Defaults that depend on the data set.
DIGITS = {"epochs": 5, "batch_size": 32}  # 200 steps: 99.4 to 99.7 % of the test images over 4 seeds
OTHERS = {"epochs": 100, "batch_size": 128}
NGPU = option(None, "0: CPU. N: N GPUs of this machine, with a process each. Default a GPU where PyTorch finds one; for each process "
              "where torchrun has started several", ANY_INT)
LR, LR_OF_OTHERS = 0.05, 0.005  # a converted network is trained already
USELESS_WITHOUT_PLAN = "--adc_share is for plans: add --adc_plan significance or ones"
USELESS_WITH_PLAN = ("--{} is for uniform bits, and with a plan each kind of read has the range of least squared error: leave it out, or "
                     "add --adc_plan uniform")
# Flags without effect on a converted network: it has no clipping levels of PACT, and --skip says which of its layers stay digital.
OF_OWN = ("alpha_init", "alpha_lr", "alpha_wd", "clp", "a_lambda", "crossbar_layers")


def _by_data(name: str) -> str:
    return f"default {DIGITS[name]} for digits, else {OTHERS[name]}"


@dataclass(frozen=True, kw_only=True)
class Network:
    """what to train, and on what"""

    model: str = option("vgg7_quant", f"{' or '.join(MODELS)}. Or, with --qat or --adc_aware, your own network: {foreign.KINDS}")
    qat: bool = option(False, "train your own network further, converted, through its quantizers: without arrays and ADCs", bool)
    w_bits: int = option(4, f"bits of a weight, 1 to 8, or {OFF} to switch the quantizer off", BITS)
    a_bits: int = option(4, f"bits of an activation, 1 to 8, or {OFF} to switch the quantizer off", BITS)
    wq: str = option("dorefa", "weight quantizer. dorefa: odd multiples of one step, up to the largest weight. sawb: multiples of a "
                     "step around an exact zero, up to a level that follows from the weights' statistics", tuple(WEIGHT_QUANTIZERS))
    alpha_init: float | str | None = option(
        None, "first clipping level of every activation. With --fine_tune: of those that the weights lack, or have for another "
        "--a_bits. fit: the level of least squared error on some training images, layer by layer. Default: fit with --fine_tune, "
        "else 6", FIT_OR_POSITIVE)
    quantize_image: bool = option(False, "also round the input image to the activation grid", bool)
    dataset: str = option("digits", "the images", data.DATASETS)
    val_split: float = option(0.1, "share of the training images that chooses the best epoch. 0: train on all images and take the last "
                              "epoch", SHARE)
    limit_train: int | None = option(None, "use only this many training images, for a quick try. Default: all", COUNT)
    limit_test: int | None = option(None, "use only this many test images, spread evenly over them. Default: all", COUNT)
    cutout: int = option(0, "cover a random square of this many pixels a side", COUNT_OR_0)
    trivial_augment: bool = option(False, "change each training image once more, at random: turned, sheared, in other colours or contrast, "
                                   "... (TrivialAugment). For long runs, which know their images by heart without", bool)
    no_flip: bool = option(False, "never mirror training images: for signs, letters, and whatever is another class in a mirror. Images "
                           "of --dataset digits are never mirrored", bool)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """optimizer: SGD with Nesterov momentum"""

    epochs: int | None = option(None, f"passes over the training images; {_by_data('epochs')}", COUNT)
    batch_size: int | None = option(None, f"images a step; {_by_data('batch_size')}", AT_LEAST_2)
    lr: float | None = option(None, f"highest learning rate. Default: {LR}; of your own network {LR_OF_OTHERS}", POSITIVE)
    momentum: float = option(0.9, "share of the last step that is repeated", SHARE)
    wd: float = option(1e-4, "weight decay of all but the clipping levels", POSITIVE_OR_0)
    schedule_type: str | None = option(
        None, "how the learning rate changes. step: times a gamma at each epoch of --schedule. cosine: half a cosine down to 0. "
        "triangular: up from 0 in the first quarter of the run, then down to 0. Default: triangular; step if --schedule is given",
        ("step", "cosine", "triangular"))
    schedule: list[int] = option([], "epochs at which the rate drops (step)", COUNT, metavar="EPOCH")
    gammas: list[float] = option([], "factor at each epoch of --schedule", POSITIVE, metavar="G")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", SHARE)
    distill: float = option(0.0, "share of the loss that asks for the answers of the network from which the run starts, without ADCs. "
                            "Of your own network this is the float network. The labels have the rest of the loss", SHARE_OR_ALL)
    weight_clip: float | None = option(
        None, "after every step, clip each layer's weights to K times their root mean square, of your own network their standard "
        "deviation. DoReFa divides by the largest weight, so a few large weights leave most levels unused", POSITIVE, metavar="K")
    alpha_lr: float | None = option(None, "highest learning rate of the clipping levels. Default: that of --lr", POSITIVE)
    alpha_wd: float | None = option(None, "weight decay of the clipping levels (the L2 penalty of the PACT paper). Default: that of "
                                    "--wd", POSITIVE_OR_0)
    clp: bool = option(False, "add a_lambda times the sum of alpha^2 over the layers to the loss", bool)
    a_lambda: float = option(0.01, "factor of the penalty that --clp adds", POSITIVE_OR_0)


@dataclass(frozen=True, kw_only=True)
class ThroughADC:
    """training through the ADC"""

    adc_aware: bool = option(False, "train through simulated crossbars. The forward pass is computed bit for bit, and gradients go "
                             "straight through the ADC. On chips, each step's output is corrected to its batch. Start from a trained "
                             "network, with --fine_tune, or with your own", bool)
    calib_steps: int = option(50, "steps between two calibrations of the ADC ranges and their correction, on 64 training images",
                              COUNT)
    crossbar_layers: str = option("all", "all: every layer but the first is on crossbars. conv: only the convolutions are",
                                  CROSSBAR_LAYERS)
    spec: CrossbarSpec = CrossbarSpec()
    calibration: Calibration = Calibration()


@dataclass(frozen=True, kw_only=True)
class Reproducible:
    """arithmetic and random numbers"""

    amp: str | None = option(None, "bf16: layers compute in bfloat16, which holds the codes exactly. Default: bf16 where the processor "
                             "has such arithmetic, else off", ("off", "bf16"))
    seed: int = option(0, "seed of initial weights, split, order, crops and flips", COUNT_OR_0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """machine and files"""

    data_path: str = option("./data", "folder of the data set. digits needs none")
    ngpu: int | None = NGPU
    save_path: str | None = option(None, "folder of the run; {dataset}, {model}, {w_bits}, {a_bits} and {wq} in it stand for these "
                                   "settings. Default save/{dataset}_{model}_w{w_bits}a{a_bits}")
    log_file: str = option("train.log", "name of the log inside save_path, or a full path")
    save_minutes: float = option(10.0, "minutes between checkpoints inside an epoch. 0 writes one after every step",
                                 POSITIVE_OR_0)


@dataclass(frozen=True, kw_only=True)
class Actions:
    """starting from a checkpoint"""

    resume: str | None = option(None, "continue the run of this checkpoint. Default: save_path/checkpoint.pth.tar. Flags that are not "
                                "given are the run's own, but for --ngpu and --log_file. Give --model again for your own network",
                                metavar="PATH", or_empty=True)
    go_on: bool = option(False, "continue the run in save_path. Start it if there is none", bool)
    fine_tune: str | None = option(
        None, "start a new run from the weights of PATH, or of --resume PATH. Where quantizers differ from theirs, clipping levels and "
        "the scale of the logits are fitted to the answers of the network before", metavar="PATH", or_empty=True)
    evaluate: bool = option(False, "only measure a checkpoint on the test images: that of --resume, default "
                            "save_path/model_best.pth.tar", bool)
    export: str | None = option(None, "with --evaluate: also write the network to FILE, with weights as packed codes. "
                                "--fine_tune, --evaluate and eval.py read it. A .json beside it says what is known of the network",
                                metavar="FILE")
    about: str | None = option(None, "with --export: what the .json says of the data, beside the name of the data set",
                               metavar="TEXT")
    overwrite: bool = option(False, "start anew in a save_path that holds a run. The old run is lost", bool)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Network, Conversion, LearnedScales, ConversionFiles, Optimizer, ThroughADC, TrainingChips, Reproducible, Machine):
    """Everything that decides a run, and where its files lie. Made by `settings_of`; no field is None that has a default."""

    @functools.cached_property
    def chips(self) -> Chips | None:
        """Chips of the device that is trained for; None for ideal cells."""
        return chips.chips_of({name: getattr(self, name) for name in chips.OF_TRAINING})

    def config(self) -> dict[str, Any]:
        """All settings by their flags, plain values."""
        values = {field.name: getattr(self, field.name) for part in PARTS for field in flags.flag_fields(part)}
        nested = asdict(self.spec) | asdict(self.calibration)
        return values | {flag_name(name): nested[name] for name in (*HARDWARE, *asdict(self.calibration))}

    def of_computation(self) -> dict[str, Any]:
        """`config` without what says where files lie: what a checkpoint holds."""
        places = {field.name for part in (ConversionFiles, Machine) for field in flags.flag_fields(part)} - OF_CHECKPOINT
        return {name: value for name, value in self.config().items() if name not in places}


# What a checkpoint may say, and a continued run may not change.
COMPUTATION = (Network, Conversion, LearnedScales, Optimizer, ThroughADC, TrainingChips, Reproducible)
PARTS = (*COMPUTATION, ConversionFiles, Machine)
OF_CHECKPOINT = {"save_minutes"}  # the one setting of `Machine` that a checkpoint may say: it is no place
# For --adc_aware only.
TRAINED_FOR = (*HARDWARE, "crossbar_layers", *(flag_name(name) for name in asdict(Calibration())), *chips.OF_TRAINING)
# What --evaluate takes from the checkpoint and does not let the command line change.
FIXED_ON_EVALUATE = {"model", "w_bits", "a_bits", "wq", "quantize_image", "adc_aware", *TRAINED_FOR}


# In which topic of --help the flags of each part stand.
TOPICS = {Network: "network", Conversion: "network", Optimizer: "train", LearnedScales: "train", ThroughADC: "adc", TrainingChips: "device",
          Reproducible: "train", ConversionFiles: "network", Machine: "files", Actions: "start"}
FIRST = {  # what --help alone shows
    "model": "the network, such as vgg7_quant or resnet20_quant",
    "dataset": "digits, cifar10, cifar100, imagefolder",
    "data_path": "folder of the images",
    "w_bits": "bits of a weight, 32: not quantized", "a_bits": "bits of an activation, 32: not quantized",
    "epochs": "passes over the training images", "batch_size": "images a step", "lr": "highest learning rate",
    "val_split": "share of the training images that chooses the best epoch",
    "adc_aware": "train through the ADC of simulated crossbars",
    "cell_bits": "with --adc_aware: bits of a memory cell", "adc_bits": "with --adc_aware: bits of the ADC",
    "device": "with --adc_aware: train on chips of measured cells",
    "go_on": "start the run in save_path, or go on where it was stopped",
    "fine_tune": "start from the weights of a checkpoint",
    "evaluate": "only measure the checkpoint of --resume",
    "resume": "the checkpoint to go on with, or to evaluate",
    "export": "with --evaluate: write the network as a small file",
    "save_path": "folder of the run",
    "ngpu": "0: the CPU; N: N GPUs of this machine",
    "config": "take flags from a JSON file; config.json in save_path repeats a run"}


def build_parser(about: str | None = None) -> ArgumentParser:
    """The parser of train.py; `about`, the text at the top of its help."""
    parser = ArgumentParser(prog="train.py", description=about, first=FIRST)
    for part, topic in TOPICS.items():
        group = parser.topic(topic, part.__doc__)
        flags.add_flags(group, part)
        if part is ThroughADC:
            flags.add_flags(group, CrossbarSpec, HARDWARE)
            flags.add_flags(group, Calibration)
    return parser


def defaults() -> dict[str, Any]:
    """`{flag: default}` of all settings."""
    values = flags.defaults(CrossbarSpec, HARDWARE) | flags.defaults(Calibration)
    for part in PARTS:
        values |= flags.defaults(part)
    return values
