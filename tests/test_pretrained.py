"""The networks in pretrained/: each has its facts beside it and its line in the README there, and is what these say."""

import json
from pathlib import Path

import pytest

import models
from experiment.inputs.checkpoint import load_checkpoint
from experiment.program.flags import in_new_names

FOLDER = Path(__file__).resolve().parent.parent / "pretrained"
NETWORKS = sorted(FOLDER.glob("*.pt"))


def facts_of(path):
    """What is known of a network; files of before have older names of flags."""
    facts = json.loads(path.with_suffix(".json").read_text())
    return facts | {"config": in_new_names(facts["config"])}


def line(name, facts):
    """A network in the README's table."""
    of = facts["config"]
    return (f"| [`{name}.pt`]({name}.json) | {of['model'].removesuffix('_quant')} | {of['w_bits']}, {of['a_bits']} | {of['wq']} "
            f"| {facts['train_images']:,} | {facts['test_accuracy']:.2f} of {facts['test_images']:,} images | {facts['about']} |")


def test_the_table_is_that_of_the_files():
    lines = (FOLDER / "README.md").read_text().splitlines()
    expected = [line(path.stem, facts_of(path)) for path in NETWORKS]
    for each in expected:
        assert each in lines, f"pretrained/README.md lacks the line\n{each}"
    assert [each for each in lines if each.startswith("| [")] == expected


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_a_file_is_what_its_facts_say(path):
    facts, checkpoint = facts_of(path), load_checkpoint(str(path))
    assert checkpoint["exported"] and path.stat().st_size <= 7e6
    assert checkpoint["commands"] == facts["commands"] and facts["commands"] and facts["machine"]["torch"]
    assert {name: checkpoint["config"][name] for name in facts["config"]} == facts["config"]
    of = facts["config"]
    net = models.create(of["model"], num_classes=len(checkpoint["data"]["classes"]), alpha_init=1.0, wbit=of["w_bits"], abit=of["a_bits"],
                        wq=of["wq"])
    assert {name: value.shape for name, value in checkpoint["state_dict"].items()} == {
        name: value.shape for name, value in net.state_dict().items()}
