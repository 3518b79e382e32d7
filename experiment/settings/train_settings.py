"""The settings of train.py: how its flags (`train_flags`) become the settings of one run.

`parse(argv)` merges once: the defaults, then what the checkpoint was trained with, then what stands on the command line.
From a checkpoint come settings of the computation only. What to do (`Actions`) and where files lie (`Machine`) never do: the
folder of the images is that of the `config.json` beside the checkpoint, a file that this project wrote on this machine.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from models.quant import Calibration, CrossbarSpec, QLinearDoreFa
from models.quant.layers.quantizers import OFF

from ..inputs import foreign
from ..inputs.checkpoint import CHECKPOINT_FORMAT, load_checkpoint
from ..program import config_file, flags
from ..program.cli import UserError, user_error
from ..program.flags import flag_name
from . import chips, conversion_settings
from .train_flags import (BEST, CHECKPOINT, COMPUTATION, CONFIG, DIGITS, FIXED_ON_EVALUATE, HARDWARE, LR, LR_OF_OTHERS, MODELS,
                          OF_CHECKPOINT, OF_OWN, OTHERS, TRAINED_FOR, USELESS_WITHOUT_PLAN, USELESS_WITH_PLAN, Actions, Machine,
                          TrainSettings, build_parser, defaults)


def from_checkpoint(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`{flag: value}` of what a checkpoint was trained with; a value that no flag takes is an error in a file of this project."""
    config, foreign, values = checkpoint["config"], checkpoint.get("format") != CHECKPOINT_FORMAT, {}
    for part, names in ((CrossbarSpec, HARDWARE), (Calibration, None), (Machine, OF_CHECKPOINT), *((part, None) for part in COMPUTATION)):
        values |= flags.checked(part, config, source, names, foreign)
    return values


def settings_of(values: Mapping[str, Any], fine_tuned: bool = False) -> TrainSettings:
    """The settings of one run from `{flag: value}`; those that are None get the default that depends on others.

    Raises: UserError for hardware that cannot be.
    """
    values = dict(values)
    values["lr"] = values["lr"] or (LR_OF_OTHERS if foreign.is_foreign(values["model"]) else LR)
    depending = (DIGITS if values["dataset"] == "digits" else OTHERS) | {
        "schedule_type": "step" if values["schedule"] else "triangular", "alpha_init": "fit" if fine_tuned else 6.0,
        "alpha_lr": values["lr"], "alpha_wd": values["wd"], "save_path": "save/{dataset}_{model}_w{w_bits}a{a_bits}"}
    values |= {name: value for name, value in depending.items() if values[name] is None}
    if not values["save_path"]:
        raise UserError("--save_path is empty: give the name of a folder")
    values["save_path"] = expanded(values["save_path"], values)
    if values["adc_aware"] and OFF in (values["w_bits"], values["a_bits"]):
        raise UserError("--adc_aware needs quantized weights and activations, --w_bits and --a_bits from 1 to 8")
    with user_error(lambda error: flags.in_flags(str(error))):
        spec = replace(CrossbarSpec(), **{name: values[name] for name in HARDWARE},
                       **({"w_bits": values["w_bits"], "a_bits": values["a_bits"]} if values["adc_aware"] else {}))
        calibration = Calibration(*(values[flag_name(field.name)] for field in fields(Calibration)))
    names = {field.name for field in fields(TrainSettings)} & values.keys()
    return TrainSettings(**{name: values[name] for name in names}, spec=spec, calibration=calibration)


def expanded(path: str, values: Mapping[str, Any]) -> str:
    """A path with `{dataset}` and the like replaced by the settings of these names."""
    if foreign.is_foreign(values["model"]):
        values = {**values, "model": foreign.short_name(values["model"])}
    for name in ("dataset", "model", "w_bits", "a_bits", "wq"):
        for known in (name, *(alias for alias, flag in flags.ALIASES.items() if flag == name)):
            path = path.replace(f"{{{known}}}", str(values[name]))
    return path


def trained_for(config: Mapping[str, Any]) -> str:
    """The hardware of a checkpoint of --adc_aware as flags; those of chips only where they are not at their defaults."""
    usual = flags.defaults(chips.TrainingChips)
    return ", ".join(f"--{name} {config[name]}" for name in TRAINED_FOR
                     if name in config and (name not in usual or config[name] != usual[name]))


