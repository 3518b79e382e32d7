"""Digests of what code does (`digest`), not of how it is written or where it lies.

A set of modules counts as the set of its statements at the top level: functions, classes, constants. Comments, docstrings, the order of
these statements and the file that each stands in change no digest; any other change does. Of imports those of other packages count, and
other names for what is imported: from which of one's own files it comes is a place.
"""

import ast
import functools
import hashlib
import importlib.util
import pkgutil
from collections.abc import Container, Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

IMPORTS = ast.Import, ast.ImportFrom
OF_PYTHON = {"ctx", "kind", "type_comment"}  # fields of a tree that change with Python's version, or say the same twice


def digest(modules: Iterable[str], own: Container[str]) -> str:
    """SHA-256 of the code of some modules, found by their full names as an import would find them, without importing any.

    Args: own, names of the packages whose places do not count. Raises: ModuleNotFoundError.
    """
    found = {part for name in modules for part in _parts(ast.parse(Path(_spec(name).origin).read_bytes()), own)}
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def resolved(modules: Iterable[str], package: str) -> list[str]:
    """Full names: ".adc" is relative to `package`, ".devices.*" all modules of a package. Raises: ModuleNotFoundError."""
    found = []
    for name in modules:
        name = package + name if name.startswith(".") else name
        if name.endswith(".*"):
            inside = [f"{name[:-1]}{each.name}" for each in pkgutil.iter_modules(_spec(name[:-2]).submodule_search_locations)]
            found += [name[:-2], *resolved([each + (".*" if _spec(each).submodule_search_locations else "") for each in inside], package)]
        else:
            _spec(name)
            found.append(name)
    return found


@functools.cache
def _spec(name: str) -> ModuleSpec:
    above, _, last = name.rpartition(".")
    found = PathFinder.find_spec(name, _spec(above).submodule_search_locations or []) if above else importlib.util.find_spec(last)
    if found is None:
        raise ModuleNotFoundError(f"no module is named {name}")
    return found


def _parts(tree: ast.Module, own: Container[str]) -> Iterator[str]:
    """A text for each statement at the top level, and for each import that counts."""
    for node in ast.walk(tree):
        if isinstance(node, IMPORTS):
            for alias in node.names:
                place = getattr(node, "module", None) or alias.name
                outside = not getattr(node, "level", 0) and place.partition(".")[0] not in own
                if outside or alias.asname:
                    yield repr([place if outside else "", alias.name, alias.asname])
    yield from (repr(_plain(each)) for each in tree.body if _counts(each))


def _counts(node: ast.AST) -> bool:
    """Whether a statement does anything: docstrings do not, nor imports, and those for the sake of types alone."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    of_types = isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
    return not (text or of_types or isinstance(node, IMPORTS))


def _plain(node: object) -> object:
    """A tree as lists. Empty fields are left out: newer versions of Python have more of them."""
    if isinstance(node, ast.AST):
        values = [(name, value) for name, value in ast.iter_fields(node) if name not in OF_PYTHON and value is not None and value != []]
        return [type(node).__name__, *((name, _plain(value)) for name, value in values)]
    if isinstance(node, list):
        return [_plain(each) for each in node if not isinstance(each, ast.AST) or _counts(each)]
    return node
