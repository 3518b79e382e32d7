"""Files of checkpoints: damaged, hostile, interrupted; what their tensors and facts may be; weights that do not fit."""

import copy
import errno
import io
import os
import pickle
import zipfile

import pytest
import torch

from experiment.inputs.checkpoint import (
    CHECKPOINT_FORMAT,
    load_checkpoint,
    load_weights,
    read_torch_file,
    save_checkpoint,
    write_torch_file,
)
from experiment.program.cli import UserError
from experiment.inputs.packed import pack

FACTS = {"data": {"classes": ["cat", "dog"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "train_images": 7}, "epoch": 3,
         "commands": ["python train.py"], "seconds": 1.5, "machine": {"torch": "2"}, "best_acc": 90.5, "test_acc": None}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(path, {"state_dict": {"w": torch.arange(5000.0)}, "config": {"lr": 0.1, "names": ["a"]}, **FACTS})
    return path


def refused(path):
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value).removeprefix(f"{path}: ")


# -- reading


def test_round_trip(path):
    checkpoint = load_checkpoint(path)
    assert checkpoint["format"] == CHECKPOINT_FORMAT and checkpoint["config"] == {"lr": 0.1, "names": ["a"]}
    assert torch.equal(checkpoint["state_dict"]["w"], torch.arange(5000.0))
    assert {name: checkpoint[name] for name in FACTS} == FACTS


def test_weights_alone_have_no_settings(tmp_path):
    state = {"w": torch.ones(2)}
    for content in (state, {"state_dict": state}, {"state_dict": state, "config": 1}):
        torch.save(content, tmp_path / "old.pth")
        assert load_checkpoint(tmp_path / "old.pth")["config"] == {}
        assert torch.equal(load_checkpoint(tmp_path / "old.pth")["state_dict"]["w"], state["w"])


def test_truncated_files_are_refused(path):
    data = path.read_bytes()
    for length in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)


