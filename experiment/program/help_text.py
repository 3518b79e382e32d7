"""`--help` in screens: what most people need on one, and the rest by topic.

    parser = ArgumentParser(description=__doc__, first={"cell_bits": "bits of a memory cell"})
    group = parser.topic("adc", "converters")        # a group of flags, shown by --help adc
"""

import argparse
import copy
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

from .cli import UserError

WIDTH, FLAG_WIDTH = 100, 30
OF_ONE = {"train": "train.py", "cost": "eval.py", "sweep": "eval.py"}  # topics that the other program lacks


class Topics(argparse.ArgumentParser):
    """A parser whose `--help` takes a topic. Args: first, `{flag: line}` of the one screen that
    `--help` alone shows."""

    def __init__(self, *, first: Mapping[str, str] = MappingProxyType({}), add_help: bool = True, **options: Any):
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=FLAG_WIDTH, width=WIDTH)
        super().__init__(add_help=False, formatter_class=form, **options)
        self.first, self.topics = first, {}
        if add_help:
            self.add_argument("-h", "--help", nargs="?", const="", metavar="TOPIC", action=_Help)

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
