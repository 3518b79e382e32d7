"""The registry and the networks: names, parameters, training to inference, one set of logits from every engine."""

import pytest
import torch
from conftest import TINY, settle
from test_engines import NAMES
from torch.nn import functional as F

import models
from models import vgg
from models.quant import (
    ADC_BUFFERS,
    CrossbarSpec,
    Qconv2d,
    Qconv2dDoreFa,
    QLinear,
    QLinearDoreFa,
    calibrate,
    correct,
    crossbar_layers,
    set_engine,
    set_spec,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KWARGS = {"num_classes": 10, "wbit": 4, "abit": 4, "alpha_init": 10.0}


def build(name, **kwargs):
    """As the scripts do it, but without changing the registry for the next test."""
    config = getattr(models, name)
    return config.base(*config.args, **{**config.kwargs, **kwargs}).eval()


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---- registry --------------------------------------------------------------------------------------------------------


def test_names():
    assert models.names() == [f"{name}_quant{end}" for name in ("resnet18", "resnet20", "vgg16", "vgg7") for end in ("", "_eval")]


@pytest.mark.parametrize("name", models.names())
def test_configuration_is_used_as_the_original_scripts_do(name):
    config = getattr(models, name)
    config.kwargs.update({**KWARGS, "num_classes": 7, "alpha_init": 3.0})
    model = config.base(*config.args, **config.kwargs)
    last = model.last
    assert last.weight.shape[0] == 7 and last.act_quant.act_alpha.item() == 3.0 and last.weight_quant.wbit == 4


def test_what_one_caller_changes_is_not_seen_by_the_next():
    config = models.vgg7_quant_eval
    config.kwargs["wbit"], config.base = 9, None
    config.args.append(3)
    other = models.vgg7_quant_eval
    assert other.kwargs == {} and other.args == ["vgg7"] and other.base is not None


@pytest.mark.parametrize("name", models.names())
def test_create_builds_what_the_configuration_does(name, monkeypatch):
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", TINY)
    monkeypatch.setitem(vgg.CONFIGS, "vgg16", TINY)
    options = {"num_classes": 7, "wbit": 3, "abit": 2, "alpha_init": 3.0, "wq": "sawb"}
    networks = []
    for make in (lambda: models.create(name, **options), lambda: build(name, **options)):
        torch.manual_seed(0)
        networks.append(make())
    assert str(networks[0]) == str(networks[1])
    for a, b in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(a, b)
    count = {"vgg": 5, "resnet20": 19, "resnet18": 20}[name[:3] if name[0] == "v" else name[:8]]
    assert len(crossbar_layers(networks[0])) == (count if name.endswith("_eval") else 0)


def test_the_older_name_of_an_option():
    """Checkpoints and scripts may say `map`."""
    for options in (dict(map="conv"), dict(crossbar_layers="conv")):
        assert len(crossbar_layers(models.create("vgg7_quant_eval", **options))) == 5


@pytest.mark.parametrize("name", ["vgg8_quant", "vgg7", "VGG7_quant"])
def test_unknown_name_lists_the_known_ones(name):
    message = f"'{name}'; known are resnet18_quant, .*, vgg16_quant_eval, vgg7_quant, vgg7_q"
    with pytest.raises(AttributeError, match=message):
        getattr(models, name)
    with pytest.raises(ValueError, match=message):
        models.create(name)


@pytest.mark.parametrize("kwargs, message", [
    (dict(map="linear"), "crossbar_layers is 'linear'; allowed are all, conv"), (dict(wbit=9), "1 to 8"),
    (dict(w_bits=4), "^a VGG has no option w_bits; known are config, num_classes, wbit, .*, spec, crossbar_layers$"),
    (dict(spec=CrossbarSpec(w_bits=3), wbit=4), "the spec has 3-bit weights.*wbit=4"),
    (dict(spec=CrossbarSpec(a_bits=3), wbit=4), "3-bit activations.*abit=4"), (dict(wbit=32, abit=32), "1 to 8")])
def test_wrong_options_of_inference_networks(kwargs, message):
    for make in (build, models.create):
        with pytest.raises(ValueError, match=message):
            make("vgg7_quant_eval", **kwargs)


# ---- VGG7 ------------------------------------------------------------------------------------------------------------


def test_vgg7_has_the_parameters_of_the_original_checkpoints():
    found = {key: list(value.shape) for key, value in build("vgg7_quant", **KWARGS).state_dict().items()}
    wanted = {}
    widths = {0: (3, 128), 3: (128, 128), 7: (128, 256), 10: (256, 256), 14: (256, 512), 17: (512, 512)}
    for index, (c_in, c_out) in widths.items():
        wanted[f"features.{index}.weight"] = [c_out, c_in, 3, 3]
        wanted[f"features.{index}.act_quant.act_alpha"] = []
    wanted |= {"classifier.0.weight": [1024, 8192], "classifier.0.bias": [1024], "classifier.3.weight": [10, 1024],
               "classifier.3.bias": [10], "classifier.0.act_quant.act_alpha": [],
               "classifier.3.act_quant.act_alpha": []}
    norms = {f"features.{index + 1}": width for index, (_, width) in widths.items()} | {"classifier.1": 1024}
    for name, width in norms.items():
        wanted |= {f"{name}.{key}": [width] for key in ("weight", "bias", "running_mean", "running_var")}
        wanted[f"{name}.num_batches_tracked"] = []
    assert found == wanted


def test_vgg7_counts():
    model = build("vgg7_quant", **KWARGS)
    convolutions = 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    linear = 8192 * 1024 + 1024 + 1024 * 10 + 10
    norms = 2 * (128 + 128 + 256 + 256 + 512 + 512 + 1024)
    assert sum(p.numel() for p in model.parameters()) == convolutions + linear + norms + 8  # and 8 alpha
    assert convolutions + linear == 12_974_474
    types = [type(module) for module in model.modules()]
    assert types.count(Qconv2d) == 6 and types.count(QLinear) == 2 and types.count(torch.nn.MaxPool2d) == 3
    first = model.features[0]
    assert first.image and not first.quantize_image
    assert build("vgg7_quant", quantize_image=True).features[0].quantize_image
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, Qconv2d))


