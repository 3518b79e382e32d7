"""models/quant/measuring: measuring as a function, from Python."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import SMALL, classes, network, shown_images
from torch import nn

import models
from models import quant, vgg
from models.quant import Calibration, CrossbarSpec, convert
from models.quant.measuring import images as images_of_measuring
from models.quant.measuring import measure as measuring
from models.quant.measuring import placing
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import Cache, Record, measure, measure_float, of_chips
from models.quant.measuring.metrics import Metric, chance_of_changes
from models.quant.measuring.placing import place
from models.quant.measuring.setting import Setting
from models.quant.network import calibration as calibrating

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scene(monkeypatch):
    """A network on crossbars, images and labels, and images for calibration."""
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", SMALL["vgg7"])
    net = models.create("vgg7_quant_eval", alpha_init=2.0)
    net.load_state_dict(network().state_dict(), strict=False)
    images, labels = shown_images(40)
    return net.eval(), images, labels, shown_images(359)[0][200:220]


def setting(adc_bits=3, layers="all", on="nominal", **spec):
    return Setting(CrossbarSpec(adc_bits=adc_bits, rows=16, **spec), layers, calibration=Calibration(on=on))


def test_accuracy_and_changes_are_those_of_the_predictions(scene):
    net, images, labels, calibration = scene
    software = measure(net, images, labels, None)
    record = measure(net, images, labels, setting(), calibration=calibration, software=software)
    assert torch.equal(software.predictions, classes(network(), images)) and software.changed_predictions == 0
    assert torch.equal(record.predictions, classes(net, images))  # the network is left on the setting
    assert record.accuracy == pytest.approx(100 * (record.predictions == labels).float().mean().item())
    assert record.software_accuracy == software.accuracy != record.accuracy
    assert record.changed_predictions == int((record.predictions != software.predictions).sum()) > 0
    assert record.band == record.chance == 100 * record.changed_predictions**0.5 / 40 and software.chance is None
    assert (record.n_images, record.engine, software.engine) == (40, "numba", None)
    assert record.images_per_s == 40 / record.seconds


def test_bands_of_chips_say_what_other_chips_and_images_do():
    """2,000 times 2 chips and 100 images are drawn; images differ in how easily they are lost, chips in how much they lose. By integrals
    over this law the mean square of the bands is 1.40 times the variance of a chip's losses on such images, as what single images do on
    single chips is in both of its parts, and the chips' deviation alone makes 0.56. The draws' quotient has a deviation of 0.05."""
    drawn, squares, alone, values = np.random.default_rng(0), [], [], []
    for _ in range(2000):
        easy, chips = drawn.beta(0.05, 0.5, 100), drawn.uniform(0.6, 1.2, (2, 1))
        lost = torch.from_numpy(drawn.random((2, 100)) < np.minimum(easy * chips, 1))
        found = [Record(setting(), torch.zeros(100), 100.0 - k, 100.0, k, 1.0, None, chance=chance_of_changes(k, 100), chip_changes=(k,),
                        chip_accuracies=(100.0 - k,), chip_predictions=torch.zeros(1, 100)) for k in lost.sum(1).tolist()]
        both = of_chips(setting(), found)
        squares.append(both.band**2)
        alone.append(both.accuracy_std**2)
        values.append(both.chip_accuracies[0])
    assert np.mean(squares) / np.var(values) == pytest.approx(1.40, abs=0.2)
    assert np.mean(alone) / np.var(values) == pytest.approx(0.56, abs=0.08)


def test_the_software_is_measured_where_it_is_not_given(scene):
    net, images, labels, calibration = scene
    software = measure(net, images, labels, None)
    record = measure(net, images, labels, setting(), calibration=calibration)
    assert (record.software_accuracy, record.setting) == (software.accuracy, setting())
    again = measure(net, images, labels, setting(), calibration=calibration, software=software)
    assert torch.equal(again.predictions, record.predictions) and again.changed_predictions == record.changed_predictions


def test_progress_bars_have_the_names_of_rows(scene, monkeypatch):
    titles, shown = [], images_of_measuring.tqdm
    monkeypatch.setattr(images_of_measuring, "tqdm", lambda *given, desc, **more: titles.append(desc) or shown(*given, **more))
    net, images, labels, calibration = scene
    measure(net, images, labels, None)
    float_net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10))
    original = measure_float(float_net, images, labels)
    converted = quant.convert(float_net, CrossbarSpec(adc_bits=3), calibration)
    measure(converted, images, labels, setting(), calibration=calibration, original=original)
    assert titles == ["software", "float", "quantized", "1-bit cells, 3-bit ADC, calibrated, rows 16"]


def test_a_metric_of_ones_own_stands_for_the_accuracy(scene):
    net, images, labels, calibration = scene
    names = [f"class {label}" for label in labels.tolist()]  # whatever the metric takes

    def share_in_two(outputs, names):
        best = outputs.topk(2).indices.tolist()
        return torch.tensor([name in {f"class {each}" for each in two} for name, two in zip(names, best, strict=True)]).double()

    chips = Chips(device=quant.Device("own", "here", 1.0, 40.0, sigma_us=1.0), chips=2)
    plain = measure(net, images, labels, replace(setting(), chips=chips), calibration=calibration)
    record = measure(net, images, names, replace(setting(), chips=chips), calibration=calibration, metric=share_in_two, batch_size=7)
    wanted = []
    for seed in chips.seeds:
        chips.program(net, seed)
        quant.correct(net, calibration)
        with torch.no_grad():
            wanted.append(share_in_two(net(images), names).mean().item())
    assert record.chip_accuracies == tuple(wanted) and record.accuracy == sum(wanted) / 2
    with torch.no_grad(), quant.without_adc(net):
        quant.program(net, None)
        assert record.software_accuracy == share_in_two(net(images), names).mean().item()
    assert record.predictions is record.chip_predictions is record.changed_predictions is record.chip_changes is None
    assert record.metric == ("share_in_two", "", True) and plain.metric == ("accuracy", "%", True)
    assert record.accuracy_lowest == min(wanted) and (record.n_images, plain.n_images) == (40, 40)


def test_an_image_of_many_predictions_is_changed_once():
    class Painter(nn.Module):  # of three classes for each pixel
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = quant.Qconv2dDoreFa(3, 3, 1, spec=CrossbarSpec(rows=16))

        def forward(self, x):
            return self.layer(x)

    net, images = Painter().eval(), torch.rand(20, 3, 4, 4) * 10
    labels = torch.zeros(20, 4, 4, dtype=torch.int64)
    metric = Metric("zeros", lambda outputs, labels: (outputs == 0).double().mean(), predict=lambda outputs, _: outputs.argmax(1))
    record = measure(net, images, labels, setting(1, adc_range="full"), metric=metric)
    software = measure(net, images, labels, None, metric=metric).predictions
    assert record.predictions.shape == (20, 4, 4)
    assert 0 < record.changed_predictions == sum(not torch.equal(a, b) for a, b in zip(record.predictions, software)) <= 20


def test_images_are_a_tensor_or_batches_that_can_be_gone_through_again(scene):
    net, images, labels, calibration = scene
    whole = measure(net, images, labels, setting(), calibration=calibration)
    parts = measure(net, list(images.split(7)), labels, setting(), calibration=list(calibration.split(6)))
    assert torch.equal(whole.predictions, parts.predictions)


def test_reads_are_counted_once_for_all_adcs(scene, monkeypatch):
    net, images, labels, calibration = scene
    counted, collect = [], quant.collect_histograms
    monkeypatch.setattr(quant.network.calibration, "collect_histograms",
                        lambda *args: (counted.append(net.features[4].spec), collect(*args))[1])
    cache, found = Cache(), {}
    for bits in (3, 4):
        found[bits] = measure(net, images, labels, setting(bits), calibration=calibration, cache=cache).predictions
    assert len(counted) == 1
    measure(net, images, labels, setting(3, cell_bits=2), calibration=calibration, cache=cache)
    assert len(counted) == 2
    for bits in (3, 4):  # and without a cache nothing is kept
        alone = measure(net, images, labels, setting(bits), calibration=calibration)
        assert torch.equal(alone.predictions, found[bits])
    assert len(counted) == 4


def test_a_network_keeps_the_ranges_that_it_has_for_the_setting(scene):
    net, images, labels, calibration = scene
    place(net, setting())
    with pytest.raises(ValueError, match="not calibrated"):
        measure(net, images, labels, setting())
    quant.calibrate(net, calibration)
    expected = classes(net, images)
    assert torch.equal(measure(net, images, labels, setting()).predictions, expected)
    place(net, setting(4))
    with pytest.raises(ValueError, match="not calibrated"):  # they were of other hardware
        measure(net, images, labels, setting(4))


def test_layers_that_are_not_on_crossbars_have_no_adc(scene):
    net, images, labels, calibration = scene
    measure(net, images, labels, setting(2, "conv"), calibration=calibration)
    on = {name for name, layer in quant.crossbar_layers(net) if layer.spec == setting(2).spec}
    assert on == {"features.4", "features.8"}
    assert {layer.spec.adc_range for name, layer in quant.crossbar_layers(net) if name not in on} == {"ideal"}
    conv_only = models.create("vgg7_quant_eval", alpha_init=2.0, spec=setting(2).spec, crossbar_layers="conv").eval()
    conv_only.load_state_dict(network().state_dict(), strict=False)
    quant.calibrate(conv_only, calibration)
    assert torch.equal(classes(net, images), classes(conv_only, images))


def test_cells_in_place_of_the_weights(scene):
    net, images, labels, _ = scene
    plain = measure(net, images, labels, setting(adc_range="ideal"))
    flipped = {name: 15 - layer.w_codes() for name, layer in quant.crossbar_layers(net)}
    edited = measure(net, images, labels, setting(adc_range="ideal"), cells=flipped)
    assert plain.changed_predictions == 0 < edited.changed_predictions  # the software keeps the weights
    assert measure(net, images, labels, setting(adc_range="ideal")).changed_predictions == 0


def test_calibration_is_that_of_the_setting(scene):
    net, images, labels, calibration = scene
    for rule in (Calibration("minmax", "slice", "none"), Calibration("mse", "layer")):
        measure(net, images, labels, Setting(setting().spec, calibration=rule), calibration=calibration)
        found = [layer.adc_delta.clone() for _, layer in quant.crossbar_layers(net)]
        gains = [layer.adc_gain.clone() for _, layer in quant.crossbar_layers(net)]
        quant.calibrate(net, calibration, rule.rule, rule.per, correct=rule.correct)
        assert all(torch.equal(a, layer.adc_delta) for a, (_, layer) in zip(found, quant.crossbar_layers(net)))
        assert all(torch.equal(a, layer.adc_gain) for a, (_, layer) in zip(gains, quant.crossbar_layers(net)))
        assert all((gain == 1).all() for gain in gains) == (rule.correct == "none")


def test_what_cannot_run_is_refused(scene):
    net, images, labels, _ = scene
    with pytest.raises(ValueError, match="no engine is named 'cuda'"):
        measure(net, images, labels, None, engine="cuda")


def test_measuring_reads_no_flags_and_touches_no_files():
    for path in Path(quant.__file__).parent.joinpath("measuring").glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"argparse", "json", "pathlib", "os", "cli", "flags", "torch.distributed"} & imported, path
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "open"], path


def test_a_cache_knows_what_it_was_made_of(scene):
    """Other calibration images, weights or cells: nothing of before is used."""
    net, images, labels, calibration = scene
    cache, others = Cache(), shown_images(359)[0][:20] * 0.3
    measure(net, images, labels, setting(), calibration=calibration, cache=cache)
    for change in (lambda: None, lambda: net.features[4].weight.data.mul_(-1)):
        change()
        found = measure(net, images, labels, setting(), calibration=others, cache=cache).predictions
        assert torch.equal(found, measure(net, images, labels, setting(), calibration=others).predictions)
    cells = {name: 15 - layer.w_codes() for name, layer in quant.crossbar_layers(net)}
    found = measure(net, images, labels, setting(), calibration=others, cache=cache, cells=cells).predictions
    assert torch.equal(found, measure(net, images, labels, setting(), calibration=others, cells=cells).predictions)


def test_a_cache_sees_other_strides(scene):
    net, images, labels, calibration = scene
    cache = Cache()
    measure(net, images, labels, setting(), calibration=calibration, cache=cache)
    [(_, layer), *_] = quant.crossbar_layers(net)
    layer.padding, layer.dilation = (2, 2), (2, 2)
    measure(net, images, labels, setting(), calibration=calibration, cache=cache)
    found = {name: value.clone() for name, value in net.state_dict().items()}
    measure(net, images, labels, setting(), calibration=calibration, cache=Cache())
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


def test_ranges_that_are_edited_in_a_network_are_not_those_of_the_cache(scene):
    net, images, labels, calibration = scene
    cache, made = Cache(), replace(setting(), chips=Chips(device=quant.Device("own", "here", 1.0, 40.0, sigma_us=1.0)))
    measure(net, images, labels, made, calibration=calibration, cache=cache)
    [(_, layer), *_] = quant.crossbar_layers(net)
    wanted = layer.adc_delta.clone()
    layer.adc_delta.mul_(3)
    measure(net, images, labels, made, calibration=calibration, cache=cache)
    assert torch.equal(layer.adc_delta, wanted)


@pytest.mark.parametrize("on", ["nominal", "chip"])
def test_chips_that_are_seen_again_are_programmed_and_corrected_once(scene, monkeypatch, on):
    """On other images; other weights have other chips, and of more than the bytes hold the last ones are there."""
    net, images, labels, calibration = scene
    made = replace(setting(on=on), chips=Chips(device=quant.Device("own", "here", 1.0, 40.0, sigma_us=1.0), chips=2, read_noise=1.0))
    done, program, correct = [], placing.program, calibrating.correct
    monkeypatch.setattr(measuring, "program", lambda *args: (done.append(args[2]), program(*args)))
    monkeypatch.setattr(calibrating, "correct", lambda *args: (done.append("correct"), correct(*args))[1])
    cache, each, again = Cache(), [0, "correct", 1, "correct"], [1, "correct"]

    def compare(some, expected):
        found = measure(net, images[some], labels[some], made, calibration=calibration, cache=cache)
        assert done == expected
        assert torch.equal(found.chip_predictions, measure(net, images[some], labels[some], made, calibration=calibration).chip_predictions)
        done.clear()

    compare(slice(20), each)
    cache.chips.most_bytes = 2**26
    compare(slice(20), each)
    compare(slice(20, 40), [])
    net.features[4].weight.data.mul_(-1)
    compare(slice(40), each)
    cache.chips.most_bytes = sum(layer.ideal_cells().values.nbytes for _, layer in quant.crossbar_layers(net))  # of one
    compare(slice(40), again)
    compare(slice(40), each)


def test_chips_in_place_of_the_weights_keep_what_their_reads_have_besides(scene):
    net, images, labels, calibration = scene
    made = replace(setting(), chips=Chips(device=quant.Device("own", "here", 1.0, 40.0, sigma_us=1.0), adc_offset=3.0, adc_noise=1.0))
    wanted = measure(net, images, labels, made, calibration=calibration)
    place(net, made)
    made.chips.program(net, 0)
    cells = {name: layer.chip for name, layer in quant.crossbar_layers(net)}
    found = measure(net, images, labels, setting(), calibration=calibration, cells=cells)
    assert torch.equal(found.predictions, wanted.predictions)
    assert all(layer.chip is None for _, layer in quant.crossbar_layers(net))  # as behind chips that were programmed
    still = {name: replace(chip, readout=None) for name, chip in cells.items()}
    assert not torch.equal(measure(net, images, labels, setting(), calibration=calibration, cells=still).predictions, wanted.predictions)


def test_convolutions_alone_and_then_all_layers_with_one_cache(scene):
    net, images, labels, calibration = scene
    cache = Cache()
    for layers in ("conv", "all", "conv"):
        found = measure(net, images, labels, setting(3, layers), calibration=calibration, cache=cache).predictions
        assert torch.equal(found, measure(net, images, labels, setting(3, layers), calibration=calibration).predictions)


class Named(nn.Module):
    """Calls its layer by the name of the argument."""

    def __init__(self):
        super().__init__()
        self.layer = quant.QLinearDoreFa(12, 10)

    def forward(self, x):
        return self.layer(x=x)


def test_layers_may_be_called_by_the_name_of_their_input():
    images, labels = torch.rand(6, 12), torch.arange(6)
    net = Named().eval()
    found = [measure(each, images, labels, setting(), calibration=images) for each in (net, net.layer)]
    assert found[0].mean_bits == found[1].mean_bits == 3 and torch.equal(found[0].predictions, found[1].predictions)


def test_a_network_in_training_mode_is_measured_in_evaluation_mode_and_keeps_its_own(scene):
    net, images, labels, calibration = scene
    expected = measure(net, images, labels, setting(), calibration=calibration)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    net.features[1].eval()
    record = measure(net, images, labels, setting(), calibration=calibration)
    assert torch.equal(record.predictions, expected.predictions) and net.training and not net.features[1].training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_what_is_no_measurement_is_one_line(scene):
    net, images, labels, calibration = scene
    for nothing in (images[:0], [images[:0]], []):
        for which in (None, setting(adc_idle="skip")):
            with pytest.raises(ValueError, match="^there are no examples to measure on$"):
                measure(net, nothing, labels[:0], which, calibration=calibration)
    with pytest.raises(ValueError, match="^batch_size is 0; allowed are whole numbers from 1$"):
        measure(net, images, labels, None, batch_size=0)
    with pytest.raises(ValueError, match="^40 examples have 39 labels$"):
        measure(net, images, labels[:39], None)
    with pytest.raises(ValueError, match="give a tensor or a list of batches"):
        measure(net, (batch for batch in images.split(8)), labels, None)
    with pytest.raises(ValueError, match="give a tensor or a list of batches"):
        measure(net, images, labels, setting(), calibration=iter([calibration]))
    with pytest.raises(ValueError, match="^crossbar_layers is 'convs'; allowed are all, conv$"):
        Setting(crossbar_layers="convs")
    assert measure(net, images, labels.tolist(), None).accuracy == measure(net, images, labels, None).accuracy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types_are_calibrated_and_measured(scene, dtype):
    net, *_, calibration = scene
    images, labels = shown_images(300)
    wanted = measure(net, images, labels, setting(6), calibration=calibration).predictions
    record = measure(net.to(dtype), images.to(dtype), labels, setting(6), calibration=calibration.to(dtype))
    assert (record.predictions == wanted).float().mean() > 0.75  # but for what rounding does to a network whose classes lie close


def test_a_network_without_crossbars_is_not_taken_for_one_on_them():
    with pytest.raises(ValueError, match="no layers on crossbars"):
        measure(nn.Linear(4, 2), torch.rand(3, 4), torch.zeros(3), Setting())
    with pytest.raises(ValueError, match=r"the setting is a CrossbarSpec; give Setting\(CrossbarSpec"):
        measure(nn.Linear(4, 2), torch.rand(3, 4), torch.zeros(3), quant.CrossbarSpec())
    assert measure(nn.Linear(4, 2), torch.rand(3, 4), torch.zeros(3), None).setting is None


def test_a_converted_network_has_no_convolutions_alone():
    net = convert(nn.Linear(8, 5), CrossbarSpec(8, 8), torch.randn(16, 8))
    with pytest.raises(ValueError, match="^crossbar_layers is 'conv', .* leaves no layer of this one on crossbars"):
        measure(net, torch.randn(4, 8), torch.zeros(4, dtype=torch.long), Setting(CrossbarSpec(8, 8), crossbar_layers="conv"))


def test_images_come_in_the_networks_type():
    net = convert(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5)).double(), CrossbarSpec(8, 8), torch.randn(16, 8))
    assert measure(net, torch.randn(4, 8), torch.zeros(4, dtype=torch.long), Setting(CrossbarSpec(8, 8))).examples == 4
