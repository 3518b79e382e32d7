"""Where compiled kernels are kept: models/quant/kernels/cache.py."""

import ast
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

from models import quant
from models.quant.kernels import cache, elementwise

HOME = "/home/nobody"


@pytest.mark.parametrize("system, environment, folder", [
    ("linux", {}, f"{HOME}/.cache"), ("darwin", {}, f"{HOME}/Library/Caches"), ("win32", {}, f"{HOME}/AppData/Local"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local"), ("linux", {"LOCALAPPDATA": "/local"}, f"{HOME}/.cache"),
    ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg"), ("linux", {"XDG_CACHE_HOME": "/xdg", "NUMBA_CACHE_DIR": "/numba"}, "/numba")])
def test_the_users_folder(system, environment, folder, monkeypatch):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": HOME}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache._user_folder() == Path(folder)


def test_kernels_are_kept_by_the_names_of_package_version_and_sources():
    name, version, digest = cache.FOLDER.name.split("-")
    assert (name, version, len(digest)) == ("models.quant", quant.__version__, 14) and cache.FOLDER.parent.name == "torchrram"
    assert Path(elementwise._scale.stats.cache_path) == cache.FOLDER / "kernels"


def test_folders_of_older_sources_go_but_not_while_a_process_uses_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    folders = {name: tmp_path / f"models.quant-0.4.0-{name}" for name in ("own", "in_use", "oldest", "older", "newer", "newest")}
    folders["of another"] = tmp_path / "torchrram-0.4.0-1"
    for age, folder in enumerate(folders.values()):
        folder.mkdir()
        (folder / "kernel.nbi").touch()
        (folder / "used").touch()
        os.utime(folder / "used", (age, age))
    with open(folders["in_use"] / "used") as used:
        fcntl.flock(used, fcntl.LOCK_SH)  # as the process has it
        cache._drop_older(folders["own"])
    assert {name for name, folder in folders.items() if folder.exists()} == {"own", "in_use", "newer", "newest", "of another"}
    cache._use(folders["in_use"])
    folders["own"].joinpath("used").unlink()  # one that somebody removes by hand
    cache._drop_older(folders["own"])
    assert {name for name, folder in folders.items() if folder.exists()} == {"own", "in_use", "newest", "of another"}


def test_a_folder_in_use_is_locked_and_as_old_as_its_last_use(tmp_path):
    folder = tmp_path / "kernels"
    cache._use(folder)
    os.utime(folder / "used", (1, 1))
    cache._use(folder)
    assert (folder / "used").stat().st_mtime > 1
    with open(folder / "used", "r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shutil.rmtree(folder)


def test_kernels_are_compiled_anew_where_a_constant_that_they_compile_in_changes():
    sources = set()
    for file in (file for room in cache.ROOMS for file in room.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and any(alias.name.isupper() for alias in node.names):
                place = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                sources.add(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
    assert cache.FILES / "arrays" / "readout.py" in sources  # of the noise of reads
    assert sources <= {*cache.COMPILED}
