"""The settings of eval.py: how its flags (`eval_flags`) become a network, images and the rows of a table.

`parse(argv)` merges once: the defaults, then what the checkpoint was trained with, then what stands on the command line.
"""

import itertools
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from models.quant import Calibration, CrossbarSpec, Device, WeightNoise
from models.quant.arrays.spec import hardware
from models.quant.cost import Technology
from models.quant.layers.quantizers import OFF
from models.quant.measuring.setting import Setting

from ..inputs import foreign
from ..inputs.checkpoint import load_checkpoint
from ..program import config_file, flags
from ..program.cli import UserError, user_error
from ..program.flags import ArgumentParser
from . import chips, conversion_settings, costs, limits, per_layer, specification, train_settings
from .eval_flags import CALIBRATE_OTHERS, CALIBRATION, MODELS, EvalSettings, Search, add_hardware, build_parser, hardware_defaults
from .train_flags import USELESS_WITH_PLAN, USELESS_WITHOUT_PLAN
from .train_settings import images_beside

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
USUAL = Calibration()
BOUNDS = ("at_least", "at_most")


def _in_turn(*kinds: str) -> list[str]:
    return sorted(hardware(*kinds), key=lambda name: CrossbarSpec.__dataclass_fields__[name].metadata.get("turn", 0))


# In which order values change from row to row of a table, the last ones fastest.
ORDER = ("crossbar_layers", *_in_turn("cells", "arrays", "inputs"), *chips.OF_ROW, *_in_turn("adc", "range"))


def parse(argv: list[str] | None = None, about: str | None = None) -> tuple[EvalSettings, dict]:
    """(settings, checkpoint) of one network, everything checked that can be checked without the images. Raises: UserError, one line."""
    found = parse_all(argv, about)
    if len(found) > 1:
        raise UserError(f"--resume names {len(found)} networks where one is expected")
    return found[0]


def parse_all(argv: list[str] | None = None, about: str | None = None) -> list[tuple[EvalSettings, dict]]:
    """`parse` for each network of --resume."""
    in_file, on_line = config_file.parse_both(build_parser(about), argv)
    given = in_file | on_line
    if chips.LIST in given.get("device", ()):
        chips.say_devices()
        raise SystemExit(0)
    if given.get("cost") == costs.LIST:
        print("\n".join(Technology.load(name).describe() for name in Technology.presets()))
        raise SystemExit(0)
    if not given.get("resume") and not foreign.is_foreign(given.get("model", "")):
        named = f" (--model {given['model']} alone is none)" if "model" in given else ""
        raise UserError(f"eval.py needs the network: --resume PATH, a checkpoint of train.py, or --model {foreign.KINDS}{named}")
    if "" in given.get("resume", ()):
        raise UserError("--resume is followed by an empty name: give the path of a checkpoint")
    return [settings_of(given | ({"resume": source} if source else {})) for source in dict.fromkeys(given.get("resume", [None]))]


def checkpoint_of(source: str | None) -> dict[str, Any]:
    """The checkpoint `source`; an empty one without, as networks of others have none before they are trained here."""
    return load_checkpoint(source) if source else {"state_dict": {}, "config": {}}


def settings_of(given: dict[str, Any]) -> tuple[EvalSettings, dict]:
    """(settings, checkpoint) of the flags that are given, --resume naming one network."""
    source = given.get("resume")
    checkpoint = checkpoint_of(source)
    values = _network(given, checkpoint, source)
    conversion_settings.check(values, given, useless=("planes", "save_cells"))
    conversion_settings.check_language(values, given)
    rows = flags.with_tables({name: given[name] for name in (*hardware_defaults(), "per_layer") if name in given})
    calibration = Calibration(*(given.get(name, default) for name, default in flags.defaults(Calibration).items()))
    of_chips = {name: given[name] for name in chips.OF_RUN if name in given}
    found = EvalSettings(**{each.name: value for each in fields(EvalSettings)
                            if (value := (values | given).get(each.name)) is not None},
                         given=given, hardware=rows, of_chips=of_chips, calibration=calibration)
    if not (found.search or found.limits or found.specify):
        found = replace(found, settings=all_settings(rows, found.w_bits, found.a_bits, found.also, found.table, calibration, of_chips))
    _check(found, given)
    _check_validation(found, checkpoint)
    chosen = found.adc_ranges or found.planes or {*CALIBRATION, "calib_images"} & given.keys()
    return (found if chosen else replace(found, trained_for=_trained_for(found, checkpoint, source))), checkpoint


