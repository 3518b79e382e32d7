"""Command-line flags made from dataclasses: a field's name, default, help text and allowed values stand in the dataclass alone.

    @dataclass(frozen=True)
    class Settings:
        lr: float = option(0.05, "highest learning rate", POSITIVE)

    add_flags(parser, Settings)                      # --lr LR  highest learning rate. Default 0.05
    given = parse(parser, argv)                      # {"lr": 0.1}: what stands on the command line, nothing else
    values = defaults(Settings) | checked(Settings, config, source) | given

Fields of `CrossbarSpec` and `Calibration` are flags too. The names that users of the original scripts know stay as aliases (`ALIASES`).
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from models.quant import Calibration, CrossbarSpec
from models.quant.arrays import spec, transfer
from models.quant.layers.quantizers import OFF
from models.quant.measuring.chips import Reads
from models.quant.network.calibration import OTHER_WORDS

from . import user_code
from .cli import UserError, user_error

# Fields of `Calibration`, whose flags say what they are about.
FLAG_NAMES = {"rule": "adc_calib", "per": "adc_per", "correct": "adc_correct", "share": "adc_share", "on": "calib_on"}
# In a help text; there they are flags.
_FIELD = re.compile(rf"(?<![-:])\b({'|'.join(item.name for item in dataclasses.fields(CrossbarSpec) if '_' in item.name)})\b(?![=}}])")
# Names of the original scripts, and of the files of earlier versions: `{alias: flag}`.
ALIASES = {"cellBit": "cell_bits", "adc_prec": "adc_bits", "subArray": "rows", "wbit": "w_bits", "abit": "a_bits", "map": "crossbar_layers"}


class Number(spec.Numbers):
    """A kind of flag: numbers, read by `kind`, for which `holds` is true, or words; `text` says which those are."""

    def __call__(self, argument: str) -> Any:
        """The value of an argument of the command line."""
        try:
            value = self.read(argument)
        except ValueError:
            value = None
        if value is None or argument not in self.words and not self.holds(value):  # not a number compares as False everywhere
            raise argparse.ArgumentTypeError(f"{argument} is not {self.text}")
        return value


WIDTH, FLAG_WIDTH = 100, 30  # columns of --help
OF_ONE = {"train": "train.py", "cost": "eval.py", "sweep": "eval.py"}  # topics that the other program lacks
_ALIAS = re.compile(rf"^--({'|'.join(ALIASES)})(?==|$)")
OF_GROUPS = ("--also", "--table")  # their values are flags themselves


def in_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{flag: value}` of a file, by the names that flags have here."""
    return {ALIASES.get(name, name): value for name, value in config.items()}


MOST_WITHOUT_STEP = 100  # values of a span


def span(kind: Number, argument: str) -> list:
    """The values that an argument of the command line means: `3`, or all from one to another, `3:8`, or with a step `1:3:0.5`."""
    if ":" not in argument:
        return [kind(argument)]
    try:
        first, last, *more = argument.split(":")
        first, last, step = kind(first), kind(last), kind.read(more[0]) if more else 1  # a difference may be of any size
        numbers = len(more) < 2 and all(isinstance(end, (int, float)) for end in (first, last, step))
    except (ValueError, argparse.ArgumentTypeError):
        numbers = False
    if not numbers:
        raise argparse.ArgumentTypeError(f"{argument} is not a span FIRST:LAST or FIRST:LAST:STEP; each is {kind.text}")
    if first > last or not 0 < step < math.inf:
        raise argparse.ArgumentTypeError(f"{argument} is an empty span; FIRST:LAST:STEP goes up, from the first to the last")
    count = int((last - first) / step + 1e-9) + 1
    if argument.count(":") == 1 and count > MOST_WITHOUT_STEP:  # two times, in seconds
        raise argparse.ArgumentTypeError(f"{argument} has {count} values with a step of 1; say the step: FIRST:LAST:STEP")
    return [kind(f"{first + i * step:.12g}") for i in range(count)]


