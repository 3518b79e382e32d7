"""`--config FILE.json`: the flags of an experiment as a JSON object, and the one that a run writes.

    {"resume": "net.pt", "cell_bits": [1, 2], "adc_bits": "3:8", "report": true}

says what `--resume net.pt --cell_bits 1 2 --adc_bits 3:8 --report` says. A flag of the command line replaces that of the file.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.quant.storage.files import write_text

from .cli import UserError, user_error
from .flags import ArgumentParser, arguments_of, parse


def parse_both(parser: ArgumentParser, argv: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """`{flag: value}` of the file of `--config`, empty without, and of the command line. Raises: UserError, one line."""
    parser.topic("files", "flags from a file").add_argument(
        "--config", metavar="FILE", help="take flags from a JSON object {\"flag\": value}; those of the command line replace "
        "them. A run writes such a file")
    given = parse(parser, argv)
    path = given.pop("config", None)
    if path is None:
        return {}, given
    with user_error(lambda error: f"--config {path}: {error}", UserError):
        found = parse(parser, _arguments(path))
    if "config" in found:
        raise UserError(f"--config {path}: names another file by config; write its flags into this one")
    return found, given


def _arguments(path: str) -> list[str]:
    """The flags of a file as they would stand on a command line."""
    with (user_error(lambda error: f"cannot be read: {error.strerror or error}", OSError),
          user_error("is not JSON ({})".format, (ValueError, RecursionError))):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError('is not a JSON object {"flag": value}')
    for name, value in values.items():
        parts = value if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [value]
        if not all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in parts):
            raise UserError(f"{name} is {json.dumps(value)[:80]}; a flag's value is text, a number, a list of these, true, false or null")
    return arguments_of(values)


def write(path: Path, values: Mapping[str, Any], but: Container[str] = ()) -> None:
    """Write flags as a file for `--config`, `but` those that make a run no other."""
    write_text(path, json.dumps({name: value for name, value in values.items() if name not in but}, indent=1) + "\n")