def test_a_flipped_bit_is_refused_or_harmless(path):
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensor = next(info for info in archive.infolist() if info.file_size == 20000)
    inside = data.index(torch.arange(5000.0).numpy().tobytes())
    for position in [inside, inside + 9999, inside + tensor.file_size - 1, *range(0, len(data), 487)]:
        damaged = bytearray(data)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # the bit lay in padding or in a field that is not used
            assert position not in range(inside, inside + tensor.file_size)
            assert torch.equal(checkpoint["state_dict"]["w"], torch.arange(5000.0))


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch", "torch_legacy", "pickle"])
def test_malicious_files_run_nothing(tmp_path, how):
    path, marker = tmp_path / "evil.pth.tar", tmp_path / "marker"
    content = {"state_dict": {"w": torch.zeros(2)}, "config": Malicious(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # it would have


@pytest.mark.parametrize("content", [
    [1, 2], {}, {"a": 1}, {"state_dict": 3}, {"state_dict": {"w": 3}}, {"state_dict": {1: torch.zeros(1)}},
    torch.nn.Linear(2, 2),
])
def test_foreign_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt")


def test_files_that_are_not_there(tmp_path):
    assert refused(tmp_path / "none") == "no such file"
    assert refused(tmp_path) == "is a folder, expected a file"


# -- what stands in them


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*beta state", "ignore:.*deprecated")
@pytest.mark.parametrize("make, words", [
    (lambda: torch.empty(2, device="meta"), "a meta tensor"),
    (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
    (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
    (lambda: torch.ones(2, dtype=torch.complex64), "complex numbers"),
    (lambda: torch.zeros(1).expand(10**12), "elements share memory"),
    (lambda: torch.zeros(3).as_strided((2, 2), (1, 1)), "elements share memory"),
])
@pytest.mark.parametrize("bare", [False, True])
def test_tensors_of_other_kinds_are_refused(make, words, bare, tmp_path):
    state = {"v": torch.ones(2), "w": make()}
    torch.save(state if bare else {"state_dict": state}, tmp_path / "c.pt")
    text = refused(tmp_path / "c.pt")
    if words == "a nested tensor" and "it holds more than tensors" in text:  # PyTorch refuses them by itself, from some version on
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "c.pt", weights_only=True)
        return
    assert text.startswith("w is ") and words in text


@pytest.mark.parametrize("key, value, text", [
    ("weight", float("nan"), "holds nan; it must be finite"),
    ("bias", float("-inf"), "holds -inf; it must be finite"),
    ("act_quant.act_alpha", float("nan"), "holds nan; it must be finite and above 0"),
    ("act_quant.act_alpha", 0.0, "holds 0; it must be finite and above 0"),
    ("act_quant.act_alpha", -1.5, "holds -1.5; it must be finite and above 0"),
    ("running_var", float("inf"), "holds inf; it must be finite and not negative"),
    ("running_var", -1.0, "holds -1; it must be finite and not negative"),
    ("weight_quant.clip", -1.0, "holds -1; it must be finite and not negative"),
    ("adc_delta", -1.0, "holds -1; it must be finite and not negative"),
    ("adc_delta", float("nan"), "holds nan; it must be finite and not negative"),
    ("adc_q_min", 1, "holds 1; it must be finite and at most 0"),
    ("adc_gain", float("nan"), "holds nan; it must be finite"),
    ("adc_offset", float("nan"), "holds nan; it must be finite"),
])
@pytest.mark.parametrize("prefix", ["", "features.0.", "module.classifier.3."])
def test_numbers_that_no_network_has_are_refused(key, value, text, prefix, tmp_path):
    key = prefix + key
    usual = -5 if key.endswith("q_min") else 5
    torch.save({"first": torch.ones(3), key: torch.tensor([usual, value, usual])}, tmp_path / "c.pt")
    assert refused(tmp_path / "c.pt") == f"{key} {text}"


@pytest.mark.parametrize("key, value", [
    ("running_var", torch.zeros(2)), ("weight_quant.clip", torch.zeros(())), ("num_batches_tracked", torch.tensor(9)),
    ("adc_delta", torch.zeros(0, dtype=torch.float64)), ("adc_q_min", torch.tensor([0, -7])),
    ("adc_gain", torch.tensor([-1.0])), ("weight", torch.zeros(2, 2).bfloat16().T),
    ("weight", torch.ones(3).to(torch.float8_e4m3fn)),
])
def test_numbers_at_the_edge_of_what_networks_have_are_read(key, value, tmp_path):
    torch.save({key: value}, tmp_path / "c.pt")
    assert torch.equal(load_checkpoint(tmp_path / "c.pt")["state_dict"][key].float(), value.float())


def test_numbers_are_checked_after_unpacking(tmp_path):
    small = pack({"state_dict": {"a.weight": torch.ones(2, 2)}, "config": {"w_bits": 4}})
    small["codes"]["a.weight"]["scale"] = float("nan")
    torch.save(small, tmp_path / "small.pt")
    assert refused(tmp_path / "small.pt") == "a.weight holds nan; it must be finite"


def without(name):
    return lambda facts: facts["data"].pop(name)


def of_data(**values):
    return lambda facts: facts["data"].update(values)


@pytest.mark.parametrize("damage, text", [
    (without("classes"), "its 'data' lacks 'classes', a list of names"),
    (without("mean"), "its 'data' lacks 'mean', three numbers"),
    (without("std"), "its 'data' lacks 'std', three numbers above 0"),
    (without("train_images"), "its 'data' lacks 'train_images', a whole number from 0 up"),
    (of_data(classes=7), "'classes' of its 'data' is not a list of names"),
    (of_data(classes=["a", 7]), "'classes' of its 'data' is not a list of names"),
    (of_data(mean=[0.5, 0.5]), "'mean' of its 'data' is not three numbers"),
    (of_data(mean=[0.5, 0.5, "x"]), "'mean' of its 'data' is not three numbers"),
    (of_data(mean=[0.5, 0.5, True]), "'mean' of its 'data' is not three numbers"),
    (of_data(mean=[10**400] * 3), "'mean' of its 'data' is not three numbers"),
    (of_data(std=[0.5, 0.5, 0]), "'std' of its 'data' is not three numbers above 0"),
    (of_data(std=[0.5, 0.5, float("nan")]), "'std' of its 'data' is not three numbers above 0"),
    (of_data(train_images=-1), "'train_images' of its 'data' is not a whole number from 0 up"),
    (of_data(train_images=7.0), "'train_images' of its 'data' is not a whole number from 0 up"),
    (lambda facts: facts.update(data=[1]), "its 'data' is not a dict"),
    (lambda facts: facts.update(epoch="abc"), "its 'epoch' is not a whole number from 0 up"),
    (lambda facts: facts.update(epoch=True), "its 'epoch' is not a whole number from 0 up"),
    (lambda facts: facts.update(commands="python"), "its 'commands' is not a list of texts"),
    (lambda facts: facts.update(seconds="long"), "its 'seconds' is not a number"),
    (lambda facts: facts.update(machine=None), "its 'machine' is not a dict"),
    (lambda facts: facts.update(best_acc="90"), "its 'best_acc' is not a number or None"),
    (lambda facts: facts.update(test_acc=float("inf")), "its 'test_acc' is not a number or None"),
])
@pytest.mark.parametrize("small", [False, True])
def test_facts_of_other_types_are_refused(damage, text, small, tmp_path):
    facts = copy.deepcopy(FACTS)
    damage(facts)
    content = {"format": CHECKPOINT_FORMAT, "state_dict": {"a.weight": torch.eye(2)}, "config": {"w_bits": 4}, **facts}
    torch.save(pack(content) if small else content, tmp_path / "c.pt")
    assert refused(tmp_path / "c.pt") == text


def test_facts_may_be_missing_and_those_of_other_code_are_left_out(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"state_dict": {}})
    assert set(load_checkpoint(tmp_path / "c.pt")) == {"format", "state_dict", "config"}
    for other in ({}, {"format": "other-1"}, {"format": [1]}):
        torch.save({"state_dict": {}, "epoch": "abc", "data": 7, "commands": 1, "optimizer": {}} | other, tmp_path / "c.pt")
        assert set(load_checkpoint(tmp_path / "c.pt")) == {"state_dict", "config", "optimizer", *other}


# -- writing


class Failing(io.RawIOBase):
    """A file that takes some bytes and then raises."""

    def __init__(self, file, error):
        self.file, self.error, self.room = file, error, 3000

    def writable(self):
        return True

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)


@pytest.fixture
def fails(monkeypatch):
    def fails(error, save=torch.save):
        monkeypatch.setattr(torch, "save", lambda content, file: save(content, Failing(file, error)))

    return fails


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: cannot write {path}"),
    (OSError(errno.EIO, "Input/output error"), "cannot write {path}: [Errno 5] Input/output error"),
])
def test_writing_that_fails_says_why_and_leaves_the_old_file(error, text, path, fails):
    before = path.read_bytes()
    fails(error)
    with pytest.raises(UserError) as raised:
        save_checkpoint(path, {"state_dict": {"w": torch.ones(100_000)}})
    assert str(raised.value) == text.format(path=path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_ctrl_c_in_a_write_stays_one_and_leaves_the_old_file(path, fails):
    before = path.read_bytes()
    fails(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"state_dict": {"w": torch.ones(100_000)}})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/none/c.pt: .*No such file or directory"):
        write_torch_file(tmp_path / "none" / "c.pt", [1])
    write_torch_file(tmp_path / "c.pt", [1])
    assert read_torch_file(tmp_path / "c.pt") == [1]


