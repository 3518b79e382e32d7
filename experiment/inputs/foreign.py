"""Networks that were not made here: found by name, with their published weights or those of a file, and the transform that
makes a picture their input.

    torchvision/resnet18          any name that `torchvision.models.get_model` knows
    timm/resnet50                 any name that `timm.create_model` knows, where timm is installed
    hf/path/to/folder             a causal language model of Hugging Face's transformers, with a text: `language`
    path/to/net.py:small          small() of that file: a network, (network, transform), or a Task

A transform takes a PIL image in RGB and gives a float tensor `[channels, height, width]`.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.quant.measuring.task import Task

from ..program import user_code
from ..program.cli import UserError, needed, one_line, user_error
from ..program.user_code import is_file
from .checkpoint import load_checkpoint, load_weights
from .streamed import Transform

# torchvision, timm and the like take seconds to import: only the networks that need them do so.

KINDS = "torchvision/NAME, timm/NAME or path/to/net.py:FUNCTION"
LANGUAGE = "hf/"  # in front of the folder of a language model
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of ImageNet's pixels, of full scale 1
MARGIN = 256 / 224  # shorter side of an image over the square that is cut out of its middle, where a network does not say it
# What torchvision sets where it loads its published weights, which `--state` may be.
_AS_PUBLISHED = {name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")}


@dataclass(frozen=True)
class Foreign:
    """A network in evaluation mode. Attributes: transform, what its images go through; None for 32x32 images as the networks here
    take them, `data.normalize`d. task, what the network is measured on where it brings that itself: no images, then."""

    network: nn.Module
    transform: Transform | None
    task: Task | None = None


def is_foreign(model: str) -> bool:
    """Whether `--model` names a network that is not of this project."""
    return model.startswith(("torchvision/", "timm/", LANGUAGE)) or is_file(model)


def is_language_model(model: str) -> bool:
    """Whether `--model` names the folder of a language model."""
    return model.startswith(LANGUAGE)


def identity(model: str) -> list[str]:
    """What tells the code of a network from other code: the name of one that is installed, or a function and the digests of its file and
    of the neighbours that the file imports."""
    if is_language_model(model):
        return [LANGUAGE]  # what is in the folder, wherever that is, its weights and its structure say
    if not is_file(model):
        return [model]
    path, _, function = model.rpartition(":")
    return [function, *user_code.digests(path)]


def short_name(model: str) -> str:
    """`--model` as a part of the names of folders: torchvision_resnet18, net_small of path/to/net.py:small."""
    if is_file(model):
        model = user_code.short_name(model)
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", model)


def load(model: str, state: str | None = None, image_size: int | None = None, weights: bool = True) -> Foreign:
    """The network that `--model` names.

    Args:
        state: a file with its weights, in place of the published ones.
        image_size: pixels a side of its input, in place of those of its own transform.
        weights: False leaves it with random ones, for those of a checkpoint.
    Raises: UserError, one line, for names that nobody knows, packages that are not installed, code or weights that do not load.
    """
    task = None
    if is_file(model):
        network, transform, task = _of_file(model)
        if transform and image_size:
            raise UserError(f"--image_size {image_size}: {model} brings its own transform, which decides the size")
        transform = transform or (image_size and _usual_transform(image_size))
    elif model.startswith("timm/"):
        network, transform = _of_timm(model.removeprefix("timm/"), weights and not state, image_size)
    else:
        network, transform = _of_torchvision(model.removeprefix("torchvision/"), weights and not state, image_size)
    if state:
        load_weights(network, _state(state), ("num_batches_tracked",), source=state)  # which older states lack
    return Foreign(network.eval(), transform or None, task)


def try_out(model: str, network: nn.Module, image: torch.Tensor) -> int:
    """Run a network on one input, `[1, ...]`, and say how many classes it tells apart.

    Raises: UserError for a network that does not take such inputs, or gives no logits `[1, classes]`.
    """
    def refusal(error: Exception) -> str:
        return (f"{model} does not take inputs {list(image.shape)} ({one_line(error)[:160]}): see --image_size; for other channels or "
                "images, a function in a file may return (network, transform)")

    with user_error(refusal, Exception), torch.no_grad():  # code of others raises nearly anything
        logits = network(image)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"{model} gives {found} for one image; a network that classifies gives logits, [1, classes]")
    return logits.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# torchvision, timm


def _of_torchvision(name: str, published: bool, image_size: int | None) -> tuple[nn.Module, Transform]:
    from torchvision import models

    known = models.list_models()
    if name.lower() not in known:
        raise UserError(f"--model torchvision/{name}: unknown to torchvision{_meant(name, known)}")
    weights = models.get_model_weights(name).DEFAULT
    options = {} if published else _AS_PUBLISHED.get(name.lower(), {})
    with _downloads(f"torchvision/{name}", weights.url):
        network = models.get_model(name, weights=weights if published else None, **options)
    transform = weights.transforms()
    if image_size:
        if not {"crop_size", "resize_size"} <= vars(transform).keys():
            raise UserError(f"--image_size {image_size}: the transform of torchvision/{name} has no size to change")
        ratio = transform.resize_size[0] / transform.crop_size[0]
        transform = weights.transforms(crop_size=image_size, resize_size=round(ratio * image_size))
    return network, transform


def _of_timm(name: str, published: bool, image_size: int | None) -> tuple[nn.Module, Transform]:
    timm = needed("timm", f"--model timm/{name} needs the package timm: pip install timm")
    known = timm.list_models()
    if name.split(".")[0] not in known:  # behind the dot, a set of weights
        raise UserError(f"--model timm/{name}: unknown to timm{_meant(name, known)}")
    with _downloads(f"timm/{name}"):
        network = timm.create_model(name, pretrained=published)
    own = {"input_size": (3, image_size, image_size)} if image_size else {}
    return network, timm.data.create_transform(**timm.data.resolve_data_config(own, model=network))


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=4)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _downloads(model: str, url: str | None = None) -> contextlib.AbstractContextManager[None]:
    """What libraries raise where weights cannot be had, or have no such form, as one line."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of many tries
    where = f"; take --state FILE with the weights{f' of {url}' if url else ''} where there is no network"
    return user_error(lambda error: f"the published weights of {model} cannot be had ({one_line(error)[:120]}){where}",
                      (OSError, RuntimeError, ValueError))