def test_first_loss_is_that_of_guessing():
    """The last layer's scale: without it training would start at a loss of about 27."""
    torch.manual_seed(0)
    model = build("vgg7_quant", **KWARGS).train()
    with torch.no_grad():
        loss = F.cross_entropy(model(images(16)), torch.arange(16) % 10)
    assert 2 < loss < 4


@pytest.mark.parametrize("placed, names", [
    ("conv", ["features.3", "features.7", "features.10", "features.14", "features.17"]),
    ("all", ["features.3", "features.7", "features.10", "features.14", "features.17", "classifier.0", "classifier.3"])])
def test_layers_on_crossbars(placed, names):
    model = build("vgg7_quant_eval", crossbar_layers=placed)
    assert [name for name, _ in crossbar_layers(model)] == names
    assert type(model.features[0]) is Qconv2d and model.features[0].image
    kinds = {Qconv2dDoreFa: 5, QLinearDoreFa: 2 * (placed == "all"), QLinear: 2 * (placed == "conv")}
    assert {kind: sum(type(m) is kind for m in model.modules()) for kind in kinds} == kinds


def test_default_map_is_all_and_default_spec_follows_the_bits():
    model = build("vgg7_quant_eval", wbit=2, abit=3)
    assert len(crossbar_layers(model)) == 7
    assert all(layer.spec == CrossbarSpec(w_bits=2, a_bits=3) for _, layer in crossbar_layers(model))


def test_vgg16_shapes():
    model = build("vgg16_quant", num_classes=100)
    assert sum(isinstance(m, Qconv2d) for m in model.modules()) == 13
    with torch.no_grad():
        assert model(images(2)).shape == (2, 100)
    assert len(crossbar_layers(build("vgg16_quant_eval", map="conv"))) == 12


