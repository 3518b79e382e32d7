"""models/quant/storage/sources.py: a result's key follows from what the code does, not from how or where it is written."""

import ast
import functools
import itertools
import pkgutil
import shutil
import sys
from pathlib import Path

import pytest
from test_house import FILES, imported, name_of

from experiment.measure import keys
from models import quant
from models.quant.storage import sources

CORE = Path(quant.__file__).parent
# Files of the package that decide no result: what is looked at or kept, files, and engines, which agree with the reference.
DECIDE_NOTHING = {
    ".storage", ".storage.bitplanes", ".storage.effective", ".storage.files", ".storage.sources", ".layers", ".layers.eager",
    ".layers.prepared", ".network", ".network.cell_files", ".network.diagnostics", ".network.expectation", ".network.filling",
    ".network.gate_errors", ".network.structure", ".saving", ".version", ".kernels", ".kernels.cache", ".kernels.checksum",
    ".kernels.inner", ".engines.forks", ".engines.reach", ".engines.gpu", ".engines.gpu.triton_conversion", ".engines.gpu.triton_gpu",
    ".engines.gpu.triton_kernel", ".engines.gpu.triton_readout", ".engines.gpu.triton_tile"}
KERNELS = ".engines.cpu"  # of an engine


def test_every_module_of_the_package_decides_or_is_named_here():
    package = quant.__name__
    decide = {name for part in keys.CODE for name in keys.modules_of(part)}
    others = {package + name for name in DECIDE_NOTHING}
    found = {each.name for each in pkgutil.walk_packages([str(CORE)], package + ".")} | {package}
    for name in sorted(found - {package}):
        of_engine = name == package + KERNELS or name.startswith(package + KERNELS + ".")
        assert of_engine or (name in decide) != (name in others), (
            f"{name}: name it in CODE of experiment/measure/keys.py where a result follows from it, else in DECIDE_NOTHING here")
    assert others <= found, "DECIDE_NOTHING names what is gone"
    for path in FILES:
        if name_of(path) in decide and package + KERNELS not in name_of(path):
            for name in imported(path) - {package}:
                assert name in decide | others or not name.startswith(package), f"{name}, which {path} calls, is in CODE nowhere"


def test_results_follow_from_every_network():
    names = {f"models.{path.stem}" for path in CORE.parent.glob("*.py") if path.stem != "__init__"}
    assert names <= {*keys.modules_of("measuring")}, "a network stands in _NETWORKS of models/__init__.py"


