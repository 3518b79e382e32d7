"""What an engine prepared is used again while nothing changed, and never after anything did."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_models import images
from torch import nn

from models.quant import SAWB, CrossbarSpec, Qconv2dDoreFa, convert, crossbar_layers, set_engine
from models.quant.layers import fusion, prepared
from models.quant.engines.cpu import engine
from models.quant.kernels import checksum
from models.quant.measuring.images import predict

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(adc_bits=3, rows=16)
RANGES = [(0.5, -3), (0.5, -4), (0.75, -4), (0.75, -3)]


@pytest.fixture
def preparations(monkeypatch):
    """The layers that the CPU engine prepares from here on."""
    layers, prepare = [], engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda layer: layers.append(layer) or prepare(layer))
    return layers


def convolution(wq="dorefa", spec=SPEC):
    """A layer that has run, and an input."""
    torch.manual_seed(0)
    layer = Qconv2dDoreFa(8, 6, 3, padding=1, spec=spec, alpha_init=1.0, wq=wq).eval()
    layer.set_ranges(RANGES)
    return layer, torch.rand(2, 8, 7, 6)


def write_with_numpy(layer):
    layer.weight.detach().numpy()[0, 0] *= -1


CHANGES = {
    "weight.data": lambda layer: layer.weight.data.add_(0.1 * torch.randn(layer.weight.shape)),
    "one weight": lambda layer: layer.weight.data[3, 2, 1].neg_(),
    "NumPy": write_with_numpy,
    "two channels swapped": lambda layer: layer.weight.data.copy_(layer.weight.data[[1, 0, 2, 3, 4, 5]]),
    "another memory format": lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(1).to(
        memory_format=torch.channels_last)),
    "clipping level": lambda layer: layer.act_quant.act_alpha.data.fill_(0.6),
    "clipping level with NumPy": lambda layer: np.copyto(layer.act_quant.act_alpha.detach().numpy(), 0.6),
    "step": lambda layer: layer.adc_delta.mul_(1.5),
    "step through .data": lambda layer: layer.adc_delta.data.mul_(1.5),
    "steps assigned": lambda layer: setattr(layer, "adc_delta", layer.adc_delta * 1.5),
    "lowest code": lambda layer: layer.adc_q_min.fill_(-1),
    "gain": lambda layer: layer.adc_gain.data.mul_(1.5),
    "gain assigned": lambda layer: setattr(layer, "adc_gain", layer.adc_gain * 1.5),
    "offset": lambda layer: layer.adc_offset.add_(1.5),
    "bias": lambda layer: layer.bias.data.add_(1.5),
    "output scale": lambda layer: setattr(layer, "out_scale", 0.3),
    "stride": lambda layer: setattr(layer, "stride", (2, 1)),
    "stride, one number": lambda layer: setattr(layer, "stride", 2),
    "padding": lambda layer: setattr(layer, "padding", (0, 2)),
    "padding, a word": lambda layer: setattr(layer, "padding", "valid"),
    "dilation": lambda layer: setattr(layer, "dilation", (1, 2)),
    "spec": lambda layer: setattr(layer, "spec", replace(layer.spec, cell_bits=3, adc_range="full")),
    "weight quantizer": lambda layer: setattr(layer, "weight_quant", SAWB(4)),
    "activation bits": lambda layer: setattr(layer.act_quant, "abit", 3),
    "codes": lambda layer: layer.set_codes(15 - layer.w_codes()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_counts_at_the_next_call(change):
    """Against a layer that never ran before the change; the version of a tensor tells only of some of them."""
    layer, x = convolution()
    before = layer(x)
    change(layer)
    found, wanted = layer(x), copy.deepcopy(layer)(x)
    assert torch.equal(found, wanted)
    assert found.shape != before.shape or not torch.equal(found, before)


def test_weight_codes_are_a_copy_of_those_of_the_weight_as_it_is():
    layer, _ = convolution()
    codes = layer.w_codes()
    changed = 15 - layer.w_codes()
    layer.w_codes().zero_()
    assert codes.any() and torch.equal(layer.w_codes(), codes)
    layer.weight.data.neg_()  # which leaves no trace in its version
    assert torch.equal(layer.w_codes(), changed)


def test_padding_and_groups_that_are_assigned_are_those_of_the_layer():
    """Not those that `nn.Conv2d` once made its own numbers of; training follows too."""
    layer, x = convolution(spec=replace(SPEC, adc_range="ideal"))
    layer.padding, layer.groups = (2, 0), 2
    layer.weight = nn.Parameter(layer.weight[:, :4].detach().clone())
    other = Qconv2dDoreFa(8, 6, 3, padding=(2, 0), groups=2, spec=layer.spec, alpha_init=1.0).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    for module in (layer, other):
        module.train()(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, other.weight.grad)


def test_the_level_of_sawb_that_is_changed_in_place_counts():
    layer, x = convolution("sawb")
    before = layer(x)
    layer.weight_quant.clip.data.mul_(0.5)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x)) and not torch.equal(layer(x), before)


@pytest.mark.parametrize("training", [False, True])
def test_codes_that_are_changed_in_place_count(training):
    layer, x = convolution()
    codes = layer.w_codes()
    layer.set_codes(codes)
    with torch.no_grad():
        before = layer.train(training)(x)
        codes[0] = 15 - codes[0]
        assert not torch.equal(layer(x), before)
        layer.set_codes(None)  # the weight's again
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_step_between_two_calls_without_gradients(optimizer, training, wq):
    """It leaves no trace in the version of the weights."""
    layer, x = convolution(wq)
    layer.train(training)
    optimizer = optimizer(layer.parameters(), lr=0.5, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape)
    with torch.no_grad():
        before = layer(x)
        optimizer.step()
        found = layer(x)
        assert torch.equal(found, copy.deepcopy(layer)(x)) and not torch.equal(found, before)


def test_sawb_takes_the_level_of_its_weights_when_training_begins():
    layer, x = convolution("sawb")
    layer.weight_quant.clip.fill_(0.05)
    with torch.no_grad():
        before = layer(x)
        assert not torch.equal(layer.train()(x), before)
        assert torch.equal(layer.eval()(x), layer(x)) and layer.weight_quant.clip != 0.05


@pytest.mark.parametrize("change", [lambda layer: None, lambda layer: layer.train(), lambda layer: layer.weight.data.mul_(1.0),
                                    lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict()))])
def test_what_is_prepared_is_used_again_where_nothing_changed(preparations, change):
    layer, x = convolution()
    with torch.inference_mode():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), before)
    assert len(preparations) == 1


def test_engines_do_not_use_what_another_prepared(preparations):
    layer, x = convolution()
    before = layer(x)
    with set_engine("reference"):
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before) and len(preparations) == 2


@pytest.mark.skipif(not fusion.batch_norm_rounds_once(), reason="PyTorch's batch norm rounds twice here")
def test_each_weight_is_looked_at_once_in_a_pass_of_the_network(tiny, preparations, monkeypatch):
    """A layer is asked twice or thrice whether it gives codes, for which weights do not matter."""
    model, looked = tiny(spec=replace(SPEC, adc_range="full")), []
    fingerprint = prepared.fingerprint
    weights = {id(layer.weight): name for name, layer in crossbar_layers(model)}
    with torch.no_grad():
        model(images(1))
        monkeypatch.setattr(prepared, "fingerprint", lambda tensors: looked.extend(
            weights[id(tensor)] for tensor in tensors if id(tensor) in weights) or fingerprint(tensors))
        model(images(1))
    assert looked == list(weights.values()) and len(preparations) == len(weights)


def test_a_copy_prepares_its_own(preparations):
    layer, x = convolution()
    layer(x)
    other = copy.deepcopy(layer)
    other.weight.data.neg_()
    assert not torch.equal(other(x), layer(x)) and len(preparations) == 2


# ---- the checksum ------------------------------------------------------------------------------------------------------


TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


@given(dtype=st.sampled_from(TYPES), numel=st.sampled_from([1, 3, 1025, 4097, 8193, 70_001]), seed=st.integers(0, 2**31),
       offset=st.integers(0, 3))
def test_a_single_bit_changes_it(dtype, numel, seed, offset):
    rng = np.random.default_rng(seed)
    size = numel * dtype.itemsize
    raw = torch.from_numpy(rng.integers(0, 2, size + 8 * dtype.itemsize, np.uint8))  # bytes 0 and 1: a bool may hold no others
    tensor = raw.view(dtype)[offset:offset + numel]
    before = prepared.fingerprint([tensor])
    assert prepared.fingerprint([tensor]) == before
    for _ in range(20):
        at, bit = int(rng.integers(size)), int(rng.integers(1 if dtype == torch.bool else 8))
        tensor.view(torch.uint8)[at] ^= 1 << bit
        assert prepared.fingerprint([tensor]) != before
        tensor.view(torch.uint8)[at] ^= 1 << bit
    assert prepared.fingerprint([tensor]) == before


CHANGES_OF_MANY = {
    "swapped neighbours": lambda w: w.view(-1, 2).flip(1).reshape(w.shape), "reversed": lambda w: w.flip(0),
    "rotated": lambda w: w.roll(1), "signs": lambda w: -w, "two signs": lambda w: w * torch.tensor([-1.0, -1, 1, 1]).repeat(
        len(w) // 4), "doubled": lambda w: 2 * w, "blocks": lambda w: w.roll(2 * checksum.BLOCK),
    "rows": lambda w: w.view(-1, 1024).flip(0).flatten(), "one ulp": lambda w: torch.nextafter(w, w + 1),
}


@pytest.mark.parametrize("values", ["random", "codes", "equal"])
@pytest.mark.parametrize("change", CHANGES_OF_MANY.values(), ids=CHANGES_OF_MANY)
def test_changes_of_many_numbers_change_it(change, values):
    """Those of weights with few bits too, whose differences are multiples of large powers of two."""
    numbers = torch.Generator().manual_seed(0)
    w = {"random": torch.randn(2**17, generator=numbers), "equal": torch.ones(2**17),
         "codes": torch.randint(-15, 16, (2**17,), generator=numbers).float()}[values]
    changed = change(w).contiguous()
    assert (prepared.fingerprint([w]) != prepared.fingerprint([changed])) == (not torch.equal(w, changed))


def test_layouts_of_the_same_numbers_are_told_apart():
    w = torch.arange(4096.0).view(16, 16, 4, 4)
    prints = [prepared.fingerprint([tensor]) for tensor in (
        w, w.to(memory_format=torch.channels_last), w.flatten().view(16, 4, 4, 16).permute(0, 3, 1, 2), w.view(16, 256),
        w.int(), w[:, :15], w.transpose(0, 1))]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert prepared.fingerprint([w[:, ::2]]) == prepared.fingerprint([w[:, ::2]])


@pytest.mark.parametrize("words", [0, 1, checksum.BLOCK - 1, checksum.BLOCK, checksum.BLOCK + 1, 3 * checksum.BLOCK + 77])
def test_tensors_of_other_devices_get_the_same_sums(words):
    """The formula in PyTorch, tried on the CPU, against the kernel and against Python's integers."""
    values = np.random.default_rng(0).integers(0, 2**64, words, np.uint64)
    found = checksum.block_sums(values)
    if words:
        assert np.array_equal(prepared.block_sums(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64), found)
    for block, total in enumerate(found.tolist()):
        wanted = 0
        for word, key in zip(values[block * checksum.BLOCK:(block + 1) * checksum.BLOCK].tolist(), checksum.KEYS.tolist()):
            mixed = word ^ key
            wanted += (2**32 + (mixed >> 32)) * (2**32 + mixed % 2**32)
        assert total == wanted % 2**64


