"""Which class a folder of images holds, where the network tells more classes apart than there are folders."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..program.cli import UserError, one_line


def read_class_index(path: str | Path) -> dict[str, int]:
    """`{folder: class}` of a JSON file, `{"n01440764": 0, ...}` or `{"0": ["n01440764", "tench"], ...}` (each of the names may be that
    of the folder), or of a text file with a folder and a number on each line.

    Names that stand for several classes, as "crane" does in ImageNet, are left out.

    Raises: UserError for a file that is none of these.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        pairs = dict.fromkeys(_of_json(json.loads(text)) if text.lstrip().startswith("{") else _of_lines(text))
        often = Counter(name for name, _ in pairs)
        found = {name: number for name, number in pairs if often[name] == 1}
        if not found or min(found.values()) < 0:
            raise ValueError("classes are numbers from 0 up")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} does not name classes ({one_line(error)}): give a JSON object, or a folder and a number a line") from None
    return found


def _of_json(content: dict) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, int):
            yield key, value
        else:
            yield from ((name, int(key)) for name in ([value] if isinstance(value, str) else value))


def _of_lines(text: str) -> Iterator[tuple[str, int]]:
    for line in filter(str.strip, text.splitlines()):
        name, number = line.rsplit(maxsplit=1)
        yield name.strip(), int(number)
