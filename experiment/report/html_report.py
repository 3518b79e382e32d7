"""`eval.py --html`: one page for a results folder, with everything in it: a table that sorts and filters, the pictures, settings,
versions and commands. It needs no network and no other file."""

import base64
import contextlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.quant.cost import CostReport
from models.quant.layers.quantizers import OFF
from models.quant.measuring.setting import LAYER_FIELDS
from models.quant.storage.files import write_text

from ..measure.columns import metric_of, named
from ..measure.points import Points
from ..settings.chips import CHIPS_OR_NOISE
from ..settings.costs import FIGURES, restored
from . import cost_report, specification_report

PAGE = "results.html"
SHEET = "specification.json"
DIGITS = 4  # of a number as it is shown
# Columns that stand first: what is measured, then what was found.
FIRST = ("baseline", "model", "dataset", "checkpoint", "wbit", "abit", *LAYER_FIELDS, "map", "per_layer", "device", "device_time_s",
         "device_temp_C", "stuck_on", "stuck_off", *CHIPS_OR_NOISE, "accuracy", "accuracy_std", "accuracy_lowest", "chance",
         "software_accuracy", "changed_predictions", "float_accuracy", "float_changed_predictions", "mean_bits", "conversions", *FIGURES)
# What has a value for some rows on arrays and none for the others, and differs by that.
OR_NONE = ("adc_bits", "per_layer", "device", "accuracy_std", "accuracy_lowest", "mean_bits")
MACHINE = ("python", "torch", "numba", "triton", "cpu", "threads", "processes", "gpu", "command")  # what stands below the table


