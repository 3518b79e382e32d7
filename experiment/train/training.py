"""Training: the loop over epochs with its checkpoints and logs."""

import contextlib
import copy
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models import quant
from models.quant.network.modes import hooked

from ..inputs.checkpoint import load_checkpoint, load_weights, odd_number, save_checkpoint
from ..inputs.data import Dataset, evenly, generator, normalize, steps_per_epoch, train_batches, training_split
from ..inputs.streamed import Streamed
from ..program import distributed
from ..program.cli import UserError, user_error
from ..program.machine import machine_info, rng_state, set_rng_state
from ..settings.train_flags import BEST, CHECKPOINT, TrainSettings
from ..settings.train_settings import continuing
from ..start.starting import learned_scales, quantized_layers, used_alphas
from . import batch_norms, data_parallel
from .meter import Meter, evaluate, loss_and_correct
from .optimizing import alpha_penalty, build_optimizer, schedule_factor, settle
from .teacher import Teacher

CALIBRATION_IMAGES = 64  # of each calibration during training: fewer than eval.py takes, since there are many
NORM_BATCHES = 8  # from which batch norms take their statistics anew


@torch.no_grad()
def write_histograms(writer: SummaryWriter, step: int, net: nn.Module, images: torch.Tensor) -> None:
    """TensorBoard histograms of the weights of the quantized layers and of what flows into them for these images."""

    def add(tag: str, values: torch.Tensor) -> None:
        values = values.detach().flatten().float()
        writer.add_histogram(tag, values[:: max(1, len(values) // 100_000)], step)  # a sample shows the same shape

    layers = quantized_layers(net) or dict(quant.crossbar_layers(net))
    for name, layer in layers.items():
        add(f"weight/{name}", layer.weight)
    with hooked(layer.register_forward_pre_hook(lambda _, inputs, name=name: add(f"activation/{name}", inputs[0]))
                for name, layer in layers.items()):
        net.eval()
        net(images)


def program(net: nn.Module, settings: TrainSettings, step: int | None = None) -> None:
    """Give a network the chip of a step of the run, or that on which it is measured; ideal cells where no device is trained for."""
    chips = settings.chips
    if not chips:
        return
    with user_error(lambda error: f"--device {chips.name}: {error}"):  # cells that the grid does not hold
        chips.program(net, chips.chip_seed + (0 if step is None else 1 + step // settings.chip_steps))
    for _, layer in quant.crossbar_layers(net):
        layer.correct_batches = settings.calibration.correct == "channel"
        if layer.spec.adc_range == "ideal":  # of --crossbar_layers conv
            layer.set_cells(None)


class Run:
    """A training run: everything that a checkpoint holds, and the loop that moves it forward.

    Args: history, the checkpoint that the run starts from, for how its weights came about; teacher, of `--distill`.
    """

    def __init__(self, settings: TrainSettings, net: nn.Module, data: Dataset, device: torch.device, log: logging.Logger,
                 history: Mapping[str, Any] | None = None, teacher: Teacher | None = None):
        self.settings, self.net, self.data, self.device, self.log, self.teacher = settings, net, data, device, log, teacher
        # How these weights came about: the commands of this run and of those that it starts from, a line for each of their epochs, and
        # their duration.
        history = history or {}
        self.commands, self.curves = list(history.get("commands", [])), list(history.get("curves", []))
        self.seconds = history.get("seconds", 0.0)
        self.folder = Path(settings.save_path)
        train_x, train_y = data.train_x, data.train_y
        if settings.trivial_augment and isinstance(train_x, Streamed):
            raise UserError("--trivial_augment changes the images of a data set, not what a network's own transform makes of them: let "
                            "that transform do it")
        train, val = training_split(train_y, settings.val_split, settings.seed, settings.limit_train)
        if len(train) < 2 or (settings.val_split and not len(val)):
            raise UserError(f"{len(train) + len(val)} training images are too few for --val_split {settings.val_split}")
        self.train_x, self.train_y = train_x[train].to(device), train_y[train].to(device)
        self.val_x, self.val_y = train_x[val].to(device), train_y[val].to(device)
        self.images = min(settings.batch_size, len(self.train_x))  # in a step
        self.part = distributed.part(self.images)  # of them, those of this process
        if self.images < distributed.world():
            raise UserError(f"batches of {self.images} images are too small for {distributed.world()} processes: raise --batch_size")
        self.optimizer = build_optimizer(net, settings)
        self.steps = steps_per_epoch(len(self.train_x), settings.batch_size)  # in an epoch
        self.forward: Callable[[torch.Tensor], torch.Tensor] = net  # in training
        self.epoch = self.step = 0  # complete epochs, and complete steps of the epoch under way
        self.meter = Meter(device)  # of the epoch under way
        self.best_acc = self.test_acc = None  # percent; best_acc, validation accuracy of the best epoch
        self.history = []  # a dict for every complete epoch
        self.stop = distributed.StopRequest()

    # -- checkpoints

    def data_facts(self) -> dict[str, Any]:
        """Tells data sets apart: a run is not continued on other images."""
        return {"classes": list(self.data.classes), "mean": list(self.data.mean), "std": list(self.data.std),
                "train_images": len(self.train_x)}

    def weights(self) -> dict[str, Any]:
        """What `model_best.pth.tar` holds: no ADC ranges where none were chosen."""
        unused = () if self.settings.adc_aware else quant.ADC_BUFFERS
        state = {key: value for key, value in self.net.state_dict().items() if not key.endswith(unused)}
        return {"state_dict": state, "epoch": self.epoch, "best_acc": self.best_acc,
                "config": self.settings.of_computation(), "data": self.data_facts(), "machine": machine_info(),
                "commands": self.commands, "curves": self.curves, "seconds": self.seconds + time.monotonic() - self.started}

    def save(self) -> None:
        """Write the checkpoint from which this run can go on, bit for bit. All processes stand where the first one, which writes it,
        does, so that it need not tell them when it is time for one."""
        self.check_finite()
        if distributed.is_first():
            save_checkpoint(self.folder / CHECKPOINT, {
                **self.weights(), "teacher": self.teacher and self.teacher.made_of, "optimizer": self.optimizer.state_dict(),
                "step": self.step, "test_acc": self.test_acc, "history": self.history, "meter": self.meter.state_dict(),
                "rng": rng_state()})
        self.saved_at = time.monotonic()

    def restore(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Go to where save() was called; the network has its weights already."""
        if checkpoint["data"] != self.data_facts():
            raise UserError(f"the images are not those that {path} was trained on; check --dataset and --data_path")
        if checkpoint["epoch"] and not (self.folder / BEST).exists():
            raise UserError(f"{self.folder / BEST} is missing: it belongs to the run of {path}")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in ("epoch", "step", "best_acc", "test_acc", "history"):
            setattr(self, name, checkpoint[name])
        if not (0 <= self.epoch <= self.settings.epochs and 0 <= self.step <= self.steps and len(self.history) == self.epoch):
            raise ValueError(f"it stands at epoch {self.epoch}, step {self.step} of {self.settings.epochs} epochs of {self.steps} steps")
        self.meter.load_state_dict(checkpoint["meter"])
        set_rng_state(checkpoint["rng"])

    def check_finite(self) -> None:
        """A checkpoint must not be replaced by one that cannot be continued."""
        loss, _ = self.meter.read()
        trained = {key: value for key, value in self.net.state_dict().items() if not key.endswith(quant.ADC_BUFFERS)}
        if not math.isfinite(loss) or (odd := odd_number(trained)):
            what = odd if math.isfinite(loss) else "the loss is no longer a finite number"
            raise UserError(f"in epoch {self.epoch + 1}, step {self.step} {what}; try a lower --lr, or for a clipping level a lower "
                            f"--alpha_lr, --alpha_wd or --a_lambda. The last checkpoint in {self.folder} was written before this")

    # -- training

    def some_images(self, count: int) -> torch.Tensor:
        """Training images of all classes, as they are, always the same."""
        return normalize(self.train_x[evenly(len(self.train_x), count)], self.data.mean, self.data.std)

    def batches(self, epoch: int, first: int = 0, part: slice = slice(None)) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(step, images, labels) of an epoch from a step on, augmented, uint8; of each batch a part."""
        fill = tuple(round(255 * mean) for mean in self.data.mean)
        return train_batches(self.train_x, self.train_y, self.settings.batch_size, self.settings.seed, epoch, first, pad=self.data.pad,
                             flip=self.data.flip and not self.settings.no_flip, cutout=self.settings.cutout,
                             trivial=self.settings.trivial_augment, fill=fill, part=part)

    def calibrate(self) -> None:
        """ADC ranges and their correction for the weights as they are, which the first process chooses for all."""
        self.check_finite()
        if self.net.training:  # SAWB keeps the level of the last step's weights: reads are counted with that of these
            for layer in quantized_layers(self.net).values():
                layer.weight_quant.codes(layer.weight.detach())
        chosen = self.settings.calibration
        with user_error("--adc_aware: {}".format):  # such as weights that are no numbers
            if distributed.is_first():
                if self.settings.chips:
                    # Augmented, as the weights know their inputs: without, ResNet-20 loses three points.
                    batch_norms.take_anew(self.net, (normalize(x, self.data.mean, self.data.std)
                                                     for _, x, _ in itertools.islice(self.batches(0), NORM_BATCHES)))
                quant.calibrate(self.net, self.some_images(CALIBRATION_IMAGES), chosen.rule, chosen.per,
                                correct=chosen.correct, share=chosen.share, on=chosen.on)
        distributed.same_ranges(self.net)
        if self.settings.chips:
            distributed.same_tensors(value for norm in batch_norms.of(self.net) for value in norm.buffers())

    def fit(self) -> int:
        """Train to the last epoch, measure the best one on the test images, and return the exit code."""
        settings = self.settings
        self.saved_at = self.started = time.monotonic()
        done = self.epoch * self.steps + self.step
        self.forward = data_parallel.shared(self.net)
        first = distributed.is_first()
        # drops what was logged after the checkpoint
        self.writer = SummaryWriter(self.folder, purge_step=done) if first else contextlib.nullcontext()
        self.bar = tqdm(total=settings.epochs * self.steps * self.images, initial=done * self.images, unit="img", disable=not first,
                        unit_scale=True, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60)
        with self.stop, self.bar, self.writer, logging_redirect_tqdm([self.log]):
            try:
                if not done:  # from here on a run that dies can go on
                    self.save()
                while self.epoch < settings.epochs:
                    self.train_epoch()
                    self.end_epoch()
                self.test()
            except distributed.Stopped:
                self.save()
                self.log.info(f"stopped after {self.epoch} of {settings.epochs} epochs and {self.step} steps; continue with: "
                              + continuing(settings, self.folder / CHECKPOINT))
                return 128 + self.stop.signal  # as a shell reports a process that the signal ended
        return 0

    def test(self) -> None:
        """Measure the best epoch, in float32 as eval.py does. The only use of the test images."""
        best = distributed.broadcast(load_checkpoint(self.folder / BEST) if distributed.is_first() else None)
        net = copy.deepcopy(self.net)
        load_weights(net, best["state_dict"], allow_missing=quant.ADC_BUFFERS, source=self.folder / BEST)
        program(net, self.settings)
        x, y = self.data.test_x.to(self.device), self.data.test_y.to(self.device)
        _, self.test_acc = evaluate(net, x, y, self.data, tick=self.stop.check, title="test images")
        self.save()
        if not distributed.is_first():
            return
        self.writer.add_hparams({name: value if isinstance(value, (bool, str, float, int)) else str(value)
                                 for name, value in self.settings.config().items()},
                                {"test/acc": self.test_acc, "val/acc_of_best": best["best_acc"] or math.nan}, run_name=".")
        self.log.info(f"test accuracy {self.test_acc:.2f} % on {len(y)} images, with the weights of epoch {best['epoch']} "
                      f"({self.folder / BEST})")

    def train_epoch(self) -> None:
        """The steps that are left of the epoch under way."""
        settings = self.settings
        started, first, shown = time.monotonic(), self.step, 0.0
        self.net.train()
        self.bar.set_description(f"epoch {self.epoch + 1}/{settings.epochs}")
        for step, x, y in self.batches(self.epoch, first, self.part):
            self.stop.check()
            position = self.epoch * self.steps + step
            if settings.chips:
                self.check_finite()  # what is no number has no cells
                program(self.net, settings, position)
            if settings.adc_aware and position % settings.calib_steps == 0:
                self.calibrate()
            loss = self.train_step(x, y, position)
            self.step = step + 1
            self.bar.update(self.images)

            now = time.monotonic()
            if now - shown >= 1 and distributed.is_first():  # reading the meter waits for a GPU, so not at every step
                shown = now
                self.check_finite()
                mean_loss, accuracy = self.meter.read()
                self.bar.set_postfix(loss=f"{mean_loss:.3f}", acc=f"{accuracy:.1f}%", refresh=False)
                self.writer.add_scalar("train/loss_of_step", loss.item(), position)
                self.writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], position)
            if now - self.saved_at >= 60 * settings.save_minutes:
                self.save()
        self.rate = (self.step - first) * self.images / (time.monotonic() - started)

    def train_step(self, x: torch.Tensor, y: torch.Tensor, position: int) -> torch.Tensor:
        """One step of the optimizer on uint8 images x, this process's part of those of step `position` of the run; returns their loss
        without --clp."""
        settings = self.settings
        factor = schedule_factor(settings.schedule_type, position, settings.epochs * self.steps, self.steps, settings.schedule,
                                 settings.gammas)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=settings.amp == "bf16")
        distributed.own_random_numbers(generator("step", settings.seed, position).initial_seed())
        with autocast, quant.image_numbers(position * self.images + self.part.start):  # noise of reads is another in every step
            inputs = normalize(x, self.data.mean, self.data.std)
            logits = self.forward(inputs).float()
            answers = self.teacher.answers(inputs) if self.teacher else None
        loss = F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)
        if self.teacher:
            loss = self.teacher.loss(loss, logits, answers)
        total = loss * (len(y) * distributed.world() / self.images)  # the mean over the processes is that over the images
        if settings.clp:
            total = total + alpha_penalty(self.net, settings.a_lambda)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        settle(self.net, settings)
        self.meter.add(distributed.summed(loss_and_correct(loss, logits, y)), self.images)
        return loss

    def end_epoch(self) -> None:
        """Validate, log, keep the weights if they are the best, and write the checkpoint of the complete epoch."""
        settings = self.settings
        self.check_finite()
        train_loss, train_acc = self.meter.read()
        row = {"epoch": self.epoch + 1, "train_loss": train_loss, "train_acc": train_acc}
        text = f"epoch {self.epoch + 1}/{settings.epochs}  loss {train_loss:.4f}  accuracy {train_acc:.2f} %"
        if settings.adc_aware:
            program(self.net, settings)
            self.calibrate()
        if len(self.val_x):
            row["val_loss"], row["val_acc"] = evaluate(self.net, self.val_x, self.val_y, self.data, settings.amp,
                                                       tick=self.stop.check, teacher=self.teacher, title="validation images")
            text += f"  validation {row['val_acc']:.2f} %"
        self.curves.append(text)
        self.bar.set_postfix(loss=f"{train_loss:.3f}", acc=f"{train_acc:.1f}%")
        self.log.info(f"{text}  lr {self.optimizer.param_groups[0]['lr']:.4g}  {self.rate:.0f} images/s")
        if distributed.is_first():
            self.write_summaries(row)
        # On a tie the later epoch wins: its learning rate was lower. Without a validation split, every epoch does.
        best = all(row["val_loss"] <= other["val_loss"] for other in self.history) if len(self.val_x) else True
        self.history.append(row)
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.device)
        if best:  # written before checkpoint.pth.tar: a run that dies between the two repeats the epoch and writes it again
            self.best_acc = row.get("val_acc")
            if distributed.is_first():
                save_checkpoint(self.folder / BEST, self.weights())
        self.save()

    def write_summaries(self, row: Mapping[str, float]) -> None:
        """Scalars of the epoch; about ten times in a run also histograms of weights, clipping levels and layer inputs."""
        position = (self.epoch + 1) * self.steps - 1  # a run that goes on drops what was logged from its first step on
        for name, value in row.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, position)
        alphas = used_alphas(self.net)
        for name, alpha in alphas.items():
            self.writer.add_scalar(f"alpha/{name}", alpha.item(), position)
        for name, scale in learned_scales(self.net).items():
            self.writer.add_scalar(f"scale/{name}", scale.mean().item(), position)
        if self.epoch % max(1, self.settings.epochs // 10) == 0 or self.epoch + 1 == self.settings.epochs:
            if alphas:
                self.writer.add_histogram("alpha", torch.stack(list(alphas.values())), position)
            write_histograms(self.writer, position, self.net, self.some_images(32))
