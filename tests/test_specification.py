"""The specification sheet: which quantities it has, that its limits and corners are those of their flags by hand, and what it refuses."""

import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from test_eval import scene, without_pictures  # noqa: F401
from test_limits import trained  # noqa: F401

import eval as evaluation
from experiment.program.cli import UserError
from experiment.report import specification_report
from experiment.settings import specification as asked
from experiment.settings.eval_settings import parse
from experiment.settings.limits import bound_of, span_of
from experiment.sweep import bench, specification
from models.quant.measuring.metrics import Scale

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = [asked.Quantity("offset of ADC", "levels", span_of("adc_offset=0.08:20.48:100log")),
       asked.Quantity("gain of ADC", "share", span_of("adc_gain=0.005:0.64:100log")),
       asked.Quantity("fewest ADC bits", "bits", span_of("adc_bits=1:8:1", smallest=True), {"adc_plan": ["uniform"]}, joint=False)]
USUAL = ["--ngpu", "0", "--rows", "64", "--cell_bits", "2", "--chips", "2", "--calib_images", "64"]
BOUNDS = ["--at_least", "accuracy=software-20", "accuracy=software-10"]


# ---- what is asked for -------------------------------------------------------------------------------------------------


def settings_of(*flags):
    return parse(["--resume", *flags])[0]


def test_quantities(trained):  # noqa: F811
    """All that a user is told of, each with values that go up by half, or by a tenth; the retention of all presets with several times."""
    found = {each.name: each for each in asked.quantities_for(settings_of(trained, "--specify"))}
    flags = {each.span.flag for each in found.values()}
    assert flags == {"sigma", "stuck_on", "stuck_off", "read_noise", "wire_ohm", "adc_noise", "adc_offset", "adc_gain", "adc_inl",
                     "adc_dnl", "adc_bits", "rows", "device_time"}
    assert found["scatter of cells"].span.values[:3] == (0.1, 0.15, 0.225) and found["scatter of cells"].span.values[-1] <= 50
    assert found["techA holds"].span.values[0] == 0.01 and 5e4 < found["techA holds"].span.values[-1] <= 1e5
    assert found["pcm holds"].span.values[0] == 20 and found["pcm holds"].span.values[-1] > 1e8  # a law, which has no end
    assert not {"ideal holds", "rram_wan_crosssim holds", "neurram_chip holds"} & {*found}
    assert [found[f"wires, {access}"].flags for access in ("voltage", "gate")] == [{"access": ["voltage"]}, {"access": ["gate"]}]
    fine = asked.quantities_for(settings_of(trained, "--specify", "--refine"))
    assert fine[0].span.values[:3] == (0.1, 0.11, 0.121) and [each.name for each in fine] == [*found]
    [retention] = [each for each in asked.quantities_for(settings_of(trained, "--specify", "--device", "techC")) if each.unit == "time"]
    assert retention.flags == {"device": ["techC"]} and retention.span.values[-1] == 1e5
    hot = settings_of(trained, "--specify", "--device", "winbond_asu_2bit", "--device_temp", "85")
    assert [each.name for each in asked.quantities_for(hot) if each.unit == "time"] == ["winbond_asu_2bit holds"]  # at 25 C it has no times


def test_bounds(trained):  # noqa: F811
    usual = asked.bounds_for(settings_of(trained, "--specify"), Scale())
    assert [text for text, _ in usual] == ["--at_least accuracy=software-0.5", "--at_least accuracy=software-1"]
    assert [bound for _, bound in usual] == [bound_of(f"accuracy=software-{loss}", 1) for loss in ("0.5", "1")]
    own = settings_of(trained, "--specify", "--at_least", "accuracy=80")
    assert asked.bounds_for(own, Scale()) == [("--at_least accuracy=80", bound_of("accuracy=80", 1))]
    with pytest.raises(UserError, match=r"give a bound, such as --at_most perplexity=software\*1.03"):
        asked.bounds_for(settings_of(trained, "--specify"), Scale("perplexity", "", False))
    assert asked.weights_for(own) == ["offset", "pair"]
    assert asked.weights_for(settings_of(trained, "--specify", "--weights", "pair")) == ["pair"]


# ---- the sheet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sheet(trained, monkeypatch):  # noqa: F811
    """sheet(flags..., stop=n): the rows of specification.json of few quantities, and how many settings were measured, of which the n-th is
    interrupted."""

    def sheet(*flags, stop=None, quantities=FEW):
        measured, real = [], bench.measure

        def spy(*args, **options):
            measured.append(args[3])
            if len(measured) == stop:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(bench, "measure", spy)
            patch.setattr(specification, "quantities_for", lambda settings: quantities)
            without_pictures(patch)
            limit = [] if "--refine" in flags else ["--limit", "90"]
            evaluation.main(["--resume", trained, *USUAL, *limit, *flags, "--specify"])
        return json.loads(Path("save/specification.json").read_text()), len(measured)

    return sheet