# -- weights


def test_load_weights_names_what_does_not_fit():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3),
             "2.weight": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_weights(net, state, source="some.pth")
    for words in ("some.pth", "missing: 1.bias", "unexpected: 2.weight", "0.bias [4] instead of [3]"):
        assert words in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())  # nothing was copied
    good = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(1, 3)}
    assert load_weights(net, good, allow_missing=("bias",)) == ["1.bias"]
    assert net[0].weight.eq(1).all() and torch.equal(net[1].bias, before["1.bias"])


@pytest.mark.parametrize("state, words", [
    ({"weight": torch.ones(1, 2)}, "missing: bias"),
    ({"weight": torch.ones(1, 2), "bias": torch.ones(1), "gain": torch.ones(1)}, "unexpected: gain"),
    ({"weight": torch.ones(2, 1), "bias": torch.ones(1)}, r"of another shape: weight \[2, 1\] instead of \[1, 2\]"),
])
def test_each_misfit_is_enough(state, words):
    with pytest.raises(UserError, match=f"^some.pth does not fit the model: {words}$"):
        load_weights(torch.nn.Linear(2, 1), state, allow_missing=("bia", "ias.x"), source="some.pth")


def test_weights_of_data_parallel():
    net = torch.nn.Linear(2, 1)
    assert load_weights(net, {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}) == []
    assert net.weight.eq(1).all() and net.bias.eq(0).all()
    with pytest.raises(UserError, match="missing: weight; unexpected: module.weight$"):  # not of one: a layer's name
        load_weights(net, {"module.weight": torch.ones(1, 2), "bias": torch.zeros(1)})


def test_long_lists_are_cut():
    with pytest.raises(UserError, match="missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias and 2 more$"):
        load_weights(torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(4))), {})
