"""Images in memory: load a data set as one uint8 tensor, augment and normalise whole batches on the device.

    data = load("digits")                                  # or cifar10, cifar100, imagefolder
    for step, x, y in train_batches(data.train_x.to(device), data.train_y.to(device), 128, seed=0, epoch=0):
        x = normalize(x, data.mean, data.std)              # float32 [N, 3, 32, 32], channels_last
    for x in Batches(data.test_x.to(device), data.mean, data.std, 250):
        ...

A CIFAR-sized set is 150 MB as uint8. Kept on the device it needs no worker processes, and cropping 128 images at once
takes milliseconds on a CPU.

digits       scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 3x32x32. Needs no download.
cifar10/100  read from, or downloaded to, data_path by torchvision.
imagefolder  any tree data_path/train/<class>/*.jpg with data_path/test/<class>/ or data_path/val/<class>/ (`folders`).

A network that brings a transform sees images of any size: they are then read when they are looked at (`streamed.Streamed`).
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# torchvision takes a second to import, and scikit-learn too: only the data sets that need them do so.
from ..program import distributed
from ..program.cli import UserError, one_line
from . import folders
from .streamed import Streamed, Transform

DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")
SIZE = 32  # pixels a side; the networks here are built for 32x32 images

# Mean and standard deviation of the training pixels per channel, as fractions of full scale.
CIFAR_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
AS_THEY_ARE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # of images that a transform has made network inputs already


@dataclass(frozen=True)
class Dataset:
    """The images of a data set, and what is known of them."""

    name: str
    train_x: torch.Tensor | Streamed  # uint8 [N, 3, 32, 32], or N images seen through a transform
    train_y: torch.Tensor  # int64 [N]
    test_x: torch.Tensor | Streamed
    test_y: torch.Tensor
    classes: tuple[str, ...]  # names; a label is an index into them
    mean: Sequence[float]  # per channel, of full scale 1.0
    std: Sequence[float]
    pad: int = 4  # random crops shift an image by up to this many pixels
    flip: bool = True  # whether a mirrored image still shows the same class
    validation: bool = False  # whether images that are there to choose by, of a folder val/ beside test/, are in place of the test images


def load(dataset: str, data_path: str | Path = "./data", log: Callable[[str], object] = print, transform: Transform | None = None,
         class_index: str | Path | None = None, validation: bool = False) -> Dataset:
    """The data set named `dataset` (one of DATASETS). log(text) is told about caches and odd folders.

    Args:
        transform: makes a picture a network's input; images of an imagefolder then have any size. None: all are 32x32.
        class_index: with a transform and imagefolder, a file that says which class a folder holds (`read_class_index`); else labels
            count the sorted names.
        validation: of an imagefolder with val/ and test/, the images of val/ in place of those of test/.
    Raises: UserError for a data set that is unknown, not there, or not as it should be.
    """
    if class_index and not (transform and dataset == "imagefolder"):
        raise UserError("--class_index names the classes of folders: it needs --dataset imagefolder and your own network (--model)")
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: unknown, choose from {', '.join(DATASETS)}")
    with distributed.one_first():
        if dataset == "imagefolder":
            return _imagefolder(folders.read(Path(data_path), log, class_index, validation), transform, log)
        found = _digits() if dataset == "digits" else _cifar(dataset, data_path)
    if not transform:
        return found
    train, test = (Streamed(list(x.permute(0, 2, 3, 1).numpy()), transform) for x in (found.train_x, found.test_x))
    mean, std = AS_THEY_ARE
    return replace(found, train_x=train, test_x=test, mean=mean, std=std)


def limited(data: Dataset, test_images: int | None) -> Dataset:
    """The data set with no more than so many test images, spread evenly over them; None: all."""
    some = evenly(len(data.test_y), test_images or len(data.test_y))
    return data if len(some) == len(data.test_y) else replace(data, test_x=data.test_x[some], test_y=data.test_y[some])


def num_classes(dataset: str, data_path: str | Path = "./data") -> int:
    """How many classes load() would find, without decoding or downloading anything.

    Raises: UserError for folders that are not as they should be.
    """
    if dataset == "imagefolder":
        return len(folders.class_names(Path(data_path)))
    return {"digits": 10, "cifar10": 10, "cifar100": 100}[dataset]


def as_trained(data: Dataset, trained_on: Mapping[str, Any] | None, source: str | Path) -> Dataset:
    """The data set, scaled as the images were that the checkpoint `source` was trained on. Args: trained_on, the "data" of the
    checkpoint; None where it does not say.

    Raises: UserError that names the classes where labels mean others than those of the training.
    """
    if not trained_on:
        return data
    pairs = zip(data.classes, trained_on["classes"])
    other = [f"{name} instead of {trained}" for name, trained in pairs if name != trained]
    if other:
        raise UserError(f"{source} was trained on other classes: the images have {', '.join(other[:10])}"
                        + ("; give the folders the names that they had in the training"
                           if data.name == "imagefolder" else ""))
    return replace(data, mean=tuple(trained_on["mean"]), std=tuple(trained_on["std"]))


def generator(*key: int | str) -> torch.Generator:
    """A CPU random generator whose stream depends only on `key`, as in generator("augment", seed, epoch, step): a run that
    is resumed in the middle of an epoch draws the same numbers without replaying what came before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Splits, batches, augmentation


