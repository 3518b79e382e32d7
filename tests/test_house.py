"""How the rooms of `models/quant` stand to each other: what each may import, where kernels live, what a user may rely on."""

import ast
import inspect
import typing
from pathlib import Path

import pytest

from models import quant

ROOT = Path(quant.__file__).parents[2]
FOLDER = ROOT / "models" / "quant"
FILES = sorted(FOLDER.rglob("*.py"))

# From the ground up: a room imports from those below it alone. Rooms of one line do not know each other.
FLOORS = [
    ["converter", "version"],
    ["files", "sources", "eager", "batches", "spec", "readout"],
    ["kernels"],
    ["cells", "channels", "devices", "effective", "pair"],
    ["mapping", "adc", "bitplanes"],
    ["engines"],
    ["engines.cpu"],
    ["prepared", "quantizers"],
    ["layers", "on_arrays"],
    ["crossbar"],
    ["modes", "counts", "structure"],
    ["expectation"],
    ["calibration", "program", "cell_files"],
    ["diagnostics", "fusion", "cost"],
    ["conversion", "gate_errors"],
    ["measuring", "saving"],
    ["__init__"],
]


def room(module):
    """"adc" for `models.quant.adc`, "engines.cpu" for what lies in that folder, "__init__" for `models.quant` itself."""
    parts = module.split(".")[2:]
    if not parts:
        return "__init__"
    if parts[0] == "engines":
        return "engines.cpu" if parts[1:2] == ["cpu"] else "engines"
    return parts[0]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Full names of the modules that a file imports, in its functions too. Imports for the sake of types alone are left out."""
    package = name_of(path if path.name == "__init__.py" else path.with_name("__init__.py"))
    tree, names = ast.parse(path.read_text()), set()

    def visit(node):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[:len(package.split(".")) - node.level + 1], *filter(None, [base])])
            # `from . import adc` imports a module, `from .adc import covering_range` a name of it.
            for alias in node.names:
                inner = ROOT / Path(*base.split("."), alias.name)
                names.add(f"{base}.{alias.name}" if inner.with_suffix(".py").exists() or inner.is_dir() else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def test_the_package_imports_nothing_of_the_project_outside_itself():
    """Another project can take the folder along."""
    own = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"models"}
    for path in FILES:
        for name in imported(path):
            assert name.split(".")[0] not in own, f"{path} imports {name}"
            assert not name.startswith("models") or name.startswith("models.quant"), f"{path} imports {name}"


def test_every_kernel_lives_in_a_room_of_them():
    for path in FILES:
        if not {FOLDER / "engines", FOLDER / "kernels"} & {*path.parents}:
            assert not {name.split(".")[0] for name in imported(path)} & {"numba", "triton"}, path


def test_imports_run_one_way():
    """Every room stands on those below it, so that none is needed to understand itself."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for path in FILES:
        own = room(name_of(path))
        for name in imported(path):
            if name.startswith("models.quant") and room(name) != own:
                assert allowed(own, room(name), floor), f"{path} imports {name}"


def allowed(own, other, floor):
    if own == "engines.cpu":  # a kernel may use the contract of the engines, and what they may use
        return other in ("engines", "converter", "spec", "kernels", "readout", "cells", "mapping")
    return other != "engines.cpu" and floor[other] < floor[own]  # engines are chosen by name


def test_every_file_has_its_floor():
    known = {name for names in FLOORS for name in names}
    assert {room(name_of(path)) for path in FILES} == known


def test_no_circle():
    """Not of files within a room either, nor one that an import in a function hides."""
    graph = {name_of(path): {name for name in imported(path) if name.startswith("models.quant")} for path in FILES}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name):], name])
        if name in done or name not in graph:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(open_.pop())

    for name in sorted(graph):
        visit(name)
    assert done == set(graph)


# ---- what a user calls ---------------------------------------------------------------------------------------------------


def public():
    """(name, function) of every function and method that a user of `models.quant` may call."""
    for name in quant.__all__:
        thing = getattr(quant, name)
        if inspect.isclass(thing):
            yield from methods(name, thing)
        elif callable(thing):
            yield name, inspect.unwrap(thing)


def methods(name, kind):
    yield name, kind
    for owner in kind.__mro__:
        if owner.__module__.startswith("models."):
            for key, value in vars(owner).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                function = inspect.unwrap(function) if callable(function) else None
                if inspect.isfunction(function) and (key[0] != "_" or key == "__init__"):
                    yield f"{name}.{key}", function


INHERITED = {"extra_repr"}  # nn.Module says what it is


@pytest.mark.parametrize("name, thing", [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_what_a_user_calls_is_typed_and_documented(name, thing):
    last = name.rpartition(".")[2]
    if last != "__init__" and last not in INHERITED:
        assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        assert vars(thing).get("__doc__"), f"{name} has no docstring of its own"
        return
    hints, parameters = typing.get_type_hints(thing), list(inspect.signature(thing).parameters)
    untyped = [parameter for parameter in parameters if parameter not in ("self", "cls") and parameter not in hints]
    assert not untyped, f"{name}: no type of {untyped}"
    assert "return" in hints, f"{name}: no type of what it returns"
