"""Limits: spans and bounds as text, the sequential tests on simulated networks whose limits are known, and `eval.py --largest`."""

import contextlib
import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_eval import classes, load_digits, network, save, scene, without_pictures  # noqa: F401

import eval as evaluation
from experiment.inputs import data as datasets
from experiment.program.cli import UserError
from experiment.settings.limits import bound_of, check_range, span_of
from experiment.sweep import bench, sequential
from experiment.sweep.sequential import LastKept, Look, ends_of, interval, looks_of
from models import vgg
from models.quant.measuring.metrics import Metric, accuracy, cross_entropy, perplexity, signal_to_error, top5

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


@pytest.mark.parametrize("metric, text, software, words", [
    (accuracy, "accuracy=-1", None, "is at least 0 and at most 100: give a bound within, such as --at_least accuracy=software-1, if 1 may"),
    (accuracy, "accuracy=101", None, "such as --at_least accuracy=software-0.5"), (accuracy, "accuracy=0", None, None),
    (accuracy, "accuracy=100", None, None), (accuracy, "accuracy=software-200", None, "at least 0 and at most 100"),
    (accuracy, "accuracy=software+20", None, None), (accuracy, "accuracy=software+20", 90, "at least 0 and at most 100"),
    (accuracy, "accuracy=software+20", 80, None), (top5, "top5=100.1", None, "such as --at_least top5=software-0.5"),
    (perplexity, "perplexity=0.9", None, r"perplexity is at least 1: give a bound within, such as --at_most perplexity=software\*1.03"),
    (perplexity, "perplexity=software*1.03", 7, None), (perplexity, "perplexity=software-10", None, None),
    (perplexity, "perplexity=software-10", 7, "is at least 1"),
    (cross_entropy, "cross_entropy=-0.1", None, "cross_entropy nat is at least 0"),
    (signal_to_error(torch.nn.Identity()), "signal_to_error=300", None, "signal_to_error dB is at most 200"),
    (Metric("r2", len), "r2=-1", None, None), (Metric("r2", len, range=(-math.inf, 1)), "r2=2", None, "r2 is at most 1")])
def test_bounds_that_the_metric_cannot_have(metric, text, software, words):
    bound = bound_of(text, 1 if metric.higher else -1)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_range(f"--at_least {text}", bound, metric, software)


