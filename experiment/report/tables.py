"""Tables as text, no wider than a terminal; that of an evaluation's settings."""

import io
import textwrap
from collections.abc import Sequence
from itertools import accumulate

import rich.box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from models.quant.measuring.measure import Record

from ..measure.columns import of_classes, shown, worst
from ..settings.costs import FIGURES
from ..start.images import word_of

WIDTH = 100  # columns of a terminal that a table takes at most
NAME = 20  # of them, those that the names of rows have at least
CELLS = range(60, 18, -2)  # those that a cell has at most where a table would be too wide
# Only a rule of dashes below the header: prints the same on every terminal and in a log file.
_BOX = rich.box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts as lines of one width: the first column to the left, the others to the right.

    Where it would be wider than `WIDTH`, columns are nearer to each other, then headers and long cells have several lines, then names.
    Columns that do not fit even so stand in a second table below.
    """
    names, *columns = ([*column] for column in zip(header, *rows))
    least, tables = min(NAME, _wide(names)), []
    gap = 3 if _wide(names) + sum(3 + _wide(column) for column in columns) <= WIDTH else 2
    if _wide(names) + sum(gap + _wide(column) for column in columns) > WIDTH:
        narrow = [[_narrow(most, *column) for column in columns] for most in CELLS]
        columns = next((each for each in narrow if least + sum(gap + _wide(column) for column in each) <= WIDTH), narrow[0])
    while columns:
        ends = [*accumulate(gap + _wide(column) for column in columns)]
        count = max(1, sum(end <= WIDTH - least for end in ends))
        left = max(NAME, WIDTH - ends[count - 1])
        tables.append(_drawn([[_folded(name, left, "  ") for name in names], *columns[:count]], gap))
        columns = columns[count:]
    return "\n\n".join(tables)


def note(text: str) -> str:
    """What stands below a table, in lines that are no wider."""
    return _folded(text, WIDTH)


def in_common(names: Sequence[str]) -> tuple[str, list[str]]:
    """(what all of several names say, what is left of each). The parts of a name stand between commas."""
    parts = [name.split(", ") for name in names]
    shared = [part for part in parts[0] if all(part in others for others in parts[1:])] if len(parts) > 1 else []
    return ", ".join(shared), [", ".join(part for part in own if part not in shared) or "otherwise default" for own in parts]


def _wide(column: Sequence[str]) -> int:
    return max(cell_len(line) for text in column for line in text.split("\n"))


def _narrow(most: int, head: str, *cells: str) -> list[str]:
    """A column whose header has a line for each word where its cells are shorter, which have lines of so many letters at most."""
    cells = [_folded(cell, most) for cell in cells]
    return [_folded(head, max(map(len, [*head.split(), *"\n".join(cells).split("\n")]))), *cells]


def _folded(text: str, width: int, indent: str = "") -> str:
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) for line in text.split("\n"))


def _drawn(columns: Sequence[Sequence[str]], gap: int) -> str:
    high = max(column[0].count("\n") for column in columns)
    table = Table(box=_BOX, show_edge=False, pad_edge=False, header_style="", padding=(0, gap - 2, 0, 1))
    for i, (head, *_) in enumerate(columns):
        table.add_column("\n" * (high - head.count("\n")) + head, justify="right" if i else "left", no_wrap=True)
    for cells in list(zip(*columns))[1:]:
        table.add_row(*cells)
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# ---- the table of settings -------------------------------------------------------------------------------------------


def settings_table(records: Sequence[Record], of_all: int, kind: str, planes: str | None = None) -> str:
    """The result of an evaluation. What all settings share stands once above, each row has what differs.

    Args: records, that of the float network, if there is one, and that of the software first; of_all, how many examples the set has; kind,
    of these, such as "test images"; planes, the folder that the cells came from.
    """
    shared, names = _names(records)
    examples = word_of(kind)
    tables = [_table(records, names, examples)]
    if costed := [i for i, record in enumerate(records) if record.cost]:
        tables.append(_table([records[i] for i in costed], [names[i] for i in costed], examples, FIGURES))
    n = records[-1].n_images
    count = f"{n} {kind}" if n == of_all else f"only {n} of {of_all} {kind} (--limit)"
    several = max(len(record.chip_accuracies or ()) for record in records)
    notes = [count + (f"; cells from {planes}" if planes else ""), *_baselines(records, examples)]
    if several > 1:
        noisy = {record.setting.without_cells for record in records if record.setting and record.setting.chips}
        which = " and ".join(words for each, words in ((False, "a device"), (True, "noise on the weights")) if each in noisy)
        notes += [f"with {which}: mean, deviation and {worst(records)} of {several} chips", *_beside_chips(records, examples)]
    if costed:
        notes.append("costs, of an example: by typical sources (by the cheapest to the dearest; where the typical value is an end, one "
                     "source makes both)")
    return "\n".join([*([note(f"all settings: {shared}")] if shared else []), "\n\n".join(tables), *map(note, notes)])


def _names(records: Sequence[Record]) -> tuple[str, list[str]]:
    """(what all settings share, what tells each record from the others)."""
    settings = [record.setting for record in records if record.setting]
    chips = any(setting.chips for setting in settings)
    shared, names = in_common([str(setting) + (", ideal cells" if chips and not setting.chips else "") for setting in settings] or [""])
    left = iter(names)
    return shared, [next(left) if record.setting else str(record) for record in records]


def _beside_chips(records: Sequence[Record], examples: str) -> list[str]:
    """What the deviation of chips leaves out, if that is known: the smallest and the largest."""
    chances = sorted(record.chance for record in records if record.accuracy_std is not None and record.chance is not None)
    ends = " to ".join(dict.fromkeys(records[0].metric.text(each) for each in (*chances[:1], *chances[-1:])))
    return [f"the choice of {examples}, which all chips share, adds a standard deviation of {ends} to a difference"] if ends else []


def _table(records: Sequence[Record], names: Sequence[str], examples: str, of: Sequence[str] | None = None) -> str:
    columns = shown(records, of, examples)
    return text_table(["setting", *(head for head, _ in columns)],
                      [[name, *(text(record) for _, text in columns)] for name, record in zip(names, records)])


def _baselines(records: Sequence[Record], examples: str) -> list[str]:
    """What the baselines are."""
    if records[0].is_float:
        what, others = "float: the network as it came; quantized: its quantized form, without arrays", "float, and than by quantized"
    else:
        what, others = "software: the same quantized network, without ADCs", "software"
    return [what, *([f"changed: {examples} that are classified differently than by {others}"] if of_classes(records) else [])]
