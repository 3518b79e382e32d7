"""Train a VGG with PACT activations and DoReFa or SAWB weights on CIFAR-sized images.

A first try: 4-bit VGG7 on scikit-learn's digits. It needs no download and takes minutes on two CPU cores.
    python train.py

CIFAR-10 (downloaded into ./data on first use):
    python train.py --dataset cifar10 --wbit 4 --abit 4 --save_path save/cifar10_w4a4

Stopped by Ctrl-C, killed, or out of power? Go on where the last checkpoint was made:
    python train.py --resume --save_path save/cifar10_w4a4
A run that was resumed ends with the same weights, bit for bit on a CPU, as one that was never stopped. A checkpoint is
written after each epoch and every --save_minutes inside one.

A network without quantizers first, then 2-bit weights and 4-bit activations that start from it:
    python train.py --dataset cifar10 --wbit 32 --abit 32 --save_path save/cifar10_float
    python train.py --dataset cifar10 --wbit 2 --abit 4 --fine_tune save/cifar10_float/model_best.pth.tar --lr 0.01

Go on with the ADC of 1-bit cells and 3 bits in the forward pass:
    python train.py --dataset cifar10 --fine_tune save/cifar10_w4a4/model_best.pth.tar --epochs 1 --lr 0.01 \\
        --adc_aware --cellBit 1 --adc_prec 3

Only measure a checkpoint on the test images:
    python train.py --evaluate --resume save/cifar10_w4a4/model_best.pth.tar

Files in --save_path: model_best.pth.tar (the epoch with the lowest validation loss; what eval.py reads),
checkpoint.pth.tar (what --resume reads), train.log, and events for `tensorboard --logdir save`.

A part of the training images (--val_split) chooses the best epoch, by the loss: among few images an accuracy is mostly
chance. The test images are used once, at the end.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

# Threads that wait for one another sleep instead of spinning: no slower on an idle machine, and three times faster where
# others use the cores too. The OpenMP runtime reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from experiment import data as datasets
from experiment import starting as fine_tune
import hardware
import models
import utils
from models import quant
from models.quant.quantizers import WEIGHT_QUANTIZERS
from networks import build_network, quantized_layers, used_alphas
from experiment.packed import pack
from utils import UserError

# Defaults that depend on the data set. Every flag given on the command line wins over them.
RECIPES = {
    "digits": {"epochs": 5, "batch_size": 32},  # 200 steps: 99.4 to 99.7 % of the test images over 4 seeds
    "other": {"epochs": 100, "batch_size": 128},
}
# What may differ between a run and its continuation: where things lie, not what is computed.
FREE_ON_RESUME = {"data_path", "save_path", "log_file", "save_minutes", "ngpu"}
# What --evaluate takes from the checkpoint and does not let the command line change.
FIXED_ON_EVALUATE = {"model", "wbit", "abit", "wq", "quantize_image", "adc_aware", *hardware.TRAINED_FOR}
# Flags that say what to do now; they are not part of a run's configuration.
ACTIONS = {"resume", "fine_tune", "evaluate", "export", "about", "overwrite"}
CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"  # in --save_path
MODELS = [name for name in models.names() if not name.endswith("_eval")]  # --adc_aware trains the others


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser():
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def recipe(name):
        return f"default {RECIPES['digits'][name]} for digits, else {RECIPES['other'][name]}"

    add = parser.add_argument_group("what to train, and on what").add_argument
    add("--model", default="vgg7_quant", help=f"{' or '.join(MODELS)}; default %(default)s")
    add("--wbit", type=utils.BITS, default=4, help="weight bits, 1 to 8, or 32 to switch the quantizer off; default 4")
    add("--abit", type=utils.BITS, default=4, help="activation bits, 1 to 8, or 32 to switch the quantizer off; default 4")
    add("--wq", default="dorefa", choices=WEIGHT_QUANTIZERS, help="weight quantizer: dorefa, odd multiples of one step up "
        "to the largest weight; sawb, multiples around an exact zero up to a level that follows from the weights' "
        "statistics. Default dorefa")
    add("--alpha_init", type=utils.FIT_OR_POSITIVE, help="first clipping level of every activation; with --fine_tune, of "
        "those that the weights lack or have for another --abit. fit: that of least squared error on some training images, "
        "layer by layer. Default fit with --fine_tune, else 6")
    add("--quantize_image", action="store_true", help="also round the input image to the activation grid")
    add("--dataset", default="digits", choices=datasets.DATASETS, help="default %(default)s")
    add("--data_path", default="./data", help="folder of the data set, default %(default)s; digits needs none")
    add("--val_split", type=utils.SHARE, default=0.1, help="share of the training images that chooses the best epoch, "
        "default 0.1; 0 trains on all of them and takes the last epoch")
    add("--limit_train", type=utils.COUNT, help="use only this many training images, for a quick try; default all")
    add("--cutout", type=utils.COUNT_OR_0, default=0, help="cover a random square of this many pixels a side; default 0")

    add = parser.add_argument_group("optimizer: SGD with Nesterov momentum").add_argument
    add("--epochs", type=utils.COUNT, help=f"passes over the training images; {recipe('epochs')}")
    add("--batch_size", type=utils.number(int, "2 or more, as batch norm needs", lambda value: value >= 2),
        help=f"images a step; {recipe('batch_size')}")
    add("--lr", type=utils.POSITIVE, default=0.05, help="highest learning rate, default 0.05")
    add("--momentum", type=utils.SHARE, default=0.9, help="default %(default)s")
    add("--wd", type=utils.POSITIVE_OR_0, default=1e-4, help="weight decay of all but the clipping levels, default 1e-4")
    add("--schedule_type", choices=("step", "cosine", "triangular"), help="step: times a gamma at each epoch of "
        "--schedule. cosine: half a cosine down to 0. triangular: up from 0 in the first quarter of the run, then down to "
        "0. Default triangular, or step if --schedule is given")
    add("--schedule", type=utils.COUNT, nargs="+", default=[], metavar="EPOCH", help="epochs at which the rate drops (step)")
    add("--gammas", type=utils.POSITIVE, nargs="+", default=[], metavar="G", help="factor at each epoch of --schedule")
    add("--label_smoothing", type=utils.SHARE, default=0.0, help="share of the target spread over all classes, default 0")
    add("--weight_clip", type=utils.POSITIVE, metavar="K", help="after every step, clip each layer's weights to K times "
        "their root mean square: DoReFa divides by the largest, so that a few large ones leave most levels unused")
    add("--alpha_lr", type=utils.POSITIVE, help="highest learning rate of the clipping levels, default that of --lr")
    add("--alpha_wd", type=utils.POSITIVE_OR_0, help="weight decay of the clipping levels (the L2 penalty of the PACT "
        "paper), default that of --wd")
    add("--clp", action="store_true", help="add a_lambda times the sum of alpha^2 over the layers to the loss")
    add("--a_lambda", type=utils.POSITIVE_OR_0, default=0.01, help="factor of the penalty that --clp adds, default 0.01")

    group = parser.add_argument_group("training through the ADC")
    group.add_argument("--adc_aware", action="store_true", help="the forward pass is that of simulated crossbars, bit for "
                       "bit; gradients go straight through the ADC. Start from a trained network with --fine_tune")
    group.add_argument("--calib_steps", type=utils.COUNT, default=50, help="steps between calibrations of the ADC ranges and "
                       "their correction, on 64 training images; default %(default)s")
    hardware.add_flags(group, several=False)
    hardware.add_calibration_flags(group)

    add = parser.add_argument_group("machine and files").add_argument
    add("--ngpu", type=int, help="0: CPU, 1: the GPU; default 1 where PyTorch finds a CUDA GPU")
    add("--amp", choices=("off", "bf16"), help="bf16: layers compute in bfloat16, in which the codes are exact; default "
        "bf16 where the processor has such arithmetic, else off")
    add("--seed", type=utils.COUNT_OR_0, default=0, help="of initial weights, split, order, crops and flips; default 0")
    add("--save_path", help="folder of the run, default save/<dataset>_<model>_w<wbit>a<abit>")
    add("--log_file", default="train.log", help="name of the log inside save_path, or a full path; default %(default)s")
    add("--save_minutes", type=utils.POSITIVE_OR_0, default=10, help="minutes between checkpoints inside an epoch, "
        "default 10; 0 writes one after every step")
    add("--overwrite", action="store_true", help="start anew in a save_path that holds a run, which is lost")

    add = parser.add_argument_group("starting from a checkpoint").add_argument
    add("--resume", nargs="?", const="", metavar="PATH", help="continue the run of this checkpoint, default "
        "save_path/checkpoint.pth.tar. Flags that are not given are the run's own")
    add("--fine_tune", nargs="?", const="", metavar="PATH", help="start a new run from the weights of PATH, or from those "
        "of --resume PATH. With other quantizers than theirs, the scale of the logits and clipping levels are fitted to what "
        "the network did before")
    add("--evaluate", action="store_true", help="only measure the checkpoint of --resume, default "
        "save_path/model_best.pth.tar, on the test images")
    add("--export", metavar="FILE", help="with --evaluate: also write the network to FILE, weights as packed codes, which "
        "--resume, --fine_tune and eval.py read, and what is known of it to a .json beside it")
    add("--about", metavar="TEXT", help="with --export: what the .json says of the data beside the name of the data set")
    return parser


def parse(argv):
    """(args, checkpoint): the settings of this call, checked, and the checkpoint it starts from or None."""
    args, given = utils.parse_flags(build_parser(), argv)
    fill_defaults(args)
    checkpoint = None
    if args.fine_tune is not None and not args.evaluate:
        if args.fine_tune and args.resume:
            raise UserError("--fine_tune and --resume both name a checkpoint: give one of them")
        args.fine_tune, args.resume = args.fine_tune or args.resume, None
        if not args.fine_tune:
            raise UserError("--fine_tune starts a new run from weights: it needs the PATH of a checkpoint")
        checkpoint = utils.load_checkpoint(args.fine_tune)
        trained = checkpoint["config"].get("model", args.model)
        if trained != args.model:
            raise UserError(f"{args.fine_tune} is of the model {trained}, not {args.model}")
    elif args.resume is not None or args.evaluate:
        file = BEST if args.evaluate else CHECKPOINT
        args.resume = args.resume or args.fine_tune or str(Path(args.save_path, file))
        checkpoint = utils.load_checkpoint(args.resume)
        adopt_config(args, given, checkpoint)

    useless = [name for name in given if name in (*hardware.TRAINED_FOR, "calib_steps") and not args.adc_aware]
    if useless:
        raise UserError(f"--{useless[0]} is for training through the ADC: add --adc_aware")
    if args.wq == "sawb" and args.wbit == 1:
        raise UserError("--wq sawb has codes around an exact zero: it needs --wbit 2 to 8")
    if args.adc_aware:
        if 32 in (args.wbit, args.abit):
            raise UserError("--adc_aware needs quantized weights and activations, --wbit and --abit from 1 to 8")
        hardware.combinations(args, args.wbit, args.abit, ["calibrated"])
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: unknown, choose from {', '.join(MODELS)}")
    if len(args.schedule) != len(args.gammas):
        raise UserError(f"--schedule has {len(args.schedule)} epochs, --gammas {len(args.gammas)} factors: give as many")
    if args.export and not args.evaluate:
        raise UserError("--export writes a trained network: add --evaluate and --resume PATH")
    if args.about and not args.export:
        raise UserError("--about is for the .json of --export")
    if args.export and Path(args.export).suffix == ".json":
        raise UserError(f"--export {args.export}: a .json is written beside the network, so name the network otherwise")
    if args.export and args.wbit == 32:
        raise UserError(f"--export packs weight codes, and {args.resume} has --wbit 32")
    if args.alpha_init == "fit" and args.fine_tune is None and not args.resume and not args.evaluate:
        raise UserError("--alpha_init fit needs the trained network of --fine_tune")
    if args.schedule_type == "step" and not args.schedule:
        raise UserError("--schedule_type step needs --schedule and --gammas")
    if args.resume and args.overwrite:
        raise UserError("--overwrite starts anew, and --resume goes on: give one of them")
    if not (args.resume or args.overwrite) and any(Path(args.save_path, file).exists() for file in (CHECKPOINT, BEST)):
        raise UserError(f"{args.save_path} holds a run: continue it with --resume, start anew with --overwrite, or choose "
                        "another --save_path")
    return args, checkpoint


def fill_defaults(args):
    """Replace None by the default that depends on other settings."""
    defaults = RECIPES.get(args.dataset, RECIPES["other"]) | {
        "schedule_type": "step" if args.schedule else "triangular",
        "save_path": f"save/{args.dataset}_{args.model}_w{args.wbit}a{args.abit}",
        "alpha_init": "fit" if args.fine_tune is not None else 6.0,
        "alpha_lr": args.lr,
        "alpha_wd": args.wd,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def adopt_config(args, given, checkpoint):
    """Take the settings from the checkpoint of --resume; those that were given must agree with it."""
    config, name = checkpoint["config"], args.resume
    if args.evaluate:
        utils.adopt_config(args, given, config, FIXED_ON_EVALUATE, name)
        return
    if checkpoint.get("format") != utils.CHECKPOINT_FORMAT or "optimizer" not in checkpoint:
        raise UserError(f"{name} holds weights but no run to continue; start from them with --fine_tune")
    utils.adopt_config(args, given, config, set(config) - FREE_ON_RESUME, name)
    args.save_path = str(Path(name).parent)  # model_best.pth.tar and the log lie beside the checkpoint
    if "save_path" in given and Path(given["save_path"]).resolve() != Path(args.save_path).resolve():
        raise UserError(f"a run is continued in its own folder, {args.save_path}, not in {given['save_path']}")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and loss


@torch.no_grad()
def clip_weights(net, factor):
    """Clip the weights of every layer to `factor` times their root mean square."""
    for layer in quantized_layers(net).values():
        bound = factor * torch.linalg.vector_norm(layer.weight) / layer.weight.numel() ** 0.5
        layer.weight.clamp_(-bound, bound)


def build_optimizer(net, args):
    """SGD in two groups; the schedule multiplies each group's own "initial_lr"."""
    alphas = list(used_alphas(net).values())
    weights = [p for name, p in net.named_parameters() if not name.endswith("act_alpha")]
    groups = [{"params": weights, "lr": args.lr, "initial_lr": args.lr, "weight_decay": args.wd}]
    if alphas:
        groups.append({"params": alphas, "lr": args.alpha_lr, "initial_lr": args.alpha_lr, "weight_decay": args.alpha_wd})
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0, fused=True)