BITS = Number(int, f"1 to 8, or {OFF} to switch the quantizer off", lambda bits: bits in (*range(1, 9), OFF))
COUNT, COUNT_OR_0, POSITIVE_OR_0 = (Number(**vars(kind)) for kind in (spec.COUNT, spec.COUNT_OR_0, spec.FROM_0))
AT_LEAST_2 = Number(int, "2 or more, as batch norm needs", lambda value: 2 <= value < 2**63)
NUMBER_FROM_0 = Number(lambda text: int(text) if text.isdigit() else float(text), "a number from 0 up",
                       lambda value: 0 <= value < math.inf)
ANY_INT = Number(int, "a whole number", lambda value: True)
POSITIVE = Number(float, "a number above 0", lambda value: 0 < value < math.inf)
SHARE = Number(float, "from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
SHARE_OR_ALL = Number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
FIT_OR_POSITIVE = Number(float, "fit or a number above 0", POSITIVE.holds, {"fit": "fit"})


def option(default: Any, text: str, kind: Any = str, metavar: str | None = None, or_empty: bool = False) -> Any:
    """A field that is a flag; with a list as its default one of several values, whose text says itself what holds where it is not given.

    Args: kind, a `Number`, `bool` for a switch, `str` for a text, or the allowed texts; or_empty, the flag may stand without a value, which
        is "" then.
    """
    several = isinstance(default, list)
    make = {"default_factory": lambda: default} if several else {"default": default}
    return dataclasses.field(**make, metadata={"help": text, "kind": kind, "several": several, "metavar": metavar, "or_empty": or_empty})


def flag_name(field: str) -> str:
    """The flag of a field, without its dashes."""
    return FLAG_NAMES.get(field, field)


def in_flags(message: str) -> str:
    """A message about a field of `CrossbarSpec`, `Calibration` or `Chips`, about its flag."""
    for field in (field.name for cls in (CrossbarSpec, Calibration, Reads) for field in flag_fields(cls)):
        if message.startswith(f"{field} is "):
            message = f"--{flag_name(field)}{message.removeprefix(field)}"
    message = re.sub(r"\((adc_max_bits|w_bits|a_bits)\)", r"(--\1)", message)
    return re.sub(r"(?<!-)\badc_plan significance", "--adc_plan significance", message)


def of_layers(message: str) -> str:
    """A message about the field `per_layer` of a setting, about its flag."""
    if not message.startswith("per_layer "):
        return in_flags(message)
    layer, colon, rest = message.partition(": ")
    return f"--{layer}{colon}{in_flags(rest).removeprefix('--')}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse prints its usage in front of every error; here an error is one line like all others. What is not given does not
    appear in the result, names of flags are not to be shortened, and `ALIASES` stand for the names that they have here. `--help` comes in
    screens: what most people need on one, and the rest by topic.

        parser = ArgumentParser(description=__doc__, first={"cell_bits": "bits of a memory cell"})
        group = parser.topic("adc", "converters")        # a group of flags, shown by --help adc

    Args: kind, what messages call a flag; first, `{flag: line}` of the one screen that `--help` alone shows.
    """

    def __init__(self, *, kind: str = "flag", first: Mapping[str, str] = MappingProxyType({}), add_help: bool = True, **options: Any):
        form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=FLAG_WIDTH, width=WIDTH)
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, formatter_class=form, **options)
        self.kind, self.first, self.topics = kind, first, {}
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -40:85:25 is a value too, as no flag begins with a digit
        if add_help:
            self.add_argument("-h", "--help", nargs="?", const="", metavar="TOPIC", action=_Help)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The flags of a command line. Raises: UserError; for an unknown flag it names the nearest known one."""
        argv = sys.argv[1:] if argv is None else argv
        # "--adc_bits=4" behind these, which argparse would take for a flag beside them, is "--adc_bits 4".
        argv = [re.sub(r"^(--\w+)=", r"\1 ", text) if before in OF_GROUPS else text for before, text in zip(["", *argv], argv)]
        found, unknown = self.parse_known_args([_ALIAS.sub(lambda alias: f"--{ALIASES[alias[1]]}", text) for text in argv], namespace)
        if unknown:
            flag = next((text[2:].partition("=")[0] for text in unknown if text.startswith("--")), None)
            if not flag:
                self.error(f"no {self.kind} takes {unknown[0]!r}")
            names = [name[2:] for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(flag, [*names, *ALIASES], 1, 0.7)
            self.error(f"there is no {self.kind} --{flag}" + "".join(f"; the nearest is --{ALIASES.get(name, name)}" for name in near))
        return found

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def topic(self, name: str, title: str) -> Any:
        """A new group of flags, which `--help NAME` shows with the others of this topic."""
        group = self.add_argument_group(title)
        self.topics.setdefault(name, []).append(group)
        return group

    def help_about(self, topic: str) -> str:
        """The text of `--help TOPIC`. Topics: those of `topic`, `all`, and "" for the one screen."""
        topics = ", ".join([*self.topics, "all"])
        if topic == "all":
            return self._text(self.description, *(group for groups in self.topics.values() for group in groups))
        if topic in self.topics:
            return self._text(f"Flags of {self.prog} about {topic}. Other topics of --help: {topics}.", *self.topics[topic])
        if topic:
            other = f"; see python {OF_ONE[topic]} --help {topic}" if topic in OF_ONE else ""
            raise UserError(f"--help {topic}: {self.prog} has no such topic{other}; it has {topics}")
        known = {action.dest: action for action in self._actions}
        head, _, example = self.description.partition("\n\n")
        first = SimpleNamespace(title="flags", _group_actions=[_brief(known[name], text) for name, text in self.first.items()])
        return self._text("\n\n".join([head, example.split("\n\n")[0]]), first,
                          epilog=f"More flags: python {self.prog} --help TOPIC, of {topics}.\nDocuments: docs/.")

    def _text(self, head: str, *groups: Any, epilog: str = "") -> str:
        text = self._get_formatter()
        text.add_text(head)
        for group in groups:
            text.start_section(group.title)
            text.add_arguments(group._group_actions)
            text.end_section()
        text.add_text(epilog)
        return text.format_help()


def _brief(action: argparse.Action, text: str) -> argparse.Action:
    """The flag with a line of help."""
    brief = copy.copy(action)
    brief.help, brief.choices, brief.nargs = text, None, None if action.nargs == "+" else action.nargs
    return brief


class _Help(argparse.Action):
    """Print the help and end."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.help_about(values), end="")
        parser.exit()


class _Flatten(argparse.Action):
    """The values of several spans in one list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [value for span in values for value in span])


def transfer_of(text: str) -> str:
    """The table that --adc_transfer means, of a file, of code, or of its own text (`transfer`). Raises: UserError."""
    if user_code.is_file(text):
        with user_error(lambda error: f"--adc_transfer {text}: {error}"):
            return transfer.text_of(user_code.made("adc_transfer", text, transfer.of_code))
    with user_error(lambda error: in_flags(str(error))):
        return transfer.table_of(text)


def with_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{flag: value}` with tables in place of what --adc_transfer names, so that it is read once, and code runs once. Raises: UserError."""
    given = values.get("adc_transfer")
    read = {} if given is None else {"adc_transfer": [*map(transfer_of, given)] if isinstance(given, list) else transfer_of(given)}
    return {**values, **read}


def flag_kind(field: dataclasses.Field) -> Any:
    """What a field's flag takes; those of the package say it by "numbers", "allowed", "fractions" or "most"."""
    meta = field.metadata
    if "numbers" in meta:
        return Number(**vars(meta["numbers"]))
    return meta.get("kind") or meta.get("allowed") or (NUMBER_FROM_0 if meta.get("fractions") else COUNT)


def flag_fields(cls: type, names: Iterable[str] | None = None) -> list[dataclasses.Field]:
    """The fields of a dataclass that are flags, all or those named."""
    return [field for field in dataclasses.fields(cls)
            if "help" in field.metadata and (names is None or field.name in names)]


def defaults(cls: type, names: Iterable[str] | None = None) -> dict[str, Any]:
    """`{flag: default}` of a dataclass."""
    return {flag_name(field.name): field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in flag_fields(cls, names)}


def add_flags(group: Any, cls: type, names: Iterable[str] | None = None, several: bool = False) -> None:
    """Add the flags of a dataclass to an argparse parser or group; with `several`, each takes a list of values."""
    for field in flag_fields(cls, names):
        meta, kind, name = field.metadata, flag_kind(field), flag_name(field.name)
        options = {"dest": name}
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options |= {"choices": kind, "type": lambda text, field=field.name: _usual_word(field, text)}
        elif kind is not str:
            options["type"] = kind
        if kind is not bool and not isinstance(kind, tuple):
            options["metavar"] = meta.get("metavar") or name.upper()
        if several or meta.get("several"):
            options["nargs"] = "+"
            if isinstance(kind, Number):
                options |= {"type": functools.partial(span, kind), "action": _Flatten}
        if meta.get("several") and kind is str:
            options["action"] = "extend"  # of a flag that is given several times
        if meta.get("or_empty"):
            options |= {"nargs": "?", "const": ""}
        text = _FIELD.sub(lambda field: f"--{flag_name(field[0])}", meta["help"].rstrip("."))
        if kind is not bool and field.default not in (None, dataclasses.MISSING):
            text += f". Default {field.default:g}" if isinstance(field.default, float) else f". Default {field.default}"
        group.add_argument(f"--{name}", help=text.replace("%", "%%"), **options)


def parse(parser: ArgumentParser, argv: list[str] | None = None) -> dict[str, Any]:
    """`{flag: value}` of those that stand on the command line."""
    return vars(parser.parse_args(argv))


def arguments_of(values: Mapping[str, Any]) -> list[str]:
    """Flags, `{flag: value}`, as they stand on a command line; those that are None, False or empty lists are not given."""
    given = {name: value for name, value in values.items() if value is not None and value is not False and value != []}
    parts = {name: value if isinstance(value, list) else [] if value is True else [value] for name, value in given.items()}
    return [str(part) for name, several in parts.items()  # a group that begins with a flag would behind another one be taken for that
            for each in ([[group] for group in several] if f"--{name}" in OF_GROUPS else [several]) for part in (f"--{name}", *each)]


def checked(cls: type, config: Mapping[str, Any], source: str, names: Iterable[str] | None = None,
            foreign: bool = False) -> dict[str, Any]:
    """`{flag: value}` of the flags of a dataclass that a file holds, each checked like one that is given. In a `foreign` file, of
    other code, the same name may mean something else: values that no flag takes are left out.

    Raises: UserError that names the file `source` and the first value that no flag takes.
    """
    found = {}
    for field in flag_fields(cls, names):
        name = flag_name(field.name)
        if name not in config:
            continue
        value = _usual_word(field.name, config[name])
        if wrong := problem(field, value):
            if foreign:
                continue
            raise UserError(f"{source} has --{name} {value!r}, which {wrong}")
        found[name] = value
    return found


def problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with a value of a field, such as "is not a number from 0 up"; None where it is a default of None, or what the flag
    takes."""
    kind, values = flag_kind(field), value if field.metadata.get("several") and isinstance(value, list) else [value]
    if isinstance(kind, Number):
        fits, text = kind.has, kind.text
    elif isinstance(kind, tuple):
        fits, text = kind.__contains__, f"one of {', '.join(kind)}"
    else:
        fits, text = lambda each: isinstance(each, kind), {bool: "True or False", str: "a text"}[kind]
    fine = value is None and field.default is None or all(map(fits, values))
    return None if fine else f"is not {text}"


def _usual_word(field: str, value: Any) -> Any:
    """The word that this version has for the value of a field."""
    words = OTHER_WORDS.get(field, {})
    return words[value] if isinstance(value, str) and value in words else value
