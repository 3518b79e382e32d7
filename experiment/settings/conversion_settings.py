"""The flags of networks that were not made here: those of `models.quant.convert`, of their training (`models.quant.Training`), of the files
that they need, and of language models, `eval.py --model hf/FOLDER --text FILE`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.quant import Training

from ..inputs import foreign
from ..program.cli import UserError
from ..program.flags import COUNT, POSITIVE, SHARE_OR_ALL, Number, option

LINEAR_BITS = Number(int, "2 to 8", lambda bits: 2 <= bits <= 8)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """your own network"""

    image_size: int | None = option(None, "pixels a side of the network's images, in place of those of its own transform", COUNT)
    first_last_bits: int = option(8, "weight and input bits of the first and the last layer", LINEAR_BITS)
    inputs: str = option("phases", "how signed inputs reach the arrays. phases: positive and negative parts have reads of their own. "
                         "ternary: word lines carry -V, 0 or +V. twos: the top digit counts negative (two's complement). offset: codes "
                         "start at 0, and the sum of the weights is subtracted", ("phases", "ternary", "twos", "offset"))
    rounding: str = option("nearest", "how weights are rounded. nearest: to the nearest code. gptq: each column makes up for the errors "
                           "of the columns before it (arXiv 2210.17323)",
                           ("nearest", "gptq"))
    skip: list[str] = option([], "layers that stay digital: names, or patterns such as \"layer4.*\"")


@dataclass(frozen=True, kw_only=True)
class ConversionFiles:
    """files of your own network"""

    state: str | None = option(None, "file with the weights of your own network, in place of the published ones", metavar="FILE")
    class_index: str | None = option(None, "which class each folder of images holds, if the network has more classes than there are "
                                     "folders. A JSON object, or lines of a folder and a number. Default: the folders in sorted "
                                     "order", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class LearnedScales:
    """scales of your own network that are trained"""

    learn_scales: bool = option(False, "train the scales of inputs and weights too (LSQ, arXiv 1902.08153), at the rate of --lr, without "
                                "weight decay", bool)
    clip_share: float | None = option(None, "with --learn_scales: share of the inputs of a layer that should lie beyond its window. "
                                      "Default: only the loss decides", SHARE_OR_ALL)
    scale_decay: float = option(Training.scale_decay, "how strongly --clip_share moves scales: so much of a scale is added to its "
                                "gradient, or taken off", POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Language:
    """language models"""

    text: str | None = option(None, "file that a language model (--model hf/FOLDER) is measured on, by its perplexity over windows",
                              metavar="FILE")
    calibration_text: str | None = option(None, "file whose first 8 windows choose scales and ADC ranges, such as a part of the training "
                                          "text. Default: those of the text, which are then not measured", metavar="FILE")
    validation_text: str | None = option(None, "file whose windows choose in a search (--search N), such as another part of the training "
                                         "text", metavar="FILE")
    window: int | None = option(None, "tokens that the model sees at a time. Default: as many as it was made for, at most 1024", COUNT)
    stride: int | None = option(None, "tokens from the beginning of a window to that of the next. Each token is counted once. Default: "
                                "half a window", COUNT)


OF_NETWORK = tuple(field.name for part in (Conversion, ConversionFiles) for field in fields(part))
FLAGS = (*OF_NETWORK, *(field.name for field in fields(LearnedScales)))
OPTIONS = ("first_last_bits", "inputs", "rounding", "skip")  # of `convert`, which with the bits decide what it makes
CONVERTED = ("w_bits", "a_bits", "image_size", *OPTIONS)  # what weights are trained with, and cannot be measured without
OF_OTHERS = ("wq", "quantize_image")  # flags of networks of this project


def check(values: Mapping[str, Any], given: Iterable[str], useless: Iterable[str] = ()) -> None:
    """Refuse flags that do not go with the network `values["model"]`; `useless`, those without effect on networks of others.

    Raises: UserError.
    """
    model = values["model"]
    if not foreign.is_foreign(model):
        if found := [name for name in FLAGS if name in given]:
            raise UserError(f"--{found[0]} is for your own network: --model {foreign.KINDS}")
        return
    if found := [name for name in (*OF_OTHERS, *useless) if name in given]:
        raise UserError(f"--{found[0]} is for the networks of this project, and {model} is converted: leave it out")
    for name, lowest in (("w_bits", 2), ("a_bits", 1)):  # weights are signed and have an exact zero
        if not lowest <= values[name] <= 8:
            raise UserError(f"--{name} {values[name]}: a converted network has {lowest} to 8 bits")


def check_code(config: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Refuse to run a file because a checkpoint names it. Args: see `check_checkpoint`. Raises: UserError."""
    model = config.get("model", "")
    if foreign.is_file(model) and "model" not in given:
        raise UserError(f"{source} is of {model}, whose code is run only if you name it: add --model {model}")


def check_checkpoint(config: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Refuse flags that contradict the checkpoint of a converted network, or that leave it without its code.

    Args: config, `{flag: value}` of the checkpoint `source`. Raises: UserError.
    """
    trained = config.get("model", "")
    if not foreign.is_foreign(trained):
        raise UserError(f"{source} is of the model {trained or 'vgg7_quant'}, not {given['model']}")
    check_code(config, given, source)
    if not foreign.is_file(trained) and given.get("model", trained) != trained:
        raise UserError(f"{source} is of the model {trained}, not {given['model']}")
    if "state" in given:
        raise UserError(f"{source} has weights, and --state {given['state']} has others: give one of them")
    for name in CONVERTED:
        if name in given and name in config and given[name] != config[name]:
            raise UserError(f"{source} was trained with --{name} {config[name]}, not {given[name]}")


def check_language(values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse these flags for other networks than language models, and those that lack a text. Raises: UserError."""
    of_text = foreign.is_language_model(values["model"])
    if not of_text and (found := [field.name for field in fields(Language) if field.name in given]):
        raise UserError(f"--{found[0]} is for language models: --model hf/FOLDER")
    if of_text and not values.get("text"):
        raise UserError(f"--model {values['model']} needs a text that it is measured on: --text FILE")
    if of_text and values.get("search") and not values.get("validation_text"):
        raise UserError(f"--search of {values['model']} chooses on a text that is not measured: --validation_text FILE")
    if "validation_text" in given and not values.get("search"):
        raise UserError("--validation_text is for a search: add --search N")
    if of_text and "state" in given:
        raise UserError(f"--model {values['model']} has its weights in that folder: leave --state out")