def alpha_penalty(net, a_lambda):
    """a_lambda times the sum of alpha^2: the penalty that --clp adds to the loss."""
    return a_lambda * sum(alpha.square() for alpha in used_alphas(net).values())


@torch.no_grad()
def evaluate(net, x, y, data, amp="off", batch_size=250, tick=lambda: None):
    """(mean loss, accuracy in percent) on uint8 images x. tick() is called before every batch and may raise."""
    net.eval()
    meter = utils.Meter(x.device)
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        tick()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp == "bf16"):
            logits = net(datasets.normalize(images, data.mean, data.std)).float()
        meter.add(F.cross_entropy(logits, labels), logits, labels)
    return meter.read()


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """A training run: everything that a checkpoint holds, and the loop that moves it forward."""

    def __init__(self, args, net, data, device, log, history=None):
        self.args, self.net, self.data, self.device, self.log = args, net, data, device, log
        # How these weights came about: the commands of this run and of those that it starts from, and their duration.
        history = history or {}
        self.commands, self.seconds = list(history.get("commands", [])), history.get("seconds", 0.0)
        self.folder = Path(args.save_path)
        train_x, train_y = data.train_x, data.train_y
        train, val = datasets.training_split(train_y, args.val_split, args.seed, args.limit_train)
        if len(train) < 2 or (args.val_split and not len(val)):
            raise UserError(f"{len(train) + len(val)} training images are too few for --val_split {args.val_split}")
        self.train_x, self.train_y = train_x[train].to(device), train_y[train].to(device)
        self.val_x, self.val_y = train_x[val].to(device), train_y[val].to(device)
        self.optimizer = build_optimizer(net, args)
        self.steps = datasets.steps_per_epoch(len(self.train_x), args.batch_size)  # in an epoch
        self.images = min(args.batch_size, len(self.train_x))  # in a step
        self.epoch = self.step = 0  # complete epochs, and complete steps of the epoch under way
        self.meter = utils.Meter(device)  # of the epoch under way
        self.best_acc = self.test_acc = None  # percent; best_acc, validation accuracy of the best epoch
        self.history = []  # a dict for every complete epoch
        self.stop = utils.StopRequest()

    # -- checkpoints

    def data_facts(self):
        """Tells data sets apart: a run is not continued on other images."""
        return {"classes": list(self.data.classes), "mean": list(self.data.mean), "std": list(self.data.std),
                "train_images": len(self.train_x)}

    def weights(self):
        config = {name: value for name, value in vars(self.args).items() if name not in ACTIONS}
        return {"state_dict": self.net.state_dict(), "epoch": self.epoch, "best_acc": self.best_acc, "config": config,
                "data": self.data_facts(), "machine": utils.machine_info(), "commands": self.commands,
                "seconds": self.seconds + time.monotonic() - self.started}

    def save(self):
        self.check_finite()
        utils.save_checkpoint(self.folder / CHECKPOINT, {
            **self.weights(), "optimizer": self.optimizer.state_dict(), "step": self.step, "test_acc": self.test_acc,
            "history": self.history, "meter": self.meter.state_dict(), "rng": utils.rng_state()})
        self.saved_at = time.monotonic()

    def restore(self, checkpoint, path):
        """Go to where save() was called; the network has its weights already."""
        if checkpoint["data"] != self.data_facts():
            raise UserError(f"the images are not those that {path} was trained on; check --dataset and --data_path")
        if checkpoint["epoch"] and not (self.folder / BEST).exists():
            raise UserError(f"{self.folder / BEST} is missing: it belongs to the run of {path}")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in ("epoch", "step", "best_acc", "test_acc", "history"):
            setattr(self, name, checkpoint[name])
        self.meter.load_state_dict(checkpoint["meter"])
        utils.set_rng_state(checkpoint["rng"])

    def check_finite(self):
        """A checkpoint must not be replaced by one that cannot be continued."""
        loss, _ = self.meter.read()
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in self.net.parameters()):
            raise UserError(f"the loss or a weight is no longer a finite number in epoch {self.epoch + 1}, step "
                            f"{self.step}; try a lower --lr. The last checkpoint in {self.folder} is from before")

    # -- training

    def some_images(self, count):
        """Training images of all classes, always the same."""
        images = self.train_x[:: max(1, len(self.train_x) // count)][:count]
        return datasets.normalize(images, self.data.mean, self.data.std)

    def calibrate(self):
        self.check_finite()
        images = self.some_images(64)
        if self.net.training:  # SAWB keeps the level of the last step's weights: reads are counted with that of these
            for layer in quantized_layers(self.net).values():
                layer.weight_quant.codes(layer.weight.detach())
        try:
            quant.calibrate(self.net, [images], self.args.adc_calib, self.args.adc_per)
        except ValueError as error:  # more values than can be counted
            raise UserError(f"--adc_aware: {error}") from None
        if self.args.adc_correct == "channel":
            quant.correct(self.net, images)

    def fit(self):
        """Train to the last epoch, measure the best one on the test images, and return the exit code."""
        args = self.args
        self.saved_at = self.started = time.monotonic()
        done = self.epoch * self.steps + self.step
        self.writer = SummaryWriter(self.folder, purge_step=done)  # drops what was logged after the checkpoint
        self.bar = tqdm(total=args.epochs * self.steps * self.images, initial=done * self.images, unit="img", unit_scale=True,
                        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60)
        try:
            with self.stop, self.bar, self.writer:
                if not done:  # from here on a run that dies can go on
                    self.save()
                while self.epoch < args.epochs:
                    self.train_epoch()
                    self.end_epoch()
                self.test()
        except utils.Stopped:
            self.save()
            self.log.info(f"stopped after {self.epoch} of {args.epochs} epochs and {self.step} steps; continue with: "
                          f"python train.py --resume {self.folder / CHECKPOINT}")
            return 128 + self.stop.signal  # as a shell reports a process that the signal ended
        return 0

    def test(self):
        """Measure the best epoch, in float32 as eval.py does. The only use of the test images."""
        best = utils.load_checkpoint(self.folder / BEST)
        net = copy.deepcopy(self.net)
        utils.load_weights(net, best["state_dict"], source=self.folder / BEST)
        x, y = self.data.test_x.to(self.device), self.data.test_y.to(self.device)
        _, self.test_acc = evaluate(net, x, y, self.data, tick=self.stop.check)
        self.save()
        self.log.info(f"test accuracy {self.test_acc:.2f} % on {len(y)} images, with the weights of epoch {best['epoch']} "
                      f"({self.folder / BEST})")

    def train_epoch(self):
        args = self.args
        started, first, shown = time.monotonic(), self.step, 0.0
        fill = tuple(round(255 * mean) for mean in self.data.mean)
        self.net.train()
        self.bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
        for step, x, y in datasets.train_batches(self.train_x, self.train_y, args.batch_size, args.seed, self.epoch, first,
                                                 pad=self.data.pad, flip=self.data.flip, cutout=args.cutout, fill=fill):
            self.stop.check()
            position = self.epoch * self.steps + step
            factor = utils.schedule_factor(args.schedule_type, position, args.epochs * self.steps, self.steps,
                                           args.schedule, args.gammas)
            if args.adc_aware and position % args.calib_steps == 0:
                self.calibrate()
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                logits = self.net(datasets.normalize(x, self.data.mean, self.data.std)).float()
            loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
            total = loss + alpha_penalty(self.net, args.a_lambda) if args.clp else loss
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.optimizer.step()
            if args.weight_clip:
                clip_weights(self.net, args.weight_clip)
            self.meter.add(loss, logits, y)
            self.step = step + 1
            self.bar.update(len(y))

            now = time.monotonic()
            if now - shown >= 1:  # reading the meter waits for a GPU, so not at every step
                shown = now
                self.check_finite()
                mean_loss, accuracy = self.meter.read()
                self.bar.set_postfix(loss=f"{mean_loss:.3f}", acc=f"{accuracy:.1f}%", refresh=False)
                self.writer.add_scalar("train/loss_of_step", loss.item(), position)
                self.writer.add_scalar("lr", args.lr * factor, position)
            if now - self.saved_at >= 60 * args.save_minutes:
                self.save()
        self.rate = (self.step - first) * self.images / (time.monotonic() - started)

    def end_epoch(self):
        """Validate, log, keep the weights if they are the best, and write the checkpoint of the complete epoch."""
        args = self.args
        self.check_finite()
        train_loss, train_acc = self.meter.read()
        row = {"epoch": self.epoch + 1, "train_loss": train_loss, "train_acc": train_acc}
        text = f"epoch {self.epoch + 1}/{args.epochs}  loss {train_loss:.4f}  accuracy {train_acc:.2f} %"
        if args.adc_aware:
            self.calibrate()
        if len(self.val_x):
            row["val_loss"], row["val_acc"] = evaluate(self.net, self.val_x, self.val_y, self.data, args.amp,
                                                       tick=self.stop.check)
            text += f"  validation {row['val_acc']:.2f} %"
        self.bar.set_postfix(loss=f"{train_loss:.3f}", acc=f"{train_acc:.1f}%")
        self.log.info(f"{text}  lr {self.optimizer.param_groups[0]['lr']:.4g}  {self.rate:.0f} images/s")
        self.write_summaries(row)
        # On a tie the later epoch wins: its learning rate was lower. Without a validation split, every epoch does.
        best = all(row["val_loss"] <= other["val_loss"] for other in self.history) if len(self.val_x) else True
        self.history.append(row)
        self.epoch, self.step, self.meter = self.epoch + 1, 0, utils.Meter(self.device)
        if best:  # written before checkpoint.pth.tar: a run that dies between the two repeats the epoch and writes it again
            self.best_acc = row.get("val_acc")
            utils.save_checkpoint(self.folder / BEST, self.weights())
        self.save()

    def write_summaries(self, row):
        """Scalars of the epoch; about ten times in a run also histograms of weights, clipping levels and layer inputs."""
        position = (self.epoch + 1) * self.steps - 1  # a run that goes on drops what was logged from its first step on
        for name, value in row.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, position)
        alphas = used_alphas(self.net)
        for name, alpha in alphas.items():
            self.writer.add_scalar(f"alpha/{name}", alpha.item(), position)
        if self.epoch % max(1, self.args.epochs // 10) == 0 or self.epoch + 1 == self.args.epochs:
            if alphas:
                self.writer.add_histogram("alpha", torch.stack(list(alphas.values())), position)
            utils.write_histograms(self.writer, position, self.net, quantized_layers(self.net), self.some_images(32))


def export(checkpoint, args, accuracy, images):
    """Write the packed network to args.export, and what is known of it to a .json beside it."""
    names = "format", "state_dict", "data", "epoch", "best_acc", "commands", "seconds", "machine"
    kept = {name: checkpoint[name] for name in names if name in checkpoint}
    network = {name: getattr(args, name) for name in ("model", "wbit", "abit", "wq", "quantize_image", "dataset")}
    config = {name: value for name, value in (network | checkpoint["config"]).items() if name not in FREE_ON_RESUME}
    try:
        small = pack(kept | {"config": config})
    except ValueError as error:
        raise UserError(f"{args.resume} cannot be packed: {error}") from None
    utils.atomic_write(args.export, lambda file: torch.save(small, file))
    facts = {
        "dataset": args.dataset, "about": args.about, "test_images": images, "test_accuracy": round(accuracy, 2),
        "validation_accuracy": checkpoint.get("best_acc"), "train_images": checkpoint.get("data", {}).get("train_images"),
        "commands": checkpoint.get("commands", []), "hours": round(checkpoint.get("seconds", 0) / 3600, 2),
        "config": config, "date": time.strftime("%Y-%m-%d"), "machine": checkpoint.get("machine", {}),
    }
    text = json.dumps(facts, indent=1) + "\n"
    utils.atomic_write(Path(args.export).with_suffix(".json"), lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args, checkpoint = parse(argv)
    utils.keep_freed_memory()
    device = utils.pick_device(args.ngpu)
    num_classes = datasets.num_classes(args.dataset, args.data_path)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: let cuDNN try its algorithms once
    torch.manual_seed(args.seed)
    net = build_network(args, num_classes, device)
    if checkpoint:
        if args.fine_tune:
            fine_tune.load(net, args, checkpoint["state_dict"])
        else:
            utils.load_weights(net, checkpoint["state_dict"], source=args.resume)

    if args.evaluate:
        if args.export:
            utils.check_writable(Path(args.export).parent)
            if Path(args.export).is_dir():
                raise UserError(f"--export {args.export} is a folder: give the name of a file")
        log = utils.get_logger()
        data = datasets.load(args.dataset, args.data_path, log.info)
        if checkpoint.get("format") == utils.CHECKPOINT_FORMAT:  # images are scaled as those of the training were
            datasets.check_classes(data, checkpoint["data"], args.resume)
            data = dataclasses.replace(data, mean=checkpoint["data"]["mean"], std=checkpoint["data"]["std"])
        _, accuracy = evaluate(net, data.test_x.to(device), data.test_y.to(device), data)
        log.info(f"test accuracy {accuracy:.2f} % on {len(data.test_y)} images of {args.dataset} ({args.resume})")
        if args.export:
            export(checkpoint, args, accuracy, len(data.test_y))
            log.info(f"packed into {args.export} ({os.path.getsize(args.export) / 1e6:.2f} MB)")
        return 0

    if args.amp is None:
        args.amp = "bf16" if utils.has_fast_bf16(device) else "off"
    utils.check_writable(args.save_path)
    log = utils.get_logger(Path(args.save_path, args.log_file))
    if args.resume and checkpoint.get("test_acc") is not None:
        log.info(f"{args.save_path} is finished after {checkpoint['epoch']} epochs: test accuracy "
                 f"{checkpoint['test_acc']:.2f} %. To train on, start from its weights with --fine_tune")
        return 0
    data = datasets.load(args.dataset, args.data_path, log.info)
    run = Run(args, net, data, device, log, checkpoint)
    run.commands.append(shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)]))
    log.info(run.commands[-1])
    log.info(", ".join(f"{name} {value}" for name, value in utils.machine_info().items() if value is not None))
    log.info(", ".join(f"{name} {value}" for name, value in vars(args).items() if name not in ACTIONS))
    log.info(f"{len(run.train_x)} training, {len(run.val_x)} validation, {len(data.test_x)} test images; on {device}, "
             + ("bfloat16" if args.amp == "bf16" else "float32"))
    if args.schedule and args.schedule_type != "step":
        log.info(f"--schedule and --gammas have no effect with --schedule_type {args.schedule_type}")
    if args.resume:
        try:
            run.restore(checkpoint, args.resume)
        except (KeyError, TypeError, ValueError) as error:  # the file is whole, but somebody has edited it
            raise UserError(f"{args.resume} cannot be continued: {utils.one_line(error)}") from error
        log.info(f"continuing {args.resume} after epoch {run.epoch}, step {run.step} of {run.steps}")
    else:
        if args.weight_clip:
            clip_weights(net, args.weight_clip)
        if checkpoint:
            fitted = fine_tune.fit_quantizers(net, args, checkpoint, num_classes, run.some_images(256))
            log.info(f"starting from the weights of {args.fine_tune}{fitted}")
        for file in (CHECKPOINT, BEST):  # after --overwrite, nothing may continue the old run by mistake
            Path(args.save_path, file).unlink(missing_ok=True)
    return run.fit()


if __name__ == "__main__":
    utils.run_main(main)
