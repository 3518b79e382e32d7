"""Packed networks: the codes come back bit for bit, and so does everything that inference uses."""

import json
from pathlib import Path

import pytest
import torch

import models
import train
from experiment.inputs.checkpoint import CHECKPOINT_FORMAT, load_checkpoint
from experiment.program.cli import UserError
from experiment.inputs.packed import pack, unpack
from models import vgg
from models.quant import Qconv2dDoreFa
from models.quant.layers.quantizers import WEIGHT_QUANTIZERS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ([6, 10, "M", 7, "M", 9, "M"], 11)  # odd numbers: the last byte of a layer is not full


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", SMALL)
    for name in models.names():
        monkeypatch.setattr(getattr(models, name), "kwargs", dict(getattr(models, name).kwargs))


def checkpoint(wbit=4, wq="dorefa", seed=0):
    torch.manual_seed(seed)
    net = vgg.VGG(wbit=wbit, wq=wq)
    net(torch.randn(8, 3, 32, 32))  # statistics, and SAWB's levels
    config = {"model": "vgg7_quant", "w_bits": wbit, "a_bits": 4, "wq": wq, "dataset": "digits", "data_path": "./data",
              "quantize_image": False}
    return {"format": CHECKPOINT_FORMAT, "state_dict": net.state_dict(), "config": config, "epoch": 3,
            "data": {"mean": [0.5] * 3, "std": [0.2] * 3, "classes": list("0123456789"), "train_images": 9}}


def weights(state):
    return {key: value for key, value in state.items() if key.endswith(".weight") and value.dim() > 1}


def codes(wbit, wq, state):
    found = {}
    for key, weight in weights(state).items():
        quantizer = WEIGHT_QUANTIZERS[wq](wbit).eval()
        if wq == "sawb":
            quantizer.clip = state[key.removesuffix("weight") + "weight_quant.clip"]
        found[key] = quantizer.codes(weight)
    return found


CASES = [(wbit, "dorefa") for wbit in range(1, 9)] + [(wbit, "sawb") for wbit in range(2, 9)]


@pytest.mark.parametrize("wbit, wq", CASES)
def test_codes_are_identical_after_a_round_trip_through_a_file(wbit, wq, tmp_path):
    before = checkpoint(wbit, wq)
    torch.save(pack(before), tmp_path / "small.pt")
    after = load_checkpoint(tmp_path / "small.pt")
    assert after["exported"] is True
    assert {name: after[name] for name in before if name != "state_dict"} == {
        name: before[name] for name in before if name != "state_dict"}
    expected, found = codes(wbit, wq, before["state_dict"]), codes(wbit, wq, after["state_dict"])
    assert len(found) == 6 and sum(len(c.unique()) for c in found.values()) > 6
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    for key in set(before["state_dict"]) - set(expected):  # batch norm, clipping levels, biases
        assert torch.equal(after["state_dict"][key], before["state_dict"][key]), key
    assert set(after["state_dict"]) == set(before["state_dict"])


def test_bits_stand_one_after_the_other_most_significant_first():
    before = checkpoint(3)
    stored = pack(before)["codes"]["classifier.3.weight"]
    expected = codes(3, "dorefa", before["state_dict"])["classifier.3.weight"]
    text = "".join(f"{code:03b}" for code in expected.flatten().tolist())
    text += "0" * (-len(text) % 8)
    assert stored["shape"] == list(expected.shape)
    assert stored["bits"].tolist() == [int(text[i:i + 8], 2) for i in range(0, len(text), 8)]


def test_packed_network_gives_the_same_logits():
    before = checkpoint()
    after = unpack(pack(before))
    net = vgg.VGG(wbit=4).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        net.load_state_dict(before["state_dict"])
        expected = net(images)
        net.load_state_dict(after["state_dict"])
        assert torch.equal(net(images), expected)


