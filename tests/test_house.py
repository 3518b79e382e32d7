"""How the rooms of `models/quant` and `experiment` stand to each other: what each may import, where kernels live, what a user may rely
on."""

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest

from models import quant

ROOT = Path(quant.__file__).parents[2]
FOLDER = ROOT / "models" / "quant"
FILES = sorted(FOLDER.rglob("*.py"))

PROGRAMS = sorted((ROOT / "experiment").rglob("*.py"))

# The map (docs/house.md), from the ground up: a room imports from those below it alone. Rooms of one line do not know each other.
FLOORS = [
    ["arrays", "storage", "version"],
    ["kernels", "devices", "engines"],
    ["layers", "engines.gpu", "engines.cpu.vectors", "engines.cpu.common", "engines.cpu.whole"],
    ["network", "engines.cpu.grid", "engines.cpu.planes"],
    ["conversion", "cost", "engines.cpu.groups", "engines.cpu.pixels"],
    ["measuring", "saving", "engines.cpu"],
    ["__init__"],
    ["experiment.program"],
    ["experiment.inputs"],
    ["experiment.settings"],
    ["experiment.start"],
    ["experiment.measure", "experiment.train"],
    ["experiment.report"],
    ["experiment.sweep"],
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def room(module):
    """"arrays" for `models.quant.arrays.adc` and `models.quant.arrays`, "engines.cpu" for files of that folder itself, "__init__" for
    `models.quant`, "experiment.train" for what lies there."""
    name = module.removeprefix("models.quant").removeprefix(".") or "__init__"
    return name if name in FLOOR else name.rpartition(".")[0]


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


@pytest.mark.parametrize("files", [FILES, PROGRAMS], ids=["package", "programs"])
def test_imports_run_one_way(files):
    """Every room stands on those below it, so that none is needed to understand itself."""
    for path in files:
        own = room(name_of(path))
        for name in imported(path):
            if name.startswith(("models.quant.", "experiment.")) and room(name) != own:
                assert FLOOR[room(name)] < FLOOR[own], f"{path} imports {name}"
                inside = own.startswith("engines") or not room(name).startswith(("engines.cpu", "engines.gpu"))
                assert inside, f"{path} imports {name}: engines are chosen by name"


def test_every_file_has_its_floor():
    inner = [path for path in PROGRAMS if path.parent != ROOT / "experiment"]
    assert {room(name_of(path)) for path in (*FILES, *inner)} == {*FLOOR}


def test_the_map_is_that_of_the_document():
    """docs/house.md has a line for each room, from the top of the house down: its floor, and the first sentence of what it says itself."""
    found = [line for line in (ROOT / "docs" / "house.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert found == [f"| {level} | `{path_of(name)}` | {says(name)} |" for level, names in reversed([*enumerate(FLOORS)]) for name in names]


def path_of(name):
    """Where a room is, as people write it."""
    inner = name if name.startswith("experiment") else "models.quant" + f".{name}" * (name != "__init__")
    path = Path(*inner.split("."))
    return f"{path}.py" if (ROOT / path).with_suffix(".py").exists() else f"{path}/"


def says(name):
    """The first sentence of a room's docstring."""
    path = ROOT / path_of(name)
    text = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path).read_text()))
    return re.split(r"(?<=\.)\s", text)[0].replace("\n", " ")


def test_files_that_the_document_names_are_there():
    text = (ROOT / "docs" / "house.md").read_text()
    for name in re.findall(r"`((?:models|experiment|tests|benchmarks|docs)/[^`A-Z ]+)`", text):
        assert (ROOT / name).exists(), name


def test_words_of_the_house_mean_one_thing():
    """A plan is the bits that ADCs have. What kernels are told of a layer is called by their way, such as `CellShape` and `CellLayout`."""
    made = [node.name if isinstance(node, ast.ClassDef) else node.targets[0].id for path in (*FILES, *PROGRAMS)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef) or isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    assert made.count("Plan") == 1 and not {"Shape", "Addresses"} & {*made}


def test_no_circle():
    """Not of files within a room either, nor one that an import in a function hides."""
    graph = {name_of(path): {name for name in imported(path) if name.startswith(("models.quant", "experiment."))}
             for path in (*FILES, *PROGRAMS)}
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
