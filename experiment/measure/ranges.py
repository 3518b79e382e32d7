"""`adc_ranges.json`: the calibrated ranges of several settings, to be used again with `eval.py --adc_ranges FILE`.

`{"ranges": [{<hardware>, <how they were chosen>, "layers": {name: {"sha256": ..., "ranges": [[delta, q_min] of each slice],
"input_step": ..., "gain": [of each channel], "offset": [...], "scale": [...], "bias": [...]}}}]}`; with a plan `[[delta, q_min] of each
slice] of each digit`, by ones of each class of n of each slice of each digit, and as many "bits"; sha256 is that of the layer's weight
codes and input_step what an input code is worth, whose reads the ranges fit; "inputs", of converted layers, is how negative codes are
applied, on which the reads depend too; gain and offset are the correction, left out where there is none, of outputs of this scale and bias.
(Older files lack input_step, scale and bias.)
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models import quant
from models.building import CROSSBAR_LAYERS
from models.quant.arrays.plans import Plan
from models.quant.arrays.spec import BEFORE, hardware
from models.quant.measuring.placing import on_adcs
from models.quant.measuring.setting import Setting
from models.quant.storage.files import locked, write_text

from ..program.cli import UserError, one_line, user_error
from ..settings.eval_flags import EvalSettings

HARDWARE = hardware("network", "cells", "arrays", "inputs", "adc")
CORRECTION = {"gain", "offset"}
SCALES = {"scale", "bias"}  # of the outputs that a correction is for
SHARED = "crossbar_layers"  # of entries whose layers share a plan's bits


class AdcRanges:
    """Entries of one or several files, and those of the settings that were calibrated since."""

    def __init__(self) -> None:
        self.entries: dict[tuple, dict[str, Any]] = {}  # by hardware

    def read(self, path: str | Path) -> None:
        """Add the entries of a file. Raises: UserError for a file that cannot be read or is no adc_ranges.json."""
        try:
            self.take(json.loads(Path(path).read_text(encoding="utf-8"))["ranges"])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            text = f"{error.args[0]} is absent" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{path} is not an adc_ranges.json ({text})") from None

    def take(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add the entries of a file's content. Raises: many kinds of errors for what are none."""
        for entry in entries:
            _check(entry)
            # Older files do not say which layers shared a plan's bits.
            shared = CROSSBAR_LAYERS if entry.get("adc_share") == "network" else (None,)
            for layers in (entry[SHARED],) if SHARED in entry else shared:
                key = *(entry[name] for name in HARDWARE), json.dumps(entry.get("per_layer", [])), layers
                self.entries[key] = {**entry, SHARED: layers} if layers else entry

    def add(self, key: tuple, entry: Mapping[str, Any]) -> None:
        """Add an entry, see `entry_of`. Other layers of an entry for the same hardware stay, if it is of the same rule, and none in which
        layers share their bits."""
        others = self.entries.get(key, {})
        same_rule = all(others.get(name) == value for name, value in entry.items() if name != "layers")
        stay = others and same_rule and entry.get("adc_share") != "network"
        self.entries[key] = {**entry, "layers": (others["layers"] if stay else {}) | entry["layers"]}

    def add_of(self, setting: Setting, entry: dict[str, Any]) -> None:
        """Add the entry that `entry_of` made for a setting."""
        _check(entry)
        self.add(_key(setting), entry)

    def layers(self, setting: Setting) -> dict[str, Any] | None:
        """The ranges that are kept for a setting, by layer, or None. A plan whose layers share their bits goes before one of the same
        hardware in which each has its own."""
        key = _key(setting)
        found = self.entries.get(key) or self.entries.get((*key[:-1], None))
        return found and found["layers"]

    def restore(self, network: nn.Module, setting: Setting, source: str) -> None:
        """Give a network that is placed on a setting the ranges that are kept for it.

        Raises: UserError that names `source` where there are none for these weight codes, or they are not of this hardware.
        """
        layers = self.layers(setting) or {}
        for name, layer in on_adcs(network):
            found: Mapping[str, Any] | None = layers.get(name)
            step = layer.act_quant.step.item()
            reads = step, layer.encoding if hasattr(layer, "encoding") else None
            kept = found and (found.get("input_step", step), found.get("inputs", reads[1]))
            if kept != reads or found["sha256"] != quant.sha256(layer.w_codes().cpu()):
                raise UserError(f"{source} has no ranges of {name} with these weights and input codes for {setting}; "
                                "calibrate it without --adc_ranges")
            with user_error(lambda error, name=name: f"{source}, {name}, {setting}: {one_line(error)}",
                            (ValueError, KeyError, IndexError, TypeError, OverflowError)):
                if not _corrects(found, layer):
                    raise ValueError("the correction is of a layer with another weight scale or bias; calibrate without --adc_ranges")
                if layer.spec.planned:
                    ranges = np.array(found["ranges"])
                    layer.set_plan(Plan(np.array(found["bits"]), ranges[..., 0], ranges[..., 1]))
                else:
                    layer.set_ranges(found["ranges"])
                layer.mapped()
                if "gain" in found:
                    layer.set_correction(torch.tensor(found["gain"]), torch.tensor(found["offset"]))

    def merge_into(self, path: str | Path) -> None:
        """Write the entries to a file; those of other settings that others have written there meanwhile stay."""
        with locked(path):
            merged = AdcRanges()
            if Path(path).exists():
                merged.read(path)
            before = dict(merged.entries)
            for key, entry in self.entries.items():
                merged.add(key, entry)
            if merged.entries != before:
                write_text(path, json.dumps({"ranges": list(merged.entries.values())}))


