"""Limits: spans and bounds as text, the sequential tests on simulated networks whose limits are known, and `eval.py --largest`."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_eval import classes, load_digits, network, save, scene, without_pictures  # noqa: F401

import eval as evaluation
from experiment.inputs import data as datasets
from experiment.program.cli import UserError
from experiment.settings.limits import bound_of, span_of
from experiment.sweep import bench, sequential
from experiment.sweep.sequential import LastKept, Look, ends_of, interval, looks_of
from models import vgg

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- as text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, number", [("90", 90), ("-3e-1", -0.3), ("software", 80), ("software-0.5", 79.5), ("software+2", 82),
                                          ("software*1.03", 82.4)])
def test_what_a_bound_means(text, number):
    bound = bound_of(f"accuracy={text}", 1)
    assert bound.at(80) == pytest.approx(number)
    assert bound.holds(number + 1e-9, 80) and not bound.holds(number - 1e-3, 80)
    assert bound_of(f"loss={text}", -1).holds(number - 1e-9, 80) and not bound_of(f"loss={text}", -1).holds(number + 1e-3, 80)


@pytest.mark.parametrize("text", ["accuracy", "accuracy=", "accuracy=x", "accuracy=software0.5", "accuracy=*2", "accuracy=software*",
                                  "accuracy=1.2.3", "accuracy=soft"])
def test_what_is_no_bound(text):
    assert bound_of(text, 1) is None


def test_a_loss_of_just_as_much_is_within():
    """Half a point of 10,000 images is 50 of them: one more is too much."""
    bound = bound_of("accuracy=software-0.5", 1)
    for right in range(51, 10_001):
        within = [bound.holds(100 * (right - lost) / 10_000, 100 * right / 10_000) for lost in (49, 50, 51)]
        assert within == [True, True, False]


@pytest.mark.parametrize("text, values", [
    ("adc_noise=0:1:0.25", (0, 0.25, 0.5, 0.75, 1)), ("rows=16:64:16", (16, 32, 48, 64)), ("subArray=1:3:1", (1, 2, 3)),
    ("adc_bits=1:2:0.5", (1, 1.5, 2)), ("device_time=1min:3min:1min", (60, 120, 180)), ("stuck_off=0.01:0.04:100log", (0.01, 0.02, 0.04)),
    ("rows=1:16:100log", (1, 2, 4, 8, 16)), ("rows=4:6:10log", (4, 5, 6)), ("device_time=1s:1min:500log", (1, 6, 36))])
def test_spans(text, values):
    assert span_of(text).values == values and span_of(text, smallest=True).values == values[::-1]


@pytest.mark.parametrize("text, words", [
    ("mapping=a:b:1", "the values of --mapping have no order"), ("device=a:b:1", "no order"), ("x=0:1:1", "there is no flag --x"),
    ("adc_noise=1:0:1", "is an empty span"), ("adc_noise=0:1:0", "is an empty span"), ("adc_noise=0:1:5log", "from above 0"),
    ("adc_noise=0:1", "give FLAG=FIRST:LAST:RESOLUTION"), ("adc_noise=a:1:1", "give FLAG=FIRST:LAST:RESOLUTION"),
    ("read_noise=0:device:1", "give FLAG=FIRST:LAST:RESOLUTION"), ("adc_noise", "give FLAG"), ("adc_noise=0:1e6:1e-3", "values")])
def test_spans_that_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        span_of(text)


# ---- tests -------------------------------------------------------------------------------------------------------------


def test_looks():
    assert ends_of(100) == [100] and ends_of(799) == [799] and ends_of(1000) == [125, 1000] and ends_of(10_000) == [156, 1250, 10_000]
    assert looks_of([44, 359], 10) == [(4, 44), (4, 359), (10, 359)]
    assert looks_of([44, 359], 1) == [(1, 44), (1, 359)] and looks_of([50], 3) == [(3, 50)]


def test_intervals():
    """Of one chip the textbook's of a sample without replacement; of all images that of the chips' means."""
    found = np.random.default_rng(0).normal(size=(1, 30))
    mean, half = interval(found, 90, 0.01)
    assert mean == pytest.approx(found.mean())
    assert half == pytest.approx(stats.t.ppf(0.99, 29) * (found.var(ddof=1) / 30 * 2 / 3)**0.5)
    found = np.random.default_rng(1).normal(size=(5, 30))
    assert interval(found, 30, 0.01)[1] == pytest.approx(stats.t.ppf(0.99, 4) * (found.mean(1).var(ddof=1) / 5)**0.5)
    assert interval(found[:1], 30, 0.01)[1] == 0 and interval(np.zeros((3, 30)), 60, 0.01)[1] == np.inf
    for chips in (1, 3):  # one image has no deviation
        assert interval(found[:chips, :1], 30, 0.01, 50.0) == (pytest.approx(found[:chips, 0].mean()), np.inf)
    assert interval(np.zeros((1, 100)), 400, 0.01, 50.0)[1] == pytest.approx(stats.norm.ppf(0.99) * (50 * 0.75 / 100)**0.5)


def test_places_on_the_sides():
    """As many as the share of the error counts: `s / 2 + 1` beside the first."""
    assert [*sequential.away(9, 0)] == [9, 7, 1, 0] and [*sequential.away(5, 5)] == [5]
    assert [*sequential.away(10, 199)] == [10, 12, 18, 42, 138, 199]
    for count in range(2, 300):
        most = math.ceil(math.log2(count + 1)) / 2 + 1
        assert all(len([*sequential.away(start, end)]) - 1 <= most for end in (0, count - 1) for start in range(count))


LOSS, PLACES = 0.5, 200  # points that may be lost; values of the span


def simulated(seed, images, limit, spread, steep):
    """`observe` of a network of which in the mean `LOSS (place / limit)^steep` points are lost: chips differ by a lognormal factor of
    deviation `spread`, and images by how easily they are lost. As chips have their seeds, they are the same ones at every place."""
    rng = np.random.default_rng(seed)
    easy = np.exp(-4 * (rng.permutation(images) + 0.5) / images)
    chips = np.exp(spread * rng.standard_normal(10) - spread**2 / 2)
    lost_from = rng.random((10, images)) / (LOSS / 100 * chips[:, None] * easy / easy.mean())

    def observe(place, look):
        return -100.0 * (lost_from[:look.chips, :look.images] < ((place + 0.5) / limit)**steep)

    return observe


@pytest.mark.parametrize("images, spread, steep", [(359, 0.3, 3), (2000, 0.0, 2), (2000, 0.5, 3)])
def test_the_share_of_wrong_intervals_is_below_its_bound(images, spread, steep):
    """Of 400 networks with limits anywhere in the span, fewer than a share of 5 % would give but for a chance of 1e-4. The intervals must
    say something, and cost an eighth of a grid at most."""
    wrong, wide, used, off = 0, [], [], []
    for seed in range(400):
        limit = int(np.random.default_rng(seed).integers(20, 160))
        found = LastKept(PLACES, looks_of(ends_of(images), 10), images, 0.05, simulated(seed, images, limit, spread, steep),
                         lambda mean: mean >= -LOSS, LOSS * (100 - LOSS)).find()
        last = limit - 1  # (place + 1/2) / limit <= 1
        wrong += not found.sure <= last < found.lost
        wide.append((found.lost - found.sure) / limit)
        off.append(abs(found.place - last) / limit)
        used.append(found.used / (PLACES * 10 * images))
    assert wrong <= stats.binom.isf(1e-4, 400, 0.05)
    assert max(used) < 0.12 and np.median(off) < 0.1 and np.median(wide) < 2


@pytest.mark.parametrize("of_all, right", [(5000, True), (500, False)])
def test_some_images_say_less_than_all(of_all, right):
    """One chip, 500 of 5,000 images: intervals are of all 5,000. Who takes the 500 for all images there are is mostly wrong."""
    wrong = 0
    for seed in range(100):
        observe = simulated(seed, 5000, 100, 0.0, 2)
        last = max(place for place in range(PLACES) if observe(place, Look(1, 5000)).mean() >= -LOSS)
        found = LastKept(PLACES, looks_of(ends_of(500), 1), of_all, 0.05, observe, lambda mean: mean >= -LOSS, LOSS * (100 - LOSS)).find()
        wrong += not found.sure <= last < found.lost
    assert (wrong <= stats.binom.isf(1e-4, 100, 0.05)) == right


def test_a_test_that_promises_less_is_wrong_more_often():
    """So that the bound above is one: with a chance of error of 1 at each of 10 tests."""
    wrong = 0
    for seed in range(100):
        found = LastKept(PLACES, looks_of([44], 2), 359, 8.0, simulated(seed, 359, 100, 0.3, 3), lambda mean: mean >= -LOSS).find()
        wrong += not found.sure <= 99 < found.lost
    assert wrong > stats.binom.isf(1e-4, 100, 0.05)


@pytest.mark.parametrize("kept", range(6))
def test_exact_values_are_bisected(kept):
    """Ideal cells: with all images there is nothing left to chance."""
    seen = []
    found = LastKept(5, looks_of([4], 1), 4, 0.05, lambda place, look: np.full((1, 4), float(place < kept)), lambda mean: mean > 0.5,
                     say=seen.append).find()
    assert found.place == found.sure == kept - 1 and found.lost == kept and len(seen) == len(found.seen) <= 3


def test_where_a_mean_cannot_be_nothing_is_decided():
    """Of squares a mean is at least 0: an interval that reaches below is wider than all that could be known."""
    found = LastKept(1, [Look(1, 3)], 6, 0.05, lambda place, look: np.array([[9.0, 1.0, 2.0]]), lambda mean: None if mean < 0 else mean < 3)
    assert found.find().seen[0].keeps is None and (found.sure, found.lost) == (-1, 1)


# ---- the whole command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A network that is right on all test images, as these have the labels that it gives; of three layers, as most is measured often."""
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", ([16, "M", "M", 24, "M"], 32))
    data, net = load_digits(), network()
    labels = classes(net, datasets.normalize(data.test_x, data.mean, data.std))
    monkeypatch.setattr(datasets, "_digits", lambda: datasets.replace(data, test_y=labels))
    (tmp_path / "save").mkdir()
    return save(tmp_path / "save" / "a.pth.tar", net)


