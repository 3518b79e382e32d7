"""Devices: presets against the tables they come from (read here by hand), draws against their statistics, own data and its errors.

Draws are compared within 5 standard deviations of what is estimated, seeds fixed: mean of n cells sigma / sqrt n, deviation of n
Gaussian cells sigma / sqrt(2 n), counts sqrt(n p (1 - p)).
"""

import csv
import gzip
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.quant import devices
from models.quant.devices import Device, Law, PowerLaw, describe, parse_time, presets
from models.quant.devices.laws import Polynomial
from models.quant.devices.rows import JointRows

DATA = Path(devices.__file__).parent / "data"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "devices.md"
PRESETS = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))}
TABLES = {name: preset["file"] for name, preset in PRESETS.items() if preset["law"] == "table"}
COLLAPSED = {("techA", 260.0), ("techC", 260.0)}


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def table(name):
    """{(temp, time): [(target, mean, std), ...]} of a table."""
    rows = defaultdict(list)
    with open(DATA / TABLES[name], newline="") as file:
        for row in csv.DictReader(file):
            if (name, float(row["temp_C"])) not in COLLAPSED:
                rows[float(row["temp_C"]), float(row["time_s"])].append(
                    tuple(float(row[key]) for key in ("target_uS", "mean_uS", "std_uS")))
    return {key: sorted(value) for key, value in rows.items()}


def write(folder, text, name="own.csv"):
    path = folder / name
    path.write_text(text)
    return path


MOMENTS = [(name, temp, time) for name in TABLES for temp, time in table(name)]


# ---- presets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, temp, time", MOMENTS)
def test_mean_and_sigma_are_those_of_the_table(name, temp, time):
    device = Device.preset(name, time, temp)
    for target, mean, std in table(name)[temp, time]:
        assert device.mean(target) == pytest.approx(mean, rel=1e-12)
        assert device.sigma(target) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("name, temp, time", MOMENTS)
def test_cells_drawn_lie_as_in_the_table(name, temp, time):
    """A 5-bit cell has the table's 32 targets for levels. 10,000 cells a level: sigma within 5 / sqrt 20,000 = 3.5 % < 5 %."""
    device, n = Device.preset(name, time, temp), 10_000
    targets = [target for target, _, _ in table(name)[25.0, 0.0]]
    assert device.levels(5) == pytest.approx(targets, rel=1e-12)
    cells = device.draw(np.repeat(np.arange(32, dtype=np.uint8)[:, None], n, axis=1), 5, generator())
    for target, mean, std in table(name)[temp, time]:
        drawn = cells[targets.index(target)]
        assert abs(drawn.mean() - mean) < 5 * std / math.sqrt(n), target
        assert abs(drawn.std() / std - 1) < 5 / math.sqrt(2 * n), target


def row_of(device):
    """The line of a preset in the table of docs/devices.md."""
    levels, g = device.level_values, (device.g_min, device.g_max)
    usual, *others = device.law.times.items()
    sigma = device.sigma(np.array(levels or np.linspace(*g, 33)))
    scatter = f"{sigma.min():.2g} to {sigma.max():.2g}" if sigma.any() else "none"
    reads = "yes" if type(device.law).read_sigma is not Law.read_sigma else ""
    cells = [f"`{device.name}`", ", ".join(map("{:.4g}".format, levels or ())) or f"{g[0]:.4g} to {g[1]:.4g}",
             f"{g[1] / g[0]:.3g}" if g[0] else "infinite", scatter, str(usual[1]) or "none",
             "; ".join(f"{temp:g} C: {times}" for temp, times in others), reads]
    return "| " + " | ".join(cells) + " |"


def test_the_documents_table_of_presets_is_theirs():
    text = DOCUMENT.read_text()
    rows = [row_of(Device.preset(name)) for name in presets()]
    assert [row for row in rows if row not in text] == []


def test_every_preset_loads_draws_and_is_described():
    lines = describe()
    assert len(lines) == len(presets()) >= 15
    for name, line in zip(presets(), lines):
        device = Device.preset(name)
        assert line.startswith(f"{name}: ") and device.source in line and device.certainty
        g = device.levels(1)
        cells = replace(device, stuck_on=0.0, stuck_off=0.0).draw(np.tile(np.arange(2, dtype=np.uint8), 20_000), 1, generator(1))
        for level in range(2):
            sigma, drawn = float(device.sigma(g[level])), cells[level::2]
            assert abs(drawn.mean() - device.mean(g[level])) <= 5 * sigma / math.sqrt(20_000) + 1e-12, name
            assert drawn.std() == pytest.approx(sigma, rel=0.08), name
    chen = Device.preset("stuck_at_chen")
    assert (chen.stuck_on, chen.stuck_off) == (0.0904, 0.0175)
    assert "level order uncertain" in next(line for line in lines if line.startswith("winbond_asu_2bit"))


@pytest.mark.parametrize("name, ratio", [("ideal", 10), ("rram_wan", 400), ("rram_wan", 2), ("techA", 5), ("techC_cells", 5)])
def test_an_on_off_ratio_keeps_the_highest_level(name, ratio):
    """And scatter and drift are the law's at the new levels."""
    preset = Device.preset(name)
    device, g = preset.with_on_off(ratio), preset.g_max / ratio
    assert device.levels(2) == pytest.approx([g + level * (preset.g_max - g) / 3 for level in range(4)])
    within = device.levels(2) + 0.0
    assert device.sigma(within) == pytest.approx(preset.sigma(within)) and device.mean(within) == pytest.approx(preset.mean(within))


def test_measured_rows_keep_their_on_off_ratio(tmp_path):
    lines = [f"{code},{10 + 3 * (code >> 1)},{10 + 3 * (code & 1)}" for code in range(4)]
    device = Device.read(write(tmp_path, "weight_level,cell0,cell1\n" + "\n".join(lines) + "\n"))
    with pytest.raises(ValueError, match="on_off 5: .* levels of its own, from 10 to 13 uS, and so its own ratio; leave on_off out"):
        device.with_on_off(5)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("name", ["ideal", "techC"])
