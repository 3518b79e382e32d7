"""The package `torchrram`: what pyproject.toml says of it is what there is."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import quant

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(quant.__file__).parents[2]
FOLDER = ROOT / "models" / "quant"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOL = PROJECT["tool"]["setuptools"]
FILES = {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_every_folder_with_code_is_a_package_of_the_list():
    """setuptools leaves out without a word what is not listed."""
    listed = {Path(*name.split(".")[1:]) for name in TOOL["packages"]}
    assert listed == {path.parent for path in FILES if path.suffix == ".py"}
    assert all((FOLDER / package / "__init__.py").exists() for package in listed)


def test_every_other_file_is_data_of_its_package():
    packed = {path.relative_to(FOLDER) for package, patterns in TOOL["package-data"].items() for pattern in patterns
              for path in FOLDER.joinpath(*package.split(".")[1:]).glob(pattern)}
    assert packed == {path for path in FILES if path.suffix != ".py"}


def test_the_second_name_in_one_process_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "torchrram").symlink_to(FOLDER)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="^this package is imported already as models.quant, .*$"):
        importlib.import_module("torchrram")
    assert "torchrram.arrays" not in sys.modules  # before anything else of it is there
    code = "import atexit, sys, torchrram; atexit.register(lambda: print(*sys.modules)); import models.quant"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "torchrram.arrays" in done.stdout.split() and "models.quant.arrays" not in done.stdout.split()
    assert done.stderr.splitlines()[-1].startswith("ImportError: this package is imported already as torchrram, ")


def test_requirements_of_a_checkout_are_those_of_the_package():
    of = PROJECT["project"]

    def listed(*names):
        lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
        return {line.replace('"', "'") for line in lines if not re.match("#|-r ", line)}

    def of_extra(name):
        return {line for line in of["optional-dependencies"][name] if not line.startswith("torchrram[")}

    assert listed("requirements.txt") == {*of["dependencies"], *of_extra("programs")}
    assert listed("requirements-cluster.txt") == of_extra("sweep")
    assert listed("requirements-search.txt") == of_extra("search")
    assert listed("requirements-test.txt") == of_extra("test")