def write(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page of a folder. Args: rows, those of its results. Returns: its path."""
    path = Path(folder, PAGE)
    write_text(path, _page(Path(folder), rows, sorted([*Path(folder).glob("*.png"), *Path(folder).glob("*/*.png")])))
    return path


def _page(folder: Path, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Path]) -> str:
    """The text of the page."""
    rows = [{"baseline": _baseline(row), **row} for row in rows]
    varied, same = _columns(rows)
    title = html.escape(f"Results in {folder.resolve().name}")
    head = "".join(f'<th scope="col"><button type="button">{html.escape(column)}</button></th>' for column in varied)
    body = "".join("<tr>" + "".join(_cell(row.get(column)) for column in varied) + "</tr>\n" for row in rows)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p><label>Show rows with <input id="filter" type="search" placeholder="calibrated adc_bits&gt;=4"></label>
<span id="count">{len(rows)} of {len(rows)} rows</span></p>
<p class="note">Words must all stand in a row; <code>column=value</code>, <code>&lt;</code>, <code>&lt;=</code>, <code>&gt;</code>,
<code>&gt;=</code> and <code>!=</code> compare one column, with numbers as they are shown. A click on a name sorts, a second one the
other way round. A <code>baseline</code> has no arrays: <code>software</code>, the same quantized network; of a network that was
converted <code>float</code>, as it came, and <code>quantized</code>. All digits of a number are in <code>results.jsonl</code>.</p>
<div class="wide"><table id="results">
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
<h2>The same in all rows</h2>
{_definitions(same)}
<h2>Machines and versions</h2>
{_machines(rows)}
<h2>Commands</h2>
<ul>{"".join(f"<li><code>{html.escape(command)}</code></li>" for command in dict.fromkeys(str(row.get("command")) for row in rows))}</ul>
{"".join(_sheet(path, folder) for path in [*folder.glob(SHEET), *folder.glob(f"*/{SHEET}")])}
{_sources(folder, rows)}
{"<h2>Pictures</h2>" if pictures else ""}
{"".join(_picture(path, folder) for path in pictures)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _sheet(path: Path, folder: Path) -> str:
    """The specification sheet in a file; nothing of one that is no sheet. Args: folder, of the page."""
    try:
        rows = json.loads(path.read_bytes())
        (header, *lines), said = specification_report.cells(rows), specification_report.notes(rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    return _section("Specification" + ("" if path.parent == folder else f" of {path.parent.name}"), header, lines, said)


def _sources(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Which sources the costs of rows follow from, as their points have them: a table for each technology."""
    found: dict[str, list[tuple[float, CostReport]]] = {}
    for row in rows:
        if row.get("cost") is not None and (point := Points(folder).read(row["key"])):
            found.setdefault(row["cost"], []).append((row["adc_bits"], restored(point["cost"])))
    return "".join(_section(f"Sources of the costs in {name}", cost_report.SOURCES, [
        (part, role, origin.text, origin.value) for part, role, origin in cost_report.sources(costs)], [
            "a figure, such as energy_uJ, is by the typical source of each part; its _low is by the cheapest, its _high by the dearest",
            cost_report.OF_OTHER_BITS]) for name, costs in found.items())


def _section(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table of texts below its title, and what it means."""
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(each)}</td>" for each in line) + "</tr>\n" for line in lines)
    said = "".join(f"<li>{html.escape(each)}</li>" for each in notes)
    return (f"<h2>{html.escape(title)}</h2>\n"
            f"<div class=\"wide\"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
            f"<ul>{said}</ul>\n")


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """(columns of the table, `{column: value}` of those that are the same in all rows). The software has no hardware to differ in, and
    ideal cells no device: what only rows with a device have is compared among those."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in MACHINE and name != "key"]
    wide = {name for row in rows for name, value in row.items() if isinstance(value, (list, dict))}
    first = [own for name in FIRST for own in dict.fromkeys(named(name, metric_of(row)) for row in rows)]
    names.sort(key=lambda name: first.index(name) if name in first else len(first) + (name in wide))
    on_arrays = [row for row in rows if row.get("cell_bits") is not None] or rows
    with_device, without = ([row for row in rows if (row.get("device") is None) == none] for none in (False, True))

    or_none = {named(name, metric_of(row)) for name in OR_NONE for row in rows}

    def compared(name):
        return with_device if with_device and name not in or_none and all(row.get(name) is None for row in without) else on_arrays

    values = {name: {*(json.dumps(row.get(name)) for row in compared(name)),
                     *(json.dumps(row[name]) for row in rows if row.get(name) is not None)} for name in names}
    always = {"cell_bits", *map(metric_of, rows)}
    varied = [name for name in names if len(values[name]) > 1 or name in always]
    return varied, {name: compared(name)[0].get(name) for name in names if name not in varied}


def _baseline(row: Mapping[str, Any]) -> str | None:
    """What a row without arrays is of."""
    if row.get("cell_bits") is not None or row.get("weight_noise") is not None:
        return None
    return "software" if row.get(named("float_accuracy", metric_of(row))) is None else "float" if row.get("wbit") == OFF else "quantized"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number" data-value="{value!r}">{_text(value)}</td>'
    return f"<td>{html.escape(_text(value))}</td>"


def _text(value: Any) -> str:
    """A value as it is shown: some digits of a number, also of those in lists and dicts."""
    if isinstance(value, float):
        return f"{float(f'{value:.{DIGITS}g}'):.{2 * DIGITS}g}"
    shortened = {"parse_float": lambda each: float(_text(float(each)))}
    return value if isinstance(value, str) else json.dumps(json.loads(json.dumps(value), **shortened))


def _definitions(values: Mapping[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    return "<dl>" + "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_text(value))}</dd></div>"
                            for name, value in given.items()) + "</dl>"


def _machines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list for each machine that measured."""
    found = dict.fromkeys(json.dumps({name: row.get(name) for name in MACHINE if name != "command"}) for row in rows)
    return "".join(_definitions(json.loads(each)) for each in found)


def _picture(path: Path, folder: Path) -> str:
    """A figure with the title of the report that it is of, or its own name; of several networks each has its pictures in a folder of its
    own, whose name stands before theirs."""
    data = base64.b64encode(path.read_bytes()).decode()
    *above, name = (part.replace("_", " ") for part in path.relative_to(folder).with_suffix("").parts)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        name = str(json.loads(path.with_suffix(".json").read_bytes())["title"])
    text = html.escape(": ".join([*above, name]))
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>\n'


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; max-height: 80vh; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #f3f3f3; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
td.number { text-align: right; } tbody tr:hover { background: #eef4ff; }
input { font: inherit; width: 24rem; max-width: 100%; } .note { color: #555; }
dl { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; } dt { color: #555; } dl div { display: flex; gap: .4rem; } dd { margin: 0; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } h1, dd, code, figcaption { overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
const table = document.getElementById("results"), body = table.tBodies[0], rows = [...body.rows];
const heads = [...table.tHead.rows[0].cells], names = heads.map(head => head.textContent);
const filter = document.getElementById("filter"), count = document.getElementById("count");
const value = cell => "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;

function compare(a, b) {  // numbers before words, and what is empty last
  if (a === "" || b === "") return a === b ? 0 : (a === "" ? 2 : -2);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(each => each.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sorted = [...rows].sort((x, y) => {
    const a = value(x.cells[i]), b = value(y.cells[i]), found = compare(a, b);
    return down && a !== "" && b !== "" ? -found : found;
  });
  body.append(...sorted);
}));

const operators = {"=": found => found === 0, "!=": found => found !== 0, "<": found => found < 0, "<=": found => found <= 0,
                   ">": found => found > 0, ">=": found => found >= 0};

function fits(row, word) {
  const parts = word.match(/^(\\w+)(<=|>=|!=|=|<|>)(.*)$/), i = parts ? names.indexOf(parts[1]) : -1;
  if (i < 0) return [...row.cells].some(cell => cell.textContent.toLowerCase().includes(word.toLowerCase()));
  const shown = row.cells[i].textContent, exact = value(row.cells[i]), isNumber = typeof exact === "number" && parts[3] !== "";
  const other = isNumber ? Number(parts[3]) : parts[3], own = isNumber ? (other === exact ? exact : Number(shown)) : shown;
  if (own === "" && parts[2] !== "=" && parts[2] !== "!=") return false;
  return operators[parts[2]](typeof own === "number" && typeof other === "number" ? own - other : String(own).localeCompare(String(other)));
}

filter.addEventListener("input", () => {
  const words = filter.value.split(/\\s+/).filter(Boolean);
  rows.forEach(row => { row.hidden = !words.every(word => fits(row, word)); });
  count.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " rows";
});
"""
