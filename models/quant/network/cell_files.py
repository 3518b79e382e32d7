"""The cells of a chip as files beside the bit-planes, where people look at them and edit them."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arrays.cells import Cells, Chip
from ..arrays.spec import BEFORE, hardware
from ..layers.crossbar import CrossbarLayer, crossbar_layers
from ..storage.bitplanes import MANIFEST, load_file, manifest_or_none, read_manifest, sha256
from ..storage.files import atomic_write, locked, write_text

log = logging.getLogger(__name__)
KEYS = ("values", "reference", "fraction_bits")
CELLS = "cells_sha256"  # in the manifest: of what was written, whatever somebody made of the file since


def cell_path(folder: str | Path, index: int, device: str, seed: int) -> Path:
    """`bit_levels<i>_<device>_chip<seed>.pt` of crossbar layer `index`; letters that no file name should have become "_"."""
    return Path(folder) / f"bit_levels{index}_{re.sub(r'[^0-9A-Za-z.+-]+', '_', device)}_chip{seed}.pt"


def cells_are_written(folder: str | Path, model: nn.Module, device: str, seed: int, facts: Mapping[str, Any] = {}) -> bool:
    """Whether the files are there and, by the manifest, of these weights and facts. Arguments as for `write_cells`."""
    known = manifest_or_none(folder)

    def written(path, entry):
        return path.is_file() and {name: value for name, value in known.get(path.name, {}).items() if name != CELLS} == entry

    return all(written(cell_path(folder, i, device, seed), _entry(name, layer, device, seed, facts))
               for i, (name, layer) in enumerate(crossbar_layers(model)))


def write_cells(folder: str | Path, model: nn.Module, device: str, seed: int, facts: Mapping[str, Any] = {}) -> int:
    """Write the cells of every crossbar layer (`layer.cells()`), one file for each layer, unless the files hold them already. A file is a
    dict with `values`, `reference` (int32) and `fraction_bits`, see `Cells`. The manifest beside the files gets an entry for each.

    Args: device, the name of the chip's device in the names of the files; facts, what else the cells depend on, for the manifest.
    Returns: the number of files written.
    Raises: OSError where the folder cannot be written to.
    """
    known = manifest_or_none(folder)
    held = {cell_path(folder, i, device, seed).name: _digest(layer.cells()) for i, (_, layer) in enumerate(crossbar_layers(model))}
    same = all(known.get(name, {}).get(CELLS, digest) == digest for name, digest in held.items())  # older manifests do not say it
    if same and cells_are_written(folder, model, device, seed, facts):
        return 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    entries = {}
    for i, (name, layer) in enumerate(crossbar_layers(model)):
        path, cells = cell_path(folder, i, device, seed), layer.cells()
        content = {"values": cells.values.cpu(), "reference": cells.reference.cpu(), "fraction_bits": cells.fraction_bits}
        atomic_write(path, lambda file, content=content: torch.save(content, file))
        entries[path.name] = _entry(name, layer, device, seed, facts) | {CELLS: held[path.name]}
    with locked(Path(folder) / MANIFEST):
        write_text(Path(folder) / MANIFEST, json.dumps(manifest_or_none(folder) | entries, indent=1))
    return len(entries)


def chips_in(folder: str | Path) -> list[tuple[str, int]]:
    """`[(device, seed), ...]` of the chips whose cells are in a folder, from the names of the files of the first layer."""
    names = (re.fullmatch(r"bit_levels0_(.+)_chip(\d+)\.pt", path.name) for path in sorted(Path(folder).glob("bit_levels0_*.pt")))
    return [(name[1], int(name[2])) for name in names if name]


def read_cells(folder: str | Path, model: nn.Module, device: str, seed: int) -> None:
    """Set the cells of every crossbar layer to what the files hold, edited or not.

    Raises: as `load_cells`; no layer is changed.
    """
    found = load_cells(folder, model, device, seed)
    for name, layer in crossbar_layers(model):
        layer.chip = found[name]


def load_cells(folder: str | Path, model: nn.Module, device: str, seed: int) -> dict[str, Chip]:
    """The cells of every crossbar layer as the files hold them, edited or not, and their nominal cells: `{layer name: Chip}`.

    Raises: ValueError, naming the file, for one that is missing, unreadable, of other weights or other hardware than the layer's (by
        the manifest) or of another shape.
    """
    known, found = read_manifest(folder), {}
    if cell_path(folder, 0, device, seed).name not in known:
        log.warning("no %s in %s says of which weights and hardware the cells of %s are", MANIFEST, folder, device)
    for i, (name, layer) in enumerate(crossbar_layers(model)):
        path = cell_path(folder, i, device, seed)
        cells = _load(path)
        if path.name in known:
            _check_entry(path, known[path.name], name, layer)
        expected = layer.ideal_cells()
        if cells.values.shape != expected.values.shape or cells.fraction_bits != expected.fraction_bits:
            raise ValueError(f"{path} has cells of shape {list(cells.values.shape)} on a grid of {cells.fraction_bits} bits; {name} needs "
                             f"{list(expected.values.shape)} and {expected.fraction_bits}")
        where, nominal = expected.values.device, None
        cells = Cells(cells.values.to(where), cells.reference.to(where), cells.fraction_bits)
        if layer.spec.reference == "digital":  # whose reads hold the off-current, which stands in the reference
            off = (cells.reference - expected.reference)[..., None]
            nominal = Cells(expected.values + off, cells.reference, cells.fraction_bits)
        found[name] = Chip(cells, nominal, of_arrays=known.get(path.name, {}).get("rows") is not None, code_sums=layer.code_sums(),
                           of=layer.version())
    return found


def _check_entry(path, entry, name, layer):
    """Refuse cells that by their entry in the manifest are none of a layer's."""
    entry = {"reference": "analog", **BEFORE, **entry}  # older ones do not say it
    for key in ("w_bits", *hardware("cells", "arrays")):
        held, own = entry.get(key), getattr(layer.spec, key)
        if held not in (None, own):
            raise ValueError(f"{path} holds cells of {key} {held}, and the hardware has {own}")
    if entry.get("access", "voltage") != "voltage":
        raise ValueError(f"{path} holds cells of gate access; the files do not hold the curve that their reads go through")
    if entry.get("sha256") != sha256(layer.w_codes().cpu()):
        raise ValueError(f"{path} holds cells of other weights than those of {name}")


def _load(path: Path) -> Cells:
    content = load_file(path)
    if not isinstance(content, dict) or set(content) != set(KEYS):
        raise ValueError(f"{path} holds no dict of {', '.join(KEYS)}")
    try:
        return Cells(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _entry(name: str, layer: CrossbarLayer, device: str, seed: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    spec, codes, chip, own = layer.spec, layer.w_codes().cpu(), layer.chip, {}
    of_cells = {name: getattr(spec, name) for name in ("w_bits", *hardware("cells"))}
    shape = list(layer.cells().values.shape)
    if chip and chip.of_arrays:
        own |= {name: getattr(spec, name) for name in hardware("arrays")}
    if chip and chip.readout is not None and chip.readout.curve is not None:
        own["access"] = "gate"
    return {"layer": name, "shape": shape, **of_cells, "sha256": sha256(codes), "device": device, "seed": seed, **own, **facts}


def _digest(cells: Cells) -> str:
    digest = hashlib.sha256(str(cells.fraction_bits).encode())
    for part in (cells.values, cells.reference):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
