"""Image folders: which files there are, of which classes, and their pixels.

    found = read(root, log)                   # root/train/<class>/*.jpg with root/test/<class>/ or root/val/<class>/
    train, test = decoded(found, 32, log)     # uint8 [N, 3, 32, 32], from a cache file where nothing has changed
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

# torchvision takes a second to import: only what needs it does so.
from ..program import distributed
from ..program.cli import UserError, one_line, user_error
from .checkpoint import read_torch_file, write_torch_file


@dataclass(frozen=True)
class Folder:
    """What lies below `root`. Attributes: classes, their names, a label is an index into them; files and labels, int64 `[N]`, of the
    training and of the test images; validation, whether those of val/, which stands beside test/, are in the place of the latter."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[list[Path], list[Path]]
    labels: tuple[torch.Tensor, torch.Tensor]
    validation: bool


def read(root: Path, log: Callable[[str], object], class_index: str | Path | None = None, validation: bool = False) -> Folder:
    """The files of an image folder, none of which is opened.

    Args: log(text) is told about odd folders; class_index, a file that says the class of each folder (`read_class_index`), where the
        labels are not those of the folders' order; validation, take val/ in place of test/ where both are there.
    Raises: UserError for folders or images that are missing, and classes that are not the same in both.
    """
    both, val = _folders(root), root / "val"
    validation = validation and both[1].name == "test" and val.is_dir()
    if validation:
        both = both[0], val
    elif both[1].name == "test" and val.is_dir():
        log(f"{val} is not used: test/ is the test set; val/ is for --validation and --search of networks that were not trained here, and "
            "--val_split takes validation images from train/")
    if class_index:
        labels = read_class_index(class_index)
        for folder in both:
            if unknown := [name for name in _class_names(folder) if name not in labels]:
                raise UserError(f"{class_index} must name one class for the folder {folder / unknown[0]}; it names none, or several")
        by_label = {label: name for name, label in labels.items()}
        classes = [by_label.get(i, f"class {i}") for i in range(max(by_label) + 1)]
    else:
        classes, test_classes = map(_class_names, both)
        if classes != test_classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes))[:6])
            raise UserError(f"--data_path {root}: classes not in both train/ and {both[1].name}/: {odd}")
        labels = {name: label for label, name in enumerate(classes)}
    files, targets = zip(*(_files_and_labels(root, folder, labels) for folder in both))
    return Folder(root, tuple(classes), files, targets, validation)


def class_names(root: Path) -> list[str]:
    """The names of the classes of the training images. Raises: UserError for folders that are missing."""
    return _class_names(_folders(root)[0])


def decoded(found: Folder, size: int, log: Callable[[str], object]) -> list[torch.Tensor]:
    """The training and the test images, uint8 `[N, 3, size, size]`, from a cache file of the same names and contents, or from the image
    files. Contents are read where the files are not those that were cached, as in a copy of the folder. log(text) is told about caches.

    Raises: UserError for what cannot be read or decoded.
    """

    def digest(title: str, of: Callable[[Path], bytes]) -> str:
        key = hashlib.sha256(f"{size}x{size} RGB, 3".encode())
        for path in tqdm([*found.files[0], *found.files[1]], desc=title, unit="img", disable=None, delay=2, leave=False):
            with user_error(lambda error, path=path: f"cannot read {path}: {error.strerror or error}", OSError):
                key.update(os.fsencode(f"{path.relative_to(found.root)}\0") + of(path))
        return key.hexdigest()

    status = digest("looking at images", _status)  # before their contents: what changes now differs at the next start
    contents = functools.cache(lambda: digest("comparing images", lambda path: hashlib.sha256(path.read_bytes()).digest()))
    return _cached_images(found, status, contents, size, log)


def _files_and_labels(root: Path, folder: Path, labels: dict[str, int]) -> tuple[list[Path], torch.Tensor]:
    """The images below the class folders in `folder`, in the order of their paths, and the label of each, int64 [N]. Args: labels,
    `{name of a class: label}`."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

    def is_image(path: str) -> bool:
        return has_file_allowed_extension(path, (*IMG_EXTENSIONS, ".gif")) and not os.path.basename(path).startswith(".")

    names = _class_names(folder)
    found = make_dataset(folder, {name: number for number, name in enumerate(names)}, is_valid_file=is_image, allow_empty=True)
    if empty := set(range(len(names))) - {number for _, number in found}:
        raise UserError(f"--data_path {root}: no images in {folder / names[min(empty)]}")
    files = sorted((Path(path), labels[names[number]]) for path, number in found)
    return [path for path, _ in files], torch.tensor([label for _, label in files])


def _folders(root: Path) -> tuple[Path, Path]:
    """The folders with the training and with the test images."""
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise UserError(f"--data_path {root}: imagefolder needs train/<class>/ and test/<class>/ (or val/<class>/) there")
    return root / "train", test


def _class_names(folder: Path) -> list[str]:
    """The names of the class folders, sorted; a label is an index into them."""
    from torchvision.datasets.folder import find_classes

    try:
        names = [name for name in find_classes(folder)[0] if not name.startswith(".")]
    except FileNotFoundError:  # what torchvision raises where there is none
        names = []
    if len(names) < 2:
        raise UserError(f"{folder}: needs at least two class folders, found {len(names)}")
    return names


def _status(path: Path) -> bytes:
    """What changes with a file's content, and is another where a name is that of another file."""
    status = path.stat()
    return repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)).encode()