@pytest.fixture(scope="module")
def vgg7():
    """VGG7 on crossbars with ranges as calibration finds them: steps about 1, some half-integers on ties."""
    torch.manual_seed(0)
    model = settle(build("vgg7_quant_eval", alpha_init=3.0))
    for number, (_, layer) in enumerate(crossbar_layers(model)):
        layer.set_ranges([(1.0 + 0.07 * (number % 3), -32 + number)] * 4)
    return model


def test_whole_vgg7_gives_the_same_logits_from_every_engine(vgg7):
    x, logits = images(2), {}
    with torch.no_grad():
        for name in NAMES:
            with set_engine(name):
                logits[name] = vgg7(x)
    assert torch.equal(logits["reference"], logits["numba"])
    assert torch.isfinite(logits["numba"]).all() and logits["numba"].std() > 1e-3
    assert not torch.equal(logits["numba"][0], logits["numba"][1])


def test_whole_vgg7_does_not_depend_on_the_batch(vgg7):
    x = images(7)
    with torch.no_grad(), set_engine("numba"):
        whole = vgg7(x)
        for size in (1, 3):
            assert torch.equal(torch.cat([vgg7(part) for part in x.split(size)]), whole)


# ---- ResNets ---------------------------------------------------------------------------------------------------------


def plain_resnet(state, depths, x):
    """He et al., section 4.2, written from the paper, with the parameters of a network whose quantizers are off."""
    def norm(y, name):
        mean, var, gain, shift = (state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias"))
        return (y - mean) / (var + 1e-5).sqrt() * gain + shift

    x = norm(F.conv2d(x, state["stem.0.weight"], padding=1), "stem.1").relu()
    for stage, depth in enumerate(depths):
        for block in range(depth):
            at, stride = f"stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            elif stride > 1:
                x = F.avg_pool2d(x, 1, stride)
                x = torch.cat([x, torch.zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])], 1)
            x = (x + y).relu()
    return (F.adaptive_avg_pool2d(x, 1).flatten(1) @ state["last.weight"].T + state["last.bias"]) * state["logit_scale"]


