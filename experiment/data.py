"""Images in memory: load a data set as one uint8 tensor, augment and normalise whole batches on the device.

    data = load("digits")                                  # or cifar10, cifar100, imagefolder
    for step, x, y in train_batches(data.train_x.to(device), data.train_y.to(device), 128, seed=0, epoch=0):
        x = normalize(x, data.mean, data.std)              # float32 [N, 3, 32, 32], channels_last

A CIFAR-sized set is 150 MB as uint8. Kept on the device it needs no worker processes, and cropping 128 images at once
takes milliseconds on a CPU.

digits       scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 3x32x32. Needs no download.
cifar10/100  read from, or downloaded to, data_path by torchvision.
imagefolder  any tree data_path/train/<class>/*.jpg with data_path/test/<class>/ or data_path/val/<class>/. Decoded once
             into a cache file that is used again as long as no file's name, size or time of change differs.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from experiment.checkpoint import read_torch_file
from experiment.cli import UserError, one_line
from models.quant.files import atomic_write

DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")
SIZE = 32  # pixels a side; the networks here are built for 32x32 images
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

# Mean and standard deviation of the training pixels per channel, as fractions of full scale.
CIFAR_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True)
class Dataset:
    name: str
    train_x: torch.Tensor  # uint8 [N, 3, 32, 32]
    train_y: torch.Tensor  # int64 [N]
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: tuple  # class names; a label is an index into them
    mean: tuple  # per channel, of full scale 1.0
    std: tuple
    pad: int = 4  # random crops shift an image by up to this many pixels
    flip: bool = True  # whether a mirrored image still shows the same class


def load(dataset, data_path="./data", log=print):
    """The data set named `dataset` (one of DATASETS). log(text) is told about caches and odd folders."""
    if dataset == "digits":
        return _digits()
    if dataset in CIFAR_STATS:
        return _cifar(dataset, data_path)
    if dataset == "imagefolder":
        return _imagefolder(Path(data_path), log)
    raise UserError(f"--dataset {dataset}: unknown, choose from {', '.join(DATASETS)}")


def num_classes(dataset, data_path="./data"):
    """How many classes load() would find, without decoding or downloading anything."""
    if dataset == "imagefolder":
        return len(_class_names(_folders(Path(data_path))[0]))
    return {"digits": 10, "cifar10": 10, "cifar100": 100}[dataset]


def check_classes(data, trained_on, source):
    """Refuse images whose labels mean other classes than those that the checkpoint `source` was trained on."""
    pairs = zip(data.classes, trained_on.get("classes", data.classes))
    other = [f"{name} instead of {trained}" for name, trained in pairs if name != trained]
    if other:
        raise UserError(f"{source} was trained on other classes: the images have {', '.join(other[:10])}"
                        + ("; labels count the sorted names: name the folders as in the training"
                           if data.name == "imagefolder" else ""))


def generator(*key):
    """A CPU random generator whose stream depends only on `key` (numbers and strings)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Splits, batches, augmentation


def stratified_split(labels, fraction, seed):
    """Split indices into (kept, held out), both ascending; of every class the same `fraction` is held out.

    The split depends on the labels, the fraction and the seed alone: a resumed run finds the same images.
    """
    held = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator("split", seed, label))
        held.append(members[order[: round(fraction * len(members))]])
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[torch.cat(held)] = True
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def training_split(labels, fraction, seed, limit=None):
    """(training, validation): indices into the training images of a run; of `limit` random ones only, if that is given."""
    if not limit:
        return stratified_split(labels, fraction, seed)
    pick = torch.randperm(len(labels), generator=generator("limit", seed))[:limit]
    return tuple(pick[part] for part in stratified_split(labels[pick], fraction, seed))


