"""Code that users bring: laws of devices, `--device path/to/law.py:NAME`, and converters, `--adc_transfer path/to/adc.py:NAME`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray.cloudpickle

from experiment.inputs.checkpoint import save_checkpoint
from experiment.measure import keys
from experiment.program import user_code
from experiment.program.cli import UserError
from experiment.settings import train_settings
from experiment.settings.chips import DeviceSettings, chips_of, names_of
from experiment.settings.eval_settings import all_settings
from models.quant import CrossbarSpec
from models.quant.measuring.chips import Chips
from models.quant.measuring.setting import Setting

ROOT = Path(__file__).resolve().parents[1]
LAW = '''
import math
import numpy as np
from models.quant import Device
from models.quant.devices import Law
from models.quant.devices.times import Times

from slope import SLOPE


class Settling(Law):
    """mean = G - 0.5 log10(t), sigma = 2 % of G; from 1 s on."""

    name, span = "settling", (1.0, 41.0)
    times = {None: Times(onward=1.0)}

    def __init__(self, share=0.02):
        self._share = share

    def mean(self, g, time, temp):
        return np.asarray(g, float) - SLOPE * math.log10(time)

    def sigma(self, g, time, temp):
        return self._share * np.asarray(g, float)


def wide():
    return Device("wide", "my bench", 1.0, 41.0, Settling(0.05), level_values=(1.0, 10.0, 20.0, 41.0))


def number():
    return 3


def broken():
    return {}["share"]


class Endless(Settling):
    span = None


class Odd(Settling):
    def __init__(self):
        self.rule = len
'''


@pytest.fixture
def law(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("law.py").write_text(LAW)
    Path("slope.py").write_text("SLOPE = 0.5\n")
    yield
    sys.modules.pop("slope", None)


def test_a_law_of_the_users_own(law):
    device = DeviceSettings(device="law.py:Settling", device_time=100.0).made()
    np.testing.assert_allclose(device.mean(device.levels(2)), np.array([1, 1 + 40 / 3, 1 + 80 / 3, 41]) - 0.5 * 2)
    drawn = device.draw(np.full(40_000, 3), 2, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(0.02 * 41, rel=0.02) and drawn.mean() == pytest.approx(40.0, abs=0.02)
    wide = DeviceSettings(device="law.py:wide").made()
    assert wide.levels(2).tolist() == [1, 10, 20, 41] and wide.sigma(41.0) == pytest.approx(0.05 * 41)
    with pytest.raises(UserError, match="^--device law.py:Settling: settling has no data"):
        DeviceSettings(device="law.py:Settling", device_time=0.5).made()


@pytest.mark.parametrize("name, says", [
    ("gone.py:Law", "no file gone.py"),
    ("law.py:Settlin", "the file has no function 'Settlin'; it has Settling, wide, number, broken, Endless, Odd"),
    ("law.py:number", "makes int; a models.quant.Device is expected, or a Law with a span"),
    ("law.py:Endless", "makes Endless; a models.quant.Device is expected, or a Law with a span"),
    ("law.py:broken", "the function fails when it is called without arguments (KeyError: 'share')"),
])
def test_code_that_makes_no_device_is_one_line(law, name, says):
    with pytest.raises(UserError) as error:
        DeviceSettings(device=name).made()
    assert str(error.value) == f"--device {name}: {says}"


def key(name="law.py:Settling"):
    sys.modules.pop("slope", None)
    return keys.of_chips(chips_of({"device": name}))["device"]


def test_results_of_a_law_have_a_key_of_its_code_and_its_numbers(law):
    first = key()
    assert key() == first
    assert keys.digest(DeviceSettings(device="law.py:Settling").made().law) != keys.digest(DeviceSettings(device="law.py:wide").made().law)
    Path("slope.py").write_text("SLOPE = 0.6\n")
    beside = key()
    Path("law.py").write_text(LAW.replace("0.02", "0.03"))
    assert len({first, beside, key()}) == 3
    with pytest.raises(UserError, match=r"^results of the law settling cannot be kept \(no digest of builtin_function_or_method\)"):
        key("law.py:Odd")


def test_names_of_laws_in_tables(law):
    assert chips_of({"device": "law.py:Settling"}).name == "law_Settling"
    assert names_of(["law.py:Settling", "law.py:wide", "techA"]) == {
        "law.py:Settling": "law_Settling", "law.py:wide": "law_wide", "techA": "techA"}


def test_workers_get_a_law_with_its_code(law, tmp_path):
    device = DeviceSettings(device="law.py:Settling", device_time=10.0).made()
    chips = Chips(device=device, name="mine")
    user_code.send_along(ray.cloudpickle)
    (tmp_path / "chips.pickle").write_bytes(ray.cloudpickle.dumps(chips))
    program = "import pickle, sys; from experiment.measure import keys; chips = pickle.load(open(sys.argv[1], 'rb')); " \
              "print(keys.digest(chips.device), float(chips.device.mean(20.0)))"
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "chips.pickle"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == [keys.digest(device), "19.5"], run.stderr


ADC = '''
from levels import LARGEST


def ternary(x):
    return max(-LARGEST, min(LARGEST, round(x)))


class Ternary:
    thresholds = [-0.5, 0.5]

    def __init__(self):
        self.values = [-LARGEST, 0, LARGEST]


class Twice(Ternary):
    values = [-2, 0, 2]

    def __init__(self):
        pass


def number():
    return 3


def one(x):
    return 1


def broken(x):
    return {}["x"]
'''


@pytest.fixture
def adc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adc.py").write_text(ADC)
    Path("levels.py").write_text("LARGEST = 1\n")
    yield
    sys.modules.pop("levels", None)


def settings(text, per_layer=False):
    """As a table of eval.py has them."""
    flags = f"--per_layer features.*:adc_transfer={text}" if per_layer else f"--adc_transfer {text}"
    sys.modules.pop("levels", None)
    return all_settings({}, 4, 4, table=[f"--adc_bits 2 {flags}"])


def test_a_converter_of_the_users_own(adc):
    """Its table is in the setting, so that results are kept by what the table says, whatever the code is."""
    [first] = settings("adc.py:ternary")
    assert first.spec.adc_transfer == CrossbarSpec(adc_bits=2, adc_transfer=lambda x: max(-1, min(1, round(x)))).adc_transfer
    assert first.spec.adc_transfer[9:].startswith("thresholds -0.5") and "\n" not in str(first)
    [layer] = settings("adc.py:ternary", per_layer=True)
    assert layer == Setting(CrossbarSpec(4, 4, adc_bits=2), per_layer={"features.*": {"adc_transfer": first.spec.adc_transfer}})
    Path("adc.py").write_text(ADC.replace("round(x)", "int(round(x))"))
    assert settings("adc.py:ternary") == (first,) and settings(f"'{first.spec.adc_transfer}'") == (first,)
    Path("levels.py").write_text("LARGEST = 1 + 1\n")  # of another length: Python keeps what has this second's time and size
    [other] = settings("adc.py:ternary")
    assert other != first and other.spec.adc_transfer.endswith(" values -2 -1 0 1 2")
    assert settings("adc.py:Ternary")[0].spec.adc_transfer.endswith(" thresholds -0.5 0.5 values -2 0 2")


@pytest.mark.parametrize("name, says", [
    ("gone.py:ternary", "no file gone.py"),
    ("adc.py:ternery", "the file has no function 'ternery'; it has ternary, Ternary, Twice, number, one, broken"),
    ("adc.py:number", "gives int; thresholds and values are expected, each a list of numbers, or the function of a read"),
    ("adc.py:one", "has 1 codes; allowed are 2 to 4096"),
    ("adc.py:broken", "the code fails (KeyError: 'x')"),
])
def test_code_that_makes_no_converter_is_one_line(adc, name, says):
    with pytest.raises(UserError) as error:
        train_settings.parse(["--adc_aware", "--adc_bits", "1", "--adc_transfer", name])
    assert str(error.value) == f"--adc_transfer {name}: {says}"
    with pytest.raises(UserError) as error:
        settings(name, per_layer=True)
    assert str(error.value) == f"--per_layer features.*: --adc_transfer {name}: {says}"
    with pytest.raises(UserError) as error:
        settings(name)
    assert str(error.value) == f"--table '--adc_bits 2 --adc_transfer {name}': --adc_transfer {name}: {says}"


def test_training_holds_the_table_of_code_and_of_files(adc):
    Path("adc.csv").write_text("threshold,value\n,-1\n-0.5,0\n0.5,1\n")
    for given in ("adc.py:Ternary", "adc.csv"):
        found, *_ = train_settings.parse(["--adc_aware", "--adc_bits", "2", "--adc_transfer", given])
        assert found.config()["adc_transfer"].endswith(" thresholds -0.5 0.5 values -1 0 1") == (found.adc_aware is True)
        again, *_ = train_settings.parse(["--adc_aware", "--adc_bits", "2", "--adc_transfer", found.config()["adc_transfer"]])
        assert again == found
        save_checkpoint("net.pt", {"state_dict": {}, "config": found.of_computation()})
        flags = ["--evaluate", "--resume", "net.pt", "--adc_bits", "2", "--adc_transfer"]
        assert train_settings.parse([*flags, given])[0].spec == found.spec  # the same as that of the checkpoint
        with pytest.raises(UserError, match="^net.pt was made with other settings: --adc_transfer .* -2 0 2 "):
            train_settings.parse([*flags, "adc.py:Twice"])