def config_beside(checkpoint: str | Path, *names: str) -> dict[str, str]:
    """`{name: text}` of some flags, as they stand in the config.json of the folder of a checkpoint; those that it has."""
    try:
        config = json.loads(Path(checkpoint).with_name(CONFIG).read_text(encoding="utf-8"))
        return {name: config[name] for name in names if isinstance(config.get(name), str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def images_beside(checkpoint: str | Path) -> dict[str, str]:
    """Where the images of the run lie whose checkpoint it is."""
    return config_beside(checkpoint, "data_path", "class_index")


def parse(argv: list[str] | None = None, about: str | None = None) -> tuple[TrainSettings, Actions, dict | None]:
    """(settings, what to do, the checkpoint that it starts from or None), all checked that can be without the images.

    Raises: UserError, one line.
    """
    in_file, on_line = config_file.parse_both(build_parser(about), argv)
    if {"evaluate", "resume"} & on_line.keys():  # of the run that the file is of, not of what it began from
        in_file.pop("fine_tune", None)
    given = flags.with_tables(in_file | on_line)
    if given.get("device") == chips.LIST:
        chips.say_devices()
        raise SystemExit(0)
    actions = Actions(**{field.name: given.pop(field.name) for field in fields(Actions) if field.name in given})
    named = defaults() | given  # for the names of folders
    actions = replace(actions, **{name: expanded(path, named) for name in ("resume", "fine_tune")
                                  if (path := getattr(actions, name))})
    if actions.go_on:
        actions = _go_on(actions, settings_of(named).save_path)
    actions, checkpoint = _find_checkpoint(actions, settings_of(named).save_path, named["model"])
    values = defaults()
    if checkpoint and actions.fine_tune is None:
        values |= _settings_of_checkpoint(actions, checkpoint, given) | images_beside(actions.resume)
    elif checkpoint and foreign.is_foreign(named["model"]):
        values |= _conversion_of_checkpoint(actions.fine_tune, checkpoint, given)
    values |= given
    if actions.resume and not actions.evaluate:
        values["save_path"] = str(Path(actions.resume).parent)  # model_best.pth.tar and the log lie beside the checkpoint
    settings = settings_of(values, fine_tuned=actions.fine_tune is not None)
    _check(settings, actions, on_line)  # a file of --config may say more than a run uses, as that of a run says all
    return settings, actions, checkpoint


def _go_on(actions: Actions, folder: str) -> Actions:
    if actions.resume is not None or actions.evaluate or actions.overwrite:
        raise UserError("--go_on continues or starts a run: leave out --resume, --evaluate and --overwrite")
    if Path(folder, CHECKPOINT).exists():
        return replace(actions, resume="", fine_tune=None)
    return actions


def _find_checkpoint(actions: Actions, folder: str, model: str) -> tuple[Actions, dict | None]:
    """The actions with the path of the checkpoint that they start from, and that checkpoint."""
    if actions.fine_tune is not None and not actions.evaluate:
        if actions.fine_tune and actions.resume:
            raise UserError("--fine_tune and --resume both name a checkpoint: give one of them")
        actions = replace(actions, fine_tune=actions.fine_tune or actions.resume, resume=None)
        if not actions.fine_tune:
            raise UserError("--fine_tune starts a new run from weights: it needs the PATH of a checkpoint")
        checkpoint = load_checkpoint(actions.fine_tune)
        trained = checkpoint["config"].get("model", model)
        if trained != model and not foreign.is_foreign(model):  # of which `_conversion_of_checkpoint` knows more
            raise UserError(f"{actions.fine_tune} is of the model {trained}, not {model}")
        return actions, checkpoint
    if actions.resume is None and not actions.evaluate:
        return actions, None
    path = actions.resume or actions.fine_tune or str(Path(folder, BEST if actions.evaluate else CHECKPOINT))
    return replace(actions, resume=path, fine_tune=None), load_checkpoint(path)


def _settings_of_checkpoint(actions: Actions, checkpoint: dict, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint of --resume was trained with; what was given must agree with it."""
    source = actions.resume
    found = from_checkpoint(checkpoint, source)
    if actions.evaluate:
        found.pop("limit_test", None)  # of a quick try
    conversion_settings.check_code(found, given, source)
    fixed = FIXED_ON_EVALUATE
    if not actions.evaluate:
        if checkpoint.get("format") != CHECKPOINT_FORMAT or "optimizer" not in checkpoint:
            raise UserError(f"{source} holds weights but no run to continue; start from them with --fine_tune")
        fixed = found.keys() - OF_CHECKPOINT
        if "save_path" in given and Path(expanded(given["save_path"], found)).resolve() != Path(source).parent.resolve():
            raise UserError(f"a run is continued in its own folder, {Path(source).parent}, not in {given['save_path']}")
    conflicts = [f"--{name} {given[name]} (the checkpoint has {found[name]})"
                 for name in sorted(fixed & given.keys() & found.keys()) if given[name] != found[name]]
    if conflicts:
        raise UserError(f"{source} was made with other settings: {', '.join(conflicts)}")
    return found


def _conversion_of_checkpoint(source: str, checkpoint: dict, given: Mapping[str, Any]) -> dict[str, Any]:
    """How the converted network was made whose weights --fine_tune starts from: its scales belong to these bits."""
    found = from_checkpoint(checkpoint, source)
    conversion_settings.check_checkpoint(found, given, source)
    return {name: found[name] for name in conversion_settings.CONVERTED if name in found}


def continuing(settings: TrainSettings, checkpoint: Path) -> str:
    """The command that goes on with a run that was stopped."""
    usual = flags.defaults(Machine)
    beside = {"model": settings.model} if foreign.is_foreign(settings.model) else {}
    beside |= {name: getattr(settings, name) for name in ("ngpu", "log_file") if getattr(settings, name) != usual[name]}
    return shlex.join(["python", "train.py", *flags.arguments_of({"resume": checkpoint} | beside)])


def _check(settings: TrainSettings, actions: Actions, given: Mapping[str, Any]) -> None:
    """Refuse settings that do not go together."""
    others = foreign.is_foreign(settings.model)
    if not others and settings.model not in MODELS:
        raise UserError(f"--model {settings.model}: unknown, choose from {', '.join(MODELS)}, or {foreign.KINDS}")
    if foreign.is_language_model(settings.model):
        raise UserError(f"--model {settings.model}: train.py trains on images; eval.py measures language models, and "
                        "examples/language_model.py trains one")
    conversion_settings.check({"model": settings.model, "w_bits": settings.w_bits, "a_bits": settings.a_bits}, given, useless=OF_OWN)
    through = [name for name in given if name in (*TRAINED_FOR, "calib_steps")]
    if through and not settings.adc_aware:
        raise UserError(f"--{through[0]} is for training through the ADC: add --adc_aware")
    if others and not (settings.qat or settings.adc_aware):
        raise UserError(f"--model {settings.model} is converted: add --adc_aware to train it through its arrays, or --qat to train it "
                        "through its quantizers alone")
    if settings.qat and not others:
        raise UserError(f"--qat trains a converted network, --model {foreign.KINDS}")
    for name in ("evaluate", "export"):
        if others and getattr(actions, name):
            raise UserError(f"--{name} is for the networks of this project; eval.py measures the checkpoint of {settings.model}")
    if others and settings.distill and actions.fine_tune:
        raise UserError("--distill learns from the float network, and --fine_tune starts from weights that were trained since: leave one "
                        "of them out")
    for name, needed, there in (("clip_share", "learn_scales", settings.learn_scales),
                                ("scale_decay", "clip_share", settings.clip_share is not None)):
        if name in given and not there:
            raise UserError(f"--{name} is for scales that are trained: add --{needed}")
    if "a_lambda" in given and not settings.clp:
        raise UserError("--a_lambda is the factor of the penalty that --clp adds: add --clp")
    planned = settings.spec.planned
    if useless := next((name for name in (("adc_calib", "adc_per") if planned else ("adc_share",)) if name in given), None):
        raise UserError(USELESS_WITH_PLAN.format(useless) if planned else USELESS_WITHOUT_PLAN)
    if settings.wq == "sawb" and settings.w_bits == 1:
        raise UserError("--wq sawb has codes around an exact zero: it needs --w_bits 2 to 8")
    if settings.chips:
        with user_error(lambda error: f"--device {settings.device}: {error}"):
            # Any layer: what cells hold depends on wq, and a converted network has codes around an exact zero too.
            settings.chips.check(QLinearDoreFa(1, 1, spec=settings.spec, wq="sawb" if others else settings.wq))
    elif settings.calibration.on == "chip":
        raise UserError(chips.WITHOUT.format("calib_on"))
    if len(settings.schedule) != len(settings.gammas):
        raise UserError(f"--schedule has {len(settings.schedule)} epochs, --gammas {len(settings.gammas)} factors: give as many")
    if settings.schedule_type == "step" and not settings.schedule:
        raise UserError("--schedule_type step needs --schedule and --gammas")
    if settings.alpha_init == "fit" and not (actions.fine_tune or actions.resume):
        raise UserError("--alpha_init fit needs the trained network of --fine_tune")
    if settings.distill and not (actions.fine_tune or actions.resume or others):
        raise UserError("--distill learns from the network that a run starts from: add --fine_tune PATH")
    if actions.export and not actions.evaluate:
        raise UserError("--export writes a trained network: add --evaluate and --resume PATH")
    if actions.about and not actions.export:
        raise UserError("--about is for the .json of --export")
    if actions.export and Path(actions.export).suffix == ".json":
        raise UserError(f"--export {actions.export}: a .json is written beside the network, so give the network another ending")
    if actions.export and settings.w_bits == OFF:
        raise UserError(f"--export packs weight codes, and {actions.resume} has --w_bits {OFF}")
    if actions.resume and actions.overwrite:
        raise UserError("--overwrite starts anew, and --resume goes on: give one of them")
    if not (actions.resume or actions.overwrite) and any(Path(settings.save_path, file).exists() for file in (CHECKPOINT, BEST)):
        raise UserError(f"{settings.save_path} holds a run: continue it with --resume, start anew with --overwrite, or choose "
                        "another --save_path")