@pytest.mark.parametrize("name", ["vgg7_quant", "resnet20_quant"])
def test_logits_are_scaled_but_for_their_bias(name):
    torch.manual_seed(0)
    model, x = models.create(name).eval(), torch.rand(2, 3, 32, 32)
    bias = torch.linspace(-3, 3, 10)

    @torch.no_grad()
    def parts():
        model.last.bias.zero_()
        without = model(x)
        model.last.bias.copy_(bias)
        return without, model(x) - without

    without, of_bias = parts()
    model.scale_logits(5.0)
    bias = model.last.bias.detach().clone()  # which a scale behind it makes smaller
    scaled, still = parts()
    torch.testing.assert_close(scaled, 5 * without, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(still, of_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, depths, weights", [("resnet20", (3, 3, 3), 268_336), ("resnet18", (2, 2, 2, 2), 11_164_352)])
def test_resnets_are_those_of_the_paper(name, depths, weights):
    torch.manual_seed(0)
    model = settle(build(f"{name}_quant", wbit=32, abit=32))
    state = model.state_dict()
    assert sum(value.numel() for key, value in state.items() if key.endswith("weight") and value.dim() > 1) == weights
    with torch.no_grad():
        x = images(2)
        torch.testing.assert_close(model(x), plain_resnet(state, depths, x), rtol=1e-4, atol=1e-4)


def test_resnet_on_crossbars_without_an_adc_is_the_trained_one():
    """On crossbars all but the first layer, and the shortcuts that have weights."""
    for name in ("resnet20", "resnet18"):
        torch.manual_seed(0)
        trained = settle(build(f"{name}_quant", alpha_init=3.0))
        mapped = build(f"{name}_quant_eval", alpha_init=3.0)
        mapped.load_state_dict(trained.state_dict(), strict=False)
        set_spec(mapped, CrossbarSpec(adc_range="ideal"))
        names = [key.removesuffix(".weight") for key, value in trained.state_dict().items()
                 if key.endswith("weight") and value.dim() > 1 and not key.startswith("stem")]
        assert [layer for layer, _ in crossbar_layers(mapped)] == names
        with torch.no_grad():
            x = images(2)
            torch.testing.assert_close(mapped(x), trained(x), rtol=1e-4, atol=1e-4)


# ---- a small network of the same class -------------------------------------------------------------------------------


@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
def test_network_gives_the_same_logits_from_every_engine(tiny, adc_range, reference, mapping):
    model = tiny(spec=CrossbarSpec(cell_bits=3, adc_bits=5, rows=16, adc_range=adc_range, reference=reference,
                                   mapping=mapping))
    logits = []
    for name in NAMES:
        with torch.no_grad(), set_engine(name):
            if adc_range == "calibrated":
                calibrate(model, [images(1, seed=1)])
            logits.append(model(images(2)))
    assert all(torch.equal(logits[0], other) for other in logits)
    assert not torch.equal(logits[0][0], logits[0][1])


@pytest.mark.parametrize("placed", ["conv", "all"])
@pytest.mark.parametrize("adc_range", ["calibrated", "full", "ideal"])
def test_network_does_not_depend_on_the_batch(tiny, adc_range, placed):
    model = tiny(spec=CrossbarSpec(rows=16, adc_bits=4, adc_range=adc_range), crossbar_layers=placed)
    x = images(7)
    if adc_range == "calibrated":
        calibrate(model, [images(2, seed=1)])
    with torch.no_grad():
        whole = model(x)
        for size in (1, 3):
            assert torch.equal(torch.cat([model(part) for part in x.split(size)]), whole)


def test_training_network_does_not_depend_on_the_batch(tiny):
    """The software baseline too, or its accuracy would depend on the batch size."""
    model, x = tiny(spec=None), images(7)
    with torch.no_grad():
        whole = model(x)
        for size in (1, 3):
            assert torch.equal(torch.cat([model(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("placed", ["conv", "all"])
def test_weights_go_from_training_to_inference(tiny, placed):
    """A trained network and its inference network without ADC give the same logits; only ranges are missing."""
    training = tiny(spec=None).train()
    optimizer = torch.optim.SGD(training.parameters(), 0.1)
    for step in range(2):
        F.cross_entropy(training(images(4, seed=step)), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    training.eval()
    model = tiny(spec=CrossbarSpec(adc_range="ideal"), crossbar_layers=placed)
    missing, unexpected = model.load_state_dict(training.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"{name}.{key}" for name, _ in crossbar_layers(model) for key in ADC_BUFFERS if key != "adc_bits_plan"}
    x = images(4, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), training(x), rtol=1e-4, atol=1e-4)

        set_spec(model, CrossbarSpec(rows=16, adc_bits=3))
        calibrate(model, [x])
        again = tiny(spec=CrossbarSpec(rows=16, adc_bits=3), crossbar_layers=placed)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x)) and not torch.equal(model(x), training(x))


def test_narrower_adc_is_farther_from_the_software_network(tiny):
    """A check of direction on the whole: more ADC bits, smaller error."""
    training, x, errors = tiny(spec=None), images(8), []
    for adc_bits in (2, 4, 6, 8):
        model = tiny(spec=CrossbarSpec(adc_bits=adc_bits, rows=128))
        calibrate(model, [x])
        correct(model, x)
        with torch.no_grad():
            errors.append(float((model(x) - training(x)).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[3] < 1e-4


@pytest.mark.parametrize("wbit, wq, scaled", [(4, "dorefa", True), (4, "sawb", False), (32, "dorefa", False)])
def test_logits_of_spread_levels_alone_are_scaled_from_the_start(wbit, wq, scaled, monkeypatch):
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", TINY)
    assert models.create("vgg7_quant", wbit=wbit, wq=wq).last.out_scale == pytest.approx(TINY[1] ** -0.5 if scaled else 1)
    assert models.create("resnet20_quant", wbit=wbit, wq=wq).logit_scale.item() == pytest.approx(1 / 8 if scaled else 1)


def test_vgg16_has_the_widths_of_the_paper():
    with torch.device("meta"):
        model = models.create("vgg16_quant")
    shapes = [tuple(module.weight.shape[:2]) for module in model.modules() if hasattr(module, "weight_quant")]
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6, 512, 10]
    assert shapes == list(zip(widths[1:], widths))
