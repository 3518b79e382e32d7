"""Train a VGG or a ResNet with PACT activations and DoReFa or SAWB weights on CIFAR-sized images.

A first try, without a download, of minutes on two CPU cores: a 4-bit VGG7 on scikit-learn's digits.
    python train.py

CIFAR-10 (downloaded into ./data on first use):
    python train.py --dataset cifar10 --w_bits 4 --a_bits 4 --save_path save/cifar10_w4a4

Stopped by Ctrl-C, killed, or out of power? Go on where the last checkpoint was made:
    python train.py --resume --save_path save/cifar10_w4a4
A run that was resumed ends with the same weights, bit for bit on as many threads of a CPU, as one that was never stopped. A
checkpoint is written after each epoch and every --save_minutes inside one.

A network without quantizers first, then 2-bit weights and 4-bit activations that start from it:
    python train.py --dataset cifar10 --w_bits 32 --a_bits 32 --save_path save/cifar10_float
    python train.py --dataset cifar10 --w_bits 2 --a_bits 4 --fine_tune save/cifar10_float/model_best.pth.tar --lr 0.01

Go on with the ADC of 1-bit cells and 3 bits in the forward pass:
    python train.py --dataset cifar10 --fine_tune save/cifar10_w4a4/model_best.pth.tar --epochs 1 --lr 0.01 \\
        --adc_aware --cell_bits 1 --adc_bits 3 --save_path save/cifar10_adc3

The same, each step on another chip of a measured device, as it is after an hour:
    python train.py --dataset cifar10 --fine_tune save/cifar10_w4a4/model_best.pth.tar --epochs 1 --lr 0.01 \\
        --adc_aware --cell_bits 1 --adc_bits 4 --device techA --device_time 1h --save_path save/cifar10_chips

Two bits of weights that learn from the answers of the 4-bit network, not from the labels alone:
    python train.py --dataset cifar10 --w_bits 2 --fine_tune save/cifar10_w4a4/model_best.pth.tar --epochs 9 --distill 0.5 \\
        --save_path save/cifar10_w2

Your own network, converted to crossbars and trained further through its arrays, or, with --qat alone, through its quantizers:
    python train.py --dataset cifar10 --model path/to/net.py:small --state small.pt --w_bits 4 --a_bits 4 --epochs 5 \\
        --adc_aware --cell_bits 2 --adc_bits 4

Begin, or go on where it stopped: what scripts use
    python train.py --go_on --save_path save/cifar10_w4a4

On two GPUs, or in two processes on the CPU (docs/cluster.md):
    python train.py --dataset cifar10 --ngpu 2 --save_path save/two
    torchrun --standalone --nproc_per_node 2 train.py --dataset cifar10 --ngpu 0 --save_path save/two_cpu

Only measure a checkpoint on the test images:
    python train.py --evaluate --resume save/cifar10_w4a4/model_best.pth.tar

Files in --save_path: model_best.pth.tar (the epoch with the lowest validation loss; what eval.py reads),
checkpoint.pth.tar (what --resume reads), config.json (the settings, for --config), train.log, and events for `tensorboard --logdir save`.

A part of the training images (--val_split) chooses the best epoch, by the loss: among few images an accuracy is mostly
chance. The test images are used once, at the end.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

# Threads that wait for one another sleep instead of spinning: no slower on an idle machine, and three times faster where
# others use the cores too. The OpenMP runtime reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from experiment.start import conversion, starting
from experiment.inputs import data, foreign
from experiment.program import config_file, distributed, machine
from experiment.report import says
from experiment.train import optimizing, teacher, training
from experiment.inputs.checkpoint import DAMAGED, load_weights, write_torch_file
from experiment.program.cli import UserError, check_writable, get_logger, one_line, user_error
from experiment.inputs.packed import pack
from experiment.settings.train_flags import BEST, CHECKPOINT, CONFIG, Actions, TrainSettings
from experiment.settings.train_settings import config_beside, parse
from models.quant import ADC_BUFFERS
from models.quant.storage.files import write_text


def measure_checkpoint(settings: TrainSettings, actions: Actions, checkpoint: dict, net: nn.Module, device: torch.device) -> int:
    """--evaluate: the accuracy of a checkpoint on the test images, and the files of --export."""
    if actions.export and distributed.is_first():
        check_writable(Path(actions.export).parent)
        if Path(actions.export).is_dir():
            raise UserError(f"--export {actions.export} is a folder: give the name of a file")
        if {Path(actions.export).resolve(), Path(actions.export).with_suffix(".json").resolve()} & {
                Path(actions.resume).resolve(), Path(actions.resume).resolve().parent / CONFIG}:
            raise UserError(f"--export {actions.export} would replace a file of the run itself: give another name")
    log = get_logger()
    images = data.limited(data.load(settings.dataset, settings.data_path, log.info), settings.limit_test)
    images = data.as_trained(images, checkpoint.get("data"), actions.resume)
    log.info(says.normalization(images.mean, images.std))
    training.program(net, settings)
    _, accuracy = training.evaluate(net, images.test_x.to(device), images.test_y.to(device), images, title="test images")
    log.info(f"test accuracy {accuracy:.2f} % on {len(images.test_y)} images of {settings.dataset} ({actions.resume})")
    if actions.export and distributed.is_first():
        export(settings, actions, checkpoint, accuracy, len(images.test_y))
        log.info(f"packed into {actions.export} ({os.path.getsize(actions.export) / 1e6:.2f} MB)")
    return 0


def export(settings: TrainSettings, actions: Actions, checkpoint: dict, accuracy: float, images: int) -> None:
    """Write the packed network to --export, and what is known of it to a .json beside it."""
    names = "format", "state_dict", "data", "epoch", "best_acc", "commands", "curves", "seconds", "machine"
    kept = {name: checkpoint[name] for name in names if name in checkpoint}
    config = {name: value for name, value in settings.of_computation().items()
              if name in checkpoint["config"] or name in ("model", "w_bits", "a_bits", "wq", "quantize_image", "dataset")}
    with user_error(lambda error: f"{actions.resume} cannot be packed: {error}"):
        small = pack(kept | {"config": config})
    write_torch_file(actions.export, small)
    facts = {
        "dataset": settings.dataset, "about": actions.about, "test_images": images, "test_accuracy": round(accuracy, 2),
        "validation_accuracy": checkpoint.get("best_acc"), "train_images": checkpoint.get("data", {}).get("train_images"),
        "commands": checkpoint.get("commands", []), "curves": checkpoint.get("curves", []),
        "hours": round(checkpoint.get("seconds", 0) / 3600, 2),
        "config": config, "date": time.strftime("%Y-%m-%d"), "machine": checkpoint.get("machine", {}),
    }
    write_text(Path(actions.export).with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def own_network(settings: TrainSettings, actions: Actions, checkpoint: dict | None, num_classes: int, device: torch.device) -> nn.Module:
    """A network of this project with random weights or those of the checkpoint."""
    net = starting.build_network(settings, num_classes, device)
    if actions.fine_tune:
        starting.load(net, settings, checkpoint["state_dict"], actions.fine_tune)
    elif checkpoint:
        load_weights(net, checkpoint["state_dict"], source=actions.resume)
    return net


def start(run: training.Run, actions: Actions, checkpoint: dict | None, num_classes: int) -> None:
    """Bring a run to its first step: where its checkpoint stands, or with weights made ready for its quantizers."""
    if actions.resume:
        with user_error(lambda error: f"{actions.resume} cannot be continued: {one_line(error)}", DAMAGED):
            run.restore(checkpoint, actions.resume)
        run.log.info(f"continuing {actions.resume} after epoch {run.epoch}, step {run.step} of {run.steps}")
        return
    optimizing.settle(run.net, run.settings)
    if checkpoint:
        own = not foreign.is_foreign(run.settings.model)
        fitted = own and starting.fit_quantizers(run.net, run.settings, checkpoint, num_classes, run.some_images(256), actions.fine_tune)
        run.log.info(f"starting from the weights of {actions.fine_tune}{fitted or ''}")
        if known := starting.known_in_validation(run.settings, checkpoint, run.data.train_y, actions.fine_tune):
            run.log.info(f"{known} of {len(run.val_x)} validation images are among those that these weights were trained on, with another "
                         "--seed, --val_split or --limit_train: validation accuracies are too high")
    training.program(run.net, run.settings, step=0)  # cells that cannot be are refused before the folder holds a run
    for file in (CHECKPOINT, BEST) if distributed.is_first() else ():  # after --overwrite, nothing may continue the old run by mistake
        Path(run.folder, file).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    settings, actions, checkpoint = parse(argv, __doc__)
    if distributed.must_start(settings.ngpu):
        return distributed.start(settings.ngpu, argv)
    machine.keep_freed_memory()
    device = machine.pick_device(settings.ngpu)
    num_classes = data.num_classes(settings.dataset, settings.data_path)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: let cuDNN try its algorithms once
    torch.manual_seed(settings.seed)
    others = conversion.network_of(settings, actions.resume or actions.fine_tune)
    if not others:
        net = own_network(settings, actions, checkpoint, num_classes, device)
    if actions.evaluate:
        return measure_checkpoint(settings, actions, checkpoint, net, device)

    if settings.amp is None:
        settings = replace(settings, amp="bf16" if machine.has_fast_bf16(device) and not others else "off")
    if distributed.is_first():
        check_writable(settings.save_path)
    log = get_logger(Path(settings.save_path, settings.log_file) if distributed.is_first() else None)
    if actions.resume and checkpoint.get("test_acc") is not None:
        log.info(f"{settings.save_path} is finished after {checkpoint['epoch']} epochs: test accuracy "
                 f"{checkpoint['test_acc']:.2f} %. To train on, start from its weights with --fine_tune")
        return 0
    if others:  # images decide how it is converted
        images = conversion.images_of(others, settings, device, log)
        net = conversion.for_training(others, settings, images, device, checkpoint, actions.resume or actions.fine_tune)
        log.info(says.conversion(net))
        if actions.resume:  # with its ranges
            load_weights(net, checkpoint["state_dict"], allow_missing=ADC_BUFFERS, source=actions.resume)
    else:
        images = data.load(settings.dataset, settings.data_path, log.info)
    images = data.limited(images, settings.limit_test)
    learns_from = teacher.teacher_of(settings, others, checkpoint, bool(actions.resume), num_classes, device,
                                     actions.fine_tune or actions.resume)
    run = training.Run(settings, net, images, device, log, checkpoint, learns_from)
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    run.commands += [command] * (command not in run.commands)  # of a run that goes on it stands there
    log.info(command)
    log.info(", ".join(f"{name} {value}" for name, value in machine.machine_info().items() if value is not None))
    log.info(", ".join(f"{name} {value}" for name, value in settings.config().items()))
    log.info(f"{len(run.train_x)} training, {len(run.val_x)} validation, {len(images.test_x)} test images; on {device}, "
             + ("bfloat16" if settings.amp == "bf16" else "float32"))
    log.info(says.normalization(images.mean, images.std, others and others.transform))
    if settings.schedule and settings.schedule_type != "step":
        log.info(f"--schedule and --gammas have no effect with --schedule_type {settings.schedule_type}")
    start(run, actions, checkpoint, num_classes)
    if distributed.is_first():
        began = config_beside(run.folder / CHECKPOINT, "fine_tune") if actions.resume else {"fine_tune": actions.fine_tune}
        config_file.write(run.folder / CONFIG, settings.config() | began)
    return run.fit()


if __name__ == "__main__":
    distributed.run(main)
