"""CrossSim's simulator and this one on the same network: in what do they agree, and how long does each take?

    git clone --branch v3.2.0 https://github.com/sandialabs/cross-sim
    python benchmarks/beside_crosssim.py cross-sim --data_path path/to/images --images 200

Images, codes, arrays, converters and cells are the same. The network is a ResNet for CIFAR-10 with the weights and input ranges that
CrossSim publishes, batch norms folded into the weights. It has 8-bit weights on pairs of lines, 8-bit inputs bit by bit, and each layer
in one array. A weight's step is `max|w| / 127` of its layer. The ADC limits are those that this project calibrates on training images. A
chip is drawn once, here, and its cells are put into both simulators. In the last rows each simulator draws one. Writes
benchmarks/results/beside_crosssim.md and .json.
"""

import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common import markdown_table, parser_of, write_results

import numpy as np
import torch
from experiment.inputs import data
from experiment.program.cli import UserError, run_main
from models import quant
from models.quant import CrossbarSpec, Device, convert
from models.quant.conversion.layer import ConvertedLayer
from models.quant.network.modes import hooked
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images, as these networks were trained
BITS, ROWS = 8, 576  # of weights and inputs; of an array: those of the largest layer
BATCH, ALONE = 16, 4  # images at a time; images on which layers are compared one by one
ON_OFF, G_MAX = 10, 100.0  # uS; CrossSim clips conductances at 0, which off-cells of 0 would reach
SOFTWARE = "no ADC"
EQUAL = 100.0  # dB, of logits of an image whose codes are the same in all layers: float32 rounds where digital scales and biases differ


@dataclass(frozen=True)
class Setting:
    """One row. Attributes: cell_bits, 1 or 7, which divide the 7 bits of a weight's size; adc_bits, None: no ADC; error, deviation of a
    programmed cell as a share of G_max; own, each simulator draws its own cells, with this seed."""

    cell_bits: int
    adc_bits: int | None = None
    error: float = 0.0
    own: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.cell_bits}-bit cells", SOFTWARE if self.adc_bits is None else f"{self.adc_bits}-bit ADC"]
        parts += [f"cells off by {self.error:.1%} of G_max"] if self.error else []
        return ", ".join(parts + (["each its own chip"] if self.own is not None else []))

    @property
    def spec(self) -> CrossbarSpec:
        adc = {"adc_range": "ideal"} if self.adc_bits is None else {"adc_bits": self.adc_bits}
        return CrossbarSpec(BITS, BITS, self.cell_bits, rows=ROWS, mapping="im2col", weights="pair", **adc)


SETTINGS = (Setting(1), Setting(7), Setting(1, 8), Setting(1, 6), Setting(7, 8), Setting(1, 8, 0.05), Setting(7, 8, 0.005),
            *(Setting(7, None, 0.005, seed) for seed in range(2)))


# ---- the network, in each simulator ----------------------------------------------------------------------------------------


