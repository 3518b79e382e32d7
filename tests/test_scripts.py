"""The scripts at the top level: which programs they call, one after another, and with what settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def calls(tmp_path):
    """calls(script, *flags, **variables): the argument lists of the programs that the script starts."""
    stub = tmp_path / "python stub"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)

    def run(script, *flags, **variables):
        done = subprocess.run(["bash", ROOT / script, *flags], capture_output=True, text=True, check=True, cwd=tmp_path,
                              env=os.environ | {"PYTHON": str(stub)} | variables)
        assert done.stderr == ""
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def settings(arguments):
    """{flag: its values as one text}; of a flag that stands twice the last counts, as in argparse."""
    found, flag = {}, None
    for argument in arguments[1:]:
        if argument.startswith("--") and " " not in argument:
            flag, found[argument] = argument, ""
        else:
            found[flag] = f"{found[flag]} {argument}".strip()
    return found


COMMON = {"--model": "vgg7_quant", "--dataset": "cifar10", "--data_path": "./data", "--batch_size": "128", "--wd": "5e-4",
          "--label_smoothing": "0.1", "--cutout": "8", "--val_split": "0.02", "--go_on": ""}
FLOAT = COMMON | {"--w_bits": "32", "--a_bits": "32", "--wq": "dorefa", "--lr": "0.1"}
QUANTIZED = COMMON | {"--w_bits": "4", "--a_bits": "4", "--wq": "dorefa", "--lr": "0.05", "--alpha_lr": "0.01",
                      "--weight_clip": "3", "--schedule_type": "cosine", "--distill": "0.5"}


@pytest.mark.parametrize("flags, recipe, epochs", [([], "full", ("100", "100")), (["full"], "full", ("100", "100")),
                                                   (["fast"], "fast", ("12", "20"))])
def test_recipes(calls, flags, recipe, epochs):
    plain, quantized = map(settings, calls("vgg_cifar_quant.sh", *flags))
    folder = f"save/{{dataset}}_{{model}}_{recipe}_"
    assert plain == FLOAT | {"--epochs": epochs[0], "--save_path": folder + "w32a32"}
    assert quantized == QUANTIZED | {"--epochs": epochs[1], "--save_path": folder + "w{w_bits}a{a_bits}_{wq}",
                                     "--fine_tune": folder + "w32a32/model_best.pth.tar"}


def test_flags_reach_every_run_but_not_what_makes_it(calls):
    given = ["--w_bits", "2", "--a_bits", "3", "--wq", "sawb", "--model", "other_quant", "--epochs", "1", "--cutout", "4",
             "--data_path", "a folder"]
    runs = [settings(call) for call in calls("vgg_cifar_quant.sh", "fast", *given, "--save_path", "x", "--fine_tune", "y")]
    assert [(run["--w_bits"], run["--a_bits"], run["--wq"]) for run in runs] == [("32", "32", "dorefa"), ("2", "3", "sawb")]
    for run in runs:
        assert (run["--model"], run["--epochs"], run["--data_path"], run["--cutout"]) == ("other_quant", "1", "a folder", "4")
    assert runs[1]["--fine_tune"] == f"{runs[0]['--save_path']}/model_best.pth.tar"
    assert len({run["--save_path"] for run in runs} - {"x"}) == 2


def test_variables_reach_one_kind_of_run(calls):
    variables = {"float_epochs": "1", "epochs": "2", "float_lr": "0.2", "lr": "0.3", "alpha_lr": "0.4", "weight_clip": "5",
                 "distill": "0.6"}
    plain, quantized = map(settings, calls("vgg_cifar_quant.sh", "fast", **variables))
    assert (plain["--epochs"], plain["--lr"]) == ("1", "0.2")
    assert not {"--alpha_lr", "--weight_clip", "--distill"} & plain.keys()
    assert quantized["--epochs"] == "2"
    assert [quantized[flag] for flag in ("--lr", "--alpha_lr", "--weight_clip", "--distill")] == ["0.3", "0.4", "5", "0.6"]


def test_whole_table_of_the_network_in_the_box(calls):
    [call] = calls("vgg_cifar_eval.sh")
    assert call[:4] == ["eval.py", "--resume", "pretrained/vgg7_w4a4_cifar10.pt", "--table"]
    assert (ROOT / call[2]).is_file()
    assert call[4:] == ["--cell_bits 1 2 4 --adc_bits 3 4 5 6 7 8", "--cell_bits 1 --adc_plan significance --adc_bits 3 2 1.5 1",
                        "--cell_bits 2 --adc_plan significance --adc_bits 3 2",
                        "--cell_bits 1 --adc_plan significance --adc_idle skip --adc_bits 3 2 1.5 1.4 1",
                        "--cell_bits 2 --adc_plan significance --adc_idle skip --adc_bits 3 2 1",
                        "--cell_bits 1 --adc_plan ones --adc_bits 3 2 1.4 1 0.75 0.5", "--cell_bits 2 --adc_plan ones --adc_bits 2 1",
                        "--cell_bits 1 2 4 --adc_range dynamic",
                        "--cell_bits 1 2 --adc_bits 4 5 --crossbar_layers conv", "--cell_bits 1 --adc_bits 4 --mapping im2col",
                        "--cell_bits 1 2 --adc_bits 5 --mapping tap im2col --rows 256"]


def test_flags_of_the_evaluation_come_last(calls):
    given = ["--cell_bits", "3", "4", "--resume", "a folder/c.pth.tar", "--limit=5"]
    [call] = calls("vgg_cifar_eval.sh", *given)
    assert call[-len(given):] == given


def test_programs_failure_ends_the_script(tmp_path):
    (tmp_path / "failing").write_text("#!/bin/sh\necho called\nexit 3\n")
    (tmp_path / "failing").chmod(0o755)
    done = subprocess.run(["bash", ROOT / "vgg_cifar_quant.sh", "fast"], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHON": str(tmp_path / "failing")})
    assert done.returncode == 3 and done.stdout == "called\n"
