"""Checkpoints: tensors, numbers, strings, lists and dicts only, so that reading one can never run code."""

import warnings
import zipfile

import torch

from experiment.cli import UserError, one_line
from experiment.packed import unpack
from models.quant.files import atomic_write

CHECKPOINT_FORMAT = "vgg-quant-1"


def read_torch_file(path):
    """torch.load for a file that nobody vouches for: weights_only, and every byte checked against its CRC.

    torch.load itself does not verify the checksums that torch.save writes: a flipped bit would become a wrong weight.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checksum of {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the outcome says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    except Exception as error:  # a damaged file can make zipfile and torch raise nearly anything
        reason = one_line(error)
        if "nsupported" in reason or "WeightsUnpickler" in reason:
            reason = "it holds more than tensors, numbers, strings, lists and dicts, or is damaged"
        raise UserError(f"{path}: not a readable PyTorch file, refused ({reason[:160]})") from error


def save_checkpoint(path, checkpoint):
    """Write `checkpoint`, a dict, to `path` atomically; "format" is added here."""
    try:
        atomic_write(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {one_line(error)[:160]}") from error


def load_checkpoint(path):
    """The checkpoint dict in `path`, tensors on the CPU. It has at least "state_dict" and "config" (empty if unknown).

    Reads the files of this project ("format" is CHECKPOINT_FORMAT), packed ones too (see packed.py), those of the original
    public code ({"state_dict": ...}) and bare state dicts. Anything else raises UserError.
    """
    checkpoint = read_torch_file(path)
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of a model (it has no state_dict)")
    for key, value in checkpoint["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint of a model (state_dict holds {key!r}, which is not a tensor)")
    if not isinstance(checkpoint.get("config"), dict):
        checkpoint["config"] = {}
    if "codes" in checkpoint:
        try:
            return unpack(checkpoint)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its weight codes cannot be unpacked ({one_line(error)[:120]})") from error
    return checkpoint


def load_weights(model, state_dict, allow_missing=(), source="checkpoint"):
    """Copy `state_dict` into `model`, or raise a UserError that names what is missing, unexpected or misshapen.

    allow_missing: endings of keys that may be absent, such as ("act_alpha",) for a model trained without activation
    quantizers; these parameters keep their values. Returns the absent keys. Nothing is copied when something is wrong.
    The prefix "module." of checkpoints saved from DataParallel is dropped.
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    own = model.state_dict()
    absent = [key for key in own if key not in state_dict]
    wrong = {
        "missing": [key for key in absent if not key.endswith(tuple(allow_missing))],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": [
            f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    if any(wrong.values()):
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise UserError(f"{source} does not fit the model: {text}")
    model.load_state_dict(state_dict, strict=False)
    return absent


def _some(names, limit=6):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
