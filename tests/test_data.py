"""Data sets, splits and augmentation, against arithmetic written again here in NumPy."""

import hashlib
import os
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from experiment.inputs import data as datasets
from experiment.inputs import folders
from experiment.program.cli import UserError
from experiment.inputs.data import Batches, generator
from experiment.inputs.streamed import Streamed


def noise(n, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator("noise", seed))


# -- augmentation


def test_crop_is_a_window_of_the_padded_image_and_reaches_every_offset():
    x = noise(600)
    out = datasets.augment(x, generator(1), torch.arange(600) % 3 == 0, pad=4).numpy()
    padded = np.zeros((600, 3, 40, 40), np.uint8)
    padded[:, :, 4:36, 4:36] = x.numpy()
    seen = set()
    for i, (image, big) in enumerate(zip(out, padded, strict=True)):
        found = [
            (dy, dx, mirrored)
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            if np.array_equal(image, big[:, dy : dy + 32, dx : dx + 32][:, :, :: -1 if mirrored else 1])
        ]
        assert len(found) == 1 and found[0][2] == (i % 3 == 0)
        seen.add(found[0])
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(9))
    assert len({(dy, dx) for dy, dx, _ in seen}) > 60  # the two offsets are drawn independently (of 81)


def test_nothing_to_do_leaves_the_images_alone():
    x = noise(20)
    assert torch.equal(datasets.augment(x, generator(1), pad=0, cutout=0), x)


def test_half_of_the_images_are_mirrored_and_in_the_next_epoch_the_other_half():
    x = noise(400)
    sides = []
    for epoch in (0, 1, 2):
        out = torch.empty_like(x)
        for _, images, labels in datasets.train_batches(x, torch.arange(400), 40, seed=1, epoch=epoch, pad=0):
            out[labels] = images
        same = (out == x).flatten(1).all(1)
        assert torch.equal(~same, (out == x.flip(-1)).flatten(1).all(1))
        sides.append(same)
    assert 150 < sides[0].sum() < 250
    assert torch.equal(sides[0], ~sides[1]) and torch.equal(sides[0], sides[2])
    plain = datasets.train_batches(x, torch.arange(400), 40, seed=1, epoch=0, flip=False, pad=0)
    assert all(torch.equal(images, x[labels]) for _, images, labels in plain)


@pytest.mark.parametrize("side", [1, 8, 9])
def test_cutout_paints_one_square_in_the_fill_colour(side):
    x = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    out = datasets.augment(x, generator(3), pad=0, cutout=side, fill=(10, 20, 30)).numpy()
    full = 0
    for image in out:
        rows, columns = np.nonzero(image[0] == 10)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width, "a filled rectangle"
        assert height <= side and width <= side
        full += height == width == side
        covered = np.zeros((32, 32), bool)
        covered[rows, columns] = True
        for channel, colour in enumerate((10, 20, 30)):
            assert np.array_equal(image[channel], np.where(covered, colour, 255))
    assert full > 150  # smaller only where it reaches over the edge