def test_packing_twice_changes_nothing():
    once = pack(checkpoint())
    twice = pack(unpack(once))
    for key in once["codes"]:
        assert torch.equal(once["codes"][key]["bits"], twice["codes"][key]["bits"])


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
def test_weights_come_back_close_to_those_that_were_trained(wq):
    """Half a step away at most where they are not clipped, so that training goes on at the same relative speed."""
    before, after = checkpoint(8, wq)["state_dict"], unpack(pack(checkpoint(8, wq)))["state_dict"]
    for key, weight in weights(before).items():
        bound = before[key.removesuffix("weight") + "weight_quant.clip"] if wq == "sawb" else weight.abs().max()
        difference = (after[key] - weight.clamp(-bound, bound)).abs().max()
        assert difference < 1.1 * bound / 254 and after[key].abs().max() == pytest.approx(bound.item(), rel=0.01)


def test_networks_that_do_not_say_their_quantizer_have_that_of_dorefa():
    before = checkpoint()
    expected = pack(before)["codes"]
    del before["config"]["wq"]
    found = pack(before)
    for key, entry in expected.items():
        assert torch.equal(found["codes"][key]["bits"], entry["bits"]) and found["codes"][key]["scale"] == entry["scale"]
    assert weights(unpack(found)["state_dict"]).keys() == expected.keys()


def test_32_bit_networks_have_no_codes():
    with pytest.raises(ValueError, match="--w_bits 32 has no weight codes"):
        pack(checkpoint(32))


@pytest.mark.parametrize("weight", [0.0, 30.0])
def test_weights_that_are_all_alike_come_back(weight):
    """No scale, or one at which tanh is 1."""
    before = checkpoint()
    before["state_dict"]["classifier.0.weight"].fill_(weight)
    expected, after = codes(4, "dorefa", before["state_dict"]), unpack(pack(before))["state_dict"]
    assert after["classifier.0.weight"].isfinite().all()
    assert torch.equal(codes(4, "dorefa", after)["classifier.0.weight"], expected["classifier.0.weight"])


def test_codes_that_would_not_come_back_are_refused(monkeypatch):
    monkeypatch.setattr(WEIGHT_QUANTIZERS["dorefa"], "weights", lambda self, codes, scale: codes * 0.0)
    with pytest.raises(ValueError, match="the codes of features.0.weight do not come back"):
        pack(checkpoint())


@pytest.mark.parametrize("damage", [
    lambda c: c.update(format="vgg-quant-packed-9"),
    lambda c: c["codes"]["classifier.0.weight"].update(shape=[3, 1000]),
    lambda c: c["codes"]["classifier.0.weight"].pop("bits"),
    lambda c: c["codes"]["classifier.0.weight"].update(bits=c["codes"]["classifier.0.weight"]["bits"].repeat(2)),
    lambda c: c["config"].pop("w_bits"),
    lambda c: c["config"].update(wq="none"),
    lambda c: c.update(codes=[1]),
])
def test_damaged_files_are_refused_in_one_line(damage, tmp_path):
    small = pack(checkpoint())
    damage(small)
    torch.save(small, tmp_path / "small.pt")
    with pytest.raises(UserError, match="small.pt: its weight codes cannot be unpacked"):
        load_checkpoint(tmp_path / "small.pt")


