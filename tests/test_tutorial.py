"""The tutorial runs as it stands, and prints what its pages show, but for numbers that differ between processors."""

import json

import pytest

import tutorial

pytestmark = pytest.mark.usefixtures("one_thread")


def test_blocks_of_a_page():
    page = "```bash\nls\n```\ntext\n```\nno output\n```\n```text\na\n```\n```python\nprint(1)\n```\n"
    first, second = tutorial.steps(page)
    assert (first.language, first.code, first.shown, second.language, second.shown) == ("bash", "ls\n", "a\n", "python", None)
    assert page[slice(*first.place)] == "a\n"


def test_what_cannot_differ():
    assert tutorial.what_cannot_differ("2-bit cells, 4-bit ADC    97.49   -0.28   3") == "2-bit cells, 4-bit ADC # # #"
    assert tutorial.what_cannot_differ("float: 97.8 % of 359 images") == "float: # % of 359 images"
    assert tutorial.what_cannot_differ("6 points: 2 to measure, about 7 s") == "6 points: 2 to measure, about"


@pytest.mark.parametrize("shown, found", [("a 1.5\nb\n", "a 2.5\nb"), ("...\nb\n", "...\nb"), ("a 0.1\n...\n", "a 2.5\n..."), ("b\n", None),
                                          ("a 2\n...\n", None), ("a 1.5\n", None)])
def test_shown_lines_among_those_that_are_printed(shown, found):
    if found is None:
        with pytest.raises(AssertionError):
            tutorial.found_in(shown, "a 2.5\nb\n")
    else:
        assert "\n".join(tutorial.found_in(shown, "a 2.5\nb\n")) == found


def test_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(tutorial.PAGES) == 5
    with tutorial.Reader(tmp_path) as reader:
        for page, step, printed in tutorial.runs(reader):
            assert step.shown != "", f"{page} shows nothing of\n{step.code}"
            if step.shown:
                tutorial.found_in(step.shown, printed)
    says_what_it_costs(tmp_path / "save" / "mynet" / "results.jsonl")


def says_what_it_costs(file):
    """What the pages say in words, on any processor."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lost = {(row["cell_bits"], row["adc_bits"], row["adc_plan"], row["device"], row["device_time_s"], row["weights"]):
            row["software_accuracy"] - row["accuracy"] for row in rows if row["cell_bits"]}
    for cell_bits in (1, 2):
        assert lost[cell_bits, 2, "uniform", None, None, "offset"] > 2 > lost[cell_bits, 4, "uniform", None, None, "offset"]
    after_a_day = {weights: lost[2, 6, "uniform", "techC", 86400, weights] for weights in ("offset", "pair")}
    assert after_a_day["pair"] < after_a_day["offset"]


def test_writing_what_was_printed(tmp_path):
    """An empty block takes all, a block with lines left out takes those that it shows."""
    page = tmp_path / "page.md"
    page.write_text("```bash\necho a 1\n```\n```text\n```\nwords\n```bash\nls\n```\n```text\n...\nc 0.1\n```\n")
    first, second = tutorial.steps(page.read_text())
    tutorial.write(page, [(first, "a 1\n"), (second, "b\nc 0.7  \n")])
    assert page.read_text() == "```bash\necho a 1\n```\n```text\na 1\n```\nwords\n```bash\nls\n```\n```text\n...\nc 0.7\n```\n"