@pytest.mark.parametrize("trivial", [False, True])
def test_augmentation_depends_on_the_generator_alone(trivial):
    x = noise(50)
    before = torch.random.get_rng_state()
    a, b, other = (datasets.augment(x, generator("augment", 0, 0, step), cutout=8, trivial=trivial) for step in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    part = datasets.augment(x[10:30], generator("augment", 0, 0, 1), cutout=8, trivial=trivial, of=50, part=slice(10, 30))
    assert torch.equal(part, a[10:30])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_trivial_augment_changes_each_image_in_one_way():
    x = torch.from_numpy(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (600, 3, 32, 1)))  # all alike: columns from dark to bright
    x[:, :, 0] = 0  # and a dark upper edge, so that a change of place is none of brightness
    out = datasets.augment(x, generator(4), pad=0, trivial=True, fill=(10, 20, 30))
    assert out.dtype == torch.uint8 and out.shape == x.shape
    coloured = (out == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all(1).any(2).any(1)
    moved = coloured.sum().item()  # 5 of the 14 changes move the image and show what is behind it; a strength near 0 moves none
    assert abs(moved / 600 - 5 / 14 * 30 / 31) < 4 * (5 / 14 * 9 / 14 / 600) ** 0.5
    assert len(out.unique(dim=0)) > 5 * 14, "strengths differ"
    assert 600 / 14 * 0.5 < (out == x).flatten(1).all(1).sum() < 600 / 2


def test_normalize_and_pixel_stats():
    x = noise(50)
    mean, std = datasets.pixel_stats(x)
    exact = x.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std((0, 2, 3)), rtol=1e-9)
    out = datasets.normalize(x, mean, std)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    expected = (exact - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    assert datasets.pixel_stats(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[1] == (1 / 255,) * 3  # never 0


def test_batches_are_normalised_and_come_any_number_of_times():
    x, stats = noise(7), ((0.4, 0.1, 0.2), (0.3, 0.2, 0.1))
    batches = Batches(x, *stats, 3)
    assert len(batches) == 3 and batches.count == 7
    for _ in range(2):
        found = list(batches)
        assert [len(batch) for batch in found] == [3, 3, 1]
        assert torch.equal(torch.cat(found), datasets.normalize(x, *stats))
        assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in found)
    assert len(Batches(x[:6], *stats, 3)) == 2 and len(list(Batches(x, *stats, 100))) == len(Batches(x, *stats, 100)) == 1
    assert len(Batches(x[:0], *stats, 3)) == 0 and list(Batches(x[:0], *stats, 3)) == []


# -- batches and splits


def test_an_epoch_started_in_the_middle_gives_the_same_batches():
    x, y = noise(70), torch.arange(70)
    whole = list(datasets.train_batches(x, y, 16, seed=3, epoch=5))
    assert [step for step, _, _ in whole] == [0, 1, 2, 3]
    assert len(torch.cat([labels for _, _, labels in whole]).unique()) == 64  # no image twice
    for (step, images, labels), (step2, images2, labels2) in zip(
        whole[2:], datasets.train_batches(x, y, 16, seed=3, epoch=5, first_step=2), strict=True
    ):
        assert step == step2 and torch.equal(images, images2) and torch.equal(labels, labels2)


def test_epochs_and_seeds_differ():
    x, y = noise(32), torch.arange(32)
    orders = [next(iter(datasets.train_batches(x, y, 32, seed=s, epoch=e)))[2].tolist() for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(sorted(order) == list(range(32)) for order in orders)


def test_images_keep_their_labels():
    y = torch.arange(40)
    x = y.to(torch.uint8)[:, None, None, None].expand(40, 3, 32, 32)
    for _, images, labels in datasets.train_batches(x, y, 8, seed=0, epoch=0, pad=4):
        assert torch.equal(images.amax((1, 2, 3)).long(), labels)


def test_stratified_split_is_disjoint_fixed_and_takes_the_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100, generator=generator(0))]
    kept, held = datasets.stratified_split(labels, 0.1, seed=4)
    assert sorted(kept.tolist() + held.tolist()) == list(range(100))
    assert labels[held].bincount().tolist() == [5, 3, 2]
    assert torch.equal(held, datasets.stratified_split(labels, 0.1, seed=4)[1])
    assert not torch.equal(held, datasets.stratified_split(labels, 0.1, seed=5)[1])
    assert len(datasets.stratified_split(labels, 0.0, seed=4)[1]) == 0


def test_training_split_of_some_images():
    labels = torch.tensor([0, 1] * 100)
    train, val = datasets.training_split(labels, 0.2, seed=4, limit=50)
    picked = train.tolist() + val.tolist()
    assert len(train) == 40 and len(val) == 10 and len(set(picked)) == 50
    assert max(picked) >= 150 and 15 < labels[picked].sum() < 35  # from the whole set, whatever the class
    again, other = (datasets.training_split(labels, 0.2, seed, limit=50) for seed in (4, 5))
    assert torch.equal(train, again[0]) and set(picked) != set(torch.cat(other).tolist())
    for part, whole in zip(datasets.training_split(labels, 0.2, seed=4), datasets.stratified_split(labels, 0.2, seed=4)):
        assert torch.equal(part, whole)