def _network(given: Mapping[str, Any], checkpoint: dict, source: str | None) -> dict[str, Any]:
    """What network and images the flags that are given and the checkpoint mean, `{flag: value}`."""
    config = train_settings.from_checkpoint(checkpoint, source)
    if foreign.is_foreign(given.get("model", config.get("model", ""))):
        return _network_of_others(given, config, source)
    exported = checkpoint.get("exported", False)
    trained = config.get("model")
    values = {"model": f"{trained or 'vgg7_quant'}_eval", "w_bits": 4, "a_bits": 4, "wq": "dorefa", "quantize_image": False,
              "dataset": "digits", "data_path": "./data",
              "save_path": str(Path("save", Path(source).stem) if exported else Path(source).parent)}
    of_network = {name: config[name] for name in ("w_bits", "a_bits", "wq", "quantize_image") if name in config}
    values |= of_network | {name: config[name] for name in ("dataset",) if name in config} | images_beside(source)
    if exported and values["dataset"] == "imagefolder" and list(checkpoint.get("data", {}).get("classes", [])) == CIFAR10_CLASSES:
        values["dataset"] = "cifar10"
    values |= given
    if values["model"] not in MODELS:
        raise UserError(f"--model {values['model']}: unknown, choose from {', '.join(MODELS)}, or leave it to the checkpoint")
    if trained and f"{trained}_eval" != values["model"]:
        raise UserError(f"{source} is of the model {trained}, not {values['model'].removesuffix('_eval')}")
    for name, stored in of_network.items():
        if values[name] != stored:
            raise UserError(f"{source} was trained with --{name} {stored}, not {values[name]}")
    for name in ("w_bits", "a_bits"):
        if values[name] == OFF:
            raise UserError(f"{source} has --{name} {OFF}: crossbars hold quantized weights and inputs, 1 to 8 bits")
    return values


