"""Bit-planes of weight codes, and the `prob/` folder where people look at them and edit them."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomic_write, locked, read_torch, write_text

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def decompose(w_codes: Tensor, w_bits: int, cell_bits: int) -> Tensor:
    """Split codes into cells, least significant first: `W = sum_k 2^(c k) C_k`.

    The last slice holds the `w - c k` bits that are left, so 4-bit weights on 3-bit cells give a 3-bit and a 1-bit cell.

    Args: w_codes, integer tensor of any shape, 0..2^w - 1; w_bits, w; cell_bits, c.
    Returns: uint8 `[slices, *w_codes.shape]`.
    Raises: ValueError for codes outside 0..2^w - 1, or not integers.
    """
    if w_codes.dtype.is_floating_point or w_codes.dtype.is_complex:
        raise ValueError(f"weight codes are {w_codes.dtype}; whole numbers (torch.uint8) are expected")
    if w_codes.numel() and not 0 <= int(w_codes.min()) <= int(w_codes.max()) < 2**w_bits:
        raise ValueError(f"weight codes reach from {int(w_codes.min())} to {int(w_codes.max())}; "
                         f"{w_bits} bits hold 0 to {2**w_bits - 1}")
    codes = w_codes.to(torch.uint8)
    return torch.stack([(codes >> low) & (2**bits - 1) for low, bits in _slices(w_bits, cell_bits)])


def compose(planes: Tensor, w_bits: int, cell_bits: int) -> Tensor:
    """Inverse of `decompose`: codes `sum_k 2^(c k) C_k`, uint8.

    Raises: ValueError unless `planes` has one plane a slice, of whole numbers that fit in the cells.
    """
    slices = _slices(w_bits, cell_bits)
    if planes.dtype.is_floating_point or planes.dtype.is_complex:
        raise ValueError(f"cell values are {planes.dtype}; whole numbers (torch.uint8) are expected")
    if planes.dim() == 0 or len(planes) != len(slices):
        raise ValueError(f"{list(planes.shape)[:1]} planes for {len(slices)} slices of a {w_bits}-bit weight on "
                         f"{cell_bits}-bit cells")
    codes = torch.zeros(planes.shape[1:], dtype=torch.uint8, device=planes.device)
    for k, (low, bits) in enumerate(slices):
        if planes[k].numel() and not 0 <= int(planes[k].min()) <= int(planes[k].max()) < 2**bits:
            raise ValueError(f"plane {k} holds cell values from {int(planes[k].min())} to {int(planes[k].max())}; "
                             f"its cells hold 0 to {2**bits - 1}")
        codes += planes[k].to(torch.uint8) << low
    return codes


def _slices(w_bits, cell_bits):
    return [(low, min(cell_bits, w_bits - low)) for low in range(0, w_bits, cell_bits)]


class PlaneStore:
    """`<root>/<model>_w<w>_c<c>/bit_levels<i>_ideal.pt`, one uint8 tensor `[slices, out, in / groups, kh, kw]` a layer.

    `manifest.json` beside the planes names, for each file, the layer, the shape, the bits and the SHA-256 of the
    weight codes. Files are written whole or not at all, so that several runs may share a folder.
    """

    def __init__(self, root: str | Path, model: str, w_bits: int, cell_bits: int) -> None:
        self.folder = Path(root) / f"{model}_w{w_bits}_c{cell_bits}"
        self.w_bits, self.cell_bits = w_bits, cell_bits

    def path(self, index: int) -> Path:
        """Where the planes of crossbar layer `index` are."""
        return self.folder / f"bit_levels{index}_ideal.pt"

    def write(self, layers: Sequence[tuple[str, Tensor]]) -> int:
        """Write the planes of `layers`, `[(name, w_codes), ...]`; a file that already holds them is left alone.

        Returns: the number of files written.
        Raises: OSError where the folder cannot be written to; ValueError for codes that the bits do not hold.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = manifest_or_none(self.folder)
        entries, written = {}, 0
        rebuilt: dict[str, list[Path]] = {}  # by what was wrong
        for index, (name, w_codes) in enumerate(layers):
            w_codes = w_codes.cpu()
            planes = decompose(w_codes, self.w_bits, self.cell_bits)
            path = self.path(index)
            entries[path.name] = entry = {"layer": name, "shape": list(planes.shape), "w_bits": self.w_bits, "cell_bits": self.cell_bits,
                                          "sha256": sha256(w_codes)}
            if problem := self._problem(path, planes, entry, known.get(path.name)):
                if path.exists():
                    rebuilt.setdefault(problem, []).append(path)
                atomic_write(path, lambda file, planes=planes: torch.save(planes, file))
                written += 1
        for problem, (path, *more) in rebuilt.items():
            log.info("%s%s: %s; rebuilt", path, f" and {len(more)} more" if more else "", problem)
        with locked(self.folder / MANIFEST):
            known = manifest_or_none(self.folder)  # to which others may have added
            entries |= {name: entry for name, entry in known.items() if not name.endswith("_ideal.pt")}  # chips stay
            if entries != known:
                write_text(self.folder / MANIFEST, json.dumps(entries, indent=1))
        return written

    def _problem(self, path, planes, entry, known):
        """Why the file at `path` cannot stand for `planes`, or None; the files of many layers share these words."""
        if known != entry:
            return "belongs to other weights" if known else "is not in the manifest"
        try:
            stored = load_planes(path)
        except ValueError as error:
            return str(error).removeprefix(f"{path} ")
        same = stored.dtype == planes.dtype and torch.equal(stored, planes)
        return None if same else "holds other values than its manifest says"