def load(folder: Path, depth: int) -> tuple[nn.Module, np.ndarray, str]:
    """(network with its batch norms folded, published range of each layer's inputs `[layers, 2]`, version of CrossSim).
    Raises: UserError for a folder that is none of CrossSim."""
    here = folder / "applications" / "dnn" / "torch" / "cifar10_resnet"
    weights, ranges = here / "models" / f"resnet{depth}_cifar10.pth", here / "calibrated_config" / f"input_limits_ResNet{depth}.npy"
    for path in (weights, ranges):
        if not path.exists():
            raise UserError(f"{path} is not there; give a clone of https://github.com/sandialabs/cross-sim, and --depth 14, 20, 32 or 56")
    sys.path[:0] = [str(folder), str(here), str(folder / "applications" / "dnn")]
    from build_resnet_cifar10 import ResNet_cifar10
    from simulator.algorithms.dnn.torch.convert import _fuse_all_bn

    net = ResNet_cifar10((depth - 2) // 6)
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    version = re.search(r'version = "(.*?)"', (folder / "pyproject.toml").read_text())
    return _fuse_all_bn(net), np.load(ranges), version[1] if version else "of unknown version"


def products(net: nn.Module) -> list[str]:
    """Names of its convolutions and linear layers, in the order of the published ranges."""
    return [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def ours(net: nn.Module, ranges: np.ndarray, images: Tensor) -> nn.Module:
    """The network on crossbars of this project, with the steps of CrossSim."""
    codes, m = 2**BITS - 1, 2 ** (BITS - 1) - 1
    weights = {name: float(net.get_submodule(name).weight.detach().abs().max()) / m for name in products(net)}
    inputs = {name: (high / m, -m, m) if low < 0 else (high / codes, 0, codes) for name, (low, high) in zip(products(net), ranges)}
    return convert(net, SETTINGS[0].spec, images, specs={products(net)[0]: first(SETTINGS[0].spec)}, first_last_bits=None,
                   weight_scale=weights, input_scales=inputs, inputs="ternary", correct="none")


def first(spec: CrossbarSpec) -> CrossbarSpec:
    """The hardware of the first layer, whose inputs have signs, so that a word line counts twice."""
    return replace(spec, rows=ROWS // 2)


def layers_of(net: nn.Module) -> dict[str, ConvertedLayer]:
    return {name.removesuffix(".crossbar"): layer for name, layer in quant.crossbar_layers(net)}


def place(net: nn.Module, setting: Setting, images: Tensor) -> None:
    """Bring the network of this project to a setting, with the chip of seed `own`, or 0, where cells scatter."""
    quant.program(net, None)
    for number, layer in enumerate(layers_of(net).values()):
        layer.set_spec(setting.spec if number else first(setting.spec))
    if setting.adc_bits is not None:
        quant.calibrate(net, images, "percentile", correct=None)  # least squares take minutes where a read has 10^5 values
        # Where a read lies half-way between two codes: CrossSim counts from the lower limit, so that both go to the same code where q_min
        # is even. Cells that scatter have a grid, and float32 goes either way: a step off the grid has no read there.
        odd = 1.001 if setting.error else 1.0
        for layer in layers_of(net).values():
            layer.set_ranges([(delta * odd, q_min + q_min % 2) for delta, q_min in zip(layer.adc_delta.tolist(), layer.adc_q_min.tolist())])
    if setting.error:
        device = Device("cells", "benchmarks/beside_crosssim.py", G_MAX / ON_OFF, G_MAX, sigma_us=setting.error * G_MAX)
        quant.program(net, device, setting.own or 0)


def theirs(net: nn.Module, ranges: np.ndarray, setting: Setting, own: nn.Module) -> nn.Module:
    """The network on CrossSim's arrays. Args: own, that of this project on the same setting, whose ADC limits and cells it gets."""
    from dnn_inference_params import dnn_inference_params
    from simulator.algorithms.dnn.torch.convert import analog_modules, from_torch

    layers, params = layers_of(own), []
    level = (1 - 1 / ON_OFF) / (2**setting.cell_bits - 1)  # in cells and reads of CrossSim, where G_max is 1
    for name, limits in zip(products(net), ranges):
        one = dnn_inference_params(
            ideal=False, core_style="BALANCED", Nslices=7 // setting.cell_bits, weight_bits=BITS, digital_bias=True, NrowsMax=2 * ROWS,
            Rmin=1e6 / G_MAX, Rmax=1e6 * ON_OFF / G_MAX, infinite_on_off_ratio=False, input_bits=BITS, input_bitslicing=True,
            positiveInputsOnly=bool(limits[0] >= 0), input_range=limits.copy(), adc_bits=0, adc_per_ibit=True, drift_model="none",
            error_model="none" if setting.own is None else "generic", alpha_error=setting.error)
        if setting.adc_bits is not None:
            layer = layers[name]
            one.xbar.adc.mvm.model = "QuantizerADC"  # which puts other parameters in the place of those there were
            adc = one.xbar.adc.mvm
            ends = torch.stack([layer.adc_q_min, layer.adc_q_min + 2**setting.adc_bits - 1], 1) * layer.adc_delta[:, None]
            ends = (ends * level).numpy()
            adc.bits, adc.signed, adc.adc_range_option = setting.adc_bits, True, "CALIBRATED"
            adc.calibrated_range = ends if len(ends) > 1 else ends[0]
        params.append(one)
    if setting.own is not None:
        np.random.seed(setting.own)  # what CrossSim draws from
    made = from_torch(net, params)
    if setting.error and setting.own is None:
        for name, module in zip(products(net), analog_modules(made)):
            give_cells(module, layers[name], level)
    return made.eval()


def give_cells(module: nn.Module, layer: ConvertedLayer, level: float) -> None:
    """Put the cells of a layer of this project into CrossSim's, which computes with the difference of the two cells of a pair."""
    cells = layer.cells()
    out, taps = layer.w_shape[0], layer.w_shape[2] * layer.w_shape[3]
    values = cells.values[:, 0].reshape(len(cells.values), taps, -1, out).permute(0, 3, 2, 1)  # there rows are (channel, tap)
    values = (values.reshape(len(values), out, -1).double() * cells.unit * level).numpy().astype(np.float32)
    core = getattr(module.core, "core", module.core).cores[0][0]
    core.W_balanced = list(values) if len(values) > 1 else values[0]


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def run(net: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """(logits, float64, seconds an image), after an image that does not count."""
    with torch.no_grad():
        net(images[:1])
        started = time.perf_counter()
        logits = torch.cat([net(batch).cpu().double() for batch in images.split(BATCH)])
    return logits, (time.perf_counter() - started) / len(images)


def decibel(wanted: Tensor, found: Tensor) -> float:
    """Signal to error of logits, dB; infinite where they are the same."""
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


@torch.no_grad()
def layers_alone(net: nn.Module, own: nn.Module, made: nn.Module, images: Tensor) -> list[float]:
    """How far the outputs of each layer agree, dB, where both have the inputs that it has in CrossSim."""
    from simulator.algorithms.dnn.torch.convert import analog_modules

    found, layers = [], layers_of(own)

    def compare(name: str, x: Tensor, y: Tensor) -> None:
        found.append(decibel(y.double(), layers[name](x, None, net.get_submodule(name).bias).double()))
    with hooked(module.register_forward_hook(lambda _, inputs, y, name=name: compare(name, inputs[0], y))
                for name, module in zip(products(net), analog_modules(made))):
        made(images)
    return found


def row(setting: Setting, net: nn.Module, own: nn.Module, made: nn.Module, images: Tensor, labels: Tensor, software: Tensor
        ) -> dict[str, object]:
    """What is told of a setting. Args: own, made, the network here and in CrossSim; software, logits here without ADC."""
    (mine, seconds), (other, other_seconds), alone = run(own, images), run(made, images), layers_alone(net, own, made, images[:ALONE])
    accuracy, other_accuracy = (100 * (logits.argmax(1) == labels).double().mean().item() for logits in (mine, other))
    return {"setting": str(setting), "accuracy_theirs": other_accuracy, "accuracy_ours": accuracy, "layers_dB": statistics.median(alone),
            "lowest_layer_dB": min(alone), "same_answers": int((mine.argmax(1) == other.argmax(1)).sum()),
            "same_logits": sum(decibel(*pair) > EQUAL for pair in zip(other, mine)), "agreement_dB": decibel(other, mine),
            "error_dB_theirs": decibel(software, other), "error_dB_ours": decibel(software, mine), "seconds_theirs": other_seconds,
            "seconds_ours": seconds}


COLUMNS = {  # of `row`: header, format
    "setting": ("setting", ""), "accuracy_theirs": ("accuracy %: CrossSim", ".1f"), "accuracy_ours": ("here", ".1f"),
    "layers_dB": ("layers alone agree, dB", ".0f"), "lowest_layer_dB": ("the lowest", ".0f"), "same_answers": ("same answers", "d"),
    "same_logits": ("same logits", "d"), "agreement_dB": ("logits agree, dB", ".1f"),
    "error_dB_theirs": ("to no ADC, dB: CrossSim", ".1f"), "error_dB_ours": ("here", ".1f"),
    "seconds_theirs": ("seconds an image: CrossSim", ".3f"), "seconds_ours": ("here", ".4f")}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("crosssim", type=Path, help="folder of CrossSim, version 3.2")
    parser.add_argument("--data_path", required=True, help="folder of the images, as for eval.py")
    parser.add_argument("--dataset", default="imagefolder", choices=("imagefolder", "cifar10"))
    parser.add_argument("--depth", type=int, default=20, choices=(14, 20, 32, 56), help="of the ResNet")
    parser.add_argument("--images", type=int, default=100, help="test images, from all over the set")
    args = parser.parse_args(argv)
    net, ranges, version = load(args.crosssim.resolve(), args.depth)
    found = data.load(args.dataset, args.data_path)
    chosen, calibrating = (torch.linspace(0, len(x) - 1, count).long() for x, count in ((found.test_x, args.images), (found.train_x, 128)))
    images, labels = data.normalize(found.test_x[chosen], MEAN, DEVIATION), found.test_y[chosen]
    calibration = data.normalize(found.train_x[calibrating], MEAN, DEVIATION)
    own, rows, measured = ours(net, ranges, calibration), [], []
    software = run(own, images)[0]
    for setting in SETTINGS:
        place(own, setting, calibration)
        measured.append(row(setting, net, own, theirs(net, ranges, setting, own), images, labels, software))
        rows.append([format(measured[-1][name], form) for name, (_, form) in COLUMNS.items()])
        print(*rows[-1], sep=", ", file=sys.stderr)
    plain = 100 * (run(net, images)[0].argmax(1) == labels).double().mean().item()
    about = (f"ResNet-{args.depth} with the weights of CrossSim {version} (NumPy {np.__version__}), {args.images} test images, batches "
             f"of {BATCH}; {plain:.1f} % in float32. 8-bit weights on pairs, 8-bit inputs bit by bit, a layer in one array. Same logits: "
             f"images whose logits agree by more than {EQUAL:g} dB. Layers alone: with the inputs that they have in CrossSim, of {ALONE} "
             "images, the median of them.")
    write_results("beside_crosssim", "Beside CrossSim", [about, markdown_table([header for header, _ in COLUMNS.values()], rows)],
                  {"crosssim": version, "rows": measured})
    return 0


if __name__ == "__main__":
    run_main(main)
