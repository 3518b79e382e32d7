"""Code of users: what a function or a class of a file makes, `path/to/file.py:NAME`, and what tells it from other code."""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .cli import UserError, one_line, user_error

PROJECT = Path(__file__).resolve().parents[2]
LOADED: list[ModuleType] = []  # modules of such files, and of their neighbours


def is_file(name: str) -> bool:
    """Whether a flag's value names a function or a class in a file, which is code that runs when it is made."""
    return ".py:" in name


def short_name(name: str) -> str:
    """net_small of path/to/net.py:small."""
    path, _, function = name.rpartition(":")
    return f"{Path(path).stem}_{function}"


def made(flag: str, name: str, by: Callable[[Any], Any] | None = None) -> Any:
    """What the function or class makes when it is called without arguments. Args: flag, whose value the name is; by, what makes it of the
    function or class instead.

    Raises: UserError, one line, for a file that is not there, or that does not load, and code that fails.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--{flag} {name}: no file {path}")
    with _neighbours_first(Path(path)):
        before, folder = set(sys.modules), Path(path).parent.resolve()
        try:
            make = _function(flag, Path(path), function)
            with _told(f"--{flag} {name}: " + ("the code fails" if by else "the function fails when it is called without arguments")):
                return by(make) if by else make()
        finally:
            new = [module for each, module in sys.modules.items() if each not in before and getattr(module, "__file__", None)]
            LOADED.extend(module for module in new if folder in Path(module.__file__).resolve().parents)


def send_along(cloudpickle: ModuleType) -> None:
    """Have what was loaded so far pickled with its code: other processes do not find it by its name."""
    for module in LOADED:
        if module.__name__ in sys.modules:  # else nothing names it any more
            cloudpickle.register_pickle_by_value(module)


def digests(path: str | Path) -> list[str]:
    """Of a file and of the neighbours that it imports: SHA-256 of each."""
    return [hashlib.sha256(source.read_bytes()).hexdigest() for source in _sources(Path(path))]


def _sources(path: Path) -> list[Path]:
    """A file of Python and, in the order of their paths, those of its folder that it imports, they import, and so on: of a package all."""
    found, left = [path], [path]
    while left:
        new = [each for name in _imported(left.pop()) for each in _neighbours(path.parent, name) if each not in found]
        found += new
        left += new
    return [path, *sorted(found[1:])]


def _imported(path: Path) -> set[str]:
    """The names of the modules that a file imports, without what stands behind a dot."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # which Python refuses where it is imported
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _neighbours(folder: Path, name: str) -> list[Path]:
    """The files of a module in a folder; none where it lies somewhere else."""
    return [Path(folder, f"{name}.py")] if Path(folder, f"{name}.py").is_file() else sorted(Path(folder, name).rglob("*.py"))


@contextlib.contextmanager
def _neighbours_first(path: Path):
    """Within the block a file's imports find what they would without this project: the `models` that lie beside it, say, in place of this
    project's, which are what they were behind the block."""
    folder, own, hidden = path.parent.resolve(), set(), set()
    for name in {name for source in _sources(path) for name in _imported(source) if _neighbours(folder, name)}:
        other = _elsewhere(folder, name)
        if other is None or _comes_before(folder, name, other):
            own.add(name)
            hidden |= {name} if other else set()

    def take_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in hidden}

    def find_spec(name, path=None, target=None):  # these alone: a folder without `__init__.py` would come behind this project's too
        return PathFinder.find_spec(name, [str(folder)]) if name in own else None

    kept, finder = take_out(), SimpleNamespace(find_spec=find_spec)
    sys.path.insert(0, str(folder))  # for names that are not in the text
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(folder))
        take_out()
        sys.modules.update(kept)


def _elsewhere(folder: Path, name: str) -> ModuleSpec | None:
    """Another module of that name than the folder's, loaded or not."""
    found = importlib.util.find_spec(name)
    places = [] if found is None else [*(found.submodule_search_locations or ()), *([found.origin] if found.has_location else ())]
    return None if any(folder in Path(place).resolve().parents for place in places) else found


def _comes_before(folder: Path, name: str, other: ModuleSpec) -> bool:
    """Whether a program in the folder would find its own module: one without `__init__.py` comes behind what is installed."""
    whole = Path(folder, f"{name}.py").is_file() or Path(folder, name, "__init__.py").is_file()
    return whole or other.origin is None or other.has_location and PROJECT in Path(other.origin).resolve().parents


def _told(what: str) -> contextlib.AbstractContextManager[None]:
    """Within `with`, whatever code of users raises, as one line."""
    return user_error(lambda error: f"{what} ({type(error).__name__}: {one_line(error)[:160]})", Exception)


def _function(flag: str, path: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(f"_code_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes of the file, and copies of them, look for their own module
    with _told(f"--{flag} {path}:{name}: the file cannot be imported"):
        spec.loader.exec_module(module)
    own = [key for key, value in vars(module).items()
           if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__]
    if not callable(getattr(module, name, None)):
        raise UserError(f"--{flag} {path}:{name}: the file has no function {name!r}; it has {', '.join(own) or 'none'}")
    return getattr(module, name)