def test_export_writes_the_network_and_what_is_known_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "1", "--limit_train", "200", "--batch_size", "20", "--ngpu", "0", "--save_path", "run"]
    assert train.main(flags) == 0
    assert train.main(["--evaluate", "--resume", "run/model_best.pth.tar", "--export", "small/net.pt", "--ngpu", "0",
                       "--about", "upscaled"]) == 0
    accuracy = float(capsys.readouterr().out.split("test accuracy ")[-1].split(" %")[0])
    facts = json.loads((tmp_path / "small/net.json").read_text())
    assert facts["test_accuracy"] == accuracy and facts["test_images"] == 359 and facts["train_images"] == 180
    assert facts["about"] == "upscaled" and facts["date"] > "2026"
    assert facts["commands"] == ["python train.py " + " ".join(flags)] and facts["config"]["seed"] == 0
    assert len(facts["curves"]) == 1 and facts["curves"][0].startswith("epoch 1/1  loss ")
    assert not {"data_path", "save_path", "log_file"} & set(facts["config"])  # where things lie on this machine
    assert facts["machine"]["torch"] == torch.__version__ and facts["hours"] >= 0 and facts["dataset"] == "digits"

    train.main(["--evaluate", "--resume", "small/net.pt", "--ngpu", "0"])  # the small file is as good as the large one
    assert f"test accuracy {accuracy:.2f} %" in capsys.readouterr().out
    small, large = load_checkpoint("small/net.pt"), load_checkpoint("run/model_best.pth.tar")
    for key, expected in codes(4, "dorefa", large["state_dict"]).items():
        assert torch.equal(codes(4, "dorefa", small["state_dict"])[key], expected)

    assert [small[name] for name in ("seconds", "best_acc")] == [large[name] for name in ("seconds", "best_acc")]

    # What is known goes on with the network: through a second file, and through a run that starts from the first.
    train.main(["--evaluate", "--resume", "small/net.pt", "--export", "again.pt", "--ngpu", "0"])
    again = json.loads((tmp_path / "again.json").read_text())
    for name in ("commands", "curves", "hours", "machine", "validation_accuracy", "train_images"):
        assert again[name] == facts[name], name
    more = ["--fine_tune", "small/net.pt", *flags[:-1], "tuned"]
    assert train.main(more) == 0
    train.main(["--evaluate", "--save_path", "tuned", "--export", "tuned.pt", "--ngpu", "0"])
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert tuned["commands"] == [*facts["commands"], "python train.py " + " ".join(more)]
    assert tuned["curves"][:1] == facts["curves"] and len(tuned["curves"]) == 2


def test_the_network_in_the_box_is_whole():
    """What packing its unpacked weights gives is the file again, bit for bit, and the .json beside it speaks of it."""
    path = Path(__file__).resolve().parent.parent / "pretrained" / "vgg7_w4a4_cifar10.pt"
    assert path.stat().st_size < 8e6
    stored, again = torch.load(path, weights_only=True), pack(load_checkpoint(path))
    assert [entry["shape"] for entry in stored["codes"].values()] == [
        [128, 3, 3, 3], [128, 128, 3, 3], [256, 128, 3, 3], [256, 256, 3, 3], [512, 256, 3, 3], [512, 512, 3, 3], [1024, 8192],
        [10, 1024]]
    assert again.keys() - {"exported"} == stored.keys() and again["codes"].keys() == stored["codes"].keys()
    for key, entry in stored["codes"].items():
        found = again["codes"][key]
        assert torch.equal(found["bits"], entry["bits"]), key
        assert found["scale"] == pytest.approx(entry["scale"], rel=1e-6)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["config"] == stored["config"] and facts["commands"] == stored["commands"]


def test_size():
    """Half a byte a weight, and little beside it."""
    small = pack(checkpoint())
    for key, weight in weights(checkpoint()["state_dict"]).items():
        assert small["codes"][key]["bits"].dtype == torch.uint8
        assert small["codes"][key]["bits"].numel() == -(-weight.numel() // 2)
    assert not weights(small["state_dict"])


def test_inference_layers_take_packed_weights():
    before = checkpoint(4, "sawb")
    state = unpack(pack(before))["state_dict"]
    layer = Qconv2dDoreFa(6, 10, 3, padding=1, bias=False, wq="sawb").eval()
    layer.weight.data.copy_(state["features.3.weight"])
    layer.weight_quant.clip.copy_(state["features.3.weight_quant.clip"])
    assert torch.equal(layer.w_codes(), codes(4, "sawb", before["state_dict"])["features.3.weight"])


def test_export_of_a_network_of_the_original_code(tmp_path, monkeypatch):
    """{"state_dict": ...} and nothing else: the bits are those of the flags."""
    monkeypatch.chdir(tmp_path)
    state = checkpoint(3)["state_dict"]
    torch.save({"state_dict": state}, "old.pth")
    assert train.main(["--evaluate", "--resume", "old.pth", "--w_bits", "3", "--export", "new.pt", "--ngpu", "0"]) == 0
    small = load_checkpoint("new.pt")
    assert small["config"] == {"model": "vgg7_quant", "w_bits": 3, "a_bits": 4, "wq": "dorefa", "quantize_image": False,
                               "dataset": "digits"}
    for key, expected in codes(3, "dorefa", state).items():
        assert torch.equal(codes(3, "dorefa", small["state_dict"])[key], expected)