def read_manifest(folder: str | Path) -> dict[str, dict]:
    """The entries of a folder's manifest by the names of files; empty where there is none. Raises: ValueError for one that cannot be
    read."""
    path = Path(folder) / MANIFEST
    try:
        entries = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("it holds other things than entries of files")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return entries


def manifest_or_none(folder: str | Path) -> dict[str, dict]:
    """As `read_manifest`, for those who write it anew: one that cannot be read has no entries."""
    with contextlib.suppress(ValueError):
        return read_manifest(folder)
    return {}


def read_planes(folder: str | Path, layers: Sequence[tuple[str, Sequence[int]]], w_bits: int, cell_bits: int) -> list[Tensor]:
    """Weight codes from the planes that somebody put into `folder`, edited or not.

    Args: folder, with `bit_levels<i>_ideal.pt`; layers, `[(name, shape of w_codes), ...]` in order.
    Returns: list of uint8 weight codes.
    Raises: ValueError naming the file for a missing or unreadable file, another shape, or values outside the cells.
    """
    codes = []
    for index, (name, shape) in enumerate(layers):
        path = Path(folder) / f"bit_levels{index}_ideal.pt"
        planes = load_planes(path)
        expected = [len(_slices(w_bits, cell_bits)), *shape]
        if list(planes.shape) != expected:
            raise ValueError(f"{path} has shape {list(planes.shape)}; layer {name} needs {expected}")
        try:
            codes.append(compose(planes, w_bits, cell_bits))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return codes


def load_planes(path: str | Path) -> Tensor:
    """The tensor in `path`; ValueError if it is absent, truncated, or anything but one tensor."""
    planes = load_file(path)
    if not isinstance(planes, torch.Tensor):
        raise ValueError(f"{path} holds a {type(planes).__name__}, not a tensor")
    return planes


def load_file(path: str | Path) -> Any:
    """What is in a file of PyTorch, by `weights_only`; ValueError if it is absent, or cannot be read."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return read_torch(path)
    except Exception as error:  # torch.load raises many types for damaged and for unsafe files
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None


def sha256(w_codes: Tensor) -> str:
    """SHA-256 of weight codes, uint8 on the CPU, their shape included; 64 hexadecimal digits."""
    digest = hashlib.sha256(str(tuple(w_codes.shape)).encode())
    digest.update(w_codes.to(torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()
