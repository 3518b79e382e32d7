"""Run a trained network bit by bit on simulated RRAM crossbars and print what accuracy is left.

    python eval.py --resume save/digits_vgg7_quant_w4a4/model_best.pth.tar --cellBit 1 2 --adc_prec 6 5

Every hardware flag that takes several values takes part in the product: the line above evaluates four settings, each on
the whole test set. The software baseline is the same quantized network computed with exact integer arithmetic, so every
difference to it comes from the ADC.

Written to --save_path (the checkpoint's folder unless given): results.jsonl, one line a setting, appended as soon as it
is known; adc_ranges.json, all ranges that were calibrated, for --adc_ranges; report_<setting>.json and .png with
--report; accuracy_over_adc_bits.png when several ADC precisions are given; eval.log. The bit-planes of the weights go to
--prob_path, prob/<model>_w<w>_c<c>/bit_levels<i>_ideal.pt: plain uint8 tensors to look at with torch.load. To evaluate
planes that you changed, copy the folder, edit the files, and pass --planes FOLDER.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; train.py says why

import torch
from tqdm import tqdm

from experiment import data as datasets
import hardware
import models
from experiment import report
import utils
from models import quant
from models.quant import diagnostics, engines
from models.quant.spec import ADC_RANGES
from models.quant.quantizers import WEIGHT_QUANTIZERS
from utils import UserError

REPORT_IMAGES = 64  # calibration images whose layer outputs --report compares
MODELS = [name for name in models.names() if name.endswith("_eval")]


def build_parser():
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("network and data").add_argument
    add("--resume", required=True, metavar="PATH", help="checkpoint of train.py, or of the original code")
    add("--model", help=f"{' or '.join(MODELS)}; default that of the checkpoint")
    add("--wbit", type=utils.BITS, help="weight bits; default those of the checkpoint")
    add("--abit", type=utils.BITS, help="activation bits; default those of the checkpoint")
    add("--wq", choices=WEIGHT_QUANTIZERS, help="weight quantizer; default that of the checkpoint")
    add("--quantize_image", action="store_true", default=None, help="round the image to the activation grid; default as "
        "the checkpoint was trained. Networks of the original code need it")
    add("--dataset", choices=datasets.DATASETS, help="default that of the checkpoint")
    add("--data_path", help="folder of the data set; default that of the checkpoint")
    add("--batch_size", type=utils.COUNT, default=64, help="images at a time; changes no result but those of --adc_range "
        "dynamic. Default %(default)s")
    add("--limit", type=utils.COUNT, help="only LIMIT test images, spread evenly over the set; default all")
    add("--validation", action="store_true", help="the validation images of the training in place of the test images: for "
        "choices, which the test images must not make")

    group = parser.add_argument_group("hardware (several values: every combination)")
    add_hardware(group)
    add = group.add_argument
    add("--also", nargs="+", action=utils.Extend, default=[], metavar="FLAGS", help="more settings in the same table: groups "
        "of the flags above, each group in quotes, a flag that is left out at its default: --also \"--cellBit 1 2 --map conv\" "
        "\"--adc_prec 5\"")

    group = parser.add_argument_group("calibration")
    hardware.add_calibration_flags(group)
    add = group.add_argument
    add("--calib_images", type=utils.COUNT, default=256, help="training images that calibrate the ADC; "
        "the first 256, as one batch, also correct what it does to the outputs. Default %(default)s. A checkpoint of "
        "train.py --adc_aware keeps its own ranges on the hardware it was trained for, unless a flag of this group is given")
    add("--adc_ranges", metavar="FILE", help="take the calibrated ranges, and their correction if it "
        "holds one, from the adc_ranges.json of an earlier evaluation")
    add("--report", action="store_true", help="for every setting with calibrated or full ranges: what the ADC does to each "
        "layer and slice, as a table, a JSON file and a picture")
    add("--planes", metavar="DIR", help="take the cells from the bit_levels<i>_ideal.pt in DIR instead of the checkpoint")

    add = parser.add_argument_group("machine and files").add_argument
    add("--engine", default="auto", help=f"{', '.join(engines.CHOICES)}; changes no result. Default auto: the fastest")
    add("--ngpu", type=int, help="0: CPU, 1: the GPU; default 1 where PyTorch finds a CUDA GPU")
    add("--save_path", help="folder for results; default that of the checkpoint")
    add("--prob_path", default="prob", help="folder for the bit-planes; default %(default)s")
    add("--log_file", default="eval.log", help="name of the log inside save_path, or a full path; default %(default)s")
    return parser


def add_hardware(group):
    """The flags whose values make the settings."""
    hardware.add_flags(group, several=True)
    group.add_argument(
        "--adc_range", nargs="+", default=["calibrated"], choices=ADC_RANGES, help="calibrated: delta and q_min chosen on "
        "training images, then frozen. full: all values that the array can produce. dynamic: minimum and maximum of the "
        "batch at hand, so that the result depends on --batch_size (for comparison with published numbers). ideal: no "
        "ADC. Default calibrated")


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    spec: quant.CrossbarSpec
    map: str

    def __str__(self):
        spec, notes = self.spec, []
        if spec.adc_range == "ideal":
            adc_text = "no ADC"
        else:
            adc_text = f"{spec.adc_bits}-bit ADC, {spec.adc_range}"
        for name, usual in (("rows", 128), ("mapping", "tap"), ("reference", "analog"), ("dac_bits", 1)):
            if getattr(spec, name) != usual:
                notes.append(f"{name} {getattr(spec, name)}")
        if self.map != "all":
            notes.append(f"map {self.map}")
        return ", ".join([f"{spec.cell_bits}-bit cells, {adc_text}", *notes])


def parse(argv):
    """(args, settings, checkpoint), everything checked that can be checked without the images."""
    args, given = utils.parse_flags(build_parser(), argv)
    checkpoint = utils.load_checkpoint(args.resume)
    config = checkpoint["config"]
    trained = config.get("model")
    args.model = args.model or f"{trained or 'vgg7_quant'}_eval"
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: unknown, choose from {', '.join(MODELS)}")
    if trained and f"{trained}_eval" != args.model:
        raise UserError(f"{args.resume} is of the model {trained}, not {args.model.removesuffix('_eval')}")
    for name, default, free in (("wbit", 4, False), ("abit", 4, False), ("wq", "dorefa", False),
                                ("quantize_image", False, False), ("dataset", "digits", True),
                                ("data_path", "./data", True)):
        value, stored = getattr(args, name), config.get(name)
        if not isinstance(stored, type(default)):  # a checkpoint of other code
            stored = None
        if value is None:
            setattr(args, name, default if stored is None else stored)
        elif stored not in (None, value) and not free:
            raise UserError(f"{args.resume} was trained with --{name} {stored}, not {value}")
    for name in ("wbit", "abit"):
        if getattr(args, name) == 32:
            raise UserError(f"{args.resume} has --{name} 32: crossbars hold quantized weights and inputs, 1 to 8 bits")
    if args.dataset not in datasets.DATASETS:
        raise UserError(f"{args.resume} was trained on {args.dataset}: choose --dataset {', '.join(datasets.DATASETS)}")
    args.save_path = args.save_path or str(Path(args.resume).parent)
    settings = all_settings(args)
    adc_ranges = {setting.spec.adc_range for setting in settings}
    useless = [name for name in given if name in (*hardware.CALIBRATION, "calib_images")]
    if args.report:  # compares rules and ranges for other ADC bits
        useless = [name for name in useless if name == "adc_correct"]
    if args.adc_ranges and useless:
        raise UserError(f"--{useless[0]} is for calibration, and --adc_ranges takes its result from a file: give one of them")
    useless += ["adc_ranges"] if args.adc_ranges else []
    if useless and "calibrated" not in adc_ranges:
        raise UserError(f"--{useless[0]} is for calibrated ranges: add --adc_range calibrated")
    if args.report and not {"calibrated", "full"} & adc_ranges:
        raise UserError("--report describes frozen ranges: add --adc_range calibrated or full")
    if args.planes and len({setting.spec.cell_bits for setting in settings}) > 1:
        raise UserError("--planes holds cells of one precision: give one --cellBit")
    asked = args.adc_ranges or args.planes or {*hardware.CALIBRATION, "calib_images"} & given.keys()
    args.trained_for = None if asked else trained_for(args, config)
    return args, settings, checkpoint


def trained_for(args, config):
    """The setting that `train.py --adc_aware` trained for, whose ranges the checkpoint holds; None for other checkpoints."""
    if not config.get("adc_aware"):
        return None
    parser = utils.ArgumentParser()
    hardware.add_flags(parser, several=False)
    flags = argparse.Namespace(**vars(parser.parse_args([])) | {
        name: config[name] for name in (*hardware.FIELDS, "map") if name in config})
    [(spec, map)] = hardware.combinations(flags, args.wbit, args.abit, ["calibrated"])
    return Setting(spec, map)


def all_settings(args):
    """The settings of the flags and of every --also, equal ones once."""
    parser = utils.ArgumentParser(add_help=False)
    add_hardware(parser)
    groups, settings = [args], []
    for text in args.also:
        try:
            groups.append(parser.parse_args(shlex.split(text)))
        except (UserError, ValueError) as error:
            raise UserError(f"--also {text!r}: {error}") from None
    for flags in groups:
        for spec, map in hardware.combinations(flags, args.wbit, args.abit, flags.adc_range):
            if spec.adc_range == "ideal":  # without an ADC its bits make no difference
                spec = replace(spec, adc_bits=1)
            settings.append(Setting(spec, map))
    return list(dict.fromkeys(settings))


class Evaluation:
    """The networks of one checkpoint, its test images, and what has been measured so far."""

    def __init__(self, args, settings, checkpoint, device):
        self.args, self.device = args, device
        state = checkpoint["state_dict"]
        self.trained_ranges = {key: value for key, value in state.items() if key.endswith(quant.ADC_BUFFERS)}
        self.trained_for = args.trained_for if self.trained_ranges else None
        state = {key: value for key, value in state.items() if key not in self.trained_ranges}
        classes = datasets.num_classes(args.dataset, args.data_path)
        self.nets = {map: self._build(map, state, classes, settings) for map in {s.map for s in settings} | {"all"}}
        self.engines = {setting: self._choose_engines(setting) for setting in settings}
        self.planes = self._read_planes(settings[0].spec.cell_bits) if args.planes else None
        self.histogram_key = None  # what self.histograms were counted for
        self.moments = {}  # map: those of the layers' outputs without ADC
        self.ranges = AdcRanges()
        if args.adc_ranges:
            self.ranges.read(args.adc_ranges)
            for setting in settings:
                if setting.spec.adc_range == "calibrated":
                    self._restore_ranges(setting)
        else:  # ranges of other settings that the folder holds stay
            with contextlib.suppress(UserError):
                self.ranges.read(Path(args.save_path, "adc_ranges.json"))
        data = checkpoint.get("data") if checkpoint.get("format") == utils.CHECKPOINT_FORMAT else None
        self.stats, self.trained_on = (data["mean"], data["std"]) if data else None, data
        if args.validation:
            config = checkpoint["config"]
            if not (data and config.get("val_split")):
                raise UserError(f"--validation: {args.resume} was trained without validation images")
            if args.dataset != config["dataset"]:
                raise UserError(f"--validation: {args.resume} was trained on {config['dataset']}, not {args.dataset}")
            self.split = config["val_split"], config["seed"], config["limit_train"]

    def _build(self, map, state, classes, settings):
        args = self.args
        config = getattr(models, args.model)
        config.kwargs.update({"num_classes": classes, "wbit": args.wbit, "abit": args.abit, "wq": args.wq, "map": map,
                              "quantize_image": args.quantize_image, "spec": settings[0].spec})
        net = config.base(*config.args, **config.kwargs)
        # Only --quantize_image uses the clipping level of the first layer.
        optional = quant.ADC_BUFFERS + (() if args.quantize_image else ("features.0.act_quant.act_alpha",))
        utils.load_weights(net, state, allow_missing=optional, source=args.resume)
        return net.to(self.device, memory_format=torch.channels_last).eval()

    def _choose_engines(self, setting):
        """Names of the engines that run the setting's layers; what cannot run is refused here, before any work."""
        net, spec, names = self.nets[setting.map], setting.spec, []
        quant.set_spec(net, spec)
        for name, layer in quant.crossbar_layers(net):
            mapped = layer.mapped("full" if spec.adc_range == "calibrated" else None)
            low, high = mapped.u_span
            counted = spec.adc_range == "calibrated" or self.args.report and spec.adc_range == "full"
            if counted and high - low >= engines.MAX_BINS:
                raise UserError(f"{setting}: a read of {name} has {high - low + 1} possible values, too many to calibrate "
                                "on; take --adc_range full without --report, or less of --subArray, --cellBit or --dac_bits")
            names.append(engines.name_of(engines.choose(self.args.engine, mapped, self.device)[0]))
        return "+".join(dict.fromkeys(names))

    def _read_planes(self, cell_bits):
        layers = [(name, layer.w_codes().shape) for name, layer in quant.crossbar_layers(self.nets["all"])]
        codes = quant.read_planes(self.args.planes, layers, self.args.wbit, cell_bits)
        return {name: plane_codes for (name, _), plane_codes in zip(layers, codes)}

    def load_data(self, log):
        args, data = self.args, datasets.load(self.args.dataset, self.args.data_path, log.info)
        if self.trained_on:
            datasets.check_classes(data, self.trained_on, args.resume)
        self.stats = self.stats or (data.mean, data.std)  # the network expects images scaled as in its training
        order = torch.randperm(len(data.train_x), generator=utils.generator("calibration"))  # the same for every checkpoint
        images, labels, self.kind = data.test_x, data.test_y, "test images"
        if args.validation:
            train, held = datasets.training_split(data.train_y, *self.split)
            if len(train) != self.trained_on["train_images"]:
                raise UserError(f"--validation: {args.resume} was trained on other images than those in {args.data_path}")
            images, labels, self.kind = data.train_x[held], data.train_y[held], "validation images"
            order = order[~torch.isin(order, held)]
        self.calibration = data.train_x[order[:args.calib_images]].to(self.device)
        n = min(args.limit or len(images), len(images))
        shown = torch.arange(n) * len(images) // n
        self.images, self.labels = images[shown].to(self.device), labels[shown]
        self.of_all = len(images)

    def batches(self, images):
        for batch in images.split(self.args.batch_size):
            yield datasets.normalize(batch, *self.stats)

    @torch.no_grad()
    def predict(self, net, title):
        """(predicted classes of all test images, seconds)."""
        predictions, seconds, watched = [], 0.0, sys.stderr.isatty()
        net(next(self.batches(self.images[:1])))  # prepares the weights, and the first time compiles
        with tqdm(total=len(self.images), desc=title, unit="img", dynamic_ncols=True, leave=False,
                  mininterval=0.5 if watched else 60, delay=0 if watched else 60) as bar:
            for batch in self.batches(self.images):
                started = time.perf_counter()
                predictions.append(net(batch).argmax(1).cpu())
                seconds += time.perf_counter() - started
                bar.update(len(batch))
        return torch.cat(predictions), seconds

    def write_planes(self, cell_bits):
        """The folder with the weights' planes, or None where it held them already."""
        args = self.args
        store = quant.PlaneStore(args.prob_path, args.model, args.wbit, cell_bits)
        layers = [(name, layer.w_codes()) for name, layer in quant.crossbar_layers(self.nets["all"])]
        return store.folder if store.write(layers) else None

    def software(self):
        net = self.nets["all"]
        quant.set_spec(net, quant.CrossbarSpec(self.args.wbit, self.args.abit, adc_range="ideal"))
        self.baseline, seconds = self.predict(net, "software")
        return self._record(None, self.baseline, seconds)

    def crossbar(self, setting):
        net = self.nets[setting.map]
        if self.planes:
            for name, layer in quant.crossbar_layers(net):
                layer.set_codes(self.planes[name])
        quant.set_spec(net, setting.spec)
        if setting.spec.adc_range == "calibrated":
            self._calibrate(net, setting)
        return self._record(setting, *self.predict(net, str(setting)))

    def _calibrate(self, net, setting):
        if self.args.adc_ranges:
            self._restore_ranges(setting)
            return
        if setting == self.trained_for:
            net.load_state_dict(self.trained_ranges, strict=False)
            return
        self._count_reads(net, setting)
        quant.calibrate(net, None, self.args.adc_calib, self.args.adc_per, self.histograms)
        if self.args.adc_correct == "channel":
            images = datasets.normalize(self.calibration[:quant.CORRECTION_IMAGES], *self.stats)
            self.moments[setting.map] = quant.correct(net, images, self.moments.get(setting.map))
        self.ranges.add(setting.spec, quant.crossbar_layers(net), self.args)

    def _count_reads(self, net, setting):
        """Histograms do not depend on the ADC: they are counted once for all its precisions."""
        key = (setting.map, replace(setting.spec, adc_bits=1, adc_range="ideal"))
        if self.histogram_key != key:
            total = -(-len(self.calibration) // self.args.batch_size)
            batches = tqdm(self.batches(self.calibration), total=total, desc="calibrating", unit="batch", leave=False,
                           disable=None)
            self.histograms, self.histogram_key = quant.collect_histograms(net, batches), key

    def report(self, setting, log):
        """Table, JSON and picture of what the ADC does to each layer, for the setting that was evaluated last."""
        args, net = self.args, self.nets[setting.map]
        self._count_reads(net, setting)
        images = datasets.normalize(self.calibration[:REPORT_IMAGES], *self.stats)
        layers = diagnostics.report(net, images, self.histograms, args.adc_calib, args.adc_per)
        name = re.sub(r"[^0-9a-z]+", "_", str(setting).lower())
        path = Path(args.save_path, f"report_{name}")
        report.write_json(path.with_suffix(".json"), str(setting), layers)
        report.plot(path.with_suffix(".png"), f"{args.model.removesuffix('_eval')} on {args.dataset}: {setting}", layers,
                    setting.spec.adc_bits)
        log.info(f"{setting}:\n{report.table(layers)}\npicture: {path.with_suffix('.png')}")

    def _restore_ranges(self, setting):
        for name, layer in quant.crossbar_layers(self.nets[setting.map]):
            found = self.ranges.of(setting.spec, name, self.planes[name] if self.planes else layer.w_codes())
            if found is None:
                raise UserError(f"{self.args.adc_ranges} has no ranges of {name} with these weights for {setting}; "
                                "calibrate it without --adc_ranges")
            layer.set_spec(setting.spec)
            try:
                layer.set_ranges(found["ranges"])
                layer.mapped()
                if "gain" in found:
                    layer.set_correction(torch.tensor(found["gain"]), torch.tensor(found["offset"]))
            except ValueError as error:
                raise UserError(f"{self.args.adc_ranges}, {name}, {setting}: {error}") from None

    def _record(self, setting, predictions, seconds):
        args, n = self.args, len(predictions)
        spec = setting.spec if setting else None
        source = args.adc_ranges or ("checkpoint" if setting and setting == self.trained_for else None)
        calibrated = spec and spec.adc_range == "calibrated" and not source
        fields = {name: getattr(spec, name, None) for name in (*hardware.FIELDS.values(), "adc_range")}
        if spec and spec.adc_range == "ideal":
            fields["adc_bits"] = None
        return {
            "model": args.model, "dataset": args.dataset, "wbit": args.wbit, "abit": args.abit, "wq": args.wq, **fields,
            "map": setting.map if setting else None, "engine": self.engines[setting] if setting else None,
            "accuracy": 100 * (predictions == self.labels).sum().item() / n,
            "software_accuracy": 100 * (self.baseline == self.labels).sum().item() / n, "n_images": n,
            "changed_predictions": int((predictions != self.baseline).sum()), "images_per_s": n / seconds,
            "seconds": seconds, "batch_size": args.batch_size, "planes": args.planes if setting else None,
            "checkpoint": args.resume, "validation": args.validation,
            "calib_images": len(self.calibration) if calibrated else None,
            **{name: getattr(args, name) if calibrated else None for name in hardware.CALIBRATION},
            "adc_ranges": source if spec and spec.adc_range == "calibrated" else None,
        }


class AdcRanges:
    """The calibrated ranges of several settings, as they stand in adc_ranges.json.

    `{"ranges": [{<hardware>, <how they were chosen>, "layers": {name: {"sha256": ..., "ranges": [[delta, q_min] of each
    slice], "gain": [of each channel], "offset": [of each channel]}}}]}`; sha256 is that of the layer's weight codes, whose
    reads the ranges fit; gain and offset are left out where there is no correction.
    """

    HARDWARE = ("w_bits", "a_bits", *hardware.FIELDS.values())
    RULE = (*hardware.CALIBRATION, "calib_images")
    CORRECTION = {"gain", "offset"}

    def __init__(self):
        self.entries = {}  # hardware: entry

    def read(self, path):
        try:
            for entry in json.loads(Path(path).read_text())["ranges"]:
                for layer in entry["layers"].values():
                    layer["ranges"] = [(float(delta), int(q_min)) for delta, q_min in layer["ranges"]]
                    layer["sha256"]
                    for name in self.CORRECTION if self.CORRECTION & layer.keys() else ():
                        layer[name] = [float(value) for value in layer[name]]
                self.entries[tuple(entry[name] for name in self.HARDWARE)] = entry
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is not an adc_ranges.json ({utils.one_line(error)})") from None

    def _key(self, spec):
        return tuple(getattr(spec, name) for name in self.HARDWARE)

    def add(self, spec, layers, args):
        key = self._key(spec)
        facts = dict(zip(self.HARDWARE, key)) | {name: getattr(args, name) for name in self.RULE}
        entry = self.entries.get(key, {})
        if any(entry.get(name) != value for name, value in facts.items()):
            entry = self.entries[key] = facts | {"layers": {}}  # nothing of another rule stays
        for name, layer in layers:
            entry["layers"][name] = {"sha256": quant.sha256(layer.w_codes().cpu()),
                                     "ranges": list(zip(layer.adc_delta.tolist(), layer.adc_q_min.tolist()))}
            if args.adc_correct == "channel":  # 9 digits tell all float32 numbers apart
                entry["layers"][name] |= {"gain": [float(f"{x:.9g}") for x in layer.adc_gain.tolist()],
                                          "offset": [float(f"{x:.9g}") for x in layer.adc_offset.tolist()]}

    def of(self, spec, name, w_codes):
        """What is kept of a layer, or None where there is nothing for these weight codes on this hardware."""
        found = self.entries.get(self._key(spec), {"layers": {}})["layers"].get(name)
        return found if found and found["sha256"] == quant.sha256(w_codes.cpu()) else None

    def write(self, path):
        text = json.dumps({"ranges": list(self.entries.values())})
        utils.atomic_write(path, lambda file: file.write(text.encode()))


def table(rows, of_all, kind):
    """The result as aligned text. rows: [(title, record), ...], that of the software first; kind: of the images."""
    lines = [["setting", "accuracy %", "difference", "changed", "images/s"]]
    for title, r in rows:
        lines.append([title, f"{r['accuracy']:.2f}", f"{r['accuracy'] - r['software_accuracy']:+.2f}",
                      str(r["changed_predictions"]), f"{r['images_per_s']:.0f}"])
    text = utils.aligned(lines)
    text.insert(1, "-" * len(text[0]))
    n, planes = rows[-1][1]["n_images"], rows[-1][1]["planes"]
    text.append((f"{n} {kind}" if n == of_all else f"only {n} of {of_all} {kind} (--limit)")
                + (f"; cells from {planes}" if planes else ""))
    text.append("changed: images that are classified differently than by the software")
    return "\n".join(text)


def plot(rows, path):
    """Accuracy over ADC bits, one line for all that is equal but the ADC's precision."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {}
    for setting, record in rows:
        name = str(setting).replace(f"{setting.spec.adc_bits}-bit ADC, ", "")
        curves.setdefault(name, []).append((setting.spec.adc_bits, record["accuracy"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), marker="o" if len(points) > 1 else "x", label=name)
    axes.axhline(rows[0][1]["software_accuracy"], color="black", linestyle="--", linewidth=1, label="software")
    r = rows[0][1]
    images = f"{r['n_images']} {'validation' if r['validation'] else 'test'} images of {r['dataset']}"
    axes.set(xlabel="ADC bits", ylabel="accuracy (%)", title=f"{r['model'].removesuffix('_eval')}, {r['wbit']}-bit weights, "
             f"{r['abit']}-bit activations: {images}")
    axes.title.set_fontsize("medium")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    utils.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def main(argv=None):
    args, settings, checkpoint = parse(argv)
    utils.keep_freed_memory()
    device = utils.pick_device(args.ngpu)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(quant.set_engine(args.engine))
            run = Evaluation(args, settings, checkpoint, device)
        except ValueError as error:  # what the package refuses: engines, planes
            raise UserError(str(error)) from None
        for folder in (args.save_path, *([] if args.planes else [args.prob_path])):
            utils.check_writable(folder)
        log = utils.get_logger(Path(args.save_path, args.log_file))
        package_log = logging.getLogger("models")  # says which engine runs, and why
        package_log.handlers[:] = log.handlers
        package_log.setLevel(logging.INFO)
        run.load_data(log)
        log.info(f"{args.resume}: {args.model.removesuffix('_eval')}, {args.wbit}-bit weights, {args.abit}-bit activations; "
                 f"{len(run.images)} {run.kind} of {args.dataset}; {'CPU' if device.type == 'cpu' else 'GPU'}")
        config = checkpoint["config"]
        if config.get("adc_aware"):
            log.info("trained through the ADC of " + ", ".join(
                f"--{name} {config[name]}" for name in hardware.TRAINED_FOR if name in config)
                + (", whose ranges it holds and keeps" if run.trained_for in settings else
                   ", whose ranges are not used: the settings are of other hardware" if run.trained_for else ""))
        rows = evaluate(run, settings, log)
    log.info("\n" + table([(str(setting or "software"), record) for setting, record in rows], run.of_all, run.kind))
    curves = [(setting, record) for setting, record in rows if setting and setting.spec.adc_range != "ideal"]
    if len({setting.spec.adc_bits for setting, _ in curves}) > 1:
        path = Path(args.save_path, "accuracy_over_adc_bits.png")
        plot(curves, path)
        log.info(f"plot: {path}")
    log.info(f"results: {Path(args.save_path, 'results.jsonl')}")
    return 0


def evaluate(run, settings, log):
    """[(setting or None for software, record), ...]; every record is on the disk as soon as it is known."""
    facts = utils.machine_info() | {"command": shlex.join(sys.argv)}
    path, rows, stored = Path(run.args.save_path, "results.jsonl"), [], set()
    try:
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
    with file:
        for setting in [None, *settings]:
            cell_bits = setting and setting.spec.cell_bits
            if cell_bits and not run.planes and cell_bits not in stored:
                stored.add(cell_bits)
                folder = run.write_planes(cell_bits)
                if folder:
                    log.info(f"bit-planes of the weights written to {folder}")
            record = run.crossbar(setting) if setting else run.software()
            if record["calib_images"]:
                run.ranges.write(Path(run.args.save_path, "adc_ranges.json"))
            file.write(json.dumps(record | facts) + "\n")
            file.flush()
            rows.append((setting, record))
            if run.args.report and setting and setting.spec.adc_range in ("calibrated", "full"):
                run.report(setting, log)
            log.info(f"{setting or 'software'}: {record['accuracy']:.2f} %")
    return rows


if __name__ == "__main__":
    utils.run_main(main)
