"""Checkpoints: files of tensors, numbers, strings, lists and dicts, so that reading one can never run code.

What is read is checked here, once: the bytes against their checksums, the structure, and that the numbers can be those of
a network. The values of "config", the settings of the run, are checked where settings are made.
"""

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.quant.storage.files import atomic_write, read_torch

from ..program.cli import UserError, one_line, user_error
from ..program.flags import in_new_names
from ..program.plain import is_count, is_dict, is_number, is_text, several
from .packed import unpack

CHECKPOINT_FORMAT = "vgg-quant-1"
# What a checkpoint that somebody has edited, or that is damaged, can raise where it is taken for one.
DAMAGED = AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError

# What the numbers of a tensor must be, by the last part of its name; see models/quant for what they are.
_FINITE = "finite", torch.isfinite
_FINITE_ABOVE_0 = "finite and above 0", lambda values: values.isfinite() & (values > 0)
_FINITE_FROM_0 = "finite and not negative", lambda values: values.isfinite() & (values >= 0)
_ALLOWED_VALUES = {
    "act_alpha": _FINITE_ABOVE_0, "clip": _FINITE_FROM_0, "running_var": _FINITE_FROM_0,
    "adc_delta": _FINITE_FROM_0,  # 0 before the first calibration
    "adc_bits_plan": _FINITE_FROM_0, "adc_q_min": ("finite and at most 0", lambda values: values.isfinite() & (values <= 0)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_torch_file(path: str | Path) -> Any:
    """`read_torch`, for a file that nobody vouches for. Raises: UserError for whatever cannot be read."""
    try:
        return read_torch(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    except Exception as error:  # a damaged file can make zipfile and torch raise nearly anything
        reason = one_line(error)
        if "nsupported" in reason or "WeightsUnpickler" in reason:
            reason = "it holds more than tensors, numbers, strings, lists and dicts, or is damaged"
        reason = "" if reason.isdigit() else f" ({reason[:160]})"
        raise UserError(f"{path}: not a readable PyTorch file, refused{reason}") from error


def write_torch_file(path: str | Path, content: Any) -> None:
    """torch.save of `content` to `path`: afterwards `path` is the complete new or, after an error, the complete old file.

    Raises: UserError for a file that cannot be written; KeyboardInterrupt.
    """
    try:
        atomic_write(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        if isinstance(reason, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: cannot write {path}") from error
        raise UserError(f"cannot write {path}: {one_line(reason)[:160]}") from error


def _reason(error: BaseException) -> BaseException:
    """What stopped torch.save. Whatever that was, a full disk or Ctrl-C, PyTorch ends the file all the same, and complains
    about where the file ends; the first error stands behind that one."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return next((e for e in chain if isinstance(e, (KeyboardInterrupt, OSError))), error)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` to `path` as `write_torch_file` does; "format" is added here.

    Raises: UserError for a file that cannot be written; KeyboardInterrupt.
    """
    write_torch_file(path, {"format": CHECKPOINT_FORMAT, **checkpoint})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint in `path`, tensors on the CPU. It has at least "state_dict" and "config" (empty if unknown).

    Reads the files of this project ("format" is CHECKPOINT_FORMAT), packed ones too (see packed.py), those of the original
    public code ({"state_dict": ...}) and bare state dicts. What the files of this project hold beside the weights ("data",
    "commands", ...) has the right types, and is there for no other file; "exported" is True for packed ones.

    Raises: UserError for everything else, and for numbers that no network has, such as a clipping level below 0.
    """
    checkpoint = read_torch_file(path)
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of a model (it has no state_dict)")
    _check_tensors(path, checkpoint["state_dict"])
    config = checkpoint.get("config")
    checkpoint["config"] = in_new_names(config) if isinstance(config, dict) else {}
    if "codes" in checkpoint:
        with user_error(lambda error: f"{path}: its weight codes cannot be unpacked ({one_line(error)[:120]})", DAMAGED):
            checkpoint = unpack(checkpoint) | {"exported": True}
    _check_numbers(path, checkpoint["state_dict"])
    if checkpoint.get("format") != CHECKPOINT_FORMAT:  # other code means other things by these names
        return {name: value for name, value in checkpoint.items() if name not in _FACTS}
    _check_facts(path, checkpoint)
    return checkpoint


def _check_tensors(path: str | Path, state_dict: dict) -> None:
    """Refuse what is not a plain tensor: its numbers could not be looked at."""
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint of a model (state_dict holds {key!r}, which is not a tensor)")
        kind = _unusual(value)
        if kind:
            raise UserError(f"{path}: {key} is {kind}; plain tensors of real numbers are expected")


def _unusual(value: torch.Tensor) -> str | None:
    """What is special about a tensor, or None for a plain one."""
    if value.is_meta:
        return "a meta tensor, without numbers"
    if value.is_nested or value.layout != torch.strided:
        return "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.is_complex():
        return "a tensor of complex numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # a few bytes that stand for terabytes
        return "a tensor whose elements share memory"
    return None


def odd_number(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the first tensor that has a number which it cannot have in a network, where there is one."""
    for key, value in state_dict.items():
        text, allowed = _ALLOWED_VALUES.get(key.rpartition(".")[2], _FINITE)
        values = value.float()  # as the network will hold it
        right = allowed(values)
        if not right.all():
            return f"{key} holds {values[~right][0].item():g}; it must be {text}"
    return None


def _check_numbers(path: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
    if odd := odd_number(state_dict):
        raise UserError(f"{path}: {odd}")


def _is_number(value: Any) -> bool:
    return is_number(value, -1e9, 1e9)  # nothing here is larger


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


# Facts beside the weights; each may be missing.
_FACTS = {
    "data": ("a dict", is_dict), "epoch": ("a whole number from 0 up", is_count),
    "best_acc": ("a number or None", _is_number_or_none), "test_acc": ("a number or None", _is_number_or_none),
    "commands": ("a list of texts", several(is_text)), "curves": ("a list of texts", several(is_text)),
    "seconds": ("a number", _is_number), "machine": ("a dict", is_dict),
}
_DATA_FACTS = {
    "classes": ("a list of names", several(is_text)), "mean": ("three numbers", several(_is_number, 3)),
    "std": ("three numbers above 0", several(lambda value: _is_number(value) and value > 0, 3)),
    "train_images": ("a whole number from 0 up", is_count),
}


def _check_facts(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Refuse facts of the wrong type, and numbers that a teacher cannot have. Of the data all must be there."""
    for name, (text, allowed) in _FACTS.items():
        if name in checkpoint and not allowed(checkpoint[name]):
            raise UserError(f"{path}: its {name!r} is not {text}")
    for name, (text, allowed) in _DATA_FACTS.items() if "data" in checkpoint else ():
        if name not in checkpoint["data"]:
            raise UserError(f"{path}: its 'data' lacks {name!r}, {text}")
        if not allowed(checkpoint["data"][name]):
            raise UserError(f"{path}: {name!r} of its 'data' is not {text}")
    teacher = checkpoint.get("teacher")  # of --distill: a network too
    if teacher is not None:
        if not (is_dict(teacher) and is_dict(teacher.get("state_dict")) and is_dict(teacher.get("config", {}))):
            raise UserError(f"{path}: its 'teacher' is not a network")
        _check_tensors(path, teacher["state_dict"])
        _check_numbers(path, teacher["state_dict"])


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def load_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], allow_missing: Sequence[str] = (),
                 source: str | Path = "checkpoint") -> list[str]:
    """Copy `state_dict` into `model`. The prefix "module." of checkpoints saved from DataParallel is dropped.

    Args: allow_missing, endings of keys that may be absent, such as ("act_alpha",) for a model trained without activation
        quantizers: these parameters keep their values; source, what an error calls the state dict.
    Returns: the absent keys.
    Raises: UserError that names what is missing, unexpected or misshapen. Nothing is copied then.
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


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
