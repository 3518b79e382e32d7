"""What networks are called with: tensors, tuples, mappings and data loaders, in conversion, calibration and measuring."""

import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from models.quant import Calibration, CrossbarSpec, Setting, calibrate, convert, crossbar_layers, load, measure, save
from models.quant.conversion.tracing import trace
from models.quant.cost import count
from models.quant.layers.batches import called, first_of, first_tensor, joined, length, part_of
from models.quant.layers.loaders import apart

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(8, 8, adc_bits=6, rows=16)


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class Two(nn.Module):
    """Of two inputs, one of which may be missing, and something that is no tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(12, 24), nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x, y, *, scale=1.0):
        hidden = self.a(x) + (0 if y is None else self.b(y))
        return {"features": hidden, "logits": self.head(F.relu(hidden)) * scale}


class Joined(nn.Module):
    """The same network of one tensor."""

    def __init__(self, two):
        super().__init__()
        self.two = two

    def forward(self, xy):
        return self.two(xy[:, :12], xy[:, 12:])["logits"]


class Whole(nn.Module):
    """The same network of one dictionary."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, batch):
        return self.two(batch["x"], batch.get("y"))


X, Y, LABELS = seeded(40, 12), seeded(40, 6).flip(0), torch.arange(40) % 5


@pytest.mark.parametrize("images", [
    {"x": X, "y": Y}, [(X[:20], Y[:20]), (X[20:], Y[20:])], [{"x": X[:7], "y": Y[:7], "labels": LABELS[:7]}, {"x": X[7:], "y": Y[7:]}],
    [{"y": Y, "x": X, "scale": 1.0}], [((X, Y), LABELS)], [[[X, Y], LABELS]]],
    ids=["mapping", "tuples", "mappings, some with targets", "with a number", "tuple and target", "lists"])
def test_a_conversion_takes_what_the_network_takes(images):
    net, wanted = convert(Two(), SPEC, images, activations="max"), convert(Joined(Two()), SPEC, torch.cat([X, Y], 1), activations="max")
    assert {name.replace("two.", "") for name, _ in crossbar_layers(wanted)} == {name for name, _ in crossbar_layers(net)}
    with torch.no_grad():
        assert torch.equal(net(X, Y)["logits"], wanted(torch.cat([X, Y], 1)))


def test_a_trace_keeps_the_first_output_alone():
    class Watched(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            made.append(weakref.ref(y))
            return y

    made, model = [], Watched(12, 3)
    found = trace(model, [*X.split(16)])
    assert [kept() is not None for kept in made] == [True, False, False] and torch.equal(found.output, model(X[:16]))


def test_inputs_that_are_missing_are_none():
    net = convert(Two(), SPEC, [(X, None)])
    assert [name for name, _ in crossbar_layers(net)] == ["a.crossbar", "head.crossbar"] and net.crossbar_report.unused == ["b.weight"]


def test_a_data_loader_gives_targets_too():
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=16)
    net = convert(model, SPEC, loader)
    whole = convert(model, SPEC, list(X.split(16)))
    with torch.no_grad():
        assert torch.equal(net(X), whole(X))
    setting = Setting(replace(SPEC, adc_bits=3))
    shuffled = DataLoader(TensorDataset(X, LABELS), batch_size=16, shuffle=True)  # as one for training does
    assert measure(net, X, LABELS, setting, calibration=shuffled).n_images == 40
    found, wanted = (measure(net, *data, setting, calibration=calibration)
                     for data, calibration in (((loader, None), loader), ((X, LABELS), X)))
    assert torch.equal(found.predictions, wanted.predictions)
    assert found.accuracy == wanted.accuracy == 100 * (found.predictions == LABELS).double().mean().item()


@pytest.mark.parametrize("plan", ["uniform", "significance", "ones"])
def test_outputs_with_names_are_calibrated_and_planned_by_the_one_that_counts(plan):
    spec = replace(SPEC, adc_plan=plan, adc_bits=3)
    data = [{"x": X, "y": Y, "labels": LABELS}]
    named, plain = convert(Two(), SPEC, {"x": X, "y": Y}), convert(Joined(Two()), SPEC, torch.cat([X, Y], 1))
    setting = Setting(spec, calibration=Calibration(correct="channel"))
    found = measure(named, data, None, setting, calibration=data)
    wanted = measure(plain, torch.cat([X, Y], 1), LABELS, setting, calibration=torch.cat([X, Y], 1))
    assert found.accuracy == wanted.accuracy and torch.equal(found.predictions, wanted.predictions)
    assert found.mean_bits == wanted.mean_bits
    with torch.no_grad():
        assert torch.equal(named(X, Y)["logits"], plain(torch.cat([X, Y], 1)))