def _network_of_others(given: Mapping[str, Any], config: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    """As `_network`, of one that is converted. Args: config, of the checkpoint `source` of `train.py`, if there is one."""
    if source:
        conversion_settings.check_checkpoint(config, given, source)
    names = "model", "dataset", *conversion_settings.CONVERTED
    values = {"w_bits": 8, "a_bits": 8, "wq": "linear", "quantize_image": False, "dataset": "imagefolder", "data_path": "./data",
              "calib_images": CALIBRATE_OTHERS} | (images_beside(source) if source else {})
    values |= {name: config[name] for name in names if name in config} | given
    folder = Path("save", f"{foreign.short_name(values['model'])}_w{values['w_bits']}a{values['a_bits']}")
    return {"save_path": str(Path(source).parent if source else folder)} | values


def all_settings(rows: Mapping[str, list], w_bits: int, a_bits: int, also: Iterable[str] = (), table: Iterable[str] = (),
                 calibration: Calibration = USUAL, of_chips: Mapping[str, int] = MappingProxyType({}),
                 known: Mapping[str, Device] = MappingProxyType({})) -> tuple[Setting, ...]:
    """The settings of the hardware flags `rows` and of the groups `also`; where neither is given, those of the groups `table`.
    Equal ones appear once. Args: of_chips, how many each setting with a device has, and their seeds (`chips.OF_RUN`); known, devices that
    were read already, among which those of `rows` have their names."""
    parser = ArgumentParser(kind="hardware flag", prog="eval.py", add_help=False)
    add_hardware(parser)
    by_table = table and not rows and not also
    groups = [] if by_table else [rows]
    for name, texts in (("table", table if by_table else ()), ("also", also)):
        for text in texts:
            with user_error(lambda error, name=name, text=text: f"--{name} {text!r}: {error}", (UserError, ValueError)):
                groups.append(flags.with_tables(flags.parse(parser, shlex.split(text))))
    known = dict(known)
    names = chips.names_of([*known, chips.IDEAL, *(device for group in groups for device in group.get("device", ()) if device)])
    settings = [setting for group in groups for setting in _combinations(group, w_bits, a_bits, calibration, of_chips, known, names)]
    return tuple(dict.fromkeys(settings))


def _combinations(given: Mapping[str, list], w_bits: int, a_bits: int, calibration: Calibration,
                  of_chips: Mapping[str, int] = MappingProxyType({}), known: dict[str, Device] | None = None,
                  names: Mapping[str, str] | None = None) -> list[Setting]:
    """Every combination of the flags' values, in the order of a table. Args: known, names, of devices, see `chips.chips_of`."""
    values = hardware_defaults() | given
    of_layers = per_layer.single(per_layer.parse(given.get("per_layer", ())))
    settings = []
    for combination in itertools.product(*(values[name] for name in ORDER)):
        found = dict(zip(ORDER, combination))
        row = {name: found.pop(name) for name in chips.OF_ROW}
        made = chips.chips_of(row | (of_chips if {chips.device_of(row), row["weight_noise"]} != {None} else {}), known, names)
        layers, plan, bits = found.pop("crossbar_layers"), found["adc_plan"], found["adc_bits"]
        if row["weight_noise"] is not None:
            settings.append(_without_cells(given, CrossbarSpec(w_bits, a_bits, adc_range="ideal"), layers, made))
            continue
        needs_a_plan = isinstance(bits, float) or bits == 0
        if plan == "uniform" and needs_a_plan and {*values["adc_plan"]} != {"uniform"}:
            continue  # a mean for the plans of the same table
        with user_error(lambda error: flags.in_flags(str(error))):
            spec = CrossbarSpec(w_bits, a_bits, **found)
        if spec.adc_range == "ideal":  # without an ADC its bits make no difference
            spec = replace(spec, adc_bits=1, adc_plan="uniform", adc_idle=CrossbarSpec().adc_idle, adc_transfer=None, columns_per_adc=None)
        plans = spec.planned or any(values.get("adc_plan", "uniform") != "uniform" for values in of_layers.values())
        if not plans:  # nor do, without a plan, the most bits of one
            spec = replace(spec, adc_max_bits=CrossbarSpec().adc_max_bits)
        if {spec.adc_plan, *(values["adc_plan"] for values in of_layers.values() if "adc_plan" in values)} == {"ones"}:  # skips idle reads
            spec = replace(spec, adc_idle=CrossbarSpec().adc_idle)
        with user_error("--{}".format):
            settings.append(with_what_counts(Setting(spec, layers, calibration, made, of_layers)))
    return settings


def _without_cells(given: Mapping[str, list], spec: CrossbarSpec, layers: str, noise: WeightNoise) -> Setting:
    """The setting of noise on the weights. Raises: UserError for flags of what it has none of."""
    for name in (*hardware("cells", "arrays", "inputs", "adc"), "adc_range", "per_layer"):
        if given.get(name) and given[name] != ["ideal"]:
            raise UserError(f"--{name} is for cells and ADCs, and --weight_noise is on weights without them: leave it out, or give one of "
                            "the two in --also")
    return Setting(spec, layers, chips=noise)


def with_what_counts(setting: Setting) -> Setting:
    """The setting without what makes no difference to its calibration: such settings are one."""
    counts = {"on": bool(setting.chips), "share": True in setting.plans, "rule": False in setting.plans, "per": False in setting.plans}
    usual = {name: getattr(USUAL, name) for name, does in counts.items() if not does}
    return replace(setting, calibration=replace(setting.calibration, **usual))


def _check(found: EvalSettings, given: Mapping[str, Any]) -> None:
    """Refuse flags that do not go together."""
    _check_search(found, given)
    _check_remedies(found, given)
    adc_ranges = {setting.spec.adc_range for setting in found.settings} or {*given.get("adc_range", [CrossbarSpec.adc_range])}
    useless = [name for name in given if name in (*CALIBRATION, "calib_images")]
    if found.report:  # compares rules and ranges for other ADC bits
        useless = [name for name in useless if name == "adc_correct"]
    if foreign.is_foreign(found.model) and not found.resume:  # the conversion looks at these images, and is corrected likewise
        useless = [name for name in useless if name not in ("calib_images", "adc_correct")]
    if found.adc_ranges and useless:
        raise UserError(f"--{useless[0]} is for calibration, and --adc_ranges takes its result from a file: give one of them")
    useless += ["adc_ranges"] if found.adc_ranges else []
    if useless and "calibrated" not in adc_ranges:
        raise UserError(f"--{useless[0]} is for calibrated ranges: add --adc_range calibrated")
    _check_plans(found, given)
    if found.report and not {"calibrated", "full"} & adc_ranges:
        raise UserError("--report describes frozen ranges: add --adc_range calibrated or full")
    named = {*given, *(span.flag for span in limits.spans_of(found))}
    asked = {"device", *chips.OF_IDEAL} & named
    with_device = any(setting.chips and setting.chips.device for setting in found.settings)
    with_device = with_device or found.specify or not found.settings and bool(asked)
    with_noise = any(setting.without_cells for setting in found.settings) or not found.settings and "weight_noise" in named
    for name in (*chips.OF_RUN, "calib_on", "save_cells"):
        if name in given and not (with_device or with_noise and name in WeightNoise.__dataclass_fields__):
            raise UserError(chips.WITHOUT.format(name))
    if found.planes and with_noise:
        raise UserError("--planes holds cells, and --weight_noise is on weights without them: give one of them")
    if found.adc_ranges and with_device:
        raise UserError("--adc_ranges are for ideal cells, and with --device chips are calibrated anew: give one of them")
    if foreign.is_foreign(found.model) and any(setting.crossbar_layers != "all" for setting in found.settings):
        raise UserError("--crossbar_layers conv is for the networks of this project; name the layers that stay digital by --skip")
    if found.planes and len({setting.spec.cell_bits for setting in found.settings}) > 1:
        raise UserError("--planes holds cells of one precision: give one --cell_bits")
    own = {field for setting in found.settings for _, values in setting.per_layer for field, _ in values}
    for name, fields_ in (("planes", ("cell_bits",)), ("save_cells", hardware("cells", "arrays"))):
        if name in given and (field := next((field for field in fields_ if field in own), None)):
            raise UserError(f"--{name} is for cells of one kind: leave {field} out of --per_layer")


def _check_plans(found: EvalSettings, given: Mapping[str, Any]) -> None:
    """Refuse what is for plans of ADC bits where there are none, and what they do not ask for where there is nothing else."""
    plans = set().union(*(setting.plans for setting in found.settings if setting.spec.adc_range == "calibrated"))
    several = (found.limits or found.search) and "per_layer" not in found.hardware
    if several and "calibrated" in found.hardware.get("adc_range", ["calibrated"]):
        plans = {plan != "uniform" for plan in found.hardware.get("adc_plan", ["uniform"])}
    if "adc_share" in given and plans == {False}:
        raise UserError(USELESS_WITHOUT_PLAN)
    for name in ("adc_calib", "adc_per"):
        if name in given and plans == {True} and not found.report:
            raise UserError(USELESS_WITH_PLAN.format(name))


def _check_search(found: EvalSettings, given: Mapping[str, Any]) -> None:
    if not found.search and (name := next((each.name for each in fields(Search) if each.name in given), None)):
        raise UserError(f"--{name} is for a search: add --search N")
    if not found.specify and (name := next((name for name in ("refine", "only") if getattr(found, name)), None)):
        raise UserError(f"--{name} is for a specification sheet: add --specify")
    if found.refine and found.limit:
        raise UserError("--refine takes all images: leave --limit out")
    asked = [name for name in ("search", "specify", "largest", "smallest") if getattr(found, name)]
    if not asked:
        if not found.remedy and (name := next((name for name in BOUNDS if name in given), None)):
            raise UserError(f"--{name} is for --search N, --largest, --smallest, --specify or --remedy: add one of them")
        return
    others = {"search": ("specify", "largest", "smallest"), "specify": ("largest", "smallest")}.get(asked[0], ("cost", "html"))
    for name in ("also", "table", "report", "planes", "save_cells", "shard", "adc_ranges", "dry_run", *others):
        if given.get(name):
            raise UserError(f"--{name} does not go with --{asked[0]}")
    limits.check(found)
    if found.specify:
        specification.check(found)
    chips.devices_of(found.hardware)  # refuses what cannot be


def _check_remedies(found: EvalSettings, given: Mapping[str, Any]) -> None:
    if not found.remedy:
        if useless := next((name for name in ("remedy_by", "remedy_epochs") if name in given), None):
            raise UserError(f"--{useless} is for remedies: add --remedy")
        return
    others = ("search", "largest", "smallest", "specify", "planes", "shard", "adc_ranges", "dry_run")
    if name := next((name for name in others if name in given), None):
        raise UserError(f"--{name} does not go with --remedy")
    if found.remedy_epochs and found.validation:
        raise UserError("--remedy_epochs trains with validation images of its own: leave --validation out")
    if found.remedy_by in ("energy", "area") and not found.cost:
        raise UserError(f"--remedy_by {found.remedy_by} needs costs: add --cost, with a technology or list")


def _check_validation(found: EvalSettings, checkpoint: Mapping[str, Any]) -> None:
    """Refuse --validation for a checkpoint that does not say which images its training held out."""
    if not (found.validation or found.search) or foreign.is_foreign(found.model) and not found.resume:
        return
    asked = "--search chooses on validation images" if found.search else "--validation"
    config = train_settings.defaults() | {"val_split": 0} | train_settings.from_checkpoint(checkpoint, found.resume)
    if not ("data" in checkpoint and config["val_split"]):
        raise UserError(f"{asked}: {found.resume} was trained without validation images")
    if found.dataset != config["dataset"]:
        raise UserError(f"{asked}: {found.resume} was trained on {config['dataset']}, not {found.dataset}")


def _trained_for(found: EvalSettings, checkpoint: Mapping[str, Any], source: str) -> Setting | None:
    """The setting that `train.py --adc_aware` trained for; None for other checkpoints."""
    stored = train_settings.from_checkpoint(checkpoint, source)
    if not stored.get("adc_aware") or chips.device_of(stored):  # ranges for chips are chosen anew
        return None
    rows = {name: [stored[name]] for name in hardware_defaults() if name in stored}
    [setting] = _combinations(rows, found.w_bits, found.a_bits, found.calibration)
    return setting
