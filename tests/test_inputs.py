"""Inputs and networks of other types and shapes than the usual ones, and compiled networks."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from test_models import images
from torch import nn

from models.quant import (
    AQ,
    SAWB,
    WQ,
    CrossbarSpec,
    Qconv2d,
    Qconv2dDoreFa,
    QLinear,
    QLinearDoreFa,
    calibrate,
    collect_histograms,
    convert,
    crossbar_layers,
    set_engine,
)
from models.quant.arrays.spec import ADC_RANGES

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")]
SPEC = CrossbarSpec(adc_bits=3, rows=16, cell_bits=2)


def layers(adc_range="full"):
    """(layer, input) of each kind."""
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_bits=3, rows=16, cell_bits=2, adc_range=adc_range)
    pairs = [(Qconv2dDoreFa(6, 5, 3, padding=1, spec=spec, alpha_init=1.0), torch.rand(2, 6, 5, 4)),
             (QLinearDoreFa(20, 5, spec=spec, alpha_init=1.0), torch.rand(2, 20)),
             (Qconv2d(6, 5, 3, padding=1, alpha_init=1.0), torch.rand(2, 6, 5, 4)),
             (Qconv2d(3, 5, 3, padding=1, image=True), torch.rand(2, 3, 5, 4)),
             (Qconv2d(4, 6, 3, padding=1, groups=2, image=True), torch.rand(2, 4, 5, 4)),
             (QLinear(20, 5, alpha_init=1.0), torch.rand(2, 20))]
    for layer, x in pairs[:2]:
        if adc_range == "calibrated":
            calibrate(layer, x)
    return [(layer.eval(), x) for layer, x in pairs]


# ---- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_outputs_have_the_type_of_the_inputs(dtype, training):
    for layer, x in layers("calibrated"):
        if dtype == torch.float16 and training:
            continue  # PyTorch has no gradient of a convolution of this type on every CPU
        wanted = layer.train(training)(x)
        y = layer.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.3 * float(wanted.detach().abs().max()))
        if training:
            y.float().square().sum().backward()
            assert layer.weight.grad.dtype == dtype and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
def test_inputs_whose_sign_a_view_turns(training):
    """As that of the imaginary part of a conjugate: their memory holds the negative."""
    linear = nn.Linear(20, 5)
    converted = [(convert(linear, SPEC, torch.rand(8, 20) - low), torch.rand(2, 20) - low) for low in (0, 0.5)]
    for layer, x in [*layers("calibrated"), *converted]:
        for order in (torch.contiguous_format, torch.channels_last)[:x.dim() // 2]:
            x = x.contiguous(memory_format=order)
            turned = torch._neg_view(-x)
            assert torch.equal(layer.train(training)(turned), layer(x))
            with torch.no_grad():
                assert torch.equal(layer(turned), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("crossbar_layers_of", ["all", "conv"])
def test_a_whole_network_of_another_type(tiny, dtype, crossbar_layers_of):
    model, x = tiny(spec=SPEC, crossbar_layers=crossbar_layers_of), images(3)
    calibrate(model, x)
    with torch.no_grad():
        wanted = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    if dtype == torch.float64:  # more exact batch norms change a code here and there
        assert (found.float() - wanted).abs().max() < 0.3 * wanted.abs().max()
    assert all(layer.adc_delta.dtype == torch.float64 and layer.adc_gain.dtype == torch.float32
               for _, layer in crossbar_layers(model))


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("engine", ["reference", "numba"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_a_float64_default_type(float64_by_default, tiny, engine, reference):
    """The numbers are those of a network that was made in float32."""
    for wq in ("dorefa", "sawb"):
        spec = CrossbarSpec(adc_bits=3, rows=16, cell_bits=2, reference=reference)
        model, x = tiny(spec=spec, wq=wq), images(2)
        assert x.dtype == torch.float64 and model.features[0].weight.dtype == torch.float64
        with set_engine(engine), torch.no_grad():
            calibrate(model, x)
            found = model(x)
            assert found.dtype == torch.float64
            single = copy.deepcopy(model).float()
            wanted = single(x.float())
            torch.set_default_dtype(torch.float32)
            assert torch.equal(single(x.float()), wanted)  # the default type changes no number of a float32 network
            torch.set_default_dtype(torch.float64)
        assert all(layer.adc_gain.dtype == layer.adc_offset.dtype == torch.float32 for _, layer in crossbar_layers(model))


# ---- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adc_range", ADC_RANGES)
@pytest.mark.parametrize("engine", ["reference", "numba"])
@pytest.mark.parametrize("training", [False, True])
def test_no_images_give_no_outputs(engine, adc_range, training):
    with set_engine(engine):
        for layer, x in layers(adc_range):
            assert layer.train(training)(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("adc_range", ADC_RANGES)
def test_no_images_give_no_logits(tiny, adc_range):
    model = tiny(spec=CrossbarSpec(adc_bits=3, rows=16, adc_range=adc_range))
    if adc_range == "calibrated":
        calibrate(model, images(1))
    with torch.no_grad():
        assert model(images(0)).shape == (0, 10)


@pytest.mark.parametrize("adc_range", ADC_RANGES)
@pytest.mark.parametrize("dilation, size, text", [(1, (2, 9), "3 x 3 pixels, the padded input has 2 x 9"),
                                                  (2, (9, 4), "5 x 5 pixels, the padded input has 9 x 4")])
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_a_kernel_larger_than_its_input_is_refused(engine, adc_range, dilation, size, text):
    spec = CrossbarSpec(adc_bits=3, rows=16, adc_range=adc_range)
    crossbar = Qconv2dDoreFa(4, 2, 3, dilation=dilation, spec=spec)
    crossbar.set_ranges([(1.0, -4)] * 4)
    for layer in (crossbar, Qconv2d(4, 2, 3, dilation=dilation, image=True)):
        with set_engine(engine), torch.no_grad(), pytest.raises(ValueError, match=f"^the kernel covers {text}$"):
            layer.eval()(torch.rand(1, 4, *size))


@pytest.mark.parametrize("training", [False, True])
def test_an_input_without_batch_is_refused(training):
    """PyTorch takes it; here a bias would meet rows instead of channels."""
    for layer, x in layers():
        text = r"\[N, in\]" if isinstance(layer, nn.Linear) else r"\[N, in, H, W\]"
        for wrong in (x[0], x[None]):
            with pytest.raises(ValueError, match=rf"^the input has shape \[[0-9, ]*\]; {text} is expected$"):
                layer.train(training)(wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_inputs_that_are_no_real_numbers_are_refused(dtype):
    for layer, x in layers():
        with pytest.raises(ValueError, match=f"^the input is of {dtype}; real floating-point numbers are expected"):
            layer(x.to(dtype))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, float("inf"), float("nan")])
def test_clipping_levels_that_are_none_are_refused(alpha):
    for layer, x in layers()[:2]:
        layer(x)
        layer.act_quant.act_alpha.data.fill_(alpha)
        with pytest.raises(ValueError, match=f"^act_alpha, the clipping level of this layer's inputs, is {alpha:g}; it must be above 0"):
            layer(x)


# ---- what is not a number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_an_input_that_is_not_a_number_is_told_of_once(tiny, fused):
    """It becomes the code of a number, behind which nothing tells."""
    model, x = tiny(spec=CrossbarSpec(adc_range="ideal")), images(4)
    x[2, 1, 5, 7] = float("nan")
    if not fused:
        model.features[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(images(4))  # what is compiled or loaded now makes Python forget which warnings were shown
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            y = model(x)
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [
        "the input of a quantized layer holds NaN, which becomes the code of a number"]
    assert y.isfinite().all()


def test_a_weight_that_is_not_a_number_is_told_of():
    """Its code is that of a number too, where a float network would answer with NaN."""
    x = torch.rand(4, 6)
    converted = convert(nn.Linear(6, 3), CrossbarSpec(adc_range="ideal"), x)
    for layer in (QLinearDoreFa(6, 3, spec=CrossbarSpec(adc_range="ideal")).eval(), converted):
        layer(x)
        layer.weight.data[1, 2] = float("nan")
        with pytest.warns(RuntimeWarning, match="^the weight of a quantized layer holds NaN, which becomes the code of a number$"):
            assert layer(x).isfinite().all()


def test_sums_that_are_not_numbers_of_inputs_that_are():
    """Infinities of both signs, and sums beyond the largest number of a type."""
    (layer, x), *_ = layers()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = float("inf"), -float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        layer.half()(torch.full_like(x, 60000.0).half())


# ---- torch.compile -----------------------------------------------------------------------------------------------------


class _Other(nn.Module):
    """A network whose layers a compiler would trace: what is between them, and the quantizers alone."""

    def __init__(self, spec):
        super().__init__()
        torch.manual_seed(0)
        self.image = Qconv2d(3, 6, 3, image=True)
        self.conv = Qconv2d(6, 6, 3) if spec is None else Qconv2dDoreFa(6, 6, 3, spec=spec)
        self.linear = QLinear(96, 4) if spec is None else QLinearDoreFa(96, 4, spec=spec)
        self.quantizers = nn.ModuleList([AQ(4, 2.0), WQ(3), SAWB(4)])

    def forward(self, x):
        x = torch.relu(self.image(x)) * 2 + 1
        x = self.linear(self.conv(x).flatten(1) * 3)
        for quantizer in self.quantizers:
            x = x + quantizer(x)
        return x


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [None, CrossbarSpec(adc_range="full", adc_bits=4)], ids=["training layers", "crossbars"])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_network_gives_the_same(fresh_compiler, spec, training):
    model, x = _Other(spec).train(training), torch.randn(3, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    for count in (3, 2):  # the second shape compiles again, and must not end otherwise
        if training:
            wanted, found = (network(x[:count]) for network in (model, compiled))
            gradients = [torch.autograd.grad(y.sum(), model.conv.weight)[0] for y in (wanted, found)]
            assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
        else:
            with torch.no_grad():
                wanted, found = model(x[:count]), compiled(x[:count])
        assert torch.equal(found, wanted)


def test_a_compiled_vgg_gives_the_same(fresh_compiler, tiny):
    model, x = tiny(spec=SPEC), images(2)
    calibrate(model, x)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(compiled(x), wanted)
        model.features[3].weight.data.neg_()
        assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), wanted)
    histograms = collect_histograms(compiled, x)
    assert len(histograms) == len(crossbar_layers(model))


def test_compiler_and_pictures_are_not_imported_before_they_are_wanted():
    """They take a second or more, and half a second."""
    program = ("import sys, torch, models, eval, train; x = torch.rand(1, 4)\n"
               "models.quant.QLinear(4, 2)(x).sum().backward()\n"
               "print('torch._dynamo' in sys.modules, 'matplotlib' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
