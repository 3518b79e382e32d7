"""The documents: how long their sentences are, whether their links lead somewhere, and whether they make a site without a network."""

import re
import shlex
import statistics
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import tutorial
from experiment.program.flags import parse
from experiment.settings import eval_flags, train_settings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "pretrained" / "README.md",
         ROOT / "prob" / "README.md", ROOT / "models" / "quant" / "devices" / "data" / "README.md"]

FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
BAND = re.compile(r"([\d.]+) \(([\d.]+)-([\d.]+)\)")
# A point, then a space, then what begins a sentence: no small letter, so that "e.g. this" and "0.5 of" are no ends.
END = re.compile(r"(?<=[.!?])[)*\"]*\s+(?=[^a-z\s])")


def prose(text):
    """Paragraphs and items of lists, one string each; without code, tables, pictures and headings. A link is its words, code in a line
    one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", FENCE.sub("\n\n", text))
    text = re.sub(r"`[^`]+`", "Code", LINK.sub(r"\1", text))
    parts = [[]]
    for line in text.splitlines():
        if re.match(r"\s*([-*]|\d+\.)\s", line):
            parts.append([re.sub(r"^\s*([-*]|\d+\.)\s+", "", line)])
        elif not line.strip() or re.match(r"\s*(\||#|    )", line):
            parts.append([])
        else:
            parts[-1].append(line.strip())
    return [" ".join(part) for part in parts if part]


def sentences(text):
    """The words of each sentence. The end of a paragraph and of an item is the end of a sentence."""
    found = [[word for word in sentence.split() if re.search(r"\w", word)] for part in prose(text) for sentence in END.split(part)]
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_bands_contain_their_values(page):
    for band in BAND.finditer(page.read_text()):
        value, low, high = map(float, band.groups())
        assert low <= value <= high, band[0]


def test_sentences():
    text = """# A heading

One, two `three four` [five six](seven.md). Eight is
0.5 of it, e.g. nine!

| no | words |
- an item
  goes on: here. (And on.)
1. another

```
no words
```

    no words
"""
    assert [" ".join(words) for words in sentences(text)] == [
        "One, two Code five six.", "Eight is 0.5 of it, e.g. nine!", "an item goes on: here.", "(And on.)", "another"]


def longest(page, most):
    return [" ".join(words) for words in sentences(page.read_text()) if len(words) > most]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130
    assert longest(README, 25) == []


@pytest.mark.parametrize("page", tutorial.PAGES, ids=lambda page: page.stem)
def test_tutorial_is_plain(page):
    assert longest(page, 40) == []


def test_half_of_the_sentences_have_15_words_at_most():
    lengths = [len(words) for page in (README, *tutorial.PAGES) for words in sentences(page.read_text())]
    assert statistics.median(lengths) <= 15


def anchors(text):
    """Those of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{words}-{found.count(words)}" if words in found else words)
    return found


def test_links_lead_somewhere():
    broken = []
    for page in dict.fromkeys(PAGES):
        for _, target in LINK.findall(FENCE.sub("", page.read_text())):
            if not target.startswith(("http://", "https://")):
                path, _, anchor = target.partition("#")
                file = (page.parent / path).resolve() if path else page
                if not file.exists() or anchor and anchor not in anchors(file.read_text()):
                    broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.skipif(not util.find_spec("mkdocs"), reason="mkdocs builds the site: pip install -r requirements-test.txt")
def test_site(tmp_path):
    """Every page, every link between them; nothing that a browser would load comes from elsewhere."""
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert all((tmp_path / page).exists() for page in pages) and (tmp_path / "search" / "search_index.json").exists()
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text())
        for target in loaded:
            assert not re.match(r"(https?:)?//", target), f"{page}: {target}"
            assert page.name == "404.html" or (page.parent / target.partition("?")[0].partition("#")[0]).exists(), f"{page}: {target}"


def commands(text):
    """(program, its flags) of each command of eval.py and train.py, and of the scripts that pass theirs on, in blocks, in lines of code,
    and on the lines of docstrings. Files of --config and what a shell fills in are left out."""
    text = re.sub(r"\\\\?\n\s*", " ", text)
    start = r"(?:^|[\s`])(?:(?:python|torchrun[^\n`]*?) (eval|train)\.py|bash (vgg_cifar_eval|vgg_cifar_quant)\.sh)"
    for program, script, flags in re.findall(start + r"([^\n`&|;>]*)", text):
        words = shlex.split(re.sub(r"(^|\s)#.*|--config \S+|(--\w+ )?\"?\$\S+", "", flags))
        yield (program or {"vgg_cifar_eval": "eval", "vgg_cifar_quant": "train"}[script],
               words[1:] if script == "vgg_cifar_quant" and words[:1] in (["fast"], ["full"]) else words)


def test_commands_are_found():
    text = ("a `python eval.py --limit 3` b\n\n    bash vgg_cifar_quant.sh fast --w_bits 2 \\\\\n        --seed 1   # why\n"
            "torchrun --x 2 train.py --ngpu 0 $F\n")
    assert list(commands(text)) == [("eval", ["--limit", "3"]), ("train", ["--w_bits", "2", "--seed", "1"]), ("train", ["--ngpu", "0"])]


def trainings(text):
    """`{folder: its flags}` of commands of train.py that begin a run in a folder that they name."""
    begun = (flags for program, flags in commands(text) if program == "train")
    return {flags[flags.index("--save_path") + 1]: flags for flags in begun
            if "--save_path" in flags and not {"--resume", "--go_on", "--evaluate"} & {*flags}}


SOURCES = [*PAGES, *sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("*.sh")), *sorted((ROOT / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("path", [path for path in SOURCES if list(commands(path.read_text()))], ids=lambda path: path.name)
def test_flags_of_every_command_are_known(path):
    """As they stand: a flag that was renamed, or a value that no flag takes, is found here and not by a reader."""
    for program, flags in commands(path.read_text()):
        build = {"eval": eval_flags.build_parser, "train": train_settings.build_parser}[program]
        if "--help" not in flags:
            parse(build(""), flags)


def test_one_folder_is_one_training():
    """Whoever follows two pages is not told that the folder holds another run."""
    found = {}
    for path in SOURCES:
        for folder, flags in trainings(path.read_text()).items():
            assert found.setdefault(folder, (path.name, flags))[1] == flags, f"{folder}: {path.name} and {found[folder][0]}"
    assert {"save/adc3", "save/chips"} <= found.keys()