def test_one_thread_and_all_of_them_find_the_same(monkeypatch):
    words = np.random.default_rng(0).integers(0, 2**64, 5 * checksum.BLOCK + 3, np.uint64)
    found = []
    for many in (100, 1):
        monkeypatch.setattr(checksum, "MANY", many)
        found.append(checksum.block_sums(words))
    assert np.array_equal(*found)


def test_memory_that_is_not_aligned_is_no_matter_for_another_kernel():
    w = torch.arange(4000, dtype=torch.uint8)
    assert prepared.fingerprint([w[1:2]]) and prepared._sums(prepared._memory(w[3:])).any()
    assert prepared._memory(w[3:]).data_ptr() % 8 == 0 and torch.equal(prepared._memory(w[3:]), w[3:])


def test_it_draws_no_numbers_and_works_in_inference_mode():
    state = torch.get_rng_state()
    w = torch.ones(3000)
    with torch.inference_mode():
        inference = torch.ones(3000)
        assert prepared.fingerprint([w]) == prepared.fingerprint([inference])
    before = prepared.fingerprint([inference, w.requires_grad_()])
    with torch.inference_mode():
        inference[2999] = 2
    assert prepared.fingerprint([inference, w]) != before
    assert torch.equal(torch.get_rng_state(), state)