def stratified_split(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the indices of labels, int64 [N], into (kept, held out), both ascending; of every class the same `fraction` is
    held out.

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


def training_split(labels: torch.Tensor, fraction: float, seed: int,
                   limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, validation): indices into the training images of a run; of `limit` random ones only, if that is given."""
    if not limit:
        return stratified_split(labels, fraction, seed)
    pick = torch.randperm(len(labels), generator=generator("limit", seed))[:limit]
    return tuple(pick[part] for part in stratified_split(labels[pick], fraction, seed))


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Full batches only: a last batch of a few images would upset the batch norm. A small set is one batch."""
    return max(1, n_images // batch_size)


def train_batches(x: torch.Tensor, y: torch.Tensor, batch_size: int, seed: int, epoch: int, first_step: int = 0,
                  flip: bool = True, part: slice = slice(None), **augmentation: Any
                  ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (step, images, labels), shuffled and augmented, from `first_step` on; images as those of x, [N, 3, H, W]. part: only these
    images of each batch, as they are in the whole one.

    Every epoch's order and every step's crops come from generators of their own, so that starting in the middle gives
    exactly the batches that an uninterrupted epoch would have given. flip: mirror half of the images in even epochs and
    the other half in odd ones, so that two epochs show both sides of each (K. Jordan, arXiv 2404.00498: better than random
    flips wherever flips help). augmentation: see augment().
    """
    order = torch.randperm(len(x), generator=generator("shuffle", seed, epoch)).to(x.device)
    mirrored = torch.randint(2, (len(x),), generator=generator("flip", seed)).to(x.device) == epoch % 2 if flip else None
    for step in range(first_step, steps_per_epoch(len(x), batch_size)):
        pick = order[step * batch_size : (step + 1) * batch_size]
        own = pick[part]
        batch = augment(_pixels(x[own]), generator("augment", seed, epoch, step), mirrored[own] if flip else None, of=len(pick),
                        part=part, **augmentation)
        yield step, batch, y[own]


def augment(x: torch.Tensor, rng: torch.Generator, mirrored: torch.Tensor | None = None, pad: int = 4, cutout: int = 0,
            trivial: bool = False, fill: Sequence[int] = (0, 0, 0), of: int | None = None, part: slice = slice(None)) -> torch.Tensor:
    """Randomly change, shift, mirror and partly cover each image of a batch x, uint8 or float [N, 3, H, W], on its own device.

    mirrored: bool [N], the images to mirror; None for none. pad: pixels of border of value 0, from which an H x W window is
    cut. cutout: side in pixels of a square painted in the colour `fill` around a random pixel (0: none; it may reach
    over the edge). trivial: before, one random change of each image, of random strength, such as a turn, a shear, more contrast, other
    colours; `fill` is behind what moves (TrivialAugment, Müller and Hutter, arXiv 2103.10158; uint8 only). of, part: x is this part of a
    batch of so many images, for all of which numbers are drawn.
    """
    n, _, height, width = x.shape

    def draw(high):  # from a CPU generator, so that CPU and GPU runs see the same images
        return torch.randint(high, (of or n,), generator=rng)[part].to(x.device, non_blocking=True)

    if trivial:
        x = torch.stack([_changed(image, seed, fill) for image, seed in zip(x, draw(2**62).tolist())])
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


def _changed(image: torch.Tensor, seed: int, fill: Sequence[int]) -> torch.Tensor:
    from torchvision.transforms.v2 import TrivialAugmentWide

    with torch.random.fork_rng(devices=[]):  # it draws from the global generator
        torch.manual_seed(seed)
        return TrivialAugmentWide(fill=list(fill))(image)


def evenly(size: int, count: int) -> torch.Tensor:
    """Places of `count` of so many images, or of all if they are fewer, evenly from the first to the last: of data that are sorted by class
    some of each."""
    count = min(size, count)
    return torch.arange(count) * size // max(count, 1)


def for_calibration(found: Dataset) -> torch.Tensor:
    """Places of all training images in the order in which a calibration takes the first ones, the same for every checkpoint."""
    return torch.randperm(len(found.train_x), generator=generator("calibration"))


def normalize(x: torch.Tensor | Streamed, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [N, 3, H, W] to float32 with mean 0 and deviation 1 per channel, in channels_last memory format. Images that a transform
    has made network inputs stay what they are."""
    x = _pixels(x)
    if x.is_floating_point():
        return x.to(memory_format=torch.channels_last)
    mean = 255 * torch.tensor(mean, device=x.device)[:, None, None]
    std = 255 * torch.tensor(std, device=x.device)[:, None, None]
    return x.to(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def _pixels(x: torch.Tensor | Streamed) -> torch.Tensor:
    return x.read() if isinstance(x, Streamed) else x


class Batches:
    """Images as a network takes them: batches of `normalize`d ones on the images' device, any number of times over.

    Args: images, uint8 [N, 3, H, W], or `Streamed`, which are read anew each time; mean, std, per channel, of full scale 1.0;
        batch_size, images in all batches but a smaller last one; first_image, number of the first one in the set, which the noise of
        its reads follows.
    Attributes: count, N. `len()` is the number of batches.
    """

    def __init__(self, images: torch.Tensor | Streamed, mean: Sequence[float], std: Sequence[float], batch_size: int,
                 first_image: int = 0):
        self.images, self.mean, self.std, self.batch_size, self.first_image = images, mean, std, batch_size, first_image
        self.count = len(images)

    @property
    def content(self) -> list[Any]:
        """What tells these images from others."""
        images = self.images.identity() if isinstance(self.images, Streamed) else self.images
        return [images, list(self.mean), list(self.std), *([self.first_image] if self.first_image else [])]

    def first(self, count: int) -> torch.Tensor:
        """The first images as one batch."""
        return normalize(self.images[:count], self.mean, self.std)

    def cut(self, batch_size: int) -> "Batches":
        """The same images in batches of another size."""
        return Batches(self.images, self.mean, self.std, batch_size, self.first_image)

    def inputs(self) -> Iterator[torch.Tensor]:
        """What a network is called with."""
        return iter(self)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self.batch_size
        return normalize(self.images[start : start + self.batch_size], self.mean, self.std)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.__getitem__, range(len(self)))


def pixel_stats(x: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(grey).float().reshape(-1, 1, 8, 8) * (255 / 16)  # 17 grey levels
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    x = x.round().to(torch.uint8).repeat(1, 3, 1, 1)
    y = torch.from_numpy(labels).long()
    train, test = stratified_split(y, 0.2, seed=0)
    mean, std = pixel_stats(x[train])
    return Dataset("digits", x[train], y[train], x[test], y[test], tuple("0123456789"), mean, std, flip=False)


def _cifar(name: str, data_path: str | Path) -> Dataset:
    from torchvision import datasets as torchvision_datasets

    kind = {"cifar10": torchvision_datasets.CIFAR10, "cifar100": torchvision_datasets.CIFAR100}[name]
    new = not Path(data_path).exists()
    try:
        train, test = (kind(data_path, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if new:
            with contextlib.suppress(OSError):  # torchvision makes it before it has anything to put there
                Path(data_path).rmdir()
        raise UserError(
            f"{name} is not in {data_path} and could not be downloaded ({one_line(error)[:120]}): put {kind.filename} from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html, or the unpacked {kind.base_folder}, there"
        ) from error

    def tensors(split):  # torchvision keeps [N, 32, 32, 3]
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)

    return Dataset(name, *tensors(train), *tensors(test), tuple(train.classes), *CIFAR_STATS[name])


def _imagefolder(found: folders.Folder, transform: Transform | None, log: Callable[[str], object]) -> Dataset:
    train, test = (Streamed(files, transform) for files in found.files) if transform else folders.decoded(found, SIZE, log)
    stats = AS_THEY_ARE if transform else pixel_stats(train)
    return Dataset("imagefolder", train, found.labels[0], test, found.labels[1], found.classes, *stats, validation=found.validation)