def steps_per_epoch(n_images, batch_size):
    """Full batches only: a last batch of a few images would upset the batch norm. A small set is one batch."""
    return max(1, n_images // batch_size)


def train_batches(x, y, batch_size, seed, epoch, first_step=0, flip=True, **augmentation):
    """Yield (step, images, labels), shuffled and augmented, from `first_step` on.

    Every epoch's order and every step's crops come from generators of their own, so that starting in the middle gives
    exactly the batches that an uninterrupted epoch would have given. flip: mirror half of the images in even epochs and
    the other half in odd ones, so that two epochs show both sides of each (K. Jordan, arXiv 2404.00498: better than random
    flips wherever flips help). augmentation: see augment().
    """
    order = torch.randperm(len(x), generator=generator("shuffle", seed, epoch)).to(x.device)
    mirrored = torch.randint(2, (len(x),), generator=generator("flip", seed)).to(x.device) == epoch % 2 if flip else None
    for step in range(first_step, steps_per_epoch(len(x), batch_size)):
        pick = order[step * batch_size : (step + 1) * batch_size]
        batch = augment(x[pick], generator("augment", seed, epoch, step), mirrored[pick] if flip else None, **augmentation)
        yield step, batch, y[pick]


def augment(x, rng, mirrored=None, pad=4, cutout=0, fill=(0, 0, 0)):
    """Randomly shift, mirror and partly cover each image of a batch x, uint8 [N, 3, H, W], on its own device.

    mirrored: bool [N], the images to mirror; None for none. pad: pixels of black border, from which an H x W window is
    cut. cutout: side in pixels of a square painted in the colour `fill` around a random pixel (0: none; it may reach
    over the edge).
    """
    n, _, height, width = x.shape

    def draw(high):  # from a CPU generator, so that CPU and GPU runs see the same images
        return torch.randint(high, (n,), generator=rng).to(x.device, non_blocking=True)

    if pad:
        windows = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [N, 3, 2 pad + 1, 2 pad + 1, H, W]
        x = windows[torch.arange(n, device=x.device), :, draw(2 * pad + 1), draw(2 * pad + 1)]
    if mirrored is not None:
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if cutout:

        def covered(length):  # [N, length]: the pixels from `cutout // 2` before a random one on
            start = draw(length)[:, None] - cutout // 2
            position = torch.arange(length, device=x.device)
            return (position >= start) & (position < start + cutout)

        square = covered(height)[:, None, :, None] & covered(width)[:, None, None, :]
        x = torch.where(square, torch.tensor(fill, dtype=x.dtype, device=x.device)[:, None, None], x)
    return x


def normalize(x, mean, std):
    """uint8 [N, 3, H, W] to float32 with mean 0 and deviation 1 per channel, in channels_last memory format."""
    mean = 255 * torch.tensor(mean, device=x.device)[:, None, None]
    std = 255 * torch.tensor(std, device=x.device)[:, None, None]
    return x.to(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def pixel_stats(x):
    """Mean and standard deviation per channel of uint8 images [N, 3, H, W], exact, as fractions of full scale."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(x.shape[1]):
        share = torch.bincount(x[:, channel].reshape(-1), minlength=256).double()
        share /= share.sum()
        mean.append((share @ levels).item())
        std.append(max((share @ (levels - mean[-1]) ** 2).sqrt().item(), 1 / 255))  # never divide by 0
    return tuple(mean), tuple(std)


# ---------------------------------------------------------------------------------------------------------------------
# The data sets


def _digits():
    from sklearn.datasets import load_digits  # takes a second to import and only this data set needs it

    grey, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(grey).float().reshape(-1, 1, 8, 8) * (255 / 16)  # 17 grey levels
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    x = x.round().to(torch.uint8).repeat(1, 3, 1, 1)
    y = torch.from_numpy(labels).long()
    train, test = stratified_split(y, 0.2, seed=0)
    mean, std = pixel_stats(x[train])
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", x[train], y[train], x[test], y[test], names, mean, std, flip=False)


def _cifar(name, data_path):
    from torchvision import datasets as torchvision_datasets

    kind, archive, folder = {
        "cifar10": (torchvision_datasets.CIFAR10, "cifar-10-python.tar.gz", "cifar-10-batches-py"),
        "cifar100": (torchvision_datasets.CIFAR100, "cifar-100-python.tar.gz", "cifar-100-python"),
    }[name]
    try:
        train, test = (kind(data_path, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {data_path} and could not be downloaded ({one_line(error)[:120]}): put {archive} from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html, or the unpacked {folder}, there"
        ) from error

    def tensors(split):  # torchvision keeps [N, 32, 32, 3]
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)

    return Dataset(name, *tensors(train), *tensors(test), tuple(train.classes), *CIFAR_STATS[name])


def _imagefolder(root, log):
    folders = _folders(root)
    if folders[1].name == "test" and (root / "val").is_dir():
        log(f"{root / 'val'} is not used: test/ is the test set, and --val_split takes validation images from train/")
    classes, test_classes = map(_class_names, folders)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes))[:6])
        raise UserError(f"--data_path {root}: classes not in both train/ and {folders[1].name}/: {odd}")

    files, labels, fingerprint = ([], []), ([], []), hashlib.sha256(f"{SIZE}x{SIZE} RGB, 1".encode())
    for split, folder in enumerate(folders):
        for label, name in enumerate(classes):
            found = _image_files(folder / name)
            if not found:
                raise UserError(f"--data_path {root}: no images in {folder / name}")
            for path, status in found:
                fingerprint.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
                files[split].append(path)
                labels[split].append(label)

    train_x, test_x = _cached_images(root, fingerprint.hexdigest(), files, log)
    train_y, test_y = map(torch.tensor, labels)
    return Dataset("imagefolder", train_x, train_y, test_x, test_y, tuple(classes), *pixel_stats(train_x))


def _folders(root):
    """The folders with the training and with the test images."""
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise UserError(f"--data_path {root}: imagefolder needs train/<class>/ and test/<class>/ (or val/<class>/) there")
    return root / "train", test


def _class_names(folder):
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{folder}: needs at least two class folders, found {len(names)}")
    return names


def _image_files(folder):
    """(path, stat) of the images below `folder`, in a fixed order."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                path = Path(parent, name)
                try:
                    found.append((path, path.stat()))
                except OSError as error:
                    raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return sorted(found, key=lambda item: item[0])


def _cached_images(root, fingerprint, splits, log):
    """The decoded images of each split, from a cache file that carries this fingerprint or from the image files."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    places = [root / f".images_{SIZE}x{SIZE}.pt", user_cache / "vgg-quant" / f"{key}.pt"]
    for place in filter(Path.exists, places):
        try:
            cache = read_torch_file(place)
            if cache["fingerprint"] == fingerprint:
                return cache["images"]
            log(f"{place} belongs to other files than {root} holds now: decoding again")
        except (UserError, KeyError, TypeError) as error:
            log(f"{place} cannot be used ({one_line(error)}): decoding again")

    images = [_decode_all(files) for files in splits]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(place, lambda file: torch.save({"fingerprint": fingerprint, "images": images}, file))
            log(f"decoded images kept in {place}")
            break
        except (OSError, RuntimeError):  # not writable, or the disk is full
            continue
    else:
        log(f"decoded images not kept: neither {places[0].parent} nor {places[1].parent} can be written")
    return images


def _decode_all(files):
    out = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes outside the interpreter lock
        decoded = tqdm(pool.map(_decode, files), total=len(files), desc="decoding images", unit="img", disable=None)
        for i, image in enumerate(decoded):
            out[i] = image
    return out


def _decode(path):
    """One image as uint8 [3, 32, 32]; others are scaled so that the centre square fills it."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # a damaged file can make PIL raise nearly anything
        raise UserError(f"cannot decode {path}: {one_line(error)}") from error