@pytest.mark.parametrize("text, values", [
    ("adc_noise=0:1:0.25", (0, 0.25, 0.5, 0.75, 1)), ("rows=16:64:16", (16, 32, 48, 64)), ("on_off=2:4:0.5", (2, 2.5, 3, 3.5, 4)),
    ("subArray=1:3:1", (1, 2, 3)),
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
    assert looks_of([44, 359], 4) == [(4, 44), (4, 359)]


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


def simulated(seed, images, losses, spread, rare=None, own=False):
    """`observe` of a network of which in the mean `losses[place]` points are lost: chips differ by a lognormal factor of deviation
    `spread`, and images by how easily they are lost. As chips have their seeds, they are the same ones at every place, and lose the same
    images, or with `own` others at each. `rare`: (share, factor) of a kind of chip that loses so many times as much as the others."""
    rng = np.random.default_rng(seed)
    easy = np.exp(-4 * (rng.permutation(images) + 0.5) / images)
    chips = np.exp(spread * rng.standard_normal(36) - spread**2 / 2)
    if rare:
        share, factor = rare
        chips *= np.where(rng.random(36) < share, factor, 1) / (share * factor + 1 - share)
    drawn = rng.random((36, images))

    def observe(place, look):
        at = np.random.default_rng((seed, place)).random((36, images)) if own else drawn
        lost = losses[place] / 100 * chips[:look.chips, None] * (easy / easy.mean())[:look.images]
        return -100.0 * (at[:look.chips, :look.images] < lost)

    return observe


def slope(limit, steep, places=PLACES):
    """Losses that are LOSS halfway to the place `limit`."""
    return LOSS * ((np.arange(places) + 0.5) / limit)**steep


def find_last(losses, images, chips, observe, of_all=None, error=0.05, **options):
    return LastKept(len(losses), ends_of(images), chips, of_all or images, error, observe, lambda mean: mean >= -LOSS, LOSS * (100 - LOSS),
                    **options).find()


def is_wrong(found, losses):
    """Whether one of the two values that are sure is not as it is said to be."""
    return found.sure >= 0 and losses[found.sure] > LOSS or found.lost < len(losses) and losses[found.lost] <= LOSS


def most_wrong(count, share=0.05):
    """As many of so many as a share of them gives but for a chance of 1e-4."""
    return stats.binom.isf(1e-4, count, share)


@pytest.mark.parametrize("images, spread, steep", [(359, 0.3, 3), (2000, 0.0, 2), (2000, 0.5, 3)])
def test_the_share_of_wrong_intervals_is_below_its_bound(images, spread, steep):
    """Of 400 networks with limits anywhere in the span. The intervals must say something, and cost a seventh of a grid at most."""
    wrong, wide, used, off = 0, [], [], []
    for seed in range(400):
        limit = int(np.random.default_rng(seed).integers(20, 160))
        losses = slope(limit, steep)
        found = find_last(losses, images, (10, 10), simulated(seed, images, losses, spread))
        last = limit - 1  # (place + 1/2) / limit <= 1
        wrong += is_wrong(found, losses)
        wide.append((found.lost - found.sure) / limit)
        off.append(abs(found.place - last) / limit)
        used.append(found.used / (PLACES * 10 * images))
    assert wrong <= most_wrong(400)
    assert max(used) < 1 / 7 and np.median(off) < 0.1 and np.median(wide) < 2


def curve(kind, rng, places):
    """Losses at so many places, which go up, or do not."""
    losses = slope(rng.uniform(0.15, 0.85) * places, rng.uniform(1, 4), places)
    if kind == "flat":
        losses[:] = LOSS * rng.choice([0.3, 0.9, 1.1, 3])
    elif kind == "steep":
        losses = np.where(losses < LOSS, 0.02, 20)
    elif kind == "noise":
        losses += rng.normal(0, 0.3, places)
    for _ in range({"dip": 1, "dips": 3}.get(kind, 0)):
        first = rng.integers(places)
        losses[first:first + max(1, int(places * rng.uniform(0.02, 0.15)))] += rng.uniform(0.5, 3) * rng.choice([1, -1])
    return losses.clip(min=0)


CURVES = ["flat", "steep", "slope", "dip", "dips", "noise"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("places", [8, PLACES])
@pytest.mark.parametrize("kind", CURVES)
def test_what_is_sure_of_any_curve(kind, places, own):
    """Chips and images are drawn; with `own` anew at each value."""
    wrong = ends = 0
    for seed in range(50):
        losses = curve(kind, np.random.default_rng(seed), places)
        found = find_last(losses, 1000, (10, 36), simulated(seed, 1000, losses, 0.3, own=own))
        wrong += is_wrong(found, losses)
        ends += (found.sure >= 0) + (found.lost < places)
        assert found.sure <= found.place and not set(found.undecided) & {found.sure, found.lost}
    assert wrong <= most_wrong(50) and ends >= (20 if kind == "flat" else 65)


@pytest.mark.parametrize("kind", CURVES)
def test_of_few_values_each_is_known(kind):
    """With ideal cells and all images nothing is left to chance: whatever the curve, the last value that keeps the bound is found, the
    first one that does not, and which are not in order."""
    for seed in range(50):
        observe = simulated(seed, 1000, curve(kind, np.random.default_rng(seed), 8), 0.0, own=True)
        keeps = [observe(place, Look(1, 1000)).mean() >= -LOSS for place in range(8)]
        found = find_last(keeps, 1000, (1, 1), observe)
        last = max((place for place in range(8) if keeps[place]), default=-1)
        assert (found.place, found.sure, found.lost) == (last, last, [*keeps, False].index(False))
        assert found.not_in_order == [place for place in range(last) if not keeps[place]] and not found.undecided


def test_fewest_bits_behind_a_dip():
    """8, 7, ..., 1 bits, of which 5 lose more than they may, and 3 do not. Of 500 of 10,000 images what is left open is said to be."""
    losses = np.array([0, 0, 0, 1.2, 0, 0.2, 3, 10])
    found = find_last(losses, 10_000, (1, 1), simulated(0, 10_000, losses, 0.0, own=True))
    assert (found.place, found.sure, found.lost, found.not_in_order, found.undecided) == (5, 5, 3, [3], [])
    few = find_last(losses, 500, (1, 1), simulated(0, 500, losses, 0.0, own=True), of_all=10_000)
    assert few.place == 5 and few.lost == 6 and {3, 5} <= {*few.undecided} and not is_wrong(few, losses)


def test_a_dip_among_many_values():
    """It is wider than those that are looked at first are apart."""
    for seed in range(20):
        first, last = np.random.default_rng(seed).integers([2, 120], [90, 198]).tolist()
        losses = np.full(PLACES, 0.02)
        losses[first:first + 20] = losses[last + 1:] = 8
        found = find_last(losses, 2000, (10, 10), simulated(seed, 2000, losses, 0.2))
        assert (found.place, found.sure, found.lost) == (last, last, first)
        assert found.not_in_order and all(first <= place < first + 20 for place in found.not_in_order)


@pytest.mark.parametrize("images, chips, rare", [
    (2000, 10, (0.31, 20)), (2000, 10, (0.35, 200)), (500, 4, (0.61, 50)), (1000, 36, (0.1, 20)), (1000, 36, (0.1, 200)),
    (500, 2, (0.85, 20))])
def test_kinds_of_chips_that_are_not_too_rare(images, chips, rare):
    """Some chips lose most, others hardly any. Kinds that are more than `unseen` of all are in the chance of error."""
    wrong = 0
    for seed in range(300):
        losses = slope(int(np.random.default_rng(seed).integers(20, 160)), 2)
        found = find_last(losses, images, (chips, chips), simulated(seed, images, losses, 0.2, rare))
        wrong += is_wrong(found, losses)
    assert rare[0] >= found.unseen and wrong <= most_wrong(300)


def test_a_kind_of_chip_that_is_rarer_may_be_unseen():
    """Ten chips have none of a tenth with a chance of 35 %, and then say nothing of it."""
    wrong = 0
    for seed in range(300):
        losses = slope(int(np.random.default_rng(seed).integers(20, 160)), 2)
        found = find_last(losses, 1000, (10, 10), simulated(seed, 1000, losses, 0.2, (0.1, 200)))
        wrong += is_wrong(found, losses)
    assert found.unseen == pytest.approx(1 - 0.025**0.1) and most_wrong(300) < wrong <= most_wrong(300, 0.9**10 + 0.025)


def test_more_chips_where_they_differ():
    """By Fisher's distribution where only images differ from chip to chip."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=60)
    alike = [sequential.differ(images + rng.normal(size=(10, 60))) for _ in range(2000)]
    share = stats.f.sf(sequential.DIFFER, 9, 9 * 59)
    assert stats.binom.ppf(1e-4, 2000, share) <= sum(alike) <= stats.binom.isf(1e-4, 2000, share)
    assert not sequential.differ(np.ones((10, 1)))
    for spread, most in ((0.0, 10), (1.0, 36)):
        losses = np.full(20, LOSS)
        found = find_last(losses, 1000, (10, 36), simulated(3, 1000, losses, spread))
        assert max(seen.look.chips for seen in found.seen.values()) == most


@pytest.mark.parametrize("of_all, right", [(5000, True), (500, False)])
def test_some_images_say_less_than_all(of_all, right):
    """One chip, 500 of 5,000 images: intervals are of all 5,000. Who takes the 500 for all images there are is mostly wrong."""
    wrong = 0
    for seed in range(100):
        observe = simulated(seed, 5000, slope(100, 2), 0.0)
        losses = [-observe(place, Look(1, 5000)).mean() for place in range(PLACES)]
        wrong += is_wrong(find_last(losses, 500, (1, 1), observe, of_all=of_all), losses)
    assert (wrong <= most_wrong(100)) == right


def test_a_test_that_promises_less_is_wrong_more_often():
    """So that the bound above is one: with a chance of error of 0.4 at each of 30 tests."""
    wrong = 0
    for seed in range(100):
        losses = slope(100, 3)
        wrong += is_wrong(find_last(losses, 359, (2, 2), simulated(seed, 359, losses, 0.3), error=24), losses)
    assert wrong > most_wrong(100)


@pytest.mark.parametrize("kept", [0, 1, 77, 199, 200])
def test_exact_values_are_bisected(kept):
    """Ideal cells: with all images there is nothing left to chance."""
    for options, most in (({"sides": False}, 8), ({"sides": False, "start": 70}, 9), ({}, 12 + 5 + 2)):
        seen = []
        found = LastKept(PLACES, [4], (1, 1), 4, 0.05, lambda place, look: np.full((1, 4), float(place < kept)), lambda mean: mean > 0.5,
                         say=seen.append, **options).find()
        assert found.place == found.sure == kept - 1 and found.lost == kept and len(seen) == len(found.seen) <= most + 2


def test_where_a_mean_cannot_be_nothing_is_decided():
    """Of squares a mean is at least 0: an interval that reaches below is wider than all that could be known."""
    found = LastKept(1, [3], (1, 1), 6, 0.05, lambda place, look: np.array([[9.0, 1.0, 2.0]]), lambda mean: None if mean < 0 else mean < 3)
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
    assert csv_row == {name: "" if each is None else str(each) for name, each in row.items()}


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
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=-1"], "--at_least accuracy=-1: accuracy % is at least 0 and at most 100"),
    (["--largest", "dac_bits=1:2:1", "--at_least", "accuracy=software+1"], "a bound of 101: accuracy % is at least 0 and at most 100"),
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