def test_a_network_of_mappings_is_saved_and_loaded(tmp_path):
    net = convert(Two(), SPEC, [{"x": X, "y": Y, "scale": 2.0}])
    save(net, tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", Two())
    with torch.no_grad():
        assert torch.equal(again(X, Y)["logits"], net(X, Y)["logits"])


def test_a_network_of_one_dictionary():
    """As one of the same inputs by name, wherever batches pass, targets in them or not."""
    data = [{"x": X[:20], "y": Y[:20], "label": LABELS[:20]}, {"x": X[20:], "y": Y[20:], "label": LABELS[20:]}]
    images = [{"x": batch["x"], "y": batch["y"]} for batch in data]
    whole, named = convert(Whole(), SPEC, data), convert(Two(), SPEC, data)
    setting = Setting(replace(SPEC, adc_bits=3))
    found, wanted = (measure(net, data, None, setting, calibration=data) for net in (whole, named))
    assert torch.equal(found.predictions, wanted.predictions) and found.accuracy == wanted.accuracy
    assert measure(whole, {"x": X, "y": Y}, LABELS, setting, calibration=data).accuracy == wanted.accuracy
    found, wanted = (calibrate(net, images) for net in (whole, named))
    assert all((found[f"two.{name}"] == of_layer).all() for name, of_layer in wanted.items()) and len(found) == len(wanted) == 3
    found, wanted = (count(net, images) for net in (whole, named))
    assert found.images == wanted.images == 40
    with torch.no_grad():
        assert torch.equal(called(torch.compile(Whole(), backend="eager"), {"x": X})["logits"], Whole()({"x": X})["logits"])


@pytest.mark.parametrize("forward, batch, whole", [
    (lambda batch: batch, {"x": X}, True), (lambda batch, extra=None: batch, {"x": X, 3: Y}, True),
    (lambda batch, **more: batch, {"x": X}, True), (lambda x: x, {"x": X}, False), (lambda x, y=None: x, {"x": X, "y": Y}, False),
    (lambda x=None, **more: more, {"z": X}, False), (lambda *parts, **more: more, {"x": X}, False)], ids=range(7))
def test_a_dictionary_is_one_input_or_gives_them_by_name(forward, batch, whole):
    """One input where forward needs one, and has none of its names."""
    assert (called(of(forward), batch) is batch) == whole


@pytest.mark.parametrize("forward, message", [
    (lambda x, mask=None: x, r"unexpected keyword argument 'image' \(forward takes x, mask, the dict has image, x: give it the same nam"),
    (lambda pixels: F.linear(pixels, X), r"dict.* \(forward takes pixels, the dict has image, x: give it the same names; or a forw"),
    (lambda batch: batch["label"], r"it asks for 'label', which is not there \(it was taken as the target: give take=lambda batch: \(bat"),
    (lambda batch: batch["mask"], "it asks for 'mask', which is not there$")], ids=["name", "one", "target", "missing"])
def test_what_is_said_of_dictionaries_that_a_network_does_not_take(forward, message):
    net = nn.Linear(12, 3)
    net.forward = forward
    with pytest.raises(ValueError, match=rf"^the network does not run on the images, of shape \[40, 6\], \[40, 12\]: .*{message}") as error:
        convert(net, SPEC, {"image": Y, "x": X, "label": LABELS})
    assert "batch_dim" not in str(error.value) and "\n" not in str(error.value)


# ---- which part is what ------------------------------------------------------------------------------------------------


def of(forward):
    net = nn.Module()
    net.forward = forward
    return net


ONE, SOME, ANY, PAIR = (of(forward) for forward in (lambda x: x, lambda x, mask=None: x, lambda *x: x, lambda x, y: x))


@pytest.mark.parametrize("network, batch, inputs, target", [
    (ONE, X, X, None), (ONE, [X], X, None), (ONE, (X, LABELS), X, LABELS), (ONE, [X, Y], X, Y), (PAIR, [X, Y], (X, Y), None),
    (PAIR, (X, Y, LABELS), (X, Y), LABELS), (SOME, [X, LABELS], X, LABELS), (SOME, (X, Y, LABELS), (X, Y), LABELS),
    (ANY, (X, LABELS), X, LABELS), (ONE, ({"x": X}, None), {"x": X}, None), (PAIR, ([X, Y], LABELS), (X, Y), LABELS),
    (SOME, {"x": X, "labels": LABELS}, {"x": X}, LABELS), (SOME, {"x": X, "target": Y, "label": LABELS}, {"x": X}, LABELS),
    (SOME, {"x": X, "mask": None}, {"x": X, "mask": None}, None), (SOME, (X, None), (X, None), None)], ids=range(15))
def test_inputs_and_targets_are_told_apart(network, batch, inputs, target):
    found, answer = apart(batch, network)
    assert type(found) is type(inputs) and answer is target
    assert all(a is b for a, b in zip(found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found],
                                      inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else [inputs]))


