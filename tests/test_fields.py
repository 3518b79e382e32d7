"""What is to be known of a hardware field stands with the field; the lists that are made from that are what they were, by hand."""

from dataclasses import fields

import pytest

from experiment.settings import chips, eval_flags, eval_settings, train_settings
from experiment.measure import ranges
from experiment.report import report
from experiment.program.flags import flag_fields
from models.quant import CrossbarSpec
from models.quant.arrays import cells
from models.quant.measuring.chips import Chips, Reads
from models.quant.measuring.setting import LAYER_FIELDS, NOTES
from models.quant.measuring.weight_noise import WeightNoise
from models.quant.arrays.spec import BEFORE, KINDS, hardware

OF_A_FIELD = f"""say of it in CrossbarSpec, beside its help: of="...", one of {', '.join(KINDS)}; turn=N, its place in the order of
a table's rows; note=(N, "... {{}}"), unless the first words of a setting's name say it; before=..., what files mean that lack it"""
HEAD = ("w_bits", "a_bits", "cell_bits", "adc_bits", "adc_range", "adc_plan")  # which the first words of a setting's name say
FIRST = ("w_bits", "a_bits", "cell_bits", "adc_bits", "rows", "mapping", "reference", "dac_bits", "adc_range")  # in the first files


def test_a_hardware_field_says_what_there_is_to_be_known_of_it():
    turns, places = [], []
    for item in fields(CrossbarSpec):
        said = item.metadata
        assert said.get("help") and said.get("of") in KINDS, f"{item.name}: {OF_A_FIELD}"
        assert ("turn" in said) != (said["of"] == "network"), f"{item.name}: {OF_A_FIELD}"
        assert ("note" in said) != (item.name in HEAD), f"{item.name}: {OF_A_FIELD}"
        assert ("before" in said) != (item.name in FIRST), f"{item.name}: {OF_A_FIELD}"
        turns += [said["turn"]] if "turn" in said else []
        places += [said["note"][0]] if "note" in said else []
    assert len({*turns}) == len(turns) and len({*places}) == len(places), "two fields have one turn, or one place of their notes"


def test_a_field_of_chips_says_what_there_is_to_be_known_of_it():
    for item in (*fields(Chips), *fields(WeightNoise)):
        if item.name not in ("device", "name"):
            assert item.metadata.get("help") and item.metadata.get("of") in ("cells", "reads", "run"), (
                f'{item.name}: say of it in Reads, or Chips, of="cells", "reads" or "run", and its unit')
    numbers = {item.name for part in (chips.DeviceSettings, Reads, WeightNoise) for item in flag_fields(part)
               if "numbers" in item.metadata or item.metadata.get("kind") in (chips.TIME, chips.TEMP, chips.PROBABILITY)}
    assert numbers - {*chips.OF_RUN} == {*report.SWEPT}, "a number of devices or reads has an axis in SWEPT of experiment/report/report.py"


@pytest.mark.parametrize("found, wanted", [
    (train_settings.HARDWARE, "cell_bits adc_bits rows mapping reference dac_bits adc_plan adc_max_bits adc_idle weights"),
    (eval_flags.hardware_defaults(), "cell_bits rows mapping reference dac_bits weights adc_bits adc_range adc_plan adc_max_bits adc_idle"),
    (LAYER_FIELDS, "cell_bits adc_bits rows mapping reference dac_bits adc_range adc_plan adc_max_bits adc_idle weights"),
    (ranges.HARDWARE, "w_bits a_bits cell_bits adc_bits rows mapping reference dac_bits adc_plan adc_max_bits adc_idle weights"),
    (BEFORE, "adc_plan adc_max_bits adc_idle weights"), (BEFORE.values(), ["uniform", 8, "convert", "offset"]),
    (hardware("adc"), "adc_bits adc_plan adc_max_bits adc_idle"), (hardware("cells"), "cell_bits reference weights"),
    ((item.name for item in NOTES), "weights rows mapping reference dac_bits adc_max_bits adc_idle"),
    (eval_settings.ORDER, ["crossbar_layers", *"weights mapping reference dac_bits rows cell_bits".split(), *chips.OF_ROW,
                           *"adc_max_bits adc_range adc_plan adc_idle adc_bits".split()]),
    (chips.OF_RUN, "noise_seed chips chip_seed")])
def test_lists_of_fields_are_what_they_were(found, wanted):
    """Keys of files and orders of columns, of flags and of rows follow from them. A new field may stand in between."""
    wanted = wanted.split() if isinstance(wanted, str) else wanted
    assert [each for each in found if each in wanted] == wanted


@pytest.mark.parametrize("name, value", [("cell_bits", 2), ("reference", "digital"), ("rows", 64), ("mapping", "im2col"), ("adc_bits", 3)])
def test_a_chip_is_of_the_hardware_that_its_cells_follow_from(name, value):
    fits = cells.Chip(None, of_arrays=name in ("rows", "mapping")).fits(CrossbarSpec(), CrossbarSpec(**{name: value}))
    assert fits == (name == "adc_bits") and cells.Chip(None).fits(CrossbarSpec(), CrossbarSpec(rows=64))
