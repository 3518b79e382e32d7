"""The wheel in an environment of its own, in a project that has a package called `models`: what a user installs runs, and goes again."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from importlib import util
from pathlib import Path

import pytest

from models import quant

if not all(map(util.find_spec, ("pip", "setuptools"))):
    pytest.skip("pip and setuptools build the wheel: pip install -r requirements-test.txt", allow_module_level=True)

ROOT = Path(quant.__file__).parents[2]
SCRIPT = """
import torch
from models import Net  # the user's own
from torchrram import (Chips, CrossbarSpec, Device, Setting, __version__, convert, load, measure, program, save, set_engine)
from torchrram import cost
import torchrram
from torchrram.kernels import cache

torch.set_num_threads(1)
images = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
with set_engine("reference"):
    network = convert(Net(), CrossbarSpec(4, 4, cell_bits=2, adc_bits=4, rows=16), images, first_last_bits=None)
    save(network, "network.pt")
    outputs = network(images)
    setting = Setting(CrossbarSpec(4, 4, cell_bits=2, adc_bits=4, rows=16), chips=Chips(device=Device.preset("techC_cells"), chips=2))
    record = measure(network, images, outputs.argmax(1), setting, calibration=images, engine="reference")
assert torch.equal(load("network.pt", Net())(images), outputs)  # by the one kernel that is compiled anew here
program(network, Device.preset("techA", time="1h"))
assert "rram_32nm" in cost.Technology.presets() and cost.Technology.load("rram_32nm").node == 32
print(record, len(record.chip_accuracies), __version__, torchrram.__file__, cache.FOLDER.name, sep="\\n")
"""
MODELS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
"""


def run(*command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_runs_beside_a_package_called_models(tmp_path):
    source, project, python = tmp_path / "source", tmp_path / "project", tmp_path / "venv" / "bin" / "python"
    (source / "models").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "models" / "quant", source / "models" / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "models").mkdir(parents=True)
    (project / "models" / "__init__.py").write_text(MODELS)
    (project / "script.py").write_text(SCRIPT)
    pip = sys.executable, "-m", "pip", "--quiet"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source, folder=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"torchrram-{quant.__version__}-py3-none-any.whl"

    venv.create(tmp_path / "venv", symlinks=True)  # which sees the packages of this one, not what is installed there as a link
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    (packages / "of_the_tests.pth").write_text("\n".join(site.getsitepackages()))
    run(*pip, "--python", python, "install", "--no-deps", wheel, folder=tmp_path)
    record, chips, version, file, kernels = run(python, "script.py", folder=project).splitlines()
    assert record == "2-bit cells, 4-bit ADC, calibrated, rows 16, techC_cells at 0s" and (chips, version) == ("2", quant.__version__)
    assert Path(file).parent == packages / "torchrram" and kernels.startswith(f"torchrram-{quant.__version__}-")

    run(*pip, "--python", python, "uninstall", "--yes", "torchrram", folder=tmp_path)
    assert not (packages / "torchrram").exists()  # no kernels that a later installation would find in its place
    run(*pip, "--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", source, folder=tmp_path)
    found = run(python, "-c", "import models, torchrram; print(models.Net.__module__, torchrram.__file__)", folder=project)
    assert found.split() == ["models", str(source / "models" / "quant" / "__init__.py")]
