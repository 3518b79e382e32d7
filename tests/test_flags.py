"""Names of flags and their aliases, --help by topics, --config."""

import json
import re
from pathlib import Path

import pytest

import eval as evaluation
import train
from experiment.program.cli import UserError
from experiment.settings import eval_flags, eval_settings, train_settings
from models import vgg

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ROOT / "pretrained" / "vgg7_w4a4_cifar10.pt"
OLD = {"cellBit": "cell_bits", "adc_prec": "adc_bits", "subArray": "rows", "wbit": "w_bits", "abit": "a_bits", "map": "crossbar_layers"}


# -- names


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_names_of_the_original_scripts_are_silent_aliases(form, capsys):
    values = {"cellBit": "2", "adc_prec": "5", "subArray": "64", "wbit": "4", "abit": "4", "map": "conv"}
    given = [part for name, value in values.items() for part in form.format(f"--{name}", value).split()]
    settings, _ = eval_settings.parse(["--resume", str(NETWORK), *given])
    [setting] = settings.settings
    assert (setting.spec.cell_bits, setting.spec.adc_bits, setting.spec.rows, setting.crossbar_layers) == (2, 5, 64, "conv")
    assert (settings.w_bits, settings.a_bits) == (4, 4) and settings.given.keys() == {"resume", *OLD.values()}
    assert capsys.readouterr() == ("", "")


def test_aliases_hold_in_groups_in_single_layers_and_in_folders():
    settings, _ = eval_settings.parse(["--resume", str(NETWORK), "--also", "--cellBit 1 --adc_prec 3",
                                       "--per_layer", "features.3:cellBit=1"])
    assert [(each.spec.cell_bits, each.spec.adc_bits) for each in settings.settings][-1] == (1, 3)
    assert settings.settings[0].per_layer == (("features.3", (("cell_bits", 1),)),)
    found, *_ = train_settings.parse(["--wbit", "3", "--save_path", "x/{model}_w{wbit}a{abit}_{w_bits}"])
    assert found.save_path == "x/vgg7_quant_w3a4_3"


@pytest.mark.parametrize("flag, before", [("--also", 1), ("--table", 0)])
@pytest.mark.parametrize("group, bits", [("--adc_bits=4", [4]), ("--adc_prec=4 --map=conv", [4]), ("--adc_bits=3:5", [3, 4, 5])])
def test_groups_may_have_equals_signs(flag, before, group, bits, tmp_path):
    Path(tmp_path, "flags.json").write_text(json.dumps({flag[2:]: [group, "--adc_bits 8"]}))
    for given in ([flag, group, "--adc_bits 8"], ["--config", str(tmp_path / "flags.json")]):
        settings, _ = eval_settings.parse(["--resume", str(NETWORK), *given, "--limit=7"])
        assert [each.spec.adc_bits for each in settings.settings[before:]] == [*bits, 8] and settings.limit == 7


def test_groups_of_a_file_stay_groups(tmp_path):
    """What a run writes for --config means what it was given."""
    Path(tmp_path, "flags.json").write_text(json.dumps({"also": ["--cell_bits=2", "--adc_bits=4"]}))
    settings, _ = eval_settings.parse(["--resume", str(NETWORK), "--config", str(tmp_path / "flags.json")])
    alone, _ = eval_settings.parse(["--resume", str(NETWORK), "--also=--cell_bits=2", "--also=--adc_bits=4"])
    assert [(each.spec.cell_bits, each.spec.adc_bits) for each in settings.settings] == [(1, 6), (2, 6), (1, 4)]
    assert settings.settings == alone.settings


def test_a_group_of_no_flag_is_refused():
    with pytest.raises(UserError, match="--also '--resume x': there is no hardware flag --resume"):
        eval_settings.parse(["--resume", str(NETWORK), "--also", "--resume=x"])
    with pytest.raises(UserError, match="--also: expected at least one argument"):
        eval_settings.parse(["--resume", str(NETWORK), "--also", "--report"])


@pytest.mark.parametrize("given, says", [
    (["--cellbits", "2"], "there is no flag --cellbits; the nearest is --cell_bits"), (["--adc-bits=4"], "the nearest is --adc_bits"),
    (["--cellBits", "2"], "the nearest is --cell_bits"), (["--zzzzzz"], "there is no flag --zzzzzz (see"), (["7"], "no flag takes '7'"),
    (["--subArray", "x"], "argument --rows: x is not"), (["--wbit", "99"], "argument --w_bits: 99 is not")])
def test_an_unknown_flag_is_answered_with_the_nearest(given, says):
    with pytest.raises(UserError, match=re.escape(says)):
        eval_settings.parse(given)


def test_the_table_of_names_is_complete():
    rows = re.findall(r"\| `--(\w+)` \| `--(\w+)` \|", (ROOT / "docs" / "names.md").read_text())
    assert {old: new for new, old in rows} == OLD


# -- help


def helped(main, capsys, *topic):
    with pytest.raises(SystemExit) as ended:
        main(["--help", *topic])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("main, build", [(evaluation.main, eval_flags.build_parser), (train.main, train_settings.build_parser)])