def _check(entry: dict[str, Any]) -> None:
    """Bring an entry into the form that it has here. Raises: many kinds of errors for what is none."""
    for layer in entry["layers"].values():
        depth = 1
        if "bits" in layer:
            depth = np.ndim(layer["bits"])
            layer["bits"] = _each(layer["bits"], depth, _whole)
        layer["ranges"] = _each(layer["ranges"], depth, _range)
        layer["sha256"]
        for name in (CORRECTION if CORRECTION & layer.keys() else set()) | (SCALES & layer.keys()):
            layer[name] = [float(value) for value in layer[name]]
    entry |= BEFORE | entry


def _each(nested: Any, depth: int, make: Callable[[Any], Any]) -> Any:
    """Lists so many deep, what stands in them made anew."""
    return [_each(part, depth - 1, make) for part in nested] if depth else make(nested)


def _range(pair: Sequence[float]) -> tuple[float, int]:
    delta, q_min = pair
    return float(delta), _whole(q_min)


def _whole(value: float) -> int:
    if int(value) != value:
        raise ValueError(f"{value!r} stands where a whole number is expected")
    return int(value)


def entry_of(network: nn.Module, setting: Setting, calib_images: int, sha256: Mapping[str, str]) -> dict[str, Any]:
    """The ranges that a network calibrated on this setting has, as an entry of the file. Args: sha256, of each layer's weight codes."""
    rule = setting.calibration
    entry = {name: getattr(setting.of_ranges.spec, name) for name in HARDWARE} | {
        "adc_calib": rule.rule, "adc_per": rule.per, "adc_correct": rule.correct, "calib_images": calib_images}
    entry |= {"adc_share": rule.share} if True in setting.plans else {}
    entry |= {SHARED: shared} if (shared := _sharing(setting)) else {}
    entry |= {"per_layer": json.loads(json.dumps(setting.per_layer))} if setting.per_layer else {}
    layers = {}
    for name, layer in on_adcs(network):
        ranges = torch.stack([layer.adc_delta, layer.adc_q_min.double()], dim=-1).tolist()
        layers[name] = {"sha256": sha256[name], "input_step": layer.act_quant.step.item(), "ranges": ranges}
        if hasattr(layer, "encoding"):
            layers[name]["inputs"] = layer.encoding
        if layer.spec.planned:
            layers[name]["bits"] = layer.adc_bits_plan.tolist()
        if rule.correct == "channel":
            scale, bias = layer.scale_and_offset()
            values = {"gain": layer.adc_gain, "offset": layer.adc_offset, "scale": scale, "bias": bias}
            layers[name] |= {key: [float(f"{x:.9g}") for x in each.tolist()] for key, each in values.items()}  # which tell float32 apart
    return entry | {"layers": layers}