def test_random_numbers_are_those_of_earlier_versions():
    """Runs that they began go on with the same splits and batches."""
    assert generator("split", 0, "a").initial_seed() == 26091004205654277


def test_an_epoch_is_full_batches_or_one_smaller():
    assert [datasets.steps_per_epoch(n, 16) for n in (5, 16, 31, 32, 70)] == [1, 1, 1, 2, 4]
    [(step, images, labels)] = datasets.train_batches(noise(5), torch.arange(5), 16, seed=0, epoch=0)
    assert step == 0 and len(images) == 5 and sorted(labels.tolist()) == list(range(5))


# -- digits


def test_digits():
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    assert data.train_x.shape == (1438, 3, 32, 32) and data.test_x.shape == (359, 3, 32, 32)
    assert data.train_x.dtype == torch.uint8 and data.train_y.dtype == torch.int64
    assert not data.flip  # a mirrored digit is another sign
    pixels, labels = load_digits(return_X_y=True)
    assert data.test_y.bincount().tolist() == [round(0.2 * n) for n in np.bincount(labels)]

    # Every digit is in one of the two sets. The corner pixels of the enlarged image are those of the original.
    def key(corners, label):
        return (*np.round(np.asarray(corners, float)).astype(int).tolist(), int(label))

    original = sorted(key(p.reshape(8, 8)[[0, 0, -1, -1], [0, -1, 0, -1]] * 255 / 16, y) for p, y in zip(pixels, labels))
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    assert sorted(key(i[0, [0, 0, -1, -1], [0, -1, 0, -1]], label) for i, label in zip(x, y)) == original
    again = datasets.load("digits")
    assert torch.equal(again.test_x, data.test_x) and torch.equal(again.train_y, data.train_y)
    test = {image.numpy().tobytes() for image in data.test_x}
    assert sum(image.numpy().tobytes() in test for image in data.train_x) == 0


