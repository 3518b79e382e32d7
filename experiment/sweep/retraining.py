"""`eval.py --remedy_epochs N`: a network that was trained N epochs on chips of a setting."""

import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from models.quant.measuring.setting import Setting

from ..inputs import foreign
from ..inputs.data import DATASETS
from ..measure import keys
from ..program import distributed, flags
from ..program.cli import UserError, run_program
from ..settings import chips as of_chips, conversion_settings
from ..settings.eval_flags import EvalSettings
from ..settings.eval_settings import settings_of
from ..settings.train_flags import BEST, HARDWARE
from .bench import Bench

# How a trained network is trained on (docs/devices.md#training).
RECIPE = ("--lr 0.01 --schedule_type cosine --alpha_lr 0.001 --weight_clip 2.2 --wd 5e-4 --label_smoothing 0.1 --val_split 0.02 "
          "--batch_size 128").split()
RECIPE_OF_OTHERS = "--schedule_type cosine --wd 5e-4 --label_smoothing 0.1 --val_split 0.02 --batch_size 128".split()
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def name_of(epochs: int) -> str:
    """What tables call this remedy."""
    return f"{epochs} epoch{'s' * (epochs > 1)} on chips"


def trained_bench(bench: Bench, setting: Setting, log: logging.Logger) -> Bench:
    """Train `remedy_epochs`, or go on, and what measures the network that came of it.

    Raises: UserError for networks and settings that train.py does not train, or what it says.
    """
    of = bench.settings
    command = flags_of(of, setting, of.remedy_epochs)
    decides = {"network": bench.decides_all["network"], "setting": keys.of_setting(setting), "epochs": of.remedy_epochs,
               "recipe": _recipe(of), "dataset": of.dataset, **bench.decides_ranges}
    name = keys.key_of(decides)[:16]
    folder = Path(of.save_path, "remedies", name)
    command = [sys.executable, str(TRAIN), *command, "--go_on", "--save_path", str(folder)]
    log.info(f"{name_of(of.remedy_epochs)}, with its log in {folder}: {shlex.join(command)}")
    done, stopped = run_program(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if stopped:
        raise KeyboardInterrupt  # of which the training has kept its last step
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(lines[-1].removeprefix("error: ") if lines else f"train.py ended with {done.returncode}: {folder} has its log")
    given = {name: value for name, value in of.given.items() if name != "state"}  # whose weights were the first ones
    given |= {"resume": str(folder / BEST), "save_path": of.save_path, "dataset": of.dataset, "data_path": of.data_path}
    return Bench(*settings_of(given), command=bench.facts["command"], of_several=True)


def flags_of(of: EvalSettings, setting: Setting, epochs: int) -> list[str]:
    """The flags of train.py for a network and a setting. Raises: UserError for what it does not train."""
    if of.dataset not in DATASETS:
        raise UserError(f"train.py trains networks that classify the images of a data set, and {of.model} is measured on {of.dataset}")
    if distributed.world() > 1:
        raise UserError("a training starts processes of its own: leave out --ngpu and torchrun")
    if setting.per_layer:
        raise UserError("train.py knows no hardware of single layers (--per_layer)")
    if setting.spec.adc_range != "calibrated":
        raise UserError(f"train.py trains through calibrated ranges, and these are {setting.spec.adc_range}")
    values = {"fine_tune": of.resume, "model": of.model.removesuffix("_eval"), "dataset": of.dataset, "data_path": of.data_path,
              "w_bits": of.w_bits, "a_bits": of.a_bits, "epochs": epochs, "ngpu": of.ngpu, "adc_aware": True}
    if foreign.is_foreign(of.model):
        values |= {name: getattr(of, name) for name in conversion_settings.OF_NETWORK}
    else:
        values |= {"wq": of.wq, "quantize_image": of.quantize_image, "crossbar_layers": setting.crossbar_layers}
    values |= {name: getattr(setting.spec, name) for name in HARDWARE}
    values |= {flags.flag_name(name): value for name, value in vars(setting.calibration).items()}
    useless = ("adc_calib", "adc_per") if setting.spec.planned else ("adc_share",)
    values = {name: value for name, value in values.items() if name not in useless}
    return [*flags.arguments_of(values | _of_chips(of, setting)), *_recipe(of)]


def _recipe(of: EvalSettings) -> list[str]:
    return RECIPE_OF_OTHERS if foreign.is_foreign(of.model) else RECIPE


def _of_chips(of: EvalSettings, setting: Setting) -> dict[str, Any]:
    """Those of the device, and of chips that are none of those that are measured."""
    chips = setting.chips
    if not chips:
        return {}
    names = of_chips.names_of([of_chips.IDEAL, *filter(None, of.hardware.get("device", []))])
    device = next((flag for flag, name in names.items() if name == chips.name), None)
    if device is None:
        raise UserError(f"the device {chips.name} is given in --also: give it as --device, alone")
    usual = flags.defaults(of_chips.TrainingChips)
    given = {name: chips.value(name) for name in of_chips.OF_TRAINING if name not in ("device", "chip_steps", "chip_seed")}
    given |= {"device": device, "chip_steps": 4, "chip_seed": chips.chip_seed + chips.chips}
    return {name: value for name, value in given.items() if value != usual[name]}