def _usual_transform(size: int) -> Transform:
    """The middle square of an image, `size` pixels a side, with the mean and the deviation of ImageNet."""
    from torchvision import transforms

    return transforms.Compose([transforms.Resize(round(MARGIN * size)), transforms.CenterCrop(size), transforms.ToTensor(),
                               transforms.Normalize(*IMAGENET_STATS)])


# ---------------------------------------------------------------------------------------------------------------------
# Files of the user


def _of_file(model: str) -> tuple[nn.Module, Transform | None, Task | None]:
    made = user_code.made("model", model)
    if isinstance(made, Task):
        if not isinstance(made.network, nn.Module):
            raise UserError(f"--model {model} returns a Task of a {type(made.network).__name__}; its network should be a torch.nn.Module")
        return made.network, None, made
    network, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module) or not (transform is None or callable(transform)):
        what = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise UserError(f"--model {model} returns {what}; a torch.nn.Module, (module, transform), or a Task is expected")
    return network, transform, None


def _state(path: str) -> dict[str, torch.Tensor]:
    """The weights in a file of PyTorch or of safetensors."""
    if not path.endswith(".safetensors"):
        return load_checkpoint(path)["state_dict"]
    of_torch = needed("safetensors.torch", f"{path} needs the package safetensors: pip install safetensors")
    with user_error(lambda error: f"{path}: not a readable safetensors file ({one_line(error)[:120]})", Exception):  # a damaged one
        return of_torch.load_file(path)