@pytest.fixture
def find(trained, monkeypatch):
    """find(flags..., stop=n): the rows of limits.json, and the settings that were measured, of which the n-th is interrupted."""

    def find(*flags, stop=None):
        measured, real = [], bench.measure

        def spy(*args, **options):
            measured.append((str(args[3]), args[3] and args[3].chips and args[3].chips.chip_seed, len(args[2])))
            if len(measured) == stop:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(bench, "measure", spy)
            patch.setattr(sequential, "FEWEST", 40)  # two blocks of these images
            without_pictures(patch)
            evaluation.main(["--resume", trained, "--ngpu", "0", "--rows", "16", "--adc_range", "full", *flags])
        return json.loads(Path("save/limits.json").read_text()), measured

    return find


CHIPS = ["--adc_bits", "6", "--device", "techA", "--chips", "3"]
OFFSET = ["--largest", "adc_offset=0:1.5:0.25", "--at_least", "accuracy=software-10"]


def test_a_limit_is_that_of_the_whole_table(find, trained):
    """Offsets are drawn once for a chip: each image is answered as in the table of all values."""
    [row], measured = find(*CHIPS, *OFFSET)
    assert row["bound"] == 90 and row["software"] == 100 and row["chips"] == 3 and row["images"] == 359
    assert {count for _, _, count in measured} == {44, 315} and len({*measured}) == len(measured)
    evaluation.main(["--resume", trained, "--ngpu", "0", "--rows", "16", "--adc_range", "full", *CHIPS, "--adc_offset", "0:1.5:0.25",
                     "--save_path", "table"])
    lines = [json.loads(line) for line in open("table/results.jsonl")]
    means = {line["adc_offset"]: line["accuracy"] for line in lines if line["adc_offset"] is not None}
    assert len(means) == row["values"] == 7
    kept, lost, value = row["kept_for_sure"], row["lost_for_sure"], row["value"]
    assert kept <= value < lost and means[kept] >= 90 > means[lost] and means[value] >= 90 > means[value + 0.25]
    [csv_row] = csv.DictReader(open("save/limits.csv"))
    assert {**csv_row, "value": float(csv_row["value"])} == {name: str(each) for name, each in row.items()} | {"value": value}


