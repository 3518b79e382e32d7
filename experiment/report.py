"""`eval.py --report`: what `models.quant.diagnostics` finds, as a table, as JSON and as a picture."""

import json

import numpy as np

import utils


def _db(value):
    return "exact" if value is None else f"{value:.1f}"


def table(layers):
    """Aligned text, one line for each slice of each layer."""
    header = ["layer", "arrays", "fill", "zero reads", "slice", "reachable", "seen", "step", "codes used", "clipped",
              "read dB", "output dB"]
    lines = [header]
    for entry in layers:
        for s in entry["slices"]:
            first = s["slice"] == 0
            lines.append([
                *([entry["layer"], str(entry["arrays"]), f"{entry['fill']:.0%}", f"{entry['all_zero_reads']:.1%}"] if first
                  else [""] * 4),
                str(s["slice"]), f"{s['reachable'][0]:g}..{s['reachable'][1]:g}", f"{s['seen'][0]:g}..{s['seen'][1]:g}",
                f"{s['delta']:.4g}", f"{s['codes_used']:.0%}", f"{s['clipped']:.2%}", _db(s["sqnr_db"]),
                _db(entry["output_sqnr_db"]) if first else ""])
    return "\n".join(utils.aligned(lines))


def write_json(path, title, layers):
    utils.atomic_write(path, lambda file: file.write(json.dumps({"setting": title, "layers": layers}).encode()))


def plot(path, title, layers, adc_bits):
    """One panel a layer: how often each partial sum occurs, and the ADC's levels; then SQNR over ADC bits."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = -(-(len(layers) + 1) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    panels = grid.flat
    for entry, axes in zip(layers, panels):
        low = min(s["seen"][0] for s in entry["slices"])
        high = max(s["seen"][1] for s in entry["slices"])
        for s in entry["slices"]:
            counts = np.array(s["histogram"], dtype=float)
            v = entry["unit"] * (np.arange(len(counts)) + entry["u_min"])
            line, = axes.plot(v[counts > 0], (counts / counts.sum())[counts > 0], marker=".", markersize=3, linewidth=1,
                              label=f"slice {s['slice']}")
            levels = s["delta"] * (s["q_min"] + np.arange(2**adc_bits))
            place = 0.02 + 0.05 * s["slice"]  # of the panel's height: the slices' levels below one another
            axes.vlines(levels, place, place + 0.04, transform=axes.get_xaxis_transform(), color=line.get_color(),
                        linewidth=1)
        margin = 0.05 * (high - low) + entry["unit"]
        axes.set(title=entry["layer"], yscale="log", xlim=(low - margin, high + margin), xlabel="partial sum v",
                 ylabel="share of reads")
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / (top / bottom) ** 0.35, top)  # room for the levels
        if entry is layers[0]:
            axes.legend(fontsize="small", title="ticks: ADC levels", title_fontsize="small")
    axes = grid.flat[len(layers)]
    for entry in layers:
        points = [(bits, db) for bits, db in entry["sqnr_over_adc_bits"].items() if db is not None]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=entry["layer"])
    axes.axvline(adc_bits, color="black", linestyle="--", linewidth=1)
    axes.set(title="signal to quantization noise", xlabel="ADC bits", ylabel="SQNR of the reads (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    for axes in grid.flat[len(layers) + 1:]:
        axes.set_axis_off()
    figure.suptitle(title)
    utils.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)
