"""The devices that come with the package: one JSON file each in `data`, see the README there."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .laws import Decades, Law, Polynomial, PowerLaw, Relaxation
from .tables import Cells, Samples, Series, Table

FOLDER = Path(__file__).parent / "data"


def presets() -> list[str]:
    """Names for `Device.load`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@functools.cache
def load(name: str) -> Mapping[str, Any]:
    """The attributes of the preset's `Device`."""
    with open(FOLDER / f"{name}.json", encoding="utf-8") as file:
        data = json.load(file)
    law = LAWS[data["law"]](name, data)
    levels = tuple(data["levels_uS"]) if "levels_uS" in data else None
    low, high = data.get("range_uS") or law.span or ()
    return {"name": name, "source": data["source"], "g_min": low, "g_max": high, "law": law, "level_values": levels, "n": data["n"],
            "certainty": data["certainty"], "note": data["note"], "stuck_on": data.get("stuck_on", 0.0),
            "stuck_off": data.get("stuck_off", 0.0)}


def _polynomial(name: str, data: dict[str, Any]) -> Law:
    span = data.get("covers_uS")
    return Polynomial(name, tuple(map(tuple, data["sigma_uS"])), tuple(data["times_s"]), data["scale_uS"], span and tuple(span),
                      data.get("shape", "gaussian"))


def _levels(name: str, data: dict[str, Any]) -> Law:
    half = np.array(data["half_width_uS"])
    targets = np.array(data["levels_uS"])
    return Table(name, [Series(None, (), targets, targets[None], half[None] / math.sqrt(3))], "uniform")


def _relaxation(name: str, data: dict[str, Any]) -> Law:
    return Relaxation(name, tuple(data["programming_uS"]), tuple(data["relaxing_uS"]), data["mean_slope_uS"], tuple(data["read"]),
                      tuple(data["range_uS"]))


def _power(name: str, data: dict[str, Any]) -> Law:
    return PowerLaw(name, data["g_top_uS"], tuple(data["programming_uS"]), tuple(data["exponent"]), tuple(data["exponent_sigma"]),
                    data["first_s"], tuple(data["read"]), tuple(data["range_uS"]))


def _decades(name: str, data: dict[str, Any]) -> Law:
    slopes = {float(temp): (np.array(each["mean"]), np.array(each["sigma"])) for temp, each in data["slopes_uS_per_decade"].items()}
    return Decades(name, np.array(data["levels_uS"]), data["first_s"], slopes, data["reference_temp_C"])


def _table(name: str, data: dict[str, Any]) -> Law:
    rows = np.loadtxt(FOLDER / data["file"], delimiter=",", skiprows=1, usecols=range(5))
    target, time, temp, mean, std = rows[np.lexsort(rows.T[:3])].T  # by temperature, then time, then target
    series = []
    for each in sorted({*temp.tolist()} - {*data["without_temps_C"]}):
        here = temp == each
        times, targets = np.unique(time[here]), np.unique(target[here])
        means, stds = (values[here].reshape(len(times), len(targets)) for values in (mean, std))
        series.append(Series(each, tuple(times.tolist()), targets, means, stds))
    return Table(name, series)


def _cells(name: str, data: dict[str, Any]) -> Law:
    _, target, time, g = np.loadtxt(FOLDER / data["file"], delimiter=",", skiprows=1, unpack=True)  # opens .gz by itself
    times, targets = np.unique(time), np.unique(target)
    reads = [[g[(time == t) & (target == level)] for level in targets] for t in times]
    return Samples(name, [Cells(data["temp_C"], tuple(times.tolist()), targets, reads)])


LAWS = {"polynomial": _polynomial, "levels": _levels, "relaxation": _relaxation, "power": _power, "decades": _decades,
        "table": _table, "cells": _cells}