def test_help_is_one_screen_and_topics_have_all_flags(main, build, capsys):
    screen = helped(main, capsys)
    assert len(screen.splitlines()) <= 40 and max(map(len, screen.splitlines())) <= 100
    topics = re.search(r"TOPIC, of (.*), all", " ".join(screen.split()))[1].split(", ")
    flags = {name for name in build("")._option_string_actions if name.startswith("--")} - {"--help"}

    def listed(text):
        return set(re.findall(r"^  (--\w+)", text, re.M))

    of_topics = [listed(helped(main, capsys, topic)) for topic in topics]
    assert set().union(*of_topics) == flags | {"--config"} == listed(helped(main, capsys, "all"))
    assert sum(map(len, of_topics)) == len(flags) + 1  # none stands in two topics
    assert listed(screen) <= flags | {"--config"}
    assert not re.search(r"[,{ ]--\w+[=}]", helped(main, capsys, "all"))  # dashes within what is copied


def test_each_program_has_the_topics_of_what_it_does():
    for main, topics in ((evaluation.main, ("adc", "device", "cost", "sweep", "all")), (train.main, ("adc", "device", "train", "all"))):
        for topic in topics:
            with pytest.raises(SystemExit):
                main(["--help", topic])
    with pytest.raises(UserError, match="train.py has no such topic; see python eval.py --help cost; it has network, train"):
        train.main(["--help", "cost"])


# -- config


def written(path, values):
    Path(path).write_text(json.dumps(values) if not isinstance(values, str) else values)
    return str(path)


def test_a_config_holds_flags_and_the_command_line_replaces_them(tmp_path):
    config = written(tmp_path / "a.json", {"resume": str(NETWORK), "cellBit": [1, 2], "adc_bits": "3:5", "report": False, "limit": None,
                                           "also": ["--cell_bits 4 --adc_bits 6"], "device_temp": [], "adc_range": "full"})
    settings, _ = eval_settings.parse(["--config", config, "--adc_bits", "8"])
    assert [(each.spec.cell_bits, each.spec.adc_bits, each.spec.adc_range) for each in settings.settings] == [
        (1, 8, "full"), (2, 8, "full"), (4, 6, "calibrated")]
    assert not settings.report and settings.limit is None


@pytest.mark.parametrize("values, says", [
    ({"cellbits": 2}, "there is no flag --cellbits; the nearest is --cell_bits"), ({"subArray": "x"}, "argument --rows: x is not"),
    ({"rows": {"a": 1}}, "rows is {\"a\": 1}; a flag's value is"), ({"per_layer": [None]}, "per_layer is [null]; a flag's value is"),
    ({"cell_bits": [1, True]}, "cell_bits is [1, true]; a flag's value is"), ({"also": [["x"]]}, "also is [[\"x\"]]; a flag's"),
    ([1], "is not a JSON object"), ("{", "is not JSON"),
    ({"config": "b.json"}, "names another file by config"), ({"adc_plan": "unifrom"}, "argument --adc_plan: invalid choice")])
def test_configs_that_cannot_be_are_one_line(tmp_path, values, says):
    config = written(tmp_path / "a.json", values)
    with pytest.raises(UserError, match=re.escape(f"--config {config}: ") + ".*" + re.escape(says)):
        eval_settings.parse(["--config", config])
    with pytest.raises(UserError, match="cannot be read: No such file"):
        eval_settings.parse(["--config", str(tmp_path / "none.json")])


def test_the_config_that_an_evaluation_writes_repeats_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--resume", str(NETWORK), "--dataset", "digits", "--cellBit", "1", "2", "--adc_bits", "4:5", "--device", "techA",
             "--device_time", "1h", "--per_layer", "features.3:adc_bits=5", "--chips", "2", "--read_noise", "0.5",
             "--adc_calib", "minmax", "--save_path", "out", "--wire_ohm", "32nm"]
    settings, _ = eval_settings.parse(given)
    evaluation.config_file.write(Path("c.json"), settings.given, but=("shard", "dry_run"))
    again, _ = eval_settings.parse(["--config", "c.json"])
    assert again == settings and len(again.settings) == 4


def test_the_config_that_a_training_writes_repeats_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", ([8, "M", 8, "M", 8, "M"], 16))
    few = ["--limit_train", "64", "--limit_test", "16", "--epochs", "1", "--seed", "3", "--amp", "off", "--ngpu", "0"]
    assert train.main([*few, "--w_bits", "32", "--a_bits", "32", "--save_path", "a"]) == 0
    assert train.main([*few, "--w_bits", "2", "--fine_tune", "a/model_best.pth.tar", "--distill", "0.5", "--save_path", "b"]) == 0
    config = json.loads(Path("b/config.json").read_text())
    assert (config["fine_tune"], config["w_bits"], config["lr"], config["alpha_init"]) == ("a/model_best.pth.tar", 2, 0.05, "fit")
    with pytest.raises(UserError, match="b holds a run"):
        train.main(["--config", "b/config.json"])
    assert train.main(["--config", "b/config.json", "--save_path", "c"]) == 0
    first, second = (train_settings.load_checkpoint(f"{folder}/model_best.pth.tar")["state_dict"] for folder in "bc")
    assert all((first[name] == second[name]).all() for name in first)
    assert train.main(["--resume", "c/checkpoint.pth.tar"]) == 0 and json.loads(Path("c/config.json").read_text())["fine_tune"]
