"""experiment/measure/columns.py: the keys of a line of results, which users' own scripts read, and the record that comes back from one."""

import json
from dataclasses import fields

import pytest
import torch

from experiment.measure import columns
from experiment.measure.columns import COLUMNS, Measured
from experiment.settings.eval_flags import EvalSettings
from models.quant import CrossbarSpec
from models.quant.measuring.measure import Record
from models.quant.measuring.metrics import Scale
from models.quant.measuring.setting import Setting

KEYS = """model dataset wbit abit wq first_last_bits inputs rounding skip float_accuracy float_changed_predictions cell_bits adc_bits rows
    mapping reference dac_bits adc_range adc_plan adc_max_bits adc_idle weights map engine accuracy software_accuracy n_images
    changed_predictions images_per_s seconds batch_size planes checkpoint validation calib_images adc_calib adc_per adc_correct adc_ranges
    adc_share mean_bits conversions layer_bits device device_time_s device_temp_C stuck_on stuck_off read_noise adc_noise adc_offset
    adc_gain access wire_ohm row_ohm driver_ohm reference_cells noise_seed chips chip_seed per_layer calib_on accuracy_std accuracy_lowest
    chip_accuracies chip_changed_predictions cost energy_uJ energy_uJ_low energy_uJ_high latency_us latency_us_low latency_us_high area_mm2
    area_mm2_low area_mm2_high tops tops_low tops_high tops_per_w tops_per_w_low tops_per_w_high utilisation""".split()
APART = {"setting", "predictions", "chip_predictions", "cost", "is_float", "numbers"}  # fields of a record that a point has beside its line
SETTINGS = EvalSettings(model="vgg7_quant_eval", dataset="digits", w_bits=4, a_bits=4, wq="dorefa", save_path="save")


def test_keys_of_a_line_are_those_of_older_lines():
    """New ones may stand between them, and none goes."""
    assert [column.name for column in COLUMNS if column.name in KEYS] == KEYS
    line = columns.line(Measured(Record(None, torch.zeros(2), 50.0, 50.0, 0, 1.0, None), SETTINGS))
    assert [*line] == [column.name for column in COLUMNS]


def test_every_field_of_a_record_has_its_column():
    assert len({column.name for column in COLUMNS}) == len(COLUMNS) and {*columns.SHOWN} <= {column.name for column in COLUMNS}
    found = {column.field for column in columns.OF_RECORD}
    for item in fields(Record):
        assert item.name in found or item.name in APART, (
            f"{item.name}: a field of Record needs a line in COLUMNS of experiment/measure/columns.py, or points lose it")


@pytest.mark.parametrize("more", [{}, {"float_accuracy": 99.0, "float_changes": 7}, {
    "engine": "numba", "mean_bits": 2.5, "conversions": 0.5, "layer_bits": {"a": 2.5}, "chip_accuracies": (50.0, 60.0),
    "chip_changes": (1, 2)}, {"metric": Scale("perplexity", "", False), "accuracy": 250.0, "chance": 0.5, "predictions": None,
    "changed_predictions": None, "chip_accuracies": (240.0, 260.0)}, {"mean_bits": 0.0, "conversions": 0.0}])
def test_a_record_comes_back_from_its_line(more):
    made = Record(**{"setting": Setting(), "predictions": torch.zeros(2), "accuracy": 50.0, "software_accuracy": 60.0,
                     "changed_predictions": 1, "seconds": 2.0, "engine": None, "examples": 2} | more)
    line = json.loads(json.dumps(columns.line(Measured(made, SETTINGS))))
    assert line["bits_made"] == (5 if more.get("conversions") else None)
    assert columns.is_line(line) and line["images_per_s"] == (2 if "chip_accuracies" in more else 1)
    found = columns.fields_of(line)
    assert found == {item.name: getattr(made, item.name) for item in fields(Record) if item.name not in APART}
    of_before = {name: value for name, value in line.items() if name not in (
        "layer_bits", "float_accuracy", "float_changed_predictions", "bits_made", "chance")}
    assert columns.fields_of(of_before) == found | {"layer_bits": None, "float_accuracy": None, "float_changes": None, "chance": None}


def test_keys_of_a_line_have_the_name_of_its_metric():
    made = {"predictions": None, "accuracy": 250.0, "software_accuracy": 200.0, "changed_predictions": None, "seconds": 2.0, "engine": None,
            "examples": 8, "chip_accuracies": (240.0, 260.0), "metric": Scale("perplexity", "", False)}
    line = columns.line(Measured(Record(Setting(), **made), SETTINGS))
    assert not [name for name in line if "accurac" in name]
    assert (line["perplexity"], line["software_perplexity"], line["chip_perplexity"], line["perplexity_worst"]) == (
        250, 200, (240, 260), 260)
    assert line["perplexity_std"] == pytest.approx(200**0.5) and (line["metric"], line["metric_higher"]) == ("perplexity", False)
    assert columns.is_line(json.loads(json.dumps(line))) and not columns.is_line(json.loads(json.dumps(line)) | {"perplexity": "250"})
    assert not columns.is_line(json.loads(json.dumps(line)) | {"metric": "accuracy", "accuracy": 250.0})
    heads = dict(columns.shown([Record(Setting(), **made)]))
    assert [text(Record(Setting(), **made)) for text in heads.values()] == ["250", "14.14", "260", "+50", "8"]
    assert [*heads] == ["perplexity", "deviation", "highest", "to software", "examples/s"]


def test_bits_of_a_conversion_stand_where_there_is_a_mean():
    """Beside the mean and the share, in tables of plans and of idle reads that are skipped."""
    made = {"predictions": torch.zeros(2), "accuracy": 50.0, "software_accuracy": 60.0, "changed_predictions": 1, "seconds": 2.0,
            "engine": None}
    plain = Record(Setting(), **made, mean_bits=6.0, conversions=1.0)
    found = Record(Setting(CrossbarSpec(adc_plan="ones", adc_bits=1)), **made, mean_bits=0.98, conversions=0.28)
    assert "bits made" not in dict(columns.shown([plain]))
    table = columns.shown([plain, found])
    assert [head for head, _ in table][:3] == ["mean bits", "converted", "bits made"]
    assert [text(found) for _, text in table][:3] == ["0.98", "28.0%", "3.50"] and dict(table)["bits made"](plain) == "6.00"


def test_a_column_has_a_text_as_its_head_or_what_makes_one(monkeypatch):
    made = [columns.Column(name, lambda of: 1, head=head, text=lambda record: "1") for name, head in (
        ("plain", "head"), ("counted", lambda records: f"of {len(records)}"), ("hidden", lambda records: None), ("none", None))]
    monkeypatch.setattr(columns, "COLUMNS", made)
    monkeypatch.setattr(columns, "SHOWN", [column.name for column in made])
    assert [head for head, _ in columns.shown([None, None])] == ["head", "of 2"]
