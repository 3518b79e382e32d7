"""Networks that were not made here, put on crossbars: from `--model` to a converted network and the images that it sees."""

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from models import quant
from models.quant import CrossbarSpec
from models.quant.layers.batches import BATCH

from ..inputs import data, foreign, language
from ..inputs.checkpoint import load_weights
from ..inputs.foreign import Foreign
from ..program import flags
from ..program.cli import UserError, one_line, user_error
from ..settings.conversion_settings import OPTIONS
from ..settings.eval_flags import EvalSettings
from ..settings.train_flags import TrainSettings
from .images import EvalImages

DRAFT_IMAGES = 4
CALIBRATION_IMAGES = 64  # of a network that is trained: its quantizers learn what more images would tell


def network_of(settings: Any, checkpoint: str | None) -> Foreign | None:
    """The network of `settings.model`; None for those of this project. Args: checkpoint, a file of `train.py` that gives it other weights
    than the published ones. Raises: UserError, see `foreign.load`."""
    if not foreign.is_foreign(settings.model):
        return None
    if foreign.is_language_model(settings.model):
        size = {"batch_size": settings.batch_size} if "batch_size" in settings.given else {}
        task = language.task(settings.model.removeprefix(foreign.LANGUAGE), settings.text, settings.window, settings.stride,
                             calibration_text=settings.calibration_text, validation_text=settings.validation_text, **size)
        return Foreign(task.network, None, task)
    return foreign.load(settings.model, settings.state, settings.image_size, weights=not checkpoint)


def images_of(found: Foreign, settings: Any, device: torch.device, log: logging.Logger, validation: bool = False) -> data.Dataset:
    """The images that the settings name, as the network of `settings.model`, which is moved to the device, takes them. Args: validation,
    see `data.load`.

    Raises: UserError for images that cannot be read, or a network that does not classify such images.
    """
    if found.task:
        raise UserError(f"{settings.model} brings a Task, which eval.py measures; train.py trains networks that classify images")
    shown = data.load(settings.dataset, settings.data_path, log.info, found.transform, settings.class_index, validation)
    first = data.normalize(shown.test_x[:1].to(device), shown.mean, shown.std)
    classes = foreign.try_out(settings.model, found.network.to(device), first)
    of_folders = settings.dataset == "imagefolder" and not settings.class_index
    if classes < len(shown.classes) or classes > len(shown.classes) and not settings.class_index:
        raise UserError(f"{settings.model} has {classes} classes, the images of {settings.dataset} have {len(shown.classes)}"
                        + (": say which ones with --class_index FILE" if of_folders else ""))
    log.info(f"{settings.model}: inputs {list(first.shape[1:])}, {classes} classes"
             + (", numbered as the sorted names of the folders" if of_folders else ""))
    return shown


def converted(network: nn.Module, settings: Any, shown: Iterable[torch.Tensor], correct: str, engine: str = "auto", **others: Any
              ) -> nn.Module:
    """A copy of a network on crossbars, without ADCs as yet.

    Args: settings, with `model`, bits and `OPTIONS`; shown, training inputs; engine, what runs it meanwhile; correct and others,
        see `convert`.
    Raises: UserError for a network that cannot be converted so.
    """
    spec = CrossbarSpec(settings.w_bits, settings.a_bits, adc_range="ideal")
    options = {name: getattr(settings, name) for name in OPTIONS} | others
    with user_error(lambda error: f"{settings.model}: {_in_flags(one_line(error))}"), quant.set_engine(engine):
        return quant.convert(network, spec, shown, correct=correct, **options)


def _in_flags(message: str) -> str:
    """What `convert` says of its argument `skip`, of the flag."""
    return re.sub(r"skip=\['(.*?)'\](, or strict=False)?", r"--skip \1", message)


def draft(found: Foreign, settings: EvalSettings, shown: EvalImages) -> nn.Module | None:
    """A network with the layers that the conversion of `found` will have, made in a moment: its scales are of few images, and of no use.
    None where that cannot be done, of which `for_evaluation` says why, or that it can."""
    few = shown.calibration.first(DRAFT_IMAGES)
    with contextlib.suppress(UserError):
        return converted(found.network, settings, [few], "none", settings.engine, weight_scale="max", activations="max", rounding="nearest",
                         take=lambda batch: (batch, None))
    return None


def for_evaluation(found: Foreign, settings: EvalSettings, shown: EvalImages, checkpoint: Mapping[str, Any], log: logging.Logger,
                   classes: bool) -> nn.Module:
    """The network of others that `eval.py` measures, with the weights of a checkpoint of `train.py` where there is one. Args: classes,
    whether its answers are some.

    Raises: UserError, see `converted`, and for weights of the checkpoint that do not fit.
    """
    take = {"take": found.task.take} if found.task else {}
    net = converted(found.network, settings, shown.calibration.cut(BATCH), settings.calibration.correct, engine=settings.engine, **take)
    # The weights of a checkpoint replace those that the answers are of.
    log.info(net.crossbar_report.text(row_blocks=False, answers=not settings.resume, classes=classes))
    if settings.resume:
        _load_trained(net, checkpoint, settings.resume)
    return net


def for_training(found: Foreign, settings: TrainSettings, shown: data.Dataset, device: torch.device, checkpoint: Mapping[str, Any] | None,
                 source: str | None) -> nn.Module:
    """The network of others that `train.py` trains: through its arrays, as yet without ADC ranges, or through its quantizers. Args:
    checkpoint, the file `source` of train.py whose weights it has, if it starts from one.

    Raises: UserError, see `for_evaluation`, and for hardware that its layers cannot have.
    """
    some = shown.train_x[data.evenly(len(shown.train_x), CALIBRATION_IMAGES)].to(device)
    batches = data.Batches(some, shown.mean, shown.std, settings.batch_size)
    # On its arrays a network starts as eval.py measures it; quantizers alone are trained from the network as it is.
    net = converted(found.network, settings, batches, settings.calibration.correct if settings.adc_aware else "none")
    if checkpoint:
        _load_trained(net, checkpoint, source)
    if settings.adc_aware:
        with user_error(lambda error: flags.of_layers(str(error))):
            quant.set_spec(net, settings.spec)
    return quant.train_through(net, quant.Training("adc" if settings.adc_aware else "quantizers", learn_scales=settings.learn_scales,
                                                   clip_share=settings.clip_share, scale_decay=settings.scale_decay))


def _load_trained(net: nn.Module, checkpoint: Mapping[str, Any], source: str) -> None:
    """Give a network the weights and scales of a checkpoint; ranges, whose shapes hang on the scales, belong to hardware."""
    state = {key: value for key, value in checkpoint["state_dict"].items() if not key.endswith(quant.ADC_BUFFERS)}
    load_weights(net, state, allow_missing=quant.ADC_BUFFERS, source=source)