def by_hand(resume, flags, folder):
    """The line of results of flags, in a folder of its own."""
    evaluation.main(["--resume", resume, "--ngpu", "0", *shlex.split(flags), "--save_path", str(folder)])
    return json.loads(Path(folder, "results.jsonl").read_text().splitlines()[-1])


def test_a_sheet_is_what_its_flags_give_by_hand(sheet, trained, monkeypatch, capsys):  # noqa: F811
    """At a limit the mean of all chips and images keeps the bound, and at the next value it does not; a corner is one setting."""
    rows, _ = sheet(*BOUNDS, "--adc_bits", "6", "--cost", "rram_32nm", "--html", quantities=FEW[:2])
    limits, corners = ([row for row in rows if (row["quantity"] == specification_report.CORNER) == corner] for corner in (False, True))
    assert [(row["quantity"], row["weights"], row["asked"]) for row in limits] == [
        (each.name, weights, f"accuracy=software-{loss}") for each in FEW[:2] for weights in ("offset", "pair") for loss in (20, 10)]
    without_pictures(monkeypatch)
    spans, folders = {each.name: each.span for each in FEW}, map(Path, map(str, itertools.count()))
    for row in limits:
        values = spans[row["quantity"]].values
        assert row["value"] is not None and row["software"] == 100 and row["chips"] == 2 and row["images"] == 90
        assert f"--{row['flag']} {row['value']}" in row["by_hand"] and f"--weights {row['weights']}" in row["by_hand"]
        assert by_hand(trained, row["by_hand"], next(folders))["accuracy"] >= row["bound"]
        if row["value"] < values[-1]:
            beyond = values[values.index(row["value"]) + 1]
            flags = row["by_hand"].replace(f"--{row['flag']} {row['value']}", f"--{row['flag']} {beyond}")
            lost = by_hand(trained, flags, next(folders))
            assert lost["accuracy"] < row["bound"]
    of_offset = {(row["quantity"], row["asked"]): row["value"] for row in limits if row["weights"] == "offset"}
    assert all(of_offset[each.name, "accuracy=software-10"] <= of_offset[each.name, "accuracy=software-20"] for each in FEW[:2])
    for row in corners:
        of = {each["flag"]: each["value"] for each in limits if (each["weights"], each["asked"]) == (row["weights"], row["asked"])}
        assert f"--adc_offset {of['adc_offset'] / 2} --adc_gain {of['adc_gain'] / 2} " in row["by_hand"]
        line = by_hand(trained, f"{row['by_hand']} --cost rram_32nm", next(folders))
        assert row["corner_value"] == line["accuracy"] and row["corner_energy_uJ"] == line["energy_uJ"]
        assert row["corner_keeps"] == (line["accuracy"] >= row["bound"])
    with open("save/specification.csv") as file:
        assert [row["by_hand"] for row in csv.DictReader(file)] == [row["by_hand"] for row in rows]
    page, text = Path("save/results.html").read_text(), capsys.readouterr().out
    assert "gain of ADC, share" in page and "energy there" in text and "90 of 359 test images of digits; software: accuracy 100" in page


def test_a_sheet_goes_on_after_a_kill_and_is_there_the_second_time(sheet):
    with pytest.raises(KeyboardInterrupt):
        sheet(*BOUNDS[:2], stop=12)
    rows, rest = sheet(*BOUNDS[:2])
    again, none = sheet(*BOUNDS[:2])
    assert again == rows and rest and not none
    assert {row["quantity"] for row in rows} == {*(each.name for each in FEW), specification_report.CORNER}


def test_a_sheet_is_refined(sheet, monkeypatch):
    rows, _ = sheet(*BOUNDS[:2], quantities=FEW[:1])
    fine = asked.Quantity("offset of ADC", "levels", span_of("adc_offset=0.08:20.48:30log"))
    places, real = [], specification.Limit

    def spy(*args, **options):
        places.append((args[4], options["sides"]))
        return real(*args, **options)

    monkeypatch.setattr(specification, "Limit", spy)
    refined, _ = sheet(*BOUNDS[:2], "--refine", quantities=[fine])
    values = fine.span.values
    starts = [max(i for i, value in enumerate(values) if value <= row["value"]) for row in rows[:2]]
    assert places == [(start, True) for start in starts]
    for row, first in zip(refined[:2], rows[:2]):
        assert first["value"] * 0.75 <= row["value"] < 2 * first["value"]


def test_ideal_cells_take_no_chips_by_hand(sheet, trained):
    rows, _ = sheet(*BOUNDS[:2], "--chip_seed", "5", quantities=[FEW[2]])
    for row in rows[:2]:
        assert by_hand(trained, row["by_hand"], row["weights"])["accuracy"] >= row["bound"] and "--chip" not in row["by_hand"]