# -- folders of images


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """train/ and test/ with two classes of lossless images, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise(1, seed=f"{split}{label}{i}")[0].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_imagefolder_pixels_and_labels(tree):
    data = datasets.load("imagefolder", tree)
    assert data.classes == ("cat", "dog") and datasets.num_classes("imagefolder", tree) == 2
    assert data.train_y.tolist() == [0, 0, 0, 1, 1, 1] and data.test_y.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.train_x[4], noise(1, seed="train11")[0])
    assert torch.equal(data.test_x[3], noise(1, seed="test11")[0])
    assert data.mean == pytest.approx((data.train_x.double() / 255).mean((0, 2, 3)).tolist())


def test_imagefolder_decodes_once(tree, monkeypatch):
    first = datasets.load("imagefolder", tree)
    monkeypatch.setattr(folders, "_decode", lambda path, size: pytest.fail("decoded again"))
    monkeypatch.setattr(folders.Path, "read_bytes", lambda path: pytest.fail("its content was read again"))
    second = datasets.load("imagefolder", str(tree))
    assert torch.equal(first.train_x, second.train_x) and torch.equal(first.test_x, second.test_x)


def test_imagefolder_notices_changed_added_and_removed_files(tree):
    datasets.load("imagefolder", tree)
    lines = []
    path = tree / "train" / "dog" / "0.png"
    status = path.stat()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(path)
    with path.open("ab") as file:  # same size as before: the time of change must tell
        file.write(b"\0" * (status.st_size - path.stat().st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert datasets.load("imagefolder", tree, lines.append).train_x[3].unique().tolist() == [7]
    assert "decoding again" in lines[0]
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(tree / "train" / "cat" / "9.png")
    assert len(datasets.load("imagefolder", tree).train_x) == 7
    (tree / "test" / "cat" / "0.png").rename(tree / "test" / "dog" / "7.png")
    assert datasets.load("imagefolder", tree).test_y.tolist() == [0, 1, 1, 1]


def test_images_lie_in_the_order_of_their_paths(tree):
    """A run that was begun before goes on with the same images, and finds its cache."""
    cat = tree / "train" / "cat"
    for i, name in enumerate(("2a/z.png", "10.png", "2a/b/a.JPG", "2.GIF", ".hidden.png", "notes.txt", "1.PNG.bak")):
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(cat / name, format="PNG")
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    (tree / "train" / "README.txt").touch()
    expected = [f"train/cat/{name}" for name in ("0.png", "1.png", "10.png", "2.GIF", "2.png", "2a/b/a.JPG", "2a/z.png")]
    expected += [f"train/dog/{i}.png" for i in range(3)]
    expected += [f"test/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)]

    data = datasets.load("imagefolder", tree)
    assert data.train_y.tolist() == [0] * 7 + [1] * 3
    assert [data.train_x[i].unique().tolist() for i in (2, 3, 5, 6)] == [[1], [3], [2], [0]]
    contents = hashlib.sha256(b"32x32 RGB, 3")
    for name in expected:
        contents.update(f"{name}\0".encode() + hashlib.sha256((tree / name).read_bytes()).digest())
    assert torch.load(tree / ".images_32x32.pt", weights_only=True)["contents"] == contents.hexdigest()


def test_files_of_one_size_and_time_are_told_apart(tree):
    """Two classes change their names, and a file is written over: no size and no time of change tells."""
    for path in tree.rglob("*.png"):
        Image.open(path).save(path, format="BMP")
        os.utime(path, (0, 0))
    before = datasets.load("imagefolder", tree)
    (tree / "train" / "cat").rename(tree / "train" / "other")
    (tree / "train" / "dog").rename(tree / "train" / "cat")
    (tree / "train" / "other").rename(tree / "train" / "dog")
    after = datasets.load("imagefolder", tree)
    assert torch.equal(after.train_x, before.train_x[[3, 4, 5, 0, 1, 2]]) and torch.equal(after.test_x, before.test_x)
    path = tree / "test" / "cat" / "0.png"
    with path.open("r+b") as file:
        file.write((tree / "test" / "dog" / "1.png").read_bytes())
    os.utime(path, (0, 0))
    assert torch.equal(datasets.load("imagefolder", tree).test_x[0], before.test_x[3])


def test_a_copy_of_a_folder_brings_its_cache(tree, tmp_path, monkeypatch):
    """Whatever its files' times are; not where one of them is another."""
    first = datasets.load("imagefolder", tree)
    for name in ("same", "other"):
        shutil.copytree(tree, tmp_path / name, copy_function=shutil.copyfile)
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(tmp_path / "other" / "train" / "dog" / "0.png")
    assert datasets.load("imagefolder", tmp_path / "other").train_x[3].unique().tolist() == [7]
    monkeypatch.setattr(folders, "_decode", lambda path, size: pytest.fail("decoded again"))
    assert torch.equal(datasets.load("imagefolder", tmp_path / "same").train_x, first.train_x)


def test_names_that_are_no_text(tree, tmp_path):
    """As all names of other letters are where the locale is ASCII."""
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "cat" / "\udcff.png")
    odd = tmp_path / "\udcfe"
    tree.rename(odd)
    (odd / ".images_32x32.pt").mkdir()  # the cache lies in the other place, whose name is made of the folder's
    assert torch.equal(datasets.load("imagefolder", odd).train_x[2], noise(1, seed="train00")[0])


def test_ctrl_c_while_the_cache_is_written_stops(tree, monkeypatch):
    def interrupted(content, file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save ends then

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("imagefolder", tree)


def test_classes_are_at_least_two(tree):
    for split in ("train", "test"):
        (tree / split / "dog").rename(tree / split / ".dog")
    with pytest.raises(UserError, match=f"{tree}/train: needs at least two class folders, found 1"):
        datasets.load("imagefolder", tree)
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / ".cat")
    with pytest.raises(UserError, match="found 0"):
        datasets.num_classes("imagefolder", tree)


def test_images_of_other_classes_are_refused(tree):
    data = datasets.load("imagefolder", tree)
    assert datasets.as_trained(data, None, "net.pt") is data
    trained_on = {"classes": ["cat", "dog"], "mean": [0.1] * 3, "std": [0.2] * 3}
    assert (scaled := datasets.as_trained(data, trained_on, "net.pt")).mean == (0.1,) * 3 and scaled.std == (0.2,) * 3
    with pytest.raises(UserError) as error:
        datasets.as_trained(data, trained_on | {"classes": ["cat", "eel"]}, "net.pt")
    assert str(error.value) == ("net.pt was trained on other classes: the images have dog instead of eel; give the "
                                "folders the names that they had in the training")