def test_a_limit_goes_on_after_a_kill_and_is_there_the_second_time(find):
    with pytest.raises(KeyboardInterrupt):
        find(*CHIPS, *OFFSET, stop=9)
    rows, rest = find(*CHIPS, *OFFSET)
    again, none = find(*CHIPS, *OFFSET)
    assert again == rows and rest and not none
    _, beside = find(*CHIPS, *OFFSET, "--save_path", "save/other")
    assert len(beside) == len(rest) + 8 and {*rest} < {*beside}


def test_each_combination_has_a_limit(find, capsys):
    rows, _ = find("--cell_bits", "1", "2", "--smallest", "adc_bits=1:8:1", "--at_least", "accuracy=software-5")
    assert [(row["kind"], row["flag"], row["setting"][:11]) for row in rows] == [("smallest", "adc_bits", f"{c}-bit cells") for c in (1, 2)]
    text = capsys.readouterr().out
    assert "smallest adc_bits, 2-bit cells" in text and "ideal cells" in text
    for row in rows:
        assert row["kept_for_sure"] == row["value"] == row["lost_for_sure"] + 1


def test_bounds_that_no_value_keeps_or_each(find, capsys):
    [none], _ = find("--smallest", "adc_bits=1:3:1", "--at_least", "accuracy=100")
    [each], _ = find("--smallest", "adc_bits=1:3:1", "--at_least", "accuracy=0")
    [alone], _ = find("--smallest", "adc_bits=1:3:5", "--at_least", "accuracy=0")
    text = " ".join(capsys.readouterr().out.split())
    assert none["value"] is none["kept_for_sure"] is None and none["lost_for_sure"] == 3
    assert (alone["values"], alone["value"]) == (1, 1)
    assert each["value"] == each["kept_for_sure"] == 1 and each["lost_for_sure"] is None
    assert "adc_bits: no value from 3 to 1 keeps the bound" in text and "adc_bits: every value from 3 to 1 keeps the bound" in text


