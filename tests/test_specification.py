"""The specification sheet: which quantities it has, that its limits and corners are those of their flags by hand, and what it refuses."""

import csv
import itertools
import json
import re
import shlex
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

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
from experiment.sweep.worklist import show_seconds
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
                     "adc_dnl", "adc_bits", "rows", "device_time", "on_off"}
    assert [*found][:3] == ["fewest ADC bits", "scatter of cells", "read noise"]  # the most asked
    assert found["scatter of cells"].span.values[:3] == (0.1, 0.15, 0.225) and found["scatter of cells"].span.values[-1] <= 50
    assert found["techA holds"].span.values[0] == 0.01 and 5e4 < found["techA holds"].span.values[-1] <= 1e5
    assert found["pcm holds"].span.values[0] == 20 and found["pcm holds"].span.values[-1] > 1e8  # a law, which has no end
    assert not {"ideal holds", "rram_wan_crosssim holds", "neurram_chip holds"} & {*found}
    assert [found[f"wires, {access}"].flags for access in ("voltage", "gate")] == [{"access": ["voltage"]}, {"access": ["gate"]}]
    fine = asked.quantities_for(settings_of(trained, "--specify", "--refine"))
    assert fine[1].span.values[:3] == (0.1, 0.11, 0.121) and [each.name for each in fine] == [*found]
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
    interrupted by Ctrl-C, or by another signal."""

    def sheet(*flags, stop=None, by=None, quantities=FEW):
        measured, real = [], bench.measure

        def spy(*args, **options):
            measured.append(args[3])
            if len(measured) == stop:
                if by:
                    signal.raise_signal(by)
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


@pytest.mark.parametrize("by, error", [(None, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_is_known_is_shown_when_a_sheet_is_interrupted_and_it_goes_on(sheet, capsys, by, error):
    """By Ctrl-C and by kill. The limits of the part are those of the whole, and nothing is measured twice."""
    flags = [*BOUNDS[:2], "--adc_bits", "6"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as ended:
        sheet(*flags, stop=25, by=by)
    assert not by or ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    *part, rest = json.loads(Path("save/specification.json").read_text())
    assert rest["quantity"] == "the rest"
    assert re.fullmatch(r"interrupted after [1-5] of 6 limits; the same command goes on", rest["left_out"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"left out: the rest: {rest['left_out']}" in text and re.search(r"; 1 of 6, about \S+ s left", text)
    rows, more = sheet(*flags)
    assert all(row.items() >= known.items() for row, known in zip(rows, part)) and more and len(rows) == 8
    capsys.readouterr()
    again, none = sheet(*flags)
    assert again == rows and not none and " left" not in capsys.readouterr().out.replace("left out", "")


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


def test_a_sheet_that_is_not_all_refined_keeps_the_other_limits(sheet, monkeypatch):
    """And where they are looked for."""
    flags = [*BOUNDS[:2], "--adc_bits", "6", "--weights", "offset"]
    rows, _ = sheet(*flags, quantities=FEW[:2])
    fine = [asked.Quantity(each.name, each.unit, span_of(f"{each.span.flag}={each.span.values[0]}:{each.span.values[-1]}:30log"))
            for each in FEW[:2]]
    places, real = [], specification.Limit

    def spy(*args, **options):
        places.append(args[4])
        if len(places) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(specification, "Limit", spy)
    with pytest.raises(KeyboardInterrupt):
        sheet(*flags, "--refine", quantities=fine)
    refined, kept, rest = json.loads(Path("save/specification.json").read_text())
    assert (refined["quantity"], rest["left_out"]) == (FEW[0].name, "interrupted after 1 of 2 limits; the same command goes on")
    assert kept == rows[1] and refined["measured_on"] != kept["measured_on"]
    whole, _ = sheet(*flags, "--refine", quantities=fine)
    assert [row["quantity"] for row in whole] == [FEW[0].name, FEW[1].name, specification_report.CORNER]
    assert places[3] == places[1] == specification._place(fine[1].span, kept["value"])


def test_only_some_lines(trained):  # noqa: F811
    """By the flags of these, in the order of the sheet."""
    settings = settings_of(trained, "--specify", "--only", "read_noise,adc_prec", "device_time", "--device", "techA")
    assert [each.name for each in asked.quantities_for(settings)] == [
        "fewest ADC bits", "read noise", "fewest bits, planned", "fewest bits, by ones", "techA holds"]
    assert [each.name for each in asked.quantities_for(settings_of(trained, "--specify", "--only", "sigma,"))] == ["scatter of cells"]
    for wrong in ("scatter", ","):
        words = f"--only {wrong.strip(',')}: no line of this sheet is of such a flag; there are adc_bits, sigma, read_noise, on_off"
        with pytest.raises(UserError, match=re.escape(words)):
            settings_of(trained, "--specify", "--only", wrong)


def test_a_sheet_of_some_lines_has_no_corner(sheet):
    """The other limits of a sheet stay where it is refined."""
    rows, _ = sheet(*BOUNDS[:2], "--weights", "offset", "--only", "adc_offset", quantities=FEW[:1])
    assert [row["quantity"] for row in rows] == ["offset of ADC"]
    rows, _ = sheet(*BOUNDS[:2], "--weights", "offset", quantities=FEW[:2])
    fine, _ = sheet(*BOUNDS[:2], "--weights", "offset", "--refine", "--only", "adc_offset", quantities=FEW[:1])
    assert [row["quantity"] for row in fine] == ["offset of ADC", "gain of ADC"] and fine[1] == rows[1]


def test_how_long_a_sheet_takes(monkeypatch):
    """16 values: of chips 5 first looks, of 100 images and 4 chips with 64 images more on each, and 2 times the other 700 images; 2 ms an
    image. Of ideal cells 1 ms. The first pass of either compiles for 9 s, which is no measure. Another loss takes one first look, 8
    values take 8, and values to the sides 12 more."""
    ticks, measured = iter([0.0, 10.0]), set()
    monkeypatch.setattr(specification, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(specification, "Worklist", lambda benches, settings: SimpleNamespace(missing=next(iter(settings.values()))))
    pool = SimpleNamespace(measure=lambda jobs, done: measured.update(jobs), workers=2, benches=[])
    one = namedtuple("one", "value number chips")

    class Part:
        def __init__(self, count):
            self.shown = SimpleNamespace(batches=SimpleNamespace(count=count), calibration=SimpleNamespace(count=64))

        def chip(self, each):
            return {"took_s": 9.0 if each[:2] == (7, 0) else 0.164 * (1 + each.chips)} if each in measured else None

    def case(chips, count=16):
        return SimpleNamespace(span=SimpleNamespace(values=range(count)), check=lambda bench: None, setting=lambda bench, value: (
            SimpleNamespace(one_by_one=[one(value, number, chips > 1) for number in range(chips)])))

    cells, ideal = (asked.Quantity(name, "", None) for name in ("cells", "ideal"))
    a, b = (specification.Asked("offset", text, None) for text in "ab")
    limits = {(cells, a): (case(4), None), (ideal, a): (case(1), None), (ideal, b): (case(1), None)}
    parts = [Part(100), Part(700)]
    clock = specification.Clock(parts, pool, limits)
    of_chips, of_ideal = 4 * (5 * 164 + 2 * 700), [5 * 164 + 2 * 700, 164 + 2 * 700]
    assert clock.left() == f", about {show_seconds((0.002 * of_chips + 0.001 * sum(of_ideal)) / 2)} left"  # of two workers
    with clock.finding((cells, a)):
        pass
    assert clock.took[True] == (pytest.approx(3 * 0.001 * of_chips + 10), 4 * of_chips)
    assert clock.left() == f", about {show_seconds(0.0005 * sum(of_ideal))} left"
    assert specification.Clock(parts, pool, limits).left() == ""
    measured.clear()
    for count, sides, looks in ((8, False, 8), (16, True, 5 + 12)):
        found = specification.Clock(parts, pool, {(ideal, a): (case(1, count), None)}, sides)
        assert found.passes == {(ideal, a): (False, looks * 164 + 2 * 700)}
        measured.clear()


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


def test_the_least_on_off_ratio_is_of_a_digital_reference(sheet, trained, capsys):  # noqa: F811
    """By hand, its value keeps the bound and the next smaller one does not. Pairs have no such reference, and the sheet says so."""
    ratio = asked.Quantity(asked.ON_OFF, "", span_of("on_off=1.1:10:30log", smallest=True), {"reference": ["digital"]}, joint=False)
    row, *others = sheet(*BOUNDS[:2], "--adc_bits", "7", "--only", "on_off", quantities=[ratio])[0]
    values = ratio.span.values
    assert row["kind"] == "smallest" and row["value"] in values[:-1] and "--reference digital" in row["by_hand"]
    assert [other["quantity"] for other in others] == [f"{asked.ON_OFF}, pair"] and "reference 'digital'" in others[0]["left_out"]
    assert "An analog one and pairs take the off-current out" in " ".join(capsys.readouterr().out.split())
    beyond = row["by_hand"].replace(f"--on_off {row['value']}", f"--on_off {values[values.index(row['value']) + 1]}")
    assert by_hand(trained, row["by_hand"], "a")["accuracy"] >= row["bound"] > by_hand(trained, beyond, "b")["accuracy"]


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
    for name, *values in (["refine"], ["only", "sigma"]):
        with pytest.raises(UserError, match=f"--{name} is for a specification sheet: add --specify"):
            parse(["--resume", trained, f"--{name}", *values])


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