def test_every_name_of_the_code_is_a_module():
    for part in keys.CODE:
        assert keys.modules_of(part) and len({*keys.modules_of(part)}) == len(keys.modules_of(part))
    assert not {*keys.modules_of("chips")} & {*keys.modules_of("wires")}
    with pytest.raises(ModuleNotFoundError, match="models.quant.adcs"):
        sources.resolved([".adcs"], "models.quant")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Copies of the package, each under a name of its own and with some text in place of another: the digest of each part of the code."""
    monkeypatch.syspath_prepend(tmp_path)
    number, known, parts = itertools.count(), {}, sources._parts
    monkeypatch.setattr(ast, "parse", functools.cache(ast.parse))  # a file that all copies have is read once
    monkeypatch.setattr(sources, "_parts", lambda tree, own: known[tree] if tree in known else known.setdefault(tree, [*parts(tree, own)]))

    def made(*changes):
        name = f"a_copy_{next(number)}_of_{tmp_path.name.replace('-', '_')}"
        folder = Path(tmp_path, name)
        shutil.copytree(CORE, folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
        for file, old, new in changes:
            text = Path(folder, file).read_text() if Path(folder, file).exists() else ""
            assert old in text
            Path(folder, file).write_text(text.replace(old, new, 1) if old else text + new)
        assert name not in sys.modules
        return keys.digests(name)

    return made


def changed(one, other):
    return {part for part in one if one[part] != other[part]}


def test_code_is_told_by_what_it_does(tree):
    usual = tree()
    assert usual == keys.digests()  # whatever the package is called and wherever it lies
    assert changed(usual, tree(("arrays/converter.py", "torch.round(x", "torch.floor(x"))) == {"measuring"}
    assert changed(usual, tree(("devices/laws.py", "", "\nANOTHER = 1\n"))) == {"chips"}
    assert changed(usual, tree(("devices/wires.py", "", "\nANOTHER = 1\n"))) == {"wires"}
    assert changed(usual, tree(("cost/events.py", "", "\nANOTHER = 1\n"))) == {"costs"}
    assert changed(usual, tree(("conversion/gptq.py", "", "\nANOTHER = 1\n"))) == {"conversion"}
    assert changed(usual, tree(("arrays/spec.py", "before=8", "before=9"))) == {"measuring"}
    assert changed(usual, tree(("engines/gpu/triton_gpu.py", "", "\nANOTHER = 1\n"), ("storage/files.py", "", "\nANOTHER = 1\n"))) == set()


def test_how_and_where_code_is_written_changes_nothing(tree):
    usual, text = tree(), (CORE / "arrays/adc.py").read_text()
    function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "covering_range")
    lines = text.splitlines(keepends=True)
    moved = "".join(lines[function.lineno - 1:function.end_lineno])
    assert tree(("arrays/adc.py", moved, ""), ("arrays/mapping.py", "", "\n\n" + moved)) == usual
    assert tree(("arrays/adc.py", moved, "def covering_range(low):\n    return low\n"), ("arrays/mapping.py", "", "\n\n" + moved)) != usual
    docstring = ast.get_docstring(function, clean=False)
    assert tree(("arrays/adc.py", moved, "\n\n" + moved), ("arrays/adc.py", docstring, "Other words."),
                ("arrays/adc.py", "", "\n# a comment\n")) == usual
    assert tree(("arrays/mapping.py", "", "\nfrom .adc import covering_range\n")) == usual  # of what is one's own
    assert tree(("arrays/mapping.py", "", "\nfrom .adc import covering_range as other\n")) != usual
    assert tree(("arrays/mapping.py", "", "\nfrom cmath import exp\n")) != usual


@pytest.mark.parametrize("one, other", [
    ("x = 1", "x = 2"), ("x = 1", "x = True"), ("x = 1", "x = 1.0"), ("x = 'a'", "x = b'a'"), ("x = None", "x = ..."),
    ("x = a - b", "x = b - a"), ("x = not a", "x = -a"), ("x[1:]", "x[:1]"), ("x < y", "x <= y"), ("x = {**a}", "x = {None: a}"),
    ("def f(x): return x", "def f(x): return"), ("def f(x): return x", "def f(x, y=None): return x"), ("f(*x)", "f(x)"),
    ("@a\ndef f(): pass", "def f(): pass"), ("class A: x: int = 1", "class A: x: float = 1"), ("x: int", "x: float"),
    ("import numpy as np", "import torch as np"), ("from math import exp", "from numpy import exp"), ("lambda: 1", "lambda x: 1"),
    ("for i in x:\n    y\nelse:\n    z", "for i in x:\n    y\nz"), ("x = [a for a in b]", "x = [a for a in b if a]"),
    ("f'{x}'", "f'{x!r}'"), ("f'{x:.3f}'", "f'{x:.4f}'")])
def test_no_change_of_code_is_overlooked(one, other):
    first, second = ({*sources._parts(ast.parse(text), {"models"})} for text in (one, other))
    assert first != second


@pytest.mark.parametrize("one, other", [
    ("x = 1", "\n\nx = (1)  # y"), ("def f():\n    'A.'\n    return 1", "def f():\n    return 1"), ("x = 1\ny = 2", "y = 2\nx = 1"),
    ("class A:\n    'B.'\n    x = 1\n    'About x.'", "class A:\n    x = 1"), ("x = 0x10", "x = 16"), ("'Module.'", ""),
    ("def f():\n    from . import adc\n    return 1", "def f():\n    return 1"), ("from .a import b", "from models.c import b"),
    ("if TYPE_CHECKING:\n    from .a import b", "")])
def test_what_changes_no_result_is_none(one, other):
    first, second = ({*sources._parts(ast.parse(text), {"models"})} for text in (one, other))
    assert first == second