@pytest.mark.parametrize("flags, words", [
    (["--largest", "mapping=a:b:1", "--at_least", "accuracy=90"], "the values of --mapping have no order"),
    (["--largest", "adc_noise=0:1:0.1"], "need one bound, and none is given"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=90", "accuracy=80"], "need one bound, and 2"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=90", "--search", "3"], "--largest does not go with --search"),
    (["--largest", "adc_bits=8:16:8", "--adc_bits", "4", "--at_least", "accuracy=90"], "--adc_bits is given, and its limit"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "speed=90"], "--at_least speed=90: give NAME=VALUE with one of accuracy"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=9o"], "--at_least accuracy=9o: give NAME=VALUE"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=90", "--cost", "rram_32nm"], "--cost does not go with --largest"),
    (["--largest", "dac_bits=1:2:1", "--at_most", "accuracy=10"], "--at_most accuracy=10: more is better: give a bound such as --at_least"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=90", "--html"], "--html does not go with --largest"),
    (["--largest", "adc_max_bits=1:8:1", "--at_least", "accuracy=90"], "--adc_max_bits makes no difference to 1-bit cells"),
    (["--largest", "device_time=0:10:0.5", "--device", "cmo_hfox", "--at_least", "accuracy=90"], "has no data at 0.5 s"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=90", "--adc_range", "calibrated", "--adc_share", "network"], "--adc_share"),
    (["--at_least", "accuracy=90"], "--at_least is for --search N, --largest, --smallest, --specify or --remedy")])
def test_what_is_refused(find, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        find(*flags)


def test_the_root_of_a_mean_of_squares(monkeypatch, tmp_path, capsys):
    """Of two examples that differ much an interval reaches below 0, where there is no root. What is printed calls them examples."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text("""
import math, torch
from models.quant import Metric, Task
def task():
    x, y = torch.eye(4).split(2), torch.tensor([[0.0], [3.0], [0.0], [3.0]]).split(2)
    rms = Metric("rms", lambda output, y: (output - y).square().flatten(1).mean(1), higher=False, value=math.sqrt)
    return Task(torch.nn.Linear(4, 1, bias=False), [*zip(x, y)], [*zip(x, y)], rms)
""")
    evaluation.main(["--model", "task.py:task", "--ngpu", "0", "--adc_bits", "8", "--largest", "adc_noise=0:20:20",
                     "--at_most", "rms=software*1.05", "--save_path", ".", "--prob_path", ".", "--limit", "2"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", 2 examples: undecided" in text and "of all chips and examples that were seen" in text and "image" not in text
    [row] = json.loads(Path("limits.json").read_text())
    assert row["kept_for_sure"] is row["lost_for_sure"] is None and row["bound"] == pytest.approx(1.05 * row["software"])
