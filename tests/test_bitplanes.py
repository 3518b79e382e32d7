"""Bit-planes of weight codes and the folder where they are kept."""

import json
import multiprocessing
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.quant import CrossbarSpec, PlaneStore, QLinearDoreFa, compose, decompose, read_planes
from models.quant.storage import bitplanes

pytestmark = pytest.mark.usefixtures("one_thread")


def codes(*shape, bits=4, seed=0):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- decomposition ---------------------------------------------------------------------------------------------------


def test_worked_example():
    planes = decompose(torch.tensor([[7, 8, 8], [8, 8, 8], [8, 7, 7]]), 4, 1)
    low = [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert planes.dtype == torch.uint8
    assert planes.tolist() == [low, low, low, [[0, 1, 1], [1, 1, 1], [1, 0, 0]]]


def test_example_of_a_layer():
    assert decompose(codes(128, 128, 3, 3), 4, 1).shape == (4, 128, 128, 3, 3)


@pytest.mark.parametrize("w_bits, cell_bits, code, cells", [
    (4, 3, 0b1101, [0b101, 1]), (4, 2, 0b1101, [1, 3]), (4, 4, 13, [13]), (8, 3, 0b10110101, [0b101, 0b110, 0b10]),
    (5, 2, 0b10011, [3, 0, 1]), (1, 1, 1, [1]), (8, 8, 255, [255])])
def test_cells_least_significant_first(w_bits, cell_bits, code, cells):
    assert decompose(torch.tensor([code]), w_bits, cell_bits).flatten().tolist() == cells


@given(w_bits=st.integers(1, 8), cell_bits=st.integers(1, 8), dtype=st.sampled_from([torch.uint8, torch.int64]))
def test_decomposition_loses_nothing(w_bits, cell_bits, dtype):
    cell_bits = min(cell_bits, w_bits)
    every = torch.arange(2**w_bits).to(dtype)
    planes = decompose(every, w_bits, cell_bits)
    assert len(planes) == -(-w_bits // cell_bits)
    assert torch.equal(sum(plane.long() << (cell_bits * k) for k, plane in enumerate(planes)), every.long())
    assert all(int(plane.max()) == 2 ** min(cell_bits, w_bits - cell_bits * k) - 1 for k, plane in enumerate(planes))
    assert torch.equal(compose(planes, w_bits, cell_bits), every.to(torch.uint8))


@pytest.mark.parametrize("bad, message", [
    (torch.tensor([3, 16]), "from 3 to 16; 4 bits hold 0 to 15"), (torch.tensor([-1, 3]), "from -1 to 3"),
    (torch.tensor([259]), "259"), (torch.tensor([3.7]), "float32"), (torch.tensor([1 + 1j]), "complex")])
def test_decompose_refuses_what_is_no_code(bad, message):
    with pytest.raises(ValueError, match=message):
        decompose(bad, 4, 1)


@pytest.mark.parametrize("planes, message", [
    (torch.zeros(3, 2, 2, dtype=torch.uint8), r"\[3\] planes for 2 slices of a 4-bit weight on 3-bit cells"),
    (torch.zeros(2, 2), "float32"), (torch.tensor(3), "planes for 2 slices"),
    (torch.tensor([[8], [0]]), "plane 0 holds cell values from 8 to 8; its cells hold 0 to 7"),
    (torch.tensor([[0], [2]]), "plane 1 holds cell values from 2 to 2; its cells hold 0 to 1"),
    (torch.tensor([[-1], [1]]), "plane 0 .* from -1"), (torch.tensor([[256], [0]]), "plane 0 .* 256")])
def test_compose_refuses_what_no_cell_holds(planes, message):
    with pytest.raises(ValueError, match=message):
        compose(planes, 4, 3)


# ---- the store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers():
    return [("features.3", codes(6, 4, 3, 3, seed=1)), ("classifier.0", codes(5, 8, 1, 1, seed=2))]


@pytest.fixture
def store(tmp_path):
    return PlaneStore(tmp_path, "vgg7", 4, 3)


def listed(store):
    return sorted(os.listdir(store.folder))


def planes_of(layers, store):
    return [decompose(w_codes, store.w_bits, store.cell_bits) for _, w_codes in layers]


def check(store, layers):
    """The folder holds exactly these layers, as anyone reads them."""
    assert listed(store) == [*(f"bit_levels{i}_ideal.pt" for i in range(len(layers))), "manifest.json"]
    for index, planes in enumerate(planes_of(layers, store)):
        assert torch.equal(torch.load(store.path(index), weights_only=True), planes)


def test_files_and_manifest(store, layers, tmp_path):
    assert store.write(layers) == 2
    assert store.folder == tmp_path / "vgg7_w4_c3"
    check(store, layers)
    planes = torch.load(store.path(0), weights_only=True)
    assert type(planes) is torch.Tensor and planes.dtype == torch.uint8 and planes.shape == (2, 6, 4, 3, 3)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert set(manifest) == {"bit_levels0_ideal.pt", "bit_levels1_ideal.pt"}
    entry = manifest["bit_levels1_ideal.pt"]
    assert {key: entry[key] for key in ("layer", "shape", "w_bits", "cell_bits")} == {
        "layer": "classifier.0", "shape": [2, 5, 8, 1, 1], "w_bits": 4, "cell_bits": 3}
    assert len(entry["sha256"]) == 64 and entry["sha256"] != manifest["bit_levels0_ideal.pt"]["sha256"]


def test_files_that_fit_are_reused(store, layers, caplog):
    store.write(layers)
    before = {name: (store.folder / name).stat().st_mtime_ns for name in listed(store)}
    caplog.set_level("INFO")
    assert store.write(layers) == 0
    assert {name: (store.folder / name).stat().st_mtime_ns for name in listed(store)} == before
    assert not caplog.records


def test_stale_files_are_rebuilt_with_a_line_in_the_log(store, layers, caplog):
    store.write(layers)
    changed = [layers[0], ("classifier.0", codes(5, 8, 1, 1, seed=3))]
    caplog.set_level("INFO")
    assert store.write(changed) == 1
    check(store, changed)
    (line,) = caplog.messages
    assert "bit_levels1_ideal.pt" in line and "other weights" in line and "rebuilt" in line


def test_one_bit_of_one_weight_makes_a_file_stale(store, layers):
    store.write(layers)
    layers[0][1][5, 3, 2, 1] ^= 1
    assert store.write(layers) == 1
    check(store, layers)


def test_other_shape_with_the_same_bytes_is_stale(store, layers):
    store.write(layers)
    reshaped = [layers[0], ("classifier.0", layers[1][1].reshape(8, 5, 1, 1))]
    assert store.write(reshaped) == 1
    check(store, reshaped)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncated(path, layers, trace):
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path, layers, trace):
    path.write_bytes(b"")


def missing(path, layers, trace):
    path.unlink()


def other_values(path, layers, trace):
    torch.save(torch.load(path, weights_only=True) ^ 1, path)


def other_type(path, layers, trace):
    torch.save(torch.load(path, weights_only=True).float(), path)


def no_tensor(path, layers, trace):
    torch.save([torch.zeros(2)], path)


def foreign(path, layers, trace):
    path.write_text("not a tensor")


def malicious(path, layers, trace):
    torch.save(Malicious(trace), path)


def malicious_pickle(path, layers, trace):
    path.write_bytes(pickle.dumps(Malicious(trace)))


def flipped(path, layers, trace):
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path, weights_only=True).numpy().tobytes())] ^= 1
    path.write_bytes(content)


