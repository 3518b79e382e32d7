"""experiment/report/html_report.py: the page of a results folder, as a parser and as a browser see it."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from experiment.report import html_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROWS = [
    {"model": "vgg7", "rows": None, "cell_bits": None, "adc_bits": None, "accuracy": 299 / 3, "adc_range": None, "chips": None,
     "python": "3.11", "cpu": "A",
     "command": "eval.py", "n_images": 9, "key": "a"},
    {"model": "vgg7", "rows": 128, "cell_bits": 1, "adc_bits": 10, "accuracy": 98.25, "adc_range": "full", "chips": [1, 2],
     "python": "3.11", "cpu": "A",
     "command": "eval.py --x '<b>'", "n_images": 9, "key": "b"},
    {"model": "vgg7", "rows": 128, "cell_bits": 1, "adc_bits": 2.5, "accuracy": 9.0, "adc_range": "calibrated <&>", "chips": None,
     "python": "3.12", "cpu": "B",
     "command": "eval.py", "n_images": 9, "key": "c", "per_layer": {"a": {"adc_bits": 3}}},
]
for row in ROWS:
    row["checkpoint"] = f"save/{'a_long_name_' * 30}"


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "accuracy_over_adc_bits.png")
    return html_report.write(tmp_path, ROWS)


class Reader(html.parser.HTMLParser):
    """Rows of cells, pictures, links to other files, and elements that were not closed."""

    def __init__(self):
        super().__init__()
        self.rows, self.sources, self.open, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += text
        self.text += text


def test_the_page_has_everything_in_it(page):
    reader = Reader()
    reader.feed(page.read_text())
    assert not reader.open and page.name == "results.html"
    assert reader.rows[0] == ["baseline", "cell_bits", "adc_bits", "adc_range", "per_layer", "chips", "accuracy"]
    assert reader.rows[1:] == [["software", "", "", "", "", "", "99.67"], ["", "1", "10", "full", "", "[1, 2]", "98.25"],
                               ["", "1", "2.5", "calibrated <&>", '{"a": {"adc_bits": 3}}', "", "9"]]
    assert len(reader.sources) == 1 and reader.sources[0].startswith("data:image/png;base64,")
    for text in ("vgg7", "rows128", "n_images", "3.11", "3.12", "eval.py --x '<b>'"):
        assert text in reader.text


def test_ideal_cells_are_no_reason_for_columns_of_what_only_devices_have(tmp_path):
    def row(**values):
        return {"cell_bits": 1, "per_layer": None, "accuracy": 90.0, "device": None, "wire_ohm": None, "stuck_on": None} | values

    rows = [row(cell_bits=None), row(), *(row(device="techA", wire_ohm=0.0, stuck_on=p, per_layer={"a": {}}) for p in (0.1, 0.2))]
    reader = Reader()
    reader.feed(html_report.write(tmp_path, rows).read_text())
    assert reader.rows[0] == ["baseline", "cell_bits", "per_layer", "device", "stuck_on", "accuracy"] and "wire_ohm0" in reader.text
    assert [each[-2] for each in reader.rows[1:]] == ["", "", "0.1", "0.2"]


def test_what_is_the_same_in_all_rows_is_that_of_the_float_network_too(tmp_path):
    rows = [{"wbit": bits, "cell_bits": cells, "accuracy": 90.0, "float_accuracy": 91.0, "n_images": 9, "processes": 2,
             "command": "eval.py"} for bits, cells in ((32, None), (8, None), (8, 1))]
    reader = Reader()
    reader.feed(html_report.write(tmp_path, rows).read_text())
    assert [row[reader.rows[0].index("wbit")] for row in reader.rows] == ["wbit", "32", "8", "8"]
    assert [row[0] for row in reader.rows] == ["baseline", "float", "quantized", ""]
    assert "wbit8" not in reader.text and "n_images9" in reader.text and "Machines and versions\nprocesses2" in reader.text


def test_columns_of_what_is_measured_stand_before_what_was_found_and_lists_last(tmp_path):
    rows = [{"seconds": i, "chip_accuracies": [i], "accuracy": i, "device_time_s": i, "mapping": f"{i}", "energy_uJ": i, "cell_bits": i}
            for i in (1, 2)]
    reader = Reader()
    reader.feed(html_report.write(tmp_path, rows).read_text())
    assert reader.rows[0] == ["cell_bits", "mapping", "device_time_s", "accuracy", "energy_uJ", "seconds", "chip_accuracies"]


def test_pictures_of_reports_are_called_as_these(tmp_path):
    for folder in ("", "net"):
        Path(tmp_path, folder).mkdir(exist_ok=True)
        for name in ("report_c1_b6_12345678", "cost_by_layer", "report_broken"):
            Image.new("RGB", (3, 2)).save(tmp_path / folder / f"{name}.png")
        Path(tmp_path, folder, "report_c1_b6_12345678.json").write_text(json.dumps({"title": "net_1: <6-bit ADC>"}))
        Path(tmp_path, folder, "report_broken.json").write_text("[")
    text = html_report.write(tmp_path, ROWS).read_text()
    assert re.findall("<figcaption>(.*?)<", text) == [
        "cost by layer", "net: cost by layer", "net: report broken", "net: net_1: &lt;6-bit ADC&gt;", "report broken",
        "net_1: &lt;6-bit ADC&gt;"]


@pytest.mark.parametrize("text", ["{}", '{"openapi": "3.0"}', "[1]", "no JSON", '[{"quantity": "x"}]'])
def test_a_file_that_is_no_sheet_is_left_out(text, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "specification.json").write_text(text)
    assert "Specification" not in html_report.write(tmp_path, ROWS).read_text()


def test_numbers_have_four_digits_also_within_lists(tmp_path):
    third = 200 / 3
    rows = [{"cell_bits": 1, "accuracy": third, "chip_accuracies": [third, 100.0], "layer_bits": {"a": 1 / 3}, "software_accuracy": third},
            {"cell_bits": 2, "accuracy": 0.0, "chip_accuracies": None, "layer_bits": None, "software_accuracy": third}]
    reader = Reader()
    reader.feed(html_report.write(tmp_path, rows).read_text())
    assert {*reader.rows[1]} == {"1", "66.67", "[66.67, 100.0]", '{"a": 0.3333}'} and "software_accuracy66.67" in reader.text
    assert [html_report._text(x) for x in (123456.7, 0.000123456, 1e-9, 100.0)] == ["123500", "0.0001235", "1e-09", "100"]


ACTIONS = """
const shown = () => rows.length && [...body.rows].filter(row => !row.hidden).map(row => row.cells[names.indexOf("accuracy")].textContent);
const type = text => { filter.value = text; filter.dispatchEvent(new Event("input")); return shown().concat(count.textContent); };
const click = name => { heads[names.indexOf(name)].firstChild.click(); return shown(); };
addEventListener("load", () => {
  const seen = {first: shown(), up: click("adc_bits"), down: click("adc_bits"), words: click("adc_range"), full: type("full"),
  both: type("accuracy>=9 adc_bits<10"), not: type("adc_range!=full"), equal: type("adc_bits=10"), empty: type("adc_range="),
  none: type("adc_bits>10"), odd: type("speed=3"), shown: type("accuracy=99.67 accuracy>=99.67"),
  exact: type("accuracy=99.66666666666667"), two: type("110"), all: type(""), red: document.images[0].naturalWidth,
  fits: document.documentElement.scrollWidth <= innerWidth, arrow: heads[names.indexOf("adc_range")].getAttribute("aria-sort")};
document.title = JSON.stringify(seen); });
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; everything but the page's script is tested without it")
def test_the_page_in_a_browser(page, tmp_path):
    text = page.read_text()
    page.write_text(text.replace("</script>", ACTIONS + "</script>"))
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                           "--virtual-time-budget=2000", page.as_uri()], capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert seen == {
        "first": ["99.67", "98.25", "9"], "up": ["9", "98.25", "99.67"], "down": ["98.25", "9", "99.67"],
        "words": ["9", "98.25", "99.67"],
        "full": ["98.25", "1 of 3 rows"], "both": ["9", "1 of 3 rows"], "not": ["9", "99.67", "2 of 3 rows"],
        "equal": ["98.25", "1 of 3 rows"], "empty": ["99.67", "1 of 3 rows"], "none": ["0 of 3 rows"], "odd": ["0 of 3 rows"],
        "shown": ["99.67", "1 of 3 rows"], "exact": ["99.67", "1 of 3 rows"], "two": ["0 of 3 rows"],
        "all": ["9", "98.25", "99.67", "3 of 3 rows"], "red": 30, "fits": True, "arrow": "ascending"}
