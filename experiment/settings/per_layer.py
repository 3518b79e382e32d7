"""`--per_layer "features.3:adc_bits=2.5,cell_bits=2"`: hardware of single layers as text.

A name may be a pattern (`*`, `?`, `[...]`); values are those of the hardware flags of the same name. For `--search` a value may be
a list `1/2/4` or a span `0.5:4:0.25` of which each layer gets one.
"""

import argparse
from collections.abc import Iterable
from typing import Any

from models.quant import CrossbarSpec
from models.quant.measuring.setting import LAYER_FIELDS

from ..program.cli import UserError, user_error
from ..program.flags import ALIASES, Number, flag_fields, flag_kind, span, with_tables

FIELDS = {field.name: field for field in flag_fields(CrossbarSpec, LAYER_FIELDS)}
Changes = dict[str, dict[str, list]]  # {pattern: {field of the spec: values}}


def parse(texts: Iterable[str]) -> Changes:
    """What the texts mean; what several say of one pattern, one behind the other, comes together.

    Raises: UserError, one line.
    """
    found: Changes = {}
    for text in texts:
        pattern, colon, rest = text.partition(":")
        parts = [part.split("=", 1) for part in rest.split(",")]
        if not (pattern and colon) or any(len(part) != 2 for part in parts):
            raise UserError(f"--per_layer {text}: give LAYER:FLAG=VALUE,FLAG=VALUE, such as features.3:adc_bits=5,cell_bits=2")
        if pattern in found and pattern != list(found)[-1]:
            raise UserError(f"--per_layer {pattern}: is given in several places: give it once, because later patterns win")
        for name, value in parts:
            name = ALIASES.get(name, name)
            if name not in FIELDS:
                raise UserError(f"--per_layer {text}: no hardware flag is called {name}; there are {', '.join(FIELDS)}")
            found.setdefault(pattern, {})[name] = _values(FIELDS[name], value, text)
    return found


def _values(field: Any, text: str, whole: str) -> list:
    kind, values = flag_kind(field), []
    if kind is str:
        return [text]
    for part in text.split("/"):
        with user_error(lambda error: f"--per_layer {whole}: {error}", argparse.ArgumentTypeError):
            values += span(kind, part) if isinstance(kind, Number) else [part]
        if not isinstance(kind, Number) and part not in kind:
            raise UserError(f"--per_layer {whole}: {part} is not one of {', '.join(kind)}")
    return values


def single(changes: Changes) -> dict[str, dict[str, Any]]:
    """The values where each is one. Raises: UserError for several, and for a table that cannot be read."""
    found = {}
    for pattern, values in changes.items():
        for name, several in values.items():
            if len(several) > 1:
                raise UserError(f"--per_layer {pattern}: {name} has {len(several)} values; several are for --search")
        with user_error(lambda error, pattern=pattern: f"--per_layer {pattern}: {error}", UserError):
            found[pattern] = with_tables({name: value for name, [value] in values.items()})
    return found