DAMAGE = [flipped, truncated, emptied, missing, other_values, no_tensor, foreign, malicious, malicious_pickle]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", DAMAGE + [other_type])
def test_damaged_files_are_rebuilt(store, layers, damage, tmp_path, caplog):
    """Also where the manifest still says that all is well."""
    store.write(layers)
    damage(store.path(0), layers, tmp_path / "executed")
    caplog.set_level("INFO")
    assert store.write(layers) == 1
    check(store, layers)
    assert torch.load(store.path(0), weights_only=True).dtype == torch.uint8
    assert not (tmp_path / "executed").exists()
    assert len(caplog.messages) == (damage is not missing)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, '{"bit_levels0_ideal.pt": 3}', '{"bit_levels0_ideal.pt": {}}'])
def test_damaged_manifest(store, layers, text):
    store.write(layers)
    good = (store.folder / "manifest.json").read_text()
    (store.folder / "manifest.json").write_text(text)
    assert store.write(layers) == 2
    check(store, layers)
    assert (store.folder / "manifest.json").read_text() == good


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage is not other_values])
def test_reading_refuses_damaged_files(store, layers, damage, tmp_path):
    store.write(layers)
    damage(store.path(1), layers, tmp_path / "executed")
    with pytest.raises(ValueError, match="bit_levels1_ideal.pt") as error:
        read_planes(store.folder, [(name, w.shape) for name, w in layers], 4, 3)
    assert not (tmp_path / "executed").exists()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_edited_planes_are_used(store, layers):
    """Someone sets the most significant cell of one weight; that weight alone changes, and with it the layer."""
    store.write(layers)
    shapes = [(name, w.shape) for name, w in layers]
    assert all(torch.equal(a, w) for a, (_, w) in zip(read_planes(store.folder, shapes, 4, 3), layers))
    planes = torch.load(store.path(1), weights_only=True)
    planes[1, 2, 3] ^= 1
    torch.save(planes, store.path(1))
    first, second = read_planes(store.folder, shapes, 4, 3)
    wanted = layers[1][1].clone()
    wanted[2, 3] ^= 8
    assert torch.equal(first, layers[0][1]) and torch.equal(second, wanted) and second.dtype == torch.uint8

    layer = QLinearDoreFa(8, 5, bias=False, alpha_init=15.0, spec=CrossbarSpec(cell_bits=3, adc_range="ideal"))
    layer.set_codes(second)
    x = torch.arange(8.0)[None]
    wanted = (x @ (2 * wanted.flatten(1).float() - 15).T) / 15
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("planes, message", [
    (torch.zeros(1, 5, 8, 1, 1, dtype=torch.uint8), r"has shape \[1, 5, 8, 1, 1\]; layer classifier.0 needs \[2, 5, 8"),
    (torch.zeros(2, 8, 5, 1, 1, dtype=torch.uint8), "has shape"), (torch.tensor(1), "has shape"),
    (torch.full((2, 5, 8, 1, 1), 2), "plane 1 holds cell values from 2 to 2; its cells hold 0 to 1"),
    (torch.full((2, 5, 8, 1, 1), -1), "plane 0 holds cell values from -1"),
    (torch.zeros(2, 5, 8, 1, 1), "float32")])
