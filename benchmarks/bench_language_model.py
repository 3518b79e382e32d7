"""How long does the small GPT of examples/language_model.py take on crossbars, beside float32? Both are called in turns, in one process.

    python benchmarks/bench_language_model.py --folder save/language_model

The folder is that of the example, with its trained network. Writes benchmarks/results/language_model_<processor>.md and .json.
"""

import sys
from pathlib import Path

from common import RESULTS, markdown_table, median_seconds, parser_of, processor, write_results

import torch
from models.quant import Chips, CrossbarSpec, Device, calibrate, convert, set_spec

sys.path.insert(0, str(RESULTS.parents[1] / "examples"))
import language_model

SETTINGS = {
    "W8A8, no ADC": (CrossbarSpec(8, 8, adc_range="ideal"), None),
    "W8A8, 1-bit cells, 8-bit ADC": (CrossbarSpec(8, 8, adc_bits=8), None),
    "W8A8, 1-bit cells, 6-bit ADC": (CrossbarSpec(8, 8, adc_bits=6), None),
    "W8A8, 2-bit cells, 8-bit ADC": (CrossbarSpec(8, 8, cell_bits=2, adc_bits=8), None),
    "W8A8, a chip of techA, 2-bit cells, 8-bit ADC": (CrossbarSpec(8, 8, cell_bits=2, adc_bits=8), "techA"),
}


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, default=Path("save/language_model"), help="that of the example")
    parser.add_argument("--windows", type=int, default=8, help="of a batch")
    args = parser.parse_args(argv)
    state = torch.load(args.folder / "float.pt", weights_only=True)
    model = language_model.GPT(state["of"]["width"], context=state["of"]["context"]).eval()
    model.load_state_dict(state["model"])
    text = language_model.text_of_library()
    batch, calibration = (language_model.windows(text[part], model.context, args.windows)[0] for part in ("validation", "training"))
    net = convert(model, CrossbarSpec(8, 8, adc_range="ideal"), calibration)
    rows, found = [], {}
    for title, (spec, device) in SETTINGS.items():
        set_spec(net, spec)
        if spec.adc_range == "calibrated":
            calibrate(net, calibration)
        if device:
            Chips(device=Device.load(device)).program(net, 0)
        with torch.no_grad():
            plain, simulated = median_seconds(lambda: model(batch), lambda: net(batch), repeats=args.repeats)
        found[title] = {"seconds_a_batch": simulated, "float32": plain}
        rows.append([title, f"{1e3 * simulated:.0f}", f"{1e3 * plain:.0f}", f"{simulated / plain:.2f}"])
        print(*rows[-1], sep="\t", flush=True)
    sections = [f"{args.windows} windows of {model.context} characters; medians of {args.repeats} passes in turns with plain float32.",
                markdown_table(["setting", "ms", "ms in float32", "ratio"], rows)]
    write_results(f"language_model_{processor()}", "A small GPT on crossbars", sections, {"settings": found})


if __name__ == "__main__":
    main()