def _cached_images(found: Folder, status: str, contents: Callable[[], str], size: int, log: Callable[[str], object]) -> list[torch.Tensor]:
    """The decoded images of each split, from a cache file of this status, or of these contents, or from the image files."""
    root, of = found.root, "_val" if found.validation else ""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    places = [root / f".images_{size}x{size}{of}.pt", user_cache / "vgg-quant" / f"{key}{of}.pt"]
    for place in filter(Path.exists, places):
        try:
            cache = read_torch_file(place)
            if not isinstance(cache, dict):
                raise TypeError("it holds something else")
            if cache["status"] == status or cache["contents"] == contents():
                return cache["images"]
            log(f"{place} belongs to other files than {root} holds now: decoding again")
        except (UserError, LookupError, TypeError) as error:
            log(f"{place} cannot be used ({one_line(error)}): decoding again")

    contents()  # before they are decoded
    images = [_decode_all(files, size) for files in found.files]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_torch_file(place, {"status": status, "contents": contents(), "images": images})
            log(f"decoded images kept in {place}")
            break
        except (OSError, UserError):  # not writable, or the disk is full
            continue
    else:
        log(f"decoded images not kept: neither {places[0].parent} nor {places[1].parent} can be written")
    return images


def _decode_all(files: list[Path], size: int) -> torch.Tensor:
    """The images as uint8 [N, 3, size, size]."""
    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(min(8, distributed.cores())) as pool:  # PIL decodes outside the interpreter lock
        images = tqdm(pool.map(_decode, files, repeat(size)), total=len(files), desc="decoding images", unit="img", disable=None)
        for i, image in enumerate(images):
            out[i] = image
    return out


def in_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, 8 bits a channel. Grey of 16 bits is scaled: Pillow itself would make all but the darkest 256th of it white.

    Raises: ValueError for grey of 32 bits and for floats, whose full scale nobody knows.
    """
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):  # the former of them in Pillow before 11
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'floats' if image.mode == 'F' else '32 bits wide'}, which have no known full scale; "
                         "save it with 8 or 16 bits")
    return image.convert("RGB")


def _decode(path: Path, size: int) -> torch.Tensor:
    """One image as uint8 [3, size, size]; others are scaled so that the centre square fills it."""
    # A damaged file can make PIL raise nearly anything.
    with user_error(lambda error: f"cannot decode {path}: {one_line(error)}", Exception), Image.open(path) as image:
        image = in_rgb(image)
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- which class a folder holds, where the network tells more classes apart than there are folders ----------------------


def read_class_index(path: str | Path) -> dict[str, int]:
    """`{folder: class}` of a JSON file, `{"n01440764": 0, ...}` or `{"0": ["n01440764", "tench"], ...}` (each of the names may be that
    of the folder), or of a text file with a folder and a number on each line.

    Names that stand for several classes, as "crane" does in ImageNet, are left out.

    Raises: UserError for a file that is none of these.
    """
    with (user_error(lambda error: f"cannot read {path}: {error.strerror or error}", OSError),
          user_error(lambda error: f"{path} does not name classes ({one_line(error)}): give a JSON object, or a folder and a number a line",
                     (ValueError, TypeError, RecursionError))):
        text = Path(path).read_text(encoding="utf-8-sig")
        pairs = dict.fromkeys(_of_json(json.loads(text)) if text.lstrip().startswith("{") else _of_lines(text))
        often = Counter(name for name, _ in pairs)
        found = {name: number for name, number in pairs if often[name] == 1}
        if not found or min(found.values()) < 0:
            raise ValueError("classes are numbers from 0 up")
    return found


def _of_json(content: dict) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, int):
            yield key, value
        else:
            yield from ((name, int(key)) for name in ([value] if isinstance(value, str) else value))


def _of_lines(text: str) -> Iterator[tuple[str, int]]:
    for line in filter(str.strip, text.splitlines()):
        name, number = line.rsplit(maxsplit=1)
        yield name.strip(), int(number)