def test_edited_planes_that_fit_no_cell_are_refused(store, layers, planes, message):
    store.write(layers)
    torch.save(planes, store.path(1))
    with pytest.raises(ValueError, match=f"bit_levels1_ideal.pt.*{message}"):
        read_planes(store.folder, [(name, w.shape) for name, w in layers], 4, 3)


def test_planes_of_other_cells_are_refused(store, layers):
    store.write(layers)
    with pytest.raises(ValueError, match=r"shape \[2, 6, 4, 3, 3\]; layer features.3 needs \[4, 6, 4, 3, 3\]"):
        read_planes(store.folder, [(name, w.shape) for name, w in layers], 4, 1)


@pytest.mark.parametrize("write", ["planes", "manifest"])
def test_interrupted_write_leaves_the_old_file(store, layers, write, monkeypatch):
    """A disk that fills up in the middle: the old file stays whole, and no temporary file is left."""
    store.write(layers)
    before = {name: (store.folder / name).read_bytes() for name in listed(store)}

    def full_disk(*args, **kwargs):
        if write == "planes":
            args[1].write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(*((bitplanes.torch, "save") if write == "planes" else (os, "fsync")), full_disk)
    with pytest.raises(OSError, match="No space"):
        store.write([(name, w ^ 1) for name, w in layers])
    assert {name: (store.folder / name).read_bytes() for name in listed(store)} == before


def test_files_can_be_read_by_others(store, layers):
    """As the umask says, not by their owner alone: two users may share the folder."""
    store.write(layers)
    plain = store.folder / "plain"
    plain.write_text("")
    assert {(store.folder / name).stat().st_mode for name in listed(store)} == {plain.stat().st_mode}


def test_two_writers_at_once(tmp_path):
    """Two processes write different weights into one folder: a reader finds whole files only, and one write heals."""
    def write(seed):
        for turn in range(20):
            store.write([(f"layer{i}", codes(64, 64, 3, 3, seed=seed + 2 * i + turn % 2)) for i in range(2)])

    store, reads = PlaneStore(tmp_path, "net", 4, 2), 0
    writers = [multiprocessing.get_context("fork").Process(target=write, args=(seed,)) for seed in (10, 20)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for index in range(2):
            if store.path(index).exists():
                assert bitplanes.load_planes(store.path(index)).shape == (2, 64, 64, 3, 3)
                assert zipfile.ZipFile(store.path(index)).testzip() is None
                reads += 1
        manifest = store.folder / "manifest.json"
        assert not manifest.exists() or len(json.loads(manifest.read_text())) == 2
    assert [writer.exitcode for writer in writers] == [0, 0] and reads > 3
    last = [("layer0", codes(64, 64, 3, 3, seed=1)), ("layer1", codes(64, 64, 3, 3, seed=2))]
    store.write(last)
    check(store, last)
