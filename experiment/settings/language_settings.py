"""Flags of language models: `eval.py --model hf/FOLDER --text FILE`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..inputs import foreign
from ..program.cli import UserError
from ..program.flags import COUNT, option


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


def check(values: Mapping[str, Any], given: Iterable[str]) -> None:
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