def test_within_unchanged_numbers_are_looked_at_once(preparations, monkeypatch):
    """But for another weight tensor, and other hardware; behind the block every change counts again."""
    layer, x = convolution()
    other, looked = copy.deepcopy(layer), []
    other.weight.data.neg_()
    wanted, negative, sums = layer(x), other(x), prepared._sums
    monkeypatch.setattr(prepared, "SMALL", 0)
    monkeypatch.setattr(prepared, "_sums", lambda memory: looked.append(memory) or sums(memory))
    with prepared.unchanged():
        layer(x)
        seen = len(looked)
        layer.weight.data.neg_()
        assert torch.equal(layer(x), wanted) and len(looked) == seen > 0
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        assert torch.equal(layer(x), negative) and len(looked) > seen
        layer.stride = (2, 1)
        assert layer(x).shape[2] < wanted.shape[2]
        layer.stride = (1, 1)
    layer.weight.data.neg_()
    assert torch.equal(layer(x), wanted)
    with prepared.unchanged():  # another block is another promise
        layer.weight.data.neg_()
        assert torch.equal(layer(x), negative)


def test_within_unchanged_converted_layers_are_looked_at_once(monkeypatch):
    """Whose weights are another tensor at each call, of the same memory."""
    looked, sums, x = [], prepared._sums, torch.rand(4, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net = convert(model, CrossbarSpec(adc_range="ideal"), x)
    wanted = net(x)
    monkeypatch.setattr(prepared, "SMALL", 0)
    monkeypatch.setattr(prepared, "_sums", lambda memory: looked.append(memory) or sums(memory))
    with prepared.unchanged():
        net(x)
        seen = len(looked)
        assert torch.equal(net(x), wanted) and len(looked) == seen > 0
        net[2].weight.data = -net[2].weight.detach()
        assert not torch.equal(net(x), wanted) and len(looked) > seen


def test_weights_are_looked_at_once_for_all_images(monkeypatch):
    """In a measurement, whose batches follow each other."""
    layer, _ = convolution()
    network, looked, sums = nn.Sequential(layer, nn.Flatten()), [], prepared._sums
    monkeypatch.setattr(prepared, "SMALL", 0)
    monkeypatch.setattr(prepared, "_sums", lambda memory: looked.append(memory) or sums(memory))
    counts, x = [], torch.rand(10, 8, 7, 6)
    network(x)
    for batches in (1, 5):
        looked.clear()
        predict(network, x.split(10 // batches))
        counts.append(len(looked))
    assert counts[0] == counts[1] > 0