def test_what_cannot_be_is_left_out(sheet, capsys):
    rows, _ = sheet("--reference", "digital", "--adc_bits", "6", *BOUNDS[:2], quantities=[FEW[0], FEW[2]])
    assert [row["quantity"] for row in rows[:3]] == ["offset of ADC", "fewest ADC bits", "corner"]
    assert {row["weights"] for row in rows[:3]} == {"offset"} and all("'pair'" in row["left_out"] for row in rows[3:])
    assert "--adc_bits 6" in rows[0]["by_hand"] and rows[1]["by_hand"].count("--adc_bits") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "left out: offset of ADC, pair: --weights is 'pair'" in text


@pytest.mark.parametrize("flags, words", [
    (["--adc_bits", "4", "5"], "--adc_bits has 2 values, and --specify makes the sheet of one hardware"),
    (["--weight_noise", "0.02"], "--weight_noise does not go with --specify"), (["--adc_range", "full"], "--adc_range does not go with"),
    (["--largest", "rows=1:2:1"], "--largest does not go with --specify"), (["--remedy"], "--specify does not go with --remedy"),
    (["--also", "--adc_bits 5"], "--also does not go with --specify"), (["--search", "3"], "--specify does not go with --search"),
    (["--at_least", "speed=3"], "--at_least speed=3: give NAME=VALUE"), (["--refine", "--limit", "9"], "--refine takes all images"),
    (["--at_most", "accuracy=100"], "--at_most accuracy=100: more is better: give a bound such as --at_least accuracy=software-0.5"),
    (["--adc_transfer", "nosuch.csv"], "--adc_transfer is 'nosuch.csv': cannot be read"),
    (["--refine"], "save/specification.json is none: run --specify first")])
def test_what_is_refused(sheet, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        sheet(*flags)


def test_a_quantity_of_which_nothing_keeps_the_bound_is_in_the_corner(sheet):
    loud = asked.Quantity("noise of ADC", "levels", span_of("adc_noise=20:80:100log"))
    *_, corner = sheet("--at_least", "accuracy=software", "--adc_bits", "6", "--weights", "offset", quantities=[loud])[0]
    assert "--adc_noise 10.0" in corner["by_hand"] and not corner["corner_keeps"]


def test_where_nothing_keeps_the_bound_the_first_value_is_set_by_hand(sheet):
    """--access without --wire_ohm says nothing, and is refused."""
    wires = asked.Quantity("wires", "ohm", span_of("wire_ohm=200:800:100log"), {"access": ["voltage"]}, joint=False)
    row, *_ = sheet("--at_least", "accuracy=software", "--adc_bits", "6", "--weights", "offset", quantities=[wires])[0]
    assert row["value"] is None and "--wire_ohm 200.0 --" in row["by_hand"] + " --"


def test_refining_needs_a_sheet(trained):  # noqa: F811
    with pytest.raises(UserError, match="--refine is for a specification sheet: add --specify"):
        parse(["--resume", trained, "--refine"])


# ---- how it is shown ---------------------------------------------------------------------------------------------------

LIMIT = {"quantity": "scatter of cells", "unit": "%", "weights": "offset", "asked": "accuracy=software-1", "kind": "largest",
         "flag": "sigma", "software": 90.0, "value": 2.25, "kept_for_sure": 1.5, "lost_for_sure": None, "first": 0.1, "last": 50.0,
         "chips": 6, "chance_of_error": 0.05, "metric": "accuracy", "measured_on": "9 test images", "left_out": None}


@pytest.mark.parametrize("changes, cell", [
    ({}, "2.25 (1.5, …)"), ({"value": None}, "< 0.1"), ({"value": 50.0}, "≥ 50"), ({"lost_for_sure": 3.375}, "2.25 (1.5, 3.38)"),
    ({"kind": "smallest", "first": 8, "last": 1, "value": None}, "> 8"), ({"kind": "smallest", "first": 8, "last": 1, "value": 1}, "≤ 1"),
    ({"unit": "time", "value": 3600.0, "kept_for_sure": 60.0, "lost_for_sure": 86400.0}, "1 h (1 min, 1 d)")])
def test_cells_of_the_table(changes, cell):
    text = specification_report.table([LIMIT | changes])
    assert cell in text and "9 test images; software: accuracy 90; at the most 6 chips" in text


def test_what_the_table_says_below():
    """What is not in order, and the kinds of chips that may be unseen."""
    text = " ".join(specification_report.table([LIMIT | {"not_in_order": "1.5", "unseen_share": 0.602}]).split())
    assert "scatter of cells, %, offset, accuracy=software-1: not in order: 1.5 not kept" in text
    assert "holds for kinds of chips that are at least 60% of all" in text


def test_picture(tmp_path):
    rows = [LIMIT, LIMIT | {"weights": "pair"}, LIMIT | {"quantity": "techA holds", "unit": "time"},
            LIMIT | {"quantity": "most rows", "unit": "rows", "value": 64}, LIMIT | {"quantity": "corner", "value": None}]
    specification_report.plot(tmp_path / "a.png", rows, "title")
    specification_report.plot(tmp_path / "none.png", rows[-1:], "title")
    assert (tmp_path / "a.png").stat().st_size > 5000 and not (tmp_path / "none.png").exists()