def test_files_that_cannot_be_read_are_named(tree):
    link = tree / "train" / "cat" / "link.png"
    link.symlink_to(tree / "nowhere.png")
    with pytest.raises(UserError, match=f"cannot read {link}: No such file"):
        datasets.load("imagefolder", tree)
    link.unlink()
    link.with_suffix(".ppm").write_bytes(b"P6 99999999999 x")  # ValueError in PIL
    with pytest.raises(UserError, match="cannot decode .*link.ppm"):
        datasets.load("imagefolder", tree)


def test_a_folder_that_is_mistyped_is_not_left_behind(tmp_path, monkeypatch):
    import torchvision

    def fail(self, root, train, download):
        os.makedirs(root)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", fail)
    with pytest.raises(UserError, match="could not be downloaded"):
        datasets.load("cifar10", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    """All of them, by rounding to the 256 that are left; pixels without a known full scale are refused."""
    shades = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for name, mode in (("a.png", None), ("a.tif", None), ("a.pgm", None), ("wide.tif", np.int32), ("float.tif", np.float32)):
        Image.fromarray(shades if mode is None else shades.astype(mode)).save(tmp_path / name)
    expected = torch.from_numpy((shades.astype(np.int64) * 2 + 257) // 514).expand(3, -1, -1)
    for name in ("a.png", "a.tif", "a.pgm"):
        assert torch.equal(folders._decode(tmp_path / name, 32), expected.to(torch.uint8))
        seen = Streamed([tmp_path / name], lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float()).read()[0]
        assert torch.equal(seen, expected.float())
    for name in ("wide.tif", "float.tif"):
        with pytest.raises(UserError, match=f"{name}: its pixels are .* no known full scale; save it with 8 or 16 bits"):
            folders._decode(tmp_path / name, 32)


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "tensor"])
def test_imagefolder_never_uses_a_damaged_cache(tree, damage):
    good = datasets.load("imagefolder", tree)
    cache = tree / ".images_32x32.pt"
    data = bytearray(cache.read_bytes())
    if damage == "truncate":
        cache.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[data.find(good.train_x.numpy().tobytes()[:64]) + 5] ^= 1
        cache.write_bytes(data)
    else:
        torch.save([1, 2, 3] if damage == "foreign" else torch.zeros(3), cache)
    lines = []
    again = datasets.load("imagefolder", tree, lines.append)
    assert torch.equal(again.train_x, good.train_x) and "cannot be used" in lines[0]
    lines.clear()
    datasets.load("imagefolder", tree, lines.append)
    assert lines == []  # the cache was made good


def test_imagefolder_that_cannot_be_written_is_cached_elsewhere(tree, tmp_path, monkeypatch):
    (tree / ".images_32x32.pt").mkdir()  # in the way of the cache file, for the superuser too
    datasets.load("imagefolder", tree)
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1
    monkeypatch.setattr(folders, "_decode", lambda path, size: pytest.fail("decoded again"))
    datasets.load("imagefolder", tree)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "train" / "cat" / "0.png"))  # no folder can be made there
    lines = []
    assert len(datasets.load("imagefolder", tree, lines.append).train_x) == 6
    assert "not kept" in lines[-1]


def test_imagefolder_scales_and_crops_other_sizes(tree):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = (200, 100, 50)  # the centre square
    Image.fromarray(pixels).save(tree / "train" / "cat" / "0.png")
    Image.fromarray(np.full((5, 5), 77, np.uint8)).save(tree / "train" / "cat" / "1.png")  # grey
    squares = np.indices((64, 64)).sum(0) % 2 * np.uint8(200)
    Image.fromarray(squares.astype(np.uint8)).save(tree / "train" / "cat" / "2.png")  # grey from far away
    x = datasets.load("imagefolder", tree).train_x
    assert (x[2].float() - 100).abs()[:, 1:-1, 1:-1].max() <= 10
    assert torch.equal(x[0, :, 1:-1, 1:-1], torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 30, 30))
    assert x[1].unique().tolist() == [77]


