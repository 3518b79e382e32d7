"""The tutorial as its readers run it: all commands and Python blocks of its pages in order, and what they print beside what stands there.
Behind the first page the lines of the README are run on its network.

    python tests/tutorial.py      # runs the pages and writes what is printed into them

A block ```bash or ```python is run, in a copy of the checkout; a block ```text behind it shows what it prints, where a line `...` stands
for lines that are left out. Python blocks of a page share their names, as in one session. What installs packages is not run.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for this file as a program

import eval as evaluation
from models import quant

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "tutorial").glob("[1-9]-*.md"))
OF_A_CHECKOUT = "eval.py", "utils.py", "models", "experiment"
INSTALLS = re.compile(r"pip install|environment\.sh")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
VARIES = re.compile(r"(?<=^worst layer).*|(?<=^computed by).*|(?<=^plan of).*|(?<=, about).*")  # what a processor chose; times
LEFT_OUT = "..."
EVALUATES = re.compile(r"(?ms)(.*?)(?:^python eval\.py ((?:[^\n|&;]|\\\n)+)\n)?")  # a block that ends in eval.py: what is before, flags


@dataclass(frozen=True)
class Step:
    """What a page runs: `language`, "bash" or "python", `code`, and `shown`, the block behind it or None, with its `place` in the page."""

    language: str
    code: str
    shown: str | None = None
    place: tuple[int, int] = (0, 0)


def steps(text: str) -> list[Step]:
    """What a page runs, in order."""
    found: list[Step] = []
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language in ("bash", "python"):
            found.append(Step(language, code))
        elif language == "text":
            found[-1] = Step(found[-1].language, found[-1].code, code, block.span(2))
    return found


class Reader:
    """Somebody who follows the pages in a fresh copy of the checkout, `folder`; for use in `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, {}
        for name in OF_A_CHECKOUT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, folder / name)

    def __enter__(self) -> "Reader":
        self.before, self.modules = Path.cwd(), {*sys.modules}
        sys.modules["torchrram"] = quant  # its name where it is installed
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)
        sys.path.remove(str(self.folder))
        del sys.modules["torchrram"]
        for name in {*sys.modules} - self.modules:  # the reader's own
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == self.folder:
                del sys.modules[name]

    def turns_the_page(self) -> None:
        """Another session of Python begins."""
        self.names = {"__name__": "__main__"}

    def does(self, step: Step) -> str:
        """Run a step; what it prints: eval.py as its last line in this process, which has imported what takes it seconds. Raises:
        AssertionError for a command that fails."""
        if step.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(step.code, "a page", "exec"), self.names)
            return printed.getvalue()
        before, flags = EVALUATES.fullmatch(step.code).groups()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", before], cwd=self.folder, env=os.environ | {"PATH": path}, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{step.code}\n{done.stdout}"
        if flags is None:
            return done.stdout
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            print(done.stdout, end="")
            assert evaluation.main(shlex.split(flags.replace("\\\n", " "))) == 0, f"{step.code}\n{printed.getvalue()}"
        return printed.getvalue()


def runs(reader: Reader) -> Iterator[tuple[Path, Step, str]]:
    """(page, step, what it printed) of all steps, one after the other."""
    for page in (PAGES[0], README, *PAGES[1:]):
        if page != README:
            reader.turns_the_page()
        for step in steps(page.read_text()):
            if not INSTALLS.search(step.code):
                yield page, step, reader.does(step)


def what_cannot_differ(line: str) -> str:
    """A line without what may differ between processors: numbers with a point or a sign, numbers in columns of a table, `VARIES`."""
    first, *columns = re.split(r"\s{2,}", VARIES.sub("", line.strip()))
    kept = NUMBER.sub(lambda number: "#" if re.search(r"[.+-]", number.group()) else number.group(), first)
    return re.sub(r"-{9,}", "---", " ".join([kept, *(NUMBER.sub("#", column) for column in columns)]))


def found_in(shown: str, printed: str) -> list[str]:
    """The lines that were printed in the place of those that are shown. Raises: AssertionError for one that was not."""
    lines, found, at, anywhere = printed.splitlines(), [], 0, False
    for line in shown.splitlines():
        if line.strip() == LEFT_OUT:
            found.append(line)
            anywhere = True
            continue
        places = range(at, len(lines) if anywhere else min(at + 1, len(lines)))
        place = next((place for place in places if what_cannot_differ(lines[place]) == what_cannot_differ(line)), None)
        assert place is not None, f"the page shows\n{line}\nand this was printed:\n{printed}"
        found.append(lines[place])
        at, anywhere = place + 1, False
    assert anywhere or at == len(lines), f"this was printed besides:\n{chr(10).join(lines[at:])}"
    return found


def write(page: Path, printed: list[tuple[Step, str]]) -> None:
    """Put what was printed into a page: all of it, or those lines that are shown where others are left out."""
    text = page.read_text()
    for step, output in reversed(printed):
        if step.shown is not None:
            lines = found_in(step.shown, output) if LEFT_OUT in step.shown.splitlines() else output.splitlines()
            text = text[:step.place[0]] + "".join(f"{line.rstrip()}\n" for line in lines) + text[step.place[1]:]
    page.write_text(text)


def main() -> None:
    printed: dict[Path, list[tuple[Step, str]]] = {}
    with tempfile.TemporaryDirectory() as folder, Reader(Path(folder)) as reader:
        for page, step, output in runs(reader):
            print(f"$ {step.code}{output}", flush=True)
            printed.setdefault(page, []).append((step, output))
    for page, outputs in printed.items():
        write(page, outputs)


if __name__ == "__main__":
    main()