def test_cells_have_sigma_percent_besides(name, bits):
    """`sigma^2 = sigma_law^2 + (p (G_max - G_min) / 100)^2`, all levels; 40,000 cells each."""
    device, n = Device.preset(name, sigma_percent=4.0), 40_000
    cells = device.draw(np.repeat(np.arange(2**bits, dtype=np.uint8)[:, None], n, axis=1), bits, generator(2))
    g = device.levels(bits)
    sigma = np.hypot(Device.preset(name).sigma(g), 0.04 * (g[-1] - g[0]))
    assert device.sigma(g) == pytest.approx(sigma, rel=1e-12)
    assert (abs(cells.std(1) / sigma - 1) < 5 / math.sqrt(2 * n)).all()
    assert (abs(cells.mean(1) - device.mean(g)) < 5 * sigma / math.sqrt(n)).all()
    assert device.reach(bits) == pytest.approx((device.mean(g) - g[0] + 6 * sigma).max() / device.step(bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_noise_that_is_the_same_for_all_levels_depends_on_none(bits):
    for noise in (0.01, 0.45, 0.5, 7.3):
        c_0, c_1, misfit = Device("mine", "here", 1.0, 40.0, read_noise=noise).cell_noise(bits)
        assert c_1 == 0 and misfit < 1e-12 and c_0 == pytest.approx((noise / (39 / (2**bits - 1))) ** 2)


@pytest.mark.parametrize("key", ["g_min", "stuck_on", "sigma_percent"])
def test_none_is_no_number(key):
    with pytest.raises(ValueError, match=f"^{key} is None; a number is expected"):
        Device(**{"name": "a", "source": "b", "g_min": 0.0, "g_max": 10.0, key: None})


def test_sigma_percent_changes_nothing_else():
    """The same cells are stuck, at their levels, and the others differ by the same normals, as many times as large."""
    level = np.tile(np.arange(4, dtype=np.uint8), 500)
    without, some, more = (Device.preset("techC", stuck_on=0.1, stuck_off=0.2, sigma_percent=p).draw(level, 2, generator(5))
                           for p in (0.0, 1.0, 3.0))
    stuck = np.isin(without, Device.preset("techC").levels(2)[[0, 3]])
    assert 400 < stuck.sum() < 800 and (some[stuck] == without[stuck]).all() and (some[~stuck] != without[~stuck]).all()
    assert (more - without) == pytest.approx(3 * (some - without))


def test_measured_rows_have_sigma_percent_of_each_cells_range(tmp_path):
    """A row of a 3-bit weight on a 2-bit and a 1-bit cell, whose levels span 60 and 10 uS."""
    lines = [f"{w},{10 * (w // 4)},{20 * (w % 4)}" for w in range(8)]
    device = Device.read(write(tmp_path, "weight_level,cell0,cell1\n" + "\n".join(lines) + "\n"), sigma_percent=10.0)
    codes = np.tile(np.arange(8, dtype=np.uint8), 5000)
    low, high = device.draw_weights(codes, (2, 1), generator(3))
    for drawn, wanted, span in ((low, 20.0 * (codes % 4), 60), (high, 10.0 * (codes // 4), 10)):
        assert abs((drawn - wanted).std() / (0.1 * span) - 1) < 5 / math.sqrt(2 * codes.size)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_sigma_percent_that_cannot_be(value):
    with pytest.raises(ValueError, match="sigma_percent is .*; allowed are finite numbers from 0 on"):
        Device.preset("ideal", sigma_percent=value)


def test_literature_by_hand():
    assert Device.preset("milo_irps21").sigma(100.0) == pytest.approx(4.7823 - 0.9107)
    wan = Device.preset("rram_wan", "1s")  # x = 1/2
    assert wan.sigma(20.0) == pytest.approx(0.348 + 16.03 / 2 - 43.853 / 4 + 45.393 / 8 - 16.815 / 16)
    assert Device.preset("rram_wan", "1d").sigma(20.0) == pytest.approx(0.701 + 22.086 / 2 - 50.773 / 4 + 47.095 / 8 - 16.458 / 16)
    assert Device.preset("rram_wan", "2d").sigma(20.0) == pytest.approx(0.782 + 20.274 / 2 - 43.507 / 4 + 37.062 / 8 - 11.934 / 16)
    assert Device.preset("rram_wan_crosssim").sigma(10.0) == pytest.approx(0.1536 - 1.167 + 2.374 + 1.053)
    cmo = Device.preset("cmo_hfox", "1h")
    log = math.log(3600)
    assert cmo.mean(50.0) == pytest.approx(50 - 0.089 * log)
    assert cmo.sigma(50.0) == pytest.approx(math.sqrt((0.01122 + 0.5645)**2 + (0.4118 + 0.042 * log)**2))
    assert Device.preset("cmo_hfox").sigma(50.0) == pytest.approx(0.01122 + 0.5645)
    fine = Device.preset("cmo_hfox_0.2pct", "1h")
    assert fine.mean(50.0) == pytest.approx(50 - 0.089 * log)
    assert fine.sigma(50.0) == pytest.approx(math.sqrt((0.00081 + 0.0535)**2 + (0.4118 + 0.042 * log)**2))
    assert Device.preset("pcm").sigma([0.0, 12.5, 25.0]) == pytest.approx([0.26, 0.95, 1.06], abs=0.005)  # as programmed
    for name, ohm, ratio in (("intel_22nm", 6000, 17), ("winbond_90nm", 6000, 150), ("tsinghua_130nm", 100_000, 10)):
        device = Device.preset(f"neurosim_{name}")
        assert device.g_max == pytest.approx(1e6 / ohm) and device.g_max / device.g_min == pytest.approx(ratio)
    mnsim = Device.preset("stuck_at_mnsim")
    assert (mnsim.stuck_on, mnsim.stuck_off) == (0.001, 0.001) and mnsim.sigma([1.0, 50.0]) == pytest.approx([0.01, 0.5])
    hot = Device.preset("winbond_asu_2bit", 200, 85)  # a decade after 20 s
    assert hot.mean(hot.levels(2)) - hot.levels(2) == pytest.approx([0.06, -1.37, -0.87, -0.21])
    assert hot.sigma(hot.levels(2)) == pytest.approx([0.1, 1.26, 0.98, 0.07])
    two = Device.preset("winbond_asu_2bit", 2000, 120)  # two decades after 20 s
    assert two.mean(two.levels(2)) - two.levels(2) == pytest.approx([0.16, -4, -2.5, -0.6])
    assert two.sigma(two.levels(2)) == pytest.approx([0.34, 3.42, 2.82, 0.32])
    one = Device.preset("winbond_asu_1bit").draw(np.ones(1000, np.uint8), 1, generator())
    assert 147 <= one.min() < 147.3 and 165.7 < one.max() <= 166
    chip = Device.preset("neurram_chip").draw(np.ones(1000, np.uint8), 1, generator())
    assert np.abs(chip - 40).max() <= 1


def test_phase_change_cells_follow_their_power_law():
    """Exponent and its deviation by hand at G = G_max / 2; of the draw mean and sigma, and exp((s l)^2 / 2) in the mean."""
    device = Device.preset("pcm", "1d", g_min=12.5)
    log, m = math.log(86400 / 20), 0.049
    s = max(0.008, -0.0125 * math.log(0.5) - 0.0059)
    assert device.mean(12.5) == pytest.approx(12.5 * math.exp(-m * log + (s * log)**2 / 2))
    cells = device.draw(np.zeros(200_000, np.uint8), 1, generator())
    assert abs(cells.mean() - device.mean(12.5)) < 5 * device.sigma(12.5) / math.sqrt(200_000)
    assert cells.std() == pytest.approx(device.sigma(12.5), rel=0.01)


# ---- times and temperatures ----------------------------------------------------------------------------------------------


def test_time_is_interpolated_in_its_logarithm():
    """sqrt(1000 10000) s is half way in log t; 10 s is half way from 1 to 100 s; between levels linear in G."""
    rows = {key: {target: (mean, std) for target, mean, std in value} for key, value in table("techA").items()}
    for time, low, high in ((math.sqrt(1e7), 1e3, 1e4), (10, 1, 100)):
        device = Device.preset("techA", time)
        for target in (3.75, 123.75):
            mean, std = np.add(rows[25.0, low][target], rows[25.0, high][target]) / 2
            assert device.mean(target) == pytest.approx(mean, rel=1e-9)
            assert device.sigma(target) == pytest.approx(std, rel=1e-9)
    share = math.log10(2)  # of the way from 1000 to 10000 s, at 2000 s
    mean, std = (1 - share) * np.array(rows[25.0, 1e3][123.75]) + share * np.array(rows[25.0, 1e4][123.75])
    assert (Device.preset("techA", 2e3).mean(123.75), Device.preset("techA", 2e3).sigma(123.75)) == pytest.approx((mean, std))
    mean, std = np.add(rows[25.0, 1][3.75], rows[25.0, 1][11.25]) / 2
    assert Device.preset("techA", 1).mean(7.5) == pytest.approx(mean) and Device.preset("techA", 1).sigma(7.5) == pytest.approx(std)
    wan = [Device.preset("rram_wan", time).sigma(20.0) for time in (1, math.sqrt(86400), 86400)]
    assert wan[1] == pytest.approx((wan[0] + wan[2]) / 2)


def test_first_time_and_lowest_temperature_unless_said():
    device = Device.preset("techA")
    assert (device.time, device.temp) == (0.0, 25.0)
    assert Device.preset("techA", temp=180).time == 5262
    assert Device.preset("pcm").time == 20 and Device.preset("milo_irps21").time is None
    assert replace(Device.preset("techC"), time="1d").time == 86400


@pytest.mark.parametrize("name, time, temp, message", [
    ("techC", 0.005, None, "techC at 25 C has no data at 0.005 s; nearest: 0 s and 0.01 s; it has 0, 0.01, 0.1, 1, 3.44, 100000 s"),
    ("techC", "2w", None, "nearest: 100000 s"),
    ("techA", 5000, 180, "techA at 180 C has no data at 5000 s; nearest: 5262 s"),
    ("techA", None, 260, "techA has no data at 260 C; it has 25 C, 100 C, 140 C, 180 C, 220 C"),
    ("techC", None, 260, "has no data at 260 C"),
    ("techA", None, 50, "has no data at 50 C"),
    ("techC_cells", 10, None, "techC_cells at 25 C has no data at 10 s; nearest: 3.44 s and 100000 s"),
    ("milo_irps21", 1, None, "milo_irps21 has no data over time"),
    ("milo_irps21", None, 25, "milo_irps21 has no data at 25 C; it has no data over temperature"),
    ("cmo_hfox", 0.5, None, "nearest: 0 s and 1 s; it has 0 s and all times from 1 s on"),
    ("pcm", 10, None, "pcm has no data at 10 s; nearest: 20 s"),
    ("techC_cells", 3.45, None, "techC_cells at 25 C has no data at 3.45 s; nearest: 3.44 s and 100000 s"),
    ("rram_wan", "3d", None, "nearest: 172800 s"),
    ("winbond_asu_2bit", 100, 25, "winbond_asu_2bit at 25 C has no data at 100 s"),
    ("nobody", None, None, "there is no preset and no file 'nobody'; presets are cmo_hfox"),
    ("", None, None, "there is no preset and no file ''; presets are cmo_hfox"),
])
def test_what_the_data_lack_is_refused(name, time, temp, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Device.preset(name, time, temp)
    assert "\n" not in str(error.value)


def test_one_door_for_presets_and_files(tmp_path, monkeypatch):
    path = write(tmp_path, "level,conductance_uS,std_uS\n0,1,0.1\n1,30,0.2\n")
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "own.csv"):
        assert Device.load(name, stuck_on=0.5).levels(1).tolist() == [1, 30] and Device.preset(name).name == "own"
    assert Device.load("techA", "1h").time == 3600 and Device.read("techA").name == "techA"
    write(tmp_path, "level,conductance_uS\n0,1\n1,30\n", "techA")
    assert Device.load("techA").g_max == 236.25 and Device.load("./techA").g_max == 30  # a preset goes before a file of its name
    with pytest.raises(ValueError, match="^there is no preset and no file '.*gone.csv'; presets are cmo_hfox, "):
        Device.load(tmp_path / "gone.csv")


def test_times_as_text():
    assert [parse_time(text) for text in ("1s", "10 s", "1h", "1d", "1w", "5min", "10ms", "3600", "1e5s", None, 2)] == [
        1, 10, 3600, 86400, 604800, 300, 0.01, 3600, 1e5, None, 2]
    for wrong in ("soon", "1 year", "", "-1s", "1h30", "nan", math.nan, math.inf, -1.0, True):
        with pytest.raises(ValueError, match="time is"):
            parse_time(wrong)
    assert Device.preset("techC_cells", 3.44 * (1 + 1e-12)).time == 3.44  # rounding makes no other time


# ---- levels and draws ----------------------------------------------------------------------------------------------------


def test_levels_and_step():
    device = Device.preset("milo_irps21")
    assert device.levels(2) == pytest.approx([50, 50 + 175 / 3, 50 + 350 / 3, 225])
    assert device.step(2) == pytest.approx(175 / 3)
    two = Device.preset("winbond_asu_2bit")
    assert two.levels(1) == pytest.approx([0.75, 136.65]) and two.step(2) == pytest.approx(45.3)
    six = Device("own", "here", g_min=0, g_max=9, level_values=(0, 1, 3, 4, 6, 9))
    assert np.array_equal(six.levels(2), [0, 3, 4, 9])  # levels 0, 5/3, 10/3, 5: the nearest
    for values in ((0, 4, 3, 9), (-1, 3, 9), (0, math.nan, 9), (0, 3, 3, 9), (0,), (), (0, 3, math.inf)):
        with pytest.raises(ValueError, match="own: level_values is .*; allowed are two or more finite uS, each above the last|0 <= g_min"):
            replace(six, level_values=values, g_min=min(values, default=0))
    edge = Device.preset("techB")
    assert edge.levels(4)[-1] > edge.g_max and np.isfinite(edge.mean(edge.levels(4))).all()  # beyond its data by rounding alone
    with pytest.raises(ValueError, match="winbond_asu_2bit has 4 levels, a cell of 3 bits needs 8"):
        two.levels(3)
    with pytest.raises(ValueError, match="bits of a cell are 9"):
        device.levels(9)


def test_nothing_but_rounding_lies_beyond_the_data():
    device = Device("own", "here", 5.0, 50.0, law=Polynomial("own", ((2.0,),), span=(5.0, 50.0)))
    assert device.mean([5 * (1 - 1e-10), 50 * (1 + 1e-10)]) == pytest.approx([5, 50])
    for g in (4.99999, 50.00001):
        with pytest.raises(ValueError, match=f"own has no data at {g:g} uS; it covers 5 to 50 uS"):
            device.mean(g)


@pytest.mark.parametrize("given", [{"sigma_us": 2.0}, {"law": Polynomial("own", ((2.0,),))}])
def test_cells_reach_six_deviations_beyond_their_levels(given):
    """Of 2 bits and 20 uS a level: 3 levels and 6 times 0.1."""
    assert Device("own", "here", 5.0, 65.0, **given).reach(2) == pytest.approx(3.6)


def test_same_seed_same_cells():
    index = generator(5).integers(0, 4, (50, 7), dtype=np.uint8)
    for name in ("techA", "techC_cells", "pcm", "neurram_chip"):
        device = Device.preset(name, stuck_on=0.1)
        first = device.draw(index, 2, generator(3))
        assert first.dtype == np.float64 and first.shape == index.shape
        assert np.array_equal(first, device.draw(index, 2, generator(3)))
        assert not np.array_equal(first, device.draw(index, 2, generator(4)))


def test_scatter_is_drawn_before_faults():
    """So that cells that are not stuck are those of the device without faults, and no uniforms are drawn without need."""
    index = np.repeat(np.arange(4, dtype=np.uint8), 100)
    device, rng = Device.preset("techA", 1), generator(3)
    plain, after = device.draw(index, 2, rng), rng.random()
    faulty = replace(device, stuck_on=0.2).draw(index, 2, generator(3))
    stuck = faulty == device.levels(2)[-1]
    assert 0 < stuck.sum() < 400 and np.array_equal(plain[~stuck], faulty[~stuck])
    normals = generator(3)
    expected = device.mean(device.levels(2))[index] + device.sigma(device.levels(2))[index] * normals.standard_normal(400)
    assert np.array_equal(plain, expected) and normals.random() == after


def kolmogorov(drawn, pool):
    """Largest distance between the distribution of a draw and that of what it is drawn from."""
    points = np.unique(pool)
    return np.abs(np.searchsorted(np.sort(drawn), points, "right") / len(drawn)
                  - np.searchsorted(np.sort(pool), points, "right") / len(pool)).max()


@pytest.mark.parametrize("time", [0, 0.01, 0.1, 1, 3.44, 100_000])
def test_measured_cells_are_drawn_as_in_the_file(time):
    """Kolmogorov: P(sqrt n D > 2.2) < 2 exp(-2 2.2^2) = 1.3e-4, less for a discrete distribution. A 2-bit cell's levels: the two
    between lie off the targets and are moved."""
    pools = defaultdict(list)
    with gzip.open(DATA / "rram_techC_cells.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            if float(row["time_s"]) == time:
                pools[float(row["target_uS"])].append(float(row["conductance_uS"]))
    device, n = Device.preset("techC_cells", time), 20_000
    cells = device.draw(np.repeat(np.arange(4, dtype=np.uint8)[:, None], n, axis=1), 2, generator())
    for level in range(4):
        nominal = 0.625 + level * (39.375 - 0.625) / 3
        target = min(pools, key=lambda t: abs(t - nominal))
        pool = np.array(pools[target]) + nominal - target
        assert abs(nominal - target) <= 0.625 and (level in (0, 3)) == (abs(nominal - target) < 1e-9)
        assert math.sqrt(n) * kolmogorov(np.round(cells[level], 9), np.round(pool, 9)) < 2.2
        assert device.mean(nominal) == pytest.approx(pool.mean()) and device.sigma(nominal) == pytest.approx(pool.std())


def test_nominal_levels_of_own_cells_are_those_of_their_first_time(tmp_path):
    """So that later ones drift."""
    path = tmp_path / "own.csv"
    path.write_text("level,conductance_uS,time_s\n0,1,0\n1,10,0\n0,2,9\n1,14,9\n")
    late = Device.read(path, 9)
    assert late.levels(1) == pytest.approx([1, 10]) and late.mean([1, 10]) == pytest.approx([2, 14])


def test_a_map_of_one_dimension_goes_on_from_row_to_row():
    assert devices.faults.on_arrays(np.array([1, 0, 0]), [(0, 3)], 2).tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_line_of_noise_is_none_below_zero_at_the_highest_level():
    """Also where levels have drifted to lower values."""
    c0, c1, _ = devices.noise.affine(np.array([0.0, 1.0]), np.sqrt([2.0, 1.0]), 3.0)
    assert c0 + 3 * c1 >= -1e-12


def test_stuck_cells():
    n, p_on, p_off = 100_000, 0.03, 0.1
    device = Device.preset("techA", stuck_on=p_on, stuck_off=p_off)
    cells = device.draw(np.full(n, 1, np.uint8), 2, generator())
    for value, p in ((device.levels(2)[-1], p_on), (device.levels(2)[0], p_off)):
        assert abs((cells == value).sum() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    all_stuck = replace(device, stuck_on=0.75, stuck_off=0.25).draw(np.ones(50, np.uint8), 2, generator())
    assert np.isin(all_stuck, device.levels(2)[[0, -1]]).all()


@pytest.mark.parametrize("name, times", [("techA", ("0", "1d")), ("winbond_asu_2bit", ("20s", "1d")), ("pcm", ("20s", "1d"))])
def test_stuck_cells_stay_stuck_over_time(name, times):
    temp = 85 if name == "winbond_asu_2bit" else None
    index = np.ones(20_000, np.uint8)
    stuck = []
    for time, at in zip(times, (None, temp)):
        device = Device.preset(name, time, at, stuck_on=0.1)
        stuck.append(device.draw(index, 2, generator(3)) == device.levels(2)[-1])
    assert np.array_equal(*stuck) and 1500 < stuck[0].sum() < 2500


def test_stuck_mask(tmp_path):
    mask = np.array([[0, 1, 0], [-1, 0, 0]])
    np.save(tmp_path / "mask.npy", mask)
    write(tmp_path, "0,1,0\n-1,0,0\n", "mask.csv")
    index = np.ones((4, 3), np.uint8)
    for given in (mask, tmp_path / "mask.npy", str(tmp_path / "mask.csv")):
        device = Device.preset("milo_irps21", stuck_mask=given)
        cells = device.draw(index, 2, generator())
        assert np.array_equal(cells == 225, np.tile(mask == 1, (2, 1))) and np.array_equal(cells == 50, np.tile(mask == -1, (2, 1)))
    for faults in ({"stuck_on": 1.0}, {"stuck_off": 1.0}):  # the map goes before them
        cells = replace(device, **faults).draw(index, 2, generator())
        assert (cells[::2, 1] == 225).all() and (cells[1::2, 0] == 50).all()
    line = write(tmp_path, "1,0\n", "line.csv")
    assert Device.preset("milo_irps21", stuck_mask=line).stuck_mask.shape == (1, 2)
    column = write(tmp_path, "1\n0\n", "column.csv")
    assert Device.preset("milo_irps21", stuck_mask=column).stuck_mask.shape == (2, 1)
    (tmp_path / "void.npy").touch()
    (tmp_path / "torn.npy").write_bytes(b"PK\x03\x04 a zip that broke off")
    for wrong, name in ((np.array([2]), "stuck_mask"), (np.array([]), "stuck_mask"), (tmp_path / "void.npy", "void.npy: no mask"),
                        (tmp_path / "torn.npy", "torn.npy: no mask"),
                        (write(tmp_path, "a,b\n", "x.csv"), "x.csv"), (tmp_path / "no.npy", "no.npy")):
        with pytest.raises(ValueError, match=name):
            Device.preset("milo_irps21", stuck_mask=wrong)


@pytest.mark.parametrize("changes, message", [
    ({"stuck_on": 1.5}, "stuck_on is 1.5; allowed are probabilities from 0 to 1"),
    ({"stuck_off": -0.1}, "stuck_off is -0.1"),
    ({"stuck_on": math.nan}, "stuck_on is nan"),
    ({"stuck_on": 0.6, "stuck_off": 0.5}, "sum above 1"),
    ({"read_noise": -1.0}, "read_noise is -1.0"),
    ({"read_noise": "much"}, "read_noise is 'much'"),
    ({"read_noise": "device"}, "techA has no read noise of its own"),
    ({"sigma_us": math.nan}, "sigma_us is nan"),
    ({"g_min": 1.0}, "techA has no data at 1 uS; it covers 3.75 to 236.25 uS"),
    ({"g_min": 50.0, "g_max": 40.0}, "allowed are 0 <= g_min < g_max"),
    ({"g_min": -1.0}, "techA: g_min is -1.0 and g_max 236.25 uS; allowed are 0 <= g_min < g_max"),
    ({"g_max": math.inf}, "allowed are 0 <= g_min < g_max"),
    ({"colour": 1}, "colour: no attribute of a device"),
])
def test_changes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Device.preset("techA", **changes)


def test_changes():
    device = Device.preset("techA", g_min=11.25, g_max=33.75, sigma_us=0.5)
    assert device.levels(1) == pytest.approx([11.25, 33.75]) and np.array_equal(device.sigma([11.25, 20.0]), [0.5, 0.5])
    assert device.draw(np.zeros(10_000, np.uint8), 1, generator()).std() == pytest.approx(0.5, rel=0.04)
    drifted = Device.preset("techA", 1e4, sigma_us=0.0)
    assert np.array_equal(drifted.draw(np.arange(4), 2, generator()), drifted.mean(drifted.levels(2)))
    with pytest.raises(ValueError, match="g_min and g_max cannot be changed"):
        Device.preset("winbond_asu_1bit", g_max=111)
    own = Device("own", "here", g_min=1, g_max=10)
    assert np.array_equal(own.draw(np.arange(4), 2, generator()), [1, 4, 7, 10])
    for index in (np.array([4]), np.array([-1]), np.array([0.5])):
        with pytest.raises(ValueError, match="level is no whole number from 0 to 3"):
            own.draw(index, 2, generator())
    with pytest.raises(ValueError, match="no rows of all cells"):
        own.draw_weights(np.arange(4), (1, 1), generator())


# ---- read noise ----------------------------------------------------------------------------------------------------------


def test_read_noise_is_a_line_in_the_level():
    own = Device("own", "here", g_min=10, g_max=40)  # 10 uS a level at 2 bits
    assert own.cell_noise(2) == (0, 0, 0)
    assert replace(own, read_noise=2.0).cell_noise(2) == pytest.approx((0.04, 0, 0))
    c_0, c_1, misfit = replace(own, read_noise=np.sqrt([1.0, 3.0, 5.0, 7.0])).cell_noise(2)
    assert (c_0, c_1) == pytest.approx((0.01, 0.02)) and misfit < 1e-9
    rising = Device("own", "here", g_min=0, g_max=7, read_noise=np.sqrt(0.7 * np.arange(8)))
    assert rising.cell_noise(3) == pytest.approx((0, 0.7, 0), abs=1e-7)  # a lowest level without noise gets none by rounding
    x, variance = np.arange(4), np.array([1, 1, 4, 9.0]) / 100
    slope, offset = np.polyfit(x, variance, 1)
    found = replace(own, read_noise=10 * np.sqrt(variance)).cell_noise(2)
    expected = (0, float(x @ variance / (x @ x))) if offset < 0 else (offset, slope)
    assert found[:2] == pytest.approx(expected)
    assert found[2] == pytest.approx(np.abs(np.sqrt(found[0] + found[1] * x) - np.sqrt(variance)).max() / 0.3)


@pytest.mark.parametrize("variance", [[0, 0, 0, 9.0], [9.0, 0, 0, 0], [0, 0, 1, 9], [9, 1, 0, 0], [1, 5, 1, 5]])
def test_read_noise_is_never_negative_and_the_best_line(variance):
    """Against a search over all lines through non-negative end points."""
    c_0, c_1, misfit = Device("own", "here", g_min=0, g_max=3, read_noise=np.sqrt(variance)).cell_noise(2)
    x = np.arange(4)
    assert c_0 >= 0 and c_0 + 3 * c_1 >= -1e-12
    left, right = np.meshgrid(np.linspace(0, 10, 201), np.linspace(0, 10, 201))
    errors = sum((left + (right - left) * i / 3 - variance[i])**2 for i in x)
    assert ((c_0 + c_1 * x - variance)**2).sum() <= errors.min() + 1e-9
    apart = np.abs(np.sqrt(np.maximum(c_0 + c_1 * x, 0)) - np.sqrt(variance))
    assert misfit == pytest.approx(apart.max() / np.sqrt(max(variance)), abs=1e-7)


def test_read_noise_of_the_device():
    device = Device.preset("cmo_hfox", "1h", read_noise="device")
    log = math.sqrt(math.log(3600 / 2e-6))
    sigma = [0.0277 * math.log10(g - 0.089 * math.log(3600)) * log for g in (8, 90)]
    c_0, c_1, misfit = device.cell_noise(1)
    drifted = -0.089 * math.log(3600) / 82  # levels, of both levels
    assert (c_0 + c_1 * drifted, c_0 + c_1 * (1 + drifted)) == pytest.approx([(s / 82)**2 for s in sigma], rel=1e-6) and misfit < 1e-6
    day = Device.preset("pcm", "1d", read_noise="device")  # whose highest level has lost a third by then
    on = float(day.mean(25.0))
    assert 0.6 * 25 < on < 0.7 * 25
    assert day.cell_noise(1)[1] * on / 25 == pytest.approx((day.law.read_sigma(np.array([25.0]), 86400, None)[0] / 25)**2)
    for g, share in ((12.5, 0.0088 / 0.5**0.65), (0.1, 0.2)):  # q / x^p, at most 0.2
        pcm = Device.preset("pcm", "1h", g_min=g, read_noise="device")
        wanted = pcm.mean(g) * share * math.sqrt(math.log((3600 + 250e-9) / 500e-9))
        assert pcm.law.read_sigma(np.array([g]), 3600, None) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="cmo_hfox has no read noise at 0 s; it has it at all times from 1 s on"):
        Device.preset("cmo_hfox", read_noise="device")
    ends = Device.preset("milo_irps21", read_noise=[1.0, 2.0, 2.0, 3.0]).cell_noise(1)
    assert ends == pytest.approx((1 / 175**2, 8 / 175**2, 0))  # a cell of fewer levels has those of the first and the last
    with pytest.raises(ValueError, match="read_noise has 2 values, a cell of 2 bits needs 4"):
        Device.preset("milo_irps21", read_noise=[1.0, 2.0]).cell_noise(2)
    with pytest.raises(ValueError, match="allowed are finite uS"):
        Device.preset("milo_irps21", read_noise=[[1.0, 2.0]])


# ---- own data ------------------------------------------------------------------------------------------------------------


def test_own_cells_are_drawn_with_replacement(tmp_path):
    pools = {0: [0.003, 1.5, 3.0], 1: [10.0, 12.0], 2: [20.0], 3: [30.0, 31.0, 33.0, 40.0]}
    lines = [f"{g},{level}" for level, pool in pools.items() for g in pool]
    device = Device.read(write(tmp_path, "\n".join(["conductance_uS,level", *lines])))
    assert device.levels(2) == pytest.approx([np.mean(pool) for pool in pools.values()]) and device.n == 10
    assert device.levels(1) == pytest.approx([np.mean(pools[0]), np.mean(pools[3])])
    assert Device.read(write(tmp_path, "level,conductance_uS,time_s\n0,1,0\n1,3,0\n0,1,9\n1,3,9\n", "twice.csv")).n == 2  # cells, not reads
    with pytest.raises(ValueError, match="own has no data over time, so time 10 s cannot be asked for"):
        replace(device, time=10)
    cells = device.draw(np.repeat(np.arange(4, dtype=np.uint8)[:, None], 10_000, axis=1), 2, generator())
    for level, pool in pools.items():
        assert set(np.round(cells[level], 9)) == set(pool)
        for g in pool:
            p = 1 / len(pool)
            assert abs(np.isclose(cells[level], g).sum() - 10_000 * p) <= 5 * math.sqrt(10_000 * p * (1 - p))


def test_a_law_as_a_table(tmp_path):
    """By hand: linear between targets, and half way between 1 and 100 s at 10 s. The levels are not the means, and any number of them."""
    path = write(tmp_path, "target_uS,mean_uS,std_uS,time_s\n1,1.5,.1,1\n11,11,.3,1\n41,38,.6,1\n1,2.5,.3,100\n11,9,.5,100\n41,30,1,100\n")
    device = Device.load(path, "10s")
    assert device.levels(1).tolist() == [1, 41] and device.levels(3) == pytest.approx(1 + 40 / 7 * np.arange(8)) and device.n is None
    assert device.mean([1, 6, 11, 26, 41]) == pytest.approx([2, 6, 10, 22, 34])
    assert device.sigma([1, 6, 11, 26, 41]) == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.8])
    cells = device.draw(np.repeat(np.arange(4)[:, None], 10_000, axis=1), 2, generator())
    means = np.interp([1, 1 + 40 / 3, 1 + 80 / 3, 41], [1, 11, 41], [2, 10, 34])
    for drawn, mean, sigma in zip(cells, means, device.sigma(device.levels(2))):
        assert abs(drawn.mean() - mean) < 5 * sigma / 100 and abs(drawn.std() / sigma - 1) < 5 / math.sqrt(20_000)
    with pytest.raises(ValueError, match="own has no data at 50 uS; it covers 1 to 41 uS"):
        Device.load(path, g_max=50)
    assert replace(device, g_min=11).levels(1).tolist() == [11, 41]


def test_a_law_as_a_table_is_the_preset_of_the_same_numbers(tmp_path):
    lines = [f"{target},{time},{temp},{mean},{std}" for (temp, time), rows in table("techA").items() for target, mean, std in rows]
    device = Device.load(write(tmp_path, "\n".join(["target_uS,time_s,temp_C,mean_uS,std_uS", *reversed(lines)])))
    index = np.arange(8, dtype=np.uint8).repeat(100)
    for moment in ((None, None), ("1h", None), (None, 180)):
        own, preset = (replace(each, time=moment[0], temp=moment[1]) for each in (device, Device.load("techA")))
        assert np.array_equal(own.draw(index, 3, generator()), preset.draw(index, 3, generator()))


def test_own_gaussian_levels_over_time_and_temperature(tmp_path):
    """Lines in any order: the first time and the lowest temperature are the smallest."""
    path = write(tmp_path, "level,conductance_uS,std_uS,time_s,temp_C\n"
                 "1,12,.5,50,25\n0,3,.4,50,25\n0,2,.3,100,-40\n1,14,.6,100,-40\n0,1,.1,1,-40\n1,10,.2,1,-40\n")
    device = Device.read(path, "10s")
    assert device.levels(1) == pytest.approx([1, 10]) and device.mean([1, 10]) == pytest.approx([1.5, 12])
    assert device.sigma([1, 10]) == pytest.approx([0.2, 0.4])
    hot = Device.read(path, temp=25)
    assert hot.time == 50 and hot.levels(1) == pytest.approx([1, 10]) and hot.mean([1, 10]) == pytest.approx([3, 12])
    with pytest.raises(ValueError, match="own at -40 C has no data at 200 s; nearest: 100 s"):
        Device.read(path, 200)


def test_states_in_siemens(tmp_path):
    """Spreadsheets write a mark of byte order in front."""
    device = Device.read(write(tmp_path, "\ufeffstates,mean,std\n0,1e-6,1e-7\n1,2e-5,5e-7\n"))
    assert device.levels(1) == pytest.approx([1, 20]) and device.sigma([1, 20]) == pytest.approx([0.1, 0.5])


def joint_rows(w_bits, cells, samples, seed=0):
    """Rows whose cells share an error: {W: uS [samples, cells]}, MSB first, and two bits a cell where cells = w_bits / 2."""
    rng, size = generator(seed), w_bits // cells
    rows = {}
    for w in range(2**w_bits):
        level = [(w >> size * (cells - 1 - j)) & (2**size - 1) for j in range(cells)]
        rows[w] = 10 + 20 * np.array(level) + rng.normal(0, 2, (samples, 1)) + rng.normal(0, 0.5, (samples, cells))
    return rows


def check_joint(device, rows, slice_bits):
    assert device.rows and device.n == sum(pool.size for pool in rows.values())
    codes = np.tile(np.arange(len(rows), dtype=np.uint8), (3000, 1))
    drawn = device.draw_weights(codes, slice_bits, generator(7))
    assert drawn.shape == (len(slice_bits), *codes.shape)
    for w, pool in rows.items():
        got = drawn[::-1, :, w].T  # MSB first, as measured
        assert {tuple(row) for row in np.round(got, 6)} == {tuple(row) for row in np.round(pool, 6)}
        assert abs(got.mean(axis=0) - pool.mean(axis=0)).max() < 5 * pool.std(axis=0).max() / math.sqrt(3000)
        assert abs(np.corrcoef(got.T) - np.corrcoef(pool.T)).max() < 0.02  # (1 - r^2) / sqrt 3000 = 0.002, five times and more
    bits = slice_bits[0]
    pools = [np.concatenate([pool[:, j] for w, pool in rows.items() for j in range(len(slice_bits))
                             if (w >> bits * (len(slice_bits) - 1 - j)) & (2**bits - 1) == level]) for level in range(2**bits)]
    assert device.levels(bits) == pytest.approx([pool.mean() for pool in pools])
    single = device.draw(np.ones(5000, np.uint8), bits, generator())
    assert set(np.round(single, 6)) <= set(np.round(pools[1], 6))
    assert np.array_equal(drawn, device.draw_weights(codes, slice_bits, generator(7)))


def test_joint_rows_of_a_csv(tmp_path):
    rows = joint_rows(4, 2, 50)
    lines = [",".join(map(repr, [w, *map(float, row)])) for w, pool in rows.items() for row in pool]
    check_joint(Device.read(write(tmp_path, "\n".join(["weight_level,cell0,cell1", *lines]))), rows, (2, 2))


def test_joint_rows_of_numpy_files(tmp_path):
    rows = joint_rows(4, 4, 40)  # level10 and later ones too
    for w, pool in rows.items():
        np.save(tmp_path / f"level{w}_raw.npy", 1e-6 * pool)
    for path in (tmp_path, tmp_path / "level0_raw.npy", str(tmp_path / "level{W}_raw.npy")):
        device = Device.read(path)
        check_joint(device, rows, (1, 1, 1, 1))
    with pytest.raises(ValueError, match=re.escape("rows of cells with (1, 1, 1, 1) bits, LSB first, not (2, 1)")):
        device.draw_weights(np.arange(8), (2, 1), generator())
    for code in (-1, 16):
        with pytest.raises(ValueError, match="weight code is no whole number from 0 to 15"):
            device.draw_weights(np.array([code]), (1, 1, 1, 1), generator())
    with pytest.raises(ValueError, match="cells of 1 bits, not of 2"):
        device.levels(2)
    n, p = 10_000, 0.1
    stuck = replace(device, stuck_on=p).draw_weights(np.zeros(n, np.uint8), (1, 1, 1, 1), generator())
    assert abs((stuck == device.levels(1)[-1]).sum() - 4 * n * p) < 5 * math.sqrt(4 * n * p * (1 - p))


def test_a_last_cell_with_fewer_bits(tmp_path):
    """3-bit weights on two cells: the low one of 2 bits, the high one of 1, and LSB comes first."""
    lines = [f"{w},{100 + w // 4},{10 + w % 4}" for w in range(8)]
    device = Device.read(write(tmp_path, "\n".join(["weight_level,cell0,cell1", *lines])))
    drawn = device.draw_weights(np.arange(8), (2, 1), generator())
    assert np.array_equal(drawn, [[10, 11, 12, 13] * 2, [100] * 4 + [101] * 4])
    assert np.array_equal(device.levels(1), [100, 101]) and np.array_equal(device.levels(2), [10, 11, 12, 13])
    device.levels(1)[:] = 0  # whoever asks gets an array of his own
    assert device.step(1) == device.step(2) == 1 and (device.g_min, device.g_max) == (10, 13)
    with pytest.raises(ValueError, match="measured rows; sigma_us cannot be changed"):
        replace(device, sigma_us=1.0)


def test_cells_of_a_weight_hold_what_the_hardware_says(tmp_path):
    """Two cells of a 4-bit weight: 1 bit above 3, or 2 and 2, and what does not rise in each of its places is not so."""
    lines = [f"{w},{5 + 100 * (w >> 3) + sample},{5 + 100 * (w & 7) / 7 + 3 * sample}" for w in range(16) for sample in range(2)]
    device = Device.read(write(tmp_path, "\n".join(["weight_level,cell0,cell1", *lines])))
    assert (device.g_min, device.g_max) == pytest.approx((6.5, 106.5))  # the file fits no other split
    assert device.levels(1) == pytest.approx([5.5, 105.5]) and device.levels(3) == pytest.approx(6.5 + 100 * np.arange(8) / 7)
    low, high = device.draw_weights(np.arange(16).repeat(100), (3, 1), generator())
    assert np.array_equal(high > 50, np.arange(16).repeat(100) >= 8) and abs(low[:800] - low[800:]).max() <= 3 + 1e-9
    for bits, message in ((2, "cell0 as one of 2 bits: level 1 has a mean of 5.5 uS"), (4, "cells of 1 or 2 or 3 bits, not of 4")):
        with pytest.raises(ValueError, match=message):
            device.levels(bits)
    both = Device.read(write(tmp_path, "\n".join(["weight_level,cell0,cell1", *(f"{w},{5 + w},{5 + w % 8}" for w in range(16))])))
    assert both.levels(2).size == 4 and both.levels(3).size == 8 and both.levels(1).size == 2
    assert JointRows("x", (np.zeros((1, 2)),) * 2**8).splits == [(4, 4), (5, 3), (6, 2), (7, 1)]
    assert JointRows("x", (np.zeros((1, 4)),) * 2**5).splits == []


@pytest.mark.parametrize("wrong, message", [({"temp": "hot"}, "temp is 'hot'; a number"), ({"stuck_on": "x"}, "stuck_on is 'x'; a number"),
                                            ({"sigma_us": True}, "sigma_us is True; a number"), ({"g_min": "a"}, "g_min is 'a'; a number"),
                                            ({"time": [1]}, "time is \\[1\\]; allowed are finite seconds")])
def test_what_is_no_number_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Device.preset("rram_wan", **wrong)


def test_levels_that_became_one_have_one_noise(tmp_path):
    text = "level,conductance_uS,std_uS,time_s\n0,1,0,1\n1,40,0,1\n0,5,0,10\n1,5,0,10\n"
    assert Device.read(write(tmp_path, text), time=10, read_noise=0.39).cell_noise(1) == pytest.approx((1e-4, 0, 0))


def test_stuck_cells_of_own_tables_stay_stuck_over_time(tmp_path):
    """Where none scatters at one of the times, too."""
    path = write(tmp_path, "level,conductance_uS,std_uS,time_s\n0,1,0,1\n1,40,0,1\n0,1,1,10\n1,39,1,10\n")
    index = np.zeros(20_000, np.uint8)
    stuck = [Device.read(path, time=time, stuck_on=0.1).draw(index, 1, generator(3)) == 40 for time in (1, 10)]
    assert np.array_equal(*stuck) and 1800 < stuck[0].sum() < 2200


HEAD = "level,conductance_uS\n"
LAW = "target_uS,mean_uS,std_uS\n"


@pytest.mark.parametrize("text, message", [
    (HEAD + "0,1\n2,5\n", "line 3: the data end without level 1"),
    (HEAD + "0,1\n", "without level 1"),
    (HEAD + "0,1\n1,-5\n", "line 3: conductance_uS is -5, negative"),
    (HEAD + "0,5\n1,4\n", "line 3: level 1 has a mean of 4 uS, not above the 5 uS of level 0"),
    (HEAD + "0,5\n\n1,5\n", "line 4: level 1 has a mean of 5 uS"),
    (HEAD + "0,120\n1,38900\n", "line 3: conductance_uS is 38900, which looks like nS or ohms; uS are expected, at most 10000"),
    ("weight_level,cell0\n0,1\n1,2e6\n", "line 3: cell0 is 2e+06, which looks like nS"),
    (HEAD + "0,1e-6\n1,2e-5\n", "line 2: conductance_uS is 1e-06 and none is as large as 0.01: these look like siemens, uS are expected"),
    ("level,conductance_uS,std_uS\n0,1,0\n1,9,2e-7\n", "line 3: std_uS is 2e-07 and none is larger: these look like siemens"),
    (HEAD + "0,1\n1,nan\n", "line 3: conductance_uS is nan, not finite"),
    (HEAD + "0,1\n1,\n", "line 3: conductance_uS is '', no number"),
    (HEAD.replace(",", ";") + "0;1\n1;2\n", "line 1: columns stand between ';'; a comma is expected"),
    (HEAD + "0,1\n1,2,3\n", "line 3: 3 values for 2 columns"),
    (HEAD + "0,1\n0.5,2\n", "line 3: level is 0.5, no whole number"),
    (HEAD, "line 1: no lines of data"),
    pytest.param(HEAD + '"0,1\n' + "1,2\n" * 40_000, "cannot be read as text (field larger", id="a quote without end"),
    ("level,conductance_uS,level\n0,1,0\n1,2,1\n", "line 1: a column stands there twice"),
    ("weight_level\n0\n1\n", "line 1: columns weight_level; after weight_level come cell0"),
    ("level,conductance\n0,1\n", "line 1: columns level,conductance; known are level,conductance_uS"),
    ("level,conductance_uS,colour\n0,1,2\n", "line 1: columns level,conductance_uS,colour"),
    ("level,conductance_uS,std_uS\n0,1,1\n0,2,1\n1,3,1\n", "line 3: a second line of level 0"),
    ("level,conductance_uS,std_uS\n0,1,-1\n1,3,1\n", "line 2: std_uS is -1, negative"),
    ("level,conductance_uS,time_s\n0,1,0\n1,3,0\n0,1,1\n", "line 4: the data end at 1 s without level 1"),
    ("level,conductance_uS,time_s\n0,1,0\n1,3,0\n2,5,0\n0,1,1\n1,3,1\n",
     "line 6: the data end at 1 s without level 2; levels are 0, 1, ... without gap, the same at all times and temperatures"),
    (LAW + "1,1,0\n20,19,1\n40,18,2\n", "line 4: target_uS 40 has a mean of 18 uS, not above the 19 uS of target_uS 20"),
    (LAW + "1,1,0\n1,19,1\n", "line 3: target_uS is 1 on all lines; two or more are expected"),
    (LAW + "1,1,0\n20,19,1\n20,18,2\n", "line 4: a second line of target_uS 20; with std_uS there is one a level, time and temperature"),
    (LAW + "1e-6,1e-6,0\n2e-5,2e-5,1e-7\n", "line 2: target_uS is 1e-06 and none is as large as 0.01: these look like siemens"),
    (LAW + "1,1,0\n20,19,1e-7\n", "line 3: std_uS is 1e-07 and none is larger: these look like siemens"),
    (LAW + "1,1,0\n20,19,200\n", "line 3: std_uS is 200, more than 10 times the largest mean_uS, 19"),
    (LAW + "1,1,0\n20,19000,2\n", "line 3: mean_uS is 19000, which looks like nS or ohms"),
    ("target_uS,mean_uS,std_uS,time_s\n1,1,0,1\n20,20,0,1\n1,1,0,9\n",
     "line 4: the data end at 9 s without target_uS 20; targets are the same at all times and temperatures"),
    ("target_uS,mean_uS\n1,1\n20,20\n", "line 1: columns target_uS,mean_uS; known are level,conductance_uS"),
    ("states,mean,std\n0,1,0.1\n1,20,0.1\n", "line 2: 1 looks like uS, siemens are expected"),
    ("states,mean,std\n0,1e-6,0\n1,1e-6,0\n", "line 3: level 1 has a mean"),
    ("states,mean,std\n0,1e-6,1e-3\n1,4e-5,2e-3\n", "line 3: std is 0.002, more than 10 times the largest mean, 4e-05; one unit"),
    ("level,conductance_uS,std_uS\n0,1,500\n1,40,30\n", "line 2: std_uS is 500, more than 10 times the largest conductance_uS, 40"),
    ("weight_level,cell0\n0,1\n1,2\n2,3\n", "code 3 is absent; weights of 2 bits have 4 codes"),
    ("weight_level,cell1,cell0\n0,1,1\n", "line 1: columns weight_level,cell1,cell0"),
    ("weight_level,cell0\n0,1\n0.5,2\n1,3\n", "line 3: weight_level is 0.5, no whole number"),
    ("weight_level,cell0\n0,2\n1,1\n", "level 1 has a mean of 1 uS, not above the 2 uS"),
    ("weight_level,cell0,cell1\n0,1,1\n1,2,2\n", "2 cells cannot hold weights of 1 bits"),
    ("weight_level,cell0\n0,1e-6\n1,2e-6\n", "these look like siemens"),
])
def test_wrong_files_are_refused_with_their_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Device.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arrays, message", [
    ({0: [[1e-6]], 2: [[2e-6]]}, "no level1_raw.npy"),
    ({0: [[1.0]], 1: [[2.0]]}, "level0_raw.npy: 1 looks like uS, siemens are expected"),
    ({0: [[1e-6]], 1: [[math.nan]]}, "level1_raw.npy, sample 0: cell 0 is nan, not finite"),
    ({0: [[1e-6], [-1e-6]], 1: [[2e-6]]}, "level0_raw.npy, sample 1: cell 0 is -1e-06, negative"),
    ({0: [[1e-6]], 1: [[2e-6, 1e-6]]}, "level1_raw.npy: 2 cells a weight, level0_raw.npy has 1"),
    ({0: [1e-6], 1: [[2e-6]]}, "expected are numbers [samples, cells]"),
    ({}, "no level0_raw.npy"),
])
def test_wrong_numpy_files_are_refused(tmp_path, arrays, message):
    for w, values in arrays.items():
        np.save(tmp_path / f"level{w}_raw.npy", np.array(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        Device.read(tmp_path)
    (tmp_path / "level0_raw.npy").write_bytes(b"")  # a copy that broke off
    with pytest.raises(ValueError, match="level0_raw.npy: no array of numbers|no level1_raw.npy"):
        Device.read(tmp_path)


def test_data_are_small_and_licensed():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 800_000
    assert "Copyright (c) 2021 Akash Levy" in (DATA / "LICENSE").read_text()


def test_programming_that_scatters_by_less_than_nothing_scatters_not():
    law = PowerLaw("mine", 25.0, (-1.0, 2.0), (0.0, 0.05, 0.05, 0.05), (0.0, 0.01, 0.01, 0.01), 20.0, (0.01, 0.5, 0.1, 1e-6), (0.0, 25.0))
    assert law.sigma(np.array([5.0, 25.0]), 20.0, None) == pytest.approx([0, 1], abs=1e-6)