def test_imagefolder_takes_val_where_there_is_no_test(tree):
    (tree / "test").rename(tree / "val")
    assert torch.equal(datasets.load("imagefolder", tree).test_x[3], noise(1, seed="test11")[0])


@pytest.mark.parametrize("transform", [None, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float()])
def test_imagefolder_takes_val_beside_test_where_it_is_asked_for(tree, transform):
    """Each has a cache of its own, so that neither is decoded again when the other was looked at."""
    shutil.copytree(tree / "test" / "cat", tree / "val" / "dog")
    shutil.copytree(tree / "test" / "dog", tree / "val" / "cat")
    for asked, order in ((False, ["test00", "test01", "test10", "test11"]), (True, ["test10", "test11", "test00", "test01"])) * 2:
        lines = []
        data = datasets.load("imagefolder", tree, lines.append, transform, validation=asked)
        shown = data.test_x.read() if transform else data.test_x
        assert torch.equal(shown, torch.cat([noise(1, seed=seed) for seed in order]).to(shown.dtype)) and data.validation == asked
        assert any("val is not used: test/ is the test set" in line for line in lines) != asked
    assert transform or not any("decod" in line for line in lines)


def break_nothing_there(tree):
    (tree / "train").rename(tree / "training")


def break_class_without_test(tree):
    (tree / "test" / "dog").rename(tree / "test" / "wolf")


def break_empty_class(tree):
    for split in ("train", "test"):
        for name in ("eel", "ant"):
            (tree / split / name).mkdir()


def break_image(tree):
    (tree / "train" / "dog" / "2.png").write_bytes(b"not an image")


@pytest.mark.parametrize("damage, words", [
    (break_nothing_there, "train/<class>"),
    (break_class_without_test, "dog, wolf"),
    (break_empty_class, "no images in .*train/ant$"),
    (break_image, "2.png"),
])
def test_imagefolder_errors_name_what_is_wrong(tree, damage, words):
    damage(tree)
    with pytest.raises(UserError, match=words):
        datasets.load("imagefolder", tree)


# -- CIFAR


@pytest.mark.parametrize("name, archive", [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_cifar_offline_says_what_to_put_where(name, archive, tmp_path, monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "__init__", offline)
    with pytest.raises(UserError, match=archive) as error:
        datasets.load(name, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_cifar_channels_come_first(monkeypatch):
    import torchvision

    class Split:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data = np.arange((4 if train else 2) * 3072, dtype=np.uint32).astype(np.uint8).reshape(-1, 32, 32, 3)
            self.targets = [0, 1] * (2 if train else 1)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Split)
    data = datasets.load("cifar10", "nowhere")
    assert data.train_x.shape == (4, 3, 32, 32) and data.train_x[0, :, 0, 0].tolist() == [0, 1, 2]
    assert data.test_y.tolist() == [0, 1] and data.flip and data.pad == 4


def test_real_cifar10_images():
    root = os.environ.get("CIFAR10_FOLDER")
    if not root:
        pytest.skip("set CIFAR10_FOLDER to a folder with train/<class> and test/<class> of the CIFAR-10 images")
    data = datasets.load("imagefolder", root)
    assert data.train_y.bincount().tolist() == [5000] * 10 and data.test_y.bincount().tolist() == [1000] * 10
    np.testing.assert_allclose(data.mean, datasets.CIFAR_STATS["cifar10"][0], atol=0.005)
    np.testing.assert_allclose(data.std, datasets.CIFAR_STATS["cifar10"][1], atol=0.01)


def test_unknown_data_set_lists_the_known():
    with pytest.raises(UserError, match="digits, cifar10, cifar100, imagefolder"):
        datasets.load("mnist")


@pytest.mark.parametrize("size, count", [(500, 256), (120, 64), (1000, 256), (64, 64), (10, 64), (50_000, 256)])
def test_some_images_are_of_all_classes(size, count):
    places = datasets.evenly(size, count)
    assert len(places) == min(size, count) == len(places.unique())
    of_class = torch.bincount(places * 10 // size, minlength=10)  # ten classes, one behind the other
    assert of_class.max() - of_class.min() <= 1