class RangesOfRun:
    """Where the calibrated ranges of each setting of an evaluation come from: a file, the checkpoint, or calibration.

    Args: folder, where adc_ranges.json is written.
    Raises: UserError for a file that is no adc_ranges.json, that of --adc_ranges or the one that new ranges will be added to.
    """

    def __init__(self, settings: EvalSettings, checkpoint: Mapping[str, Any], folder: Path):
        self.checkpoint = settings.resume
        self.file, self.path = settings.adc_ranges, Path(folder, "adc_ranges.json")
        self.trained = {key: value for key, value in checkpoint["state_dict"].items() if key.endswith(quant.ADC_BUFFERS)}
        self.trained_for = settings.trained_for if self.trained else None
        self.kept = AdcRanges()
        if self.file:
            self.kept.read(self.file)
        elif self.path.exists() and any(self.to_calibrate(setting) for setting in settings.settings):
            AdcRanges().read(self.path)

    def to_calibrate(self, setting: Setting) -> bool:
        """Whether the ranges of a setting are chosen in this evaluation."""
        trained = self.trained_for is not None and setting.of_ranges == self.trained_for.of_ranges
        return setting.spec.adc_range == "calibrated" and not self.file and not trained

    def give(self, network: nn.Module, setting: Setting) -> str | None:
        """Give a network that is placed on a setting the ranges that are kept for it. Returns: where they come from, the file or
        "checkpoint"; None where they are to be chosen, or none are needed."""
        if setting.spec.adc_range != "calibrated" or self.to_calibrate(setting):
            return None
        if self.file:
            self.kept.restore(network, setting, self.file)
            return self.file
        try:
            network.load_state_dict(self.trained, strict=False)
            for _, layer in on_adcs(network):
                layer.mapped()
        except (ValueError, RuntimeError) as error:
            first = " size mismatch for ".join(one_line(error).split(" size mismatch for ")[:2])  # PyTorch names one tensor after another
            raise UserError(f"the ADC ranges in {self.checkpoint}: {first}") from None
        return "checkpoint"

    def given(self, setting: Setting) -> Any:
        """The ranges that `give` gives, as they are kept."""
        if setting.spec.adc_range != "calibrated" or self.to_calibrate(setting):
            return None
        return self.kept.layers(setting) if self.file else self.trained

    def keep(self, entries: Mapping[Setting, dict[str, Any]]) -> None:
        """Add the ranges that settings were calibrated with to the results folder's adc_ranges.json. Args: entries, see `entry_of`."""
        found = AdcRanges()
        for setting, entry in entries.items():
            found.add_of(setting, entry)
        if entries:
            found.merge_into(self.path)


def _corrects(found: Mapping[str, Any], layer: nn.Module) -> bool:
    """Whether an entry's correction, if it has one, is of outputs like this layer's: processors differ by less than a thousandth, and a
    bias by less than one unit of the sums. Raises: KeyError, ValueError for an entry of no layer like this."""
    if "scale" not in found or "gain" not in found:
        return True
    scale, bias = (values.cpu().numpy() for values in layer.scale_and_offset())
    return np.allclose(found["scale"], scale, 1e-3, 0) and np.allclose(found["bias"], bias, 1e-3, np.abs(scale))


def _key(setting: Setting) -> tuple:
    return *(getattr(setting.of_ranges.spec, name) for name in HARDWARE), json.dumps(setting.per_layer), _sharing(setting)


def _sharing(setting: Setting) -> str | None:
    """Which layers a plan shares its bits among; None where no layer's range depends on the others."""
    return setting.crossbar_layers if True in setting.plans and setting.calibration.share == "network" else None