def test_labels_that_are_the_tokens_become_those_that_follow():
    labels = torch.tensor([[5, 6, 7, 8], [9, 5, -100, -100]])
    for name, both, shifted in (("MineForCausalLM", False, True), ("MineLMHeadModel", False, True), ("MineForMaskedLM", False, False),
                                ("MineLMHeadModel", True, False), ("XLNetLMHeadModel", False, False), ("CpmAntForCausalLM", False, False),
                                ("MineForConditionalGeneration", False, True), ("MineForConditionalGeneration", True, False)):
        network = type(name, (nn.Module,), {"config": SimpleNamespace(is_encoder_decoder=both)})()
        inputs, target = apart({"input_ids": labels, "labels": labels}, network)
        assert [*inputs] == ["input_ids"]
        assert target.tolist() == ([[6, 7, 8, -100], [5, -100, -100, -100]] if shifted else labels.tolist())
    assert apart({"x": labels, "labels": labels}, SOME)[1] is labels
    of_images = type("MineForConditionalGeneration", (nn.Module,), {"config": SimpleNamespace(
        is_encoder_decoder=False, text_config=SimpleNamespace(is_encoder_decoder=True))})()
    assert apart({"input_ids": labels, "labels": labels}, of_images)[1] is labels


def test_an_input_that_is_called_as_a_target():
    with pytest.raises(ValueError, match=r"^the network needs 'target' as an input \(its 'target' was taken as the target: give take, a"):
        apart({"x": X, "target": Y}, of(lambda x, target: x))
    assert apart({"x": X, "target": Y}, of(lambda x, target=None: x))[1] is Y


@pytest.mark.parametrize("network, batch, takes", [
    (SOME, (X, Y), "1 to 2"), (ANY, (X, Y), "0 or more"), (ONE, (X, Y, LABELS), "1"), (PAIR, (X, Y, Y, Y), "2")], ids=range(4))
def test_what_cannot_be_told_apart_asks_for_a_function(network, batch, takes):
    with pytest.raises(ValueError, match=f"^a batch has {len(batch)} parts, and the network takes {takes} inputs, so .* Give take, a"):
        apart(batch, network)
    inputs, target = apart(batch, network, lambda batch: ([batch[0]], batch[1]))
    assert isinstance(inputs, tuple) and inputs[0] is batch[0] and target is batch[1]
    with pytest.raises(ValueError, match=r"^take returns a Tensor; a tuple \(inputs, target\) is expected"):
        apart(batch, network, lambda batch: batch[0])


def test_outputs_of_a_dataclass():
    @dataclass
    class Answer:
        kind: str
        y: torch.Tensor

    assert first_tensor(Answer("a", X)) is X


def test_parts_of_batches():
    batch = {"x": X, "shared": torch.arange(3), "none": None, "both": (X, Y[:, 0])}
    assert length(batch) == 40
    cut = first_of(batch, 7)
    assert torch.equal(cut["x"], X[:7]) and torch.equal(cut["both"][1], Y[:7, 0]) and cut["shared"] is batch["shared"]
    again = joined([cut, part_of(batch, 7, 13), part_of(batch, 20, 99)], 0)
    assert torch.equal(again["x"], X) and torch.equal(again["both"][1], Y[:, 0]) and again["none"] is None
    assert torch.equal(again["shared"], batch["shared"])
    assert length((X.T,), 1) == 40 and torch.equal(joined([(X.T[:, :9],), (X.T[:, 9:],)], 1)[0], X.T)
    with pytest.raises(ValueError, match="^a batch is a dict without tensors"):
        length({"x": None})
    with pytest.raises(ValueError, match=r"^the first tensor of a batch has shape \[\], and no dimension 0 along which"):
        length({"scale": torch.tensor(2.0), "x": X})
