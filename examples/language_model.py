"""Train a small GPT on the sources of Python's standard library, and put it on crossbars.

    python examples/language_model.py                            # an hour and a half on two CPU cores, most of it training
    python examples/language_model.py --folder save/lm_small --width 64 --steps 500 --more_steps 50     # to look at it

Tokens are characters. Whole modules are in training, validation or test, by the check sum of their names, so that no text of the test was
trained on. Then the network is trained on for an epoch, with noise on its weights and without, and measured again. `--folder` keeps the
trained networks and a picture. Where training was stopped, the next run goes on.
"""

import argparse
import copy
import math
import statistics
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import printable
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from models.quant import Cache, Chips, CrossbarSpec, Device, Setting, WeightNoise, convert, measure, measure_float, perplexity

NO_CODE = {"site-packages", "test", "tests", "encodings", "pydoc_data"}  # packages of others, data, tables and texts
HELD_OUT = {0: "test", 1: "validation"}  # by a check sum's last digit; the other eight are training
CALIBRATION = 32  # windows of the training text that choose scales and ADC ranges
SAVED_EVERY = 250  # steps of training
NOISE = 0.02  # of the weights, as a share of the largest one of their channel
CLIP = 2.5  # standard deviations of a channel's weights: none is larger in a training with noise
RATE, BATCH = 2e-3, 8  # of training: the largest rate, and pieces of text of a step


def text_of_library() -> dict[str, Tensor]:
    """The characters of the standard library as numbers, int64 `[length]`: of training, validation and test. What `printable` has not is a
    question mark."""
    number = torch.tensor([printable.find(chr(code)) for code in range(128)])
    number[number < 0] = printable.index("?")
    library, parts = Path(sysconfig.get_paths()["stdlib"]), {"training": [], "validation": [], "test": []}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).with_suffix("").parts
        if not NO_CODE & set(inside) and path.stat().st_size:
            part = HELD_OUT.get(zlib.crc32(inside[0].encode()) % 10, "training")
            ascii_text = path.read_text(encoding="utf-8", errors="replace").encode("ascii", "replace")
            parts[part].append(number[torch.frombuffer(bytearray(ascii_text), dtype=torch.uint8).long()])
    if not all(parts.values()):
        raise SystemExit(f"{library} has not the sources of Python's standard library")
    return {part: torch.cat(found) for part, found in parts.items()}


def windows(text: Tensor, context: int, count: int) -> tuple[Tensor, Tensor]:
    """So many windows of a text that do not overlap, evenly spread over it, and the character that follows each of theirs; both
    `[count, context]`."""
    most = (len(text) - 1) // context
    count = min(count, most)
    at = torch.arange(count)[:, None] * most // count * context + torch.arange(context)
    return text[at], text[at + 1]


class Block(nn.Module):
    """Attention and two linear layers, each beside a shortcut; `[N, T, width]` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Numbers of characters `[N, T]` to the logits of the next ones `[N, T, len(printable)]`; T is at most `context`."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4, context: int = 256) -> None:
        super().__init__()
        self.context = context
        self.letters, self.places = nn.Embedding(len(printable), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(printable))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what is added to a shortcut is smaller, as there are 2 * layers of it
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if name.endswith(("proj.weight", "down.weight")) else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.letters(x) + self.places.weight[:x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: GPT, text: Tensor, noise: float) -> Tensor:
    """Cross-entropy of random pieces of a text, in nats, with its gradients. Weights have noise of a share of the largest one of their
    output channel while both are computed."""
    chosen = text[torch.randint(len(text) - model.context, (BATCH, 1)) + torch.arange(model.context + 1)]
    weights = linear_weights(model) if noise else []
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data += noise * weight.data.abs().amax(1, keepdim=True) * torch.randn_like(weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(chosen[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), chosen[:, 1:].flatten())
    loss.backward()
    for weight, values in zip(weights, kept):
        weight.data = values
    return loss.detach()


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Those that lie on crossbars, `[out, in]`."""
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]


def clip_weights(model: nn.Module) -> None:
    """Cut the weights of each output channel at CLIP of their standard deviations, as the noise is a share of the largest one. (Source:
    Büchel et al., Analog Foundation Models, NeurIPS 2025, arXiv 2505.09663.)"""
    for weight in linear_weights(model):
        most = CLIP * weight.data.std(1, keepdim=True)
        weight.data.clamp_(-most, most)


def train(model: GPT, text: Tensor, file: Path, steps: int, rate: float, noise: float = 0.0) -> None:
    """AdamW, a short warm-up, then a cosine to 0; with noise, weights are clipped after each step. `file` keeps the state, from which an
    interrupted training goes on.

    Raises: SystemExit where the file is of another training.
    """
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], rate, (0.9, 0.99), weight_decay=0.1)
    first, mean, warm_up = 0, None, max(steps // 50, 1)
    of = {"width": model.norm.weight.numel(), "context": model.context, "steps": steps}
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["of"] != of:
            raise SystemExit(f"{file} is of a training with {state['of']}, and this one has {of}: give another --folder")
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    with tqdm(total=steps, initial=first, desc=file.stem, mininterval=1 if sys.stderr.isatty() else 30) as bar:
        for step in range(first, steps):
            torch.manual_seed(step)  # the same pieces and noise wherever it goes on
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.zero_grad()
            loss = loss_of(model, text, noise).item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if noise:
                clip_weights(model)
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            bar.update()
            bar.set_postfix(perplexity=f"{math.exp(mean):.3f}", refresh=False)
            if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
                new = file.with_suffix(".new")
                torch.save({"of": of, "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, new)
                new.replace(file)


class Row(NamedTuple):
    """What was measured. Attributes: setting, None without ADCs and cells; perplexities, of each chip where there are some."""

    network: str
    setting: Setting | None
    perplexities: tuple[float, ...]


def on_crossbars(name: str, model: GPT, bits: tuple[int, int], settings: Iterable[Setting], test: tuple[Tensor, Tensor],
                 calibration: Tensor, **options: str) -> Iterator[Row]:
    """A network with weights and inputs of so many bits: without ADCs, and then on each setting. Args: options, of `convert`."""
    net, cache = convert(model, CrossbarSpec(*bits, adc_range="ideal"), calibration, **options), Cache()
    software = measure(net, *test, None, metric=perplexity)
    yield Row(name, None, (software.accuracy,))
    for setting in settings:
        record = measure(net, *test, setting, calibration=calibration, software=software, cache=cache, metric=perplexity, progress=True)
        yield Row(name, setting, record.chip_accuracies or (record.accuracy,))


def adcs(bits: tuple[int, int], uniform: dict[int, tuple[int, ...]], means: tuple[int, ...]) -> list[Setting]:
    """Uniform ADCs, `{bits of a cell: of an ADC}`, and plans of few bits in the mean."""
    specs = [CrossbarSpec(*bits, cell_bits=cells, adc_bits=adc_bits) for cells, each in uniform.items() for adc_bits in each]
    specs += [CrossbarSpec(*bits, adc_bits=mean, adc_plan=plan) for plan in ("significance", "ones") for mean in means]
    return [Setting(spec) for spec in specs]


def chips(bits: tuple[int, int], count: int) -> list[Setting]:
    """Gaussian noise on the weights themselves, drawn so many times, and a device after a day, of which a third as many are drawn."""
    device = Chips(device=Device.load("techA", time="1d"), chips=math.ceil(count / 3))
    return [Setting(CrossbarSpec(*bits, adc_range="ideal"), chips=WeightNoise(NOISE, chips=count)),
            Setting(CrossbarSpec(*bits, adc_bits=8), chips=device)]


def table(how: str, model: GPT, settings: list[Setting], test: tuple[Tensor, Tensor], calibration: Tensor) -> Iterator[Row]:
    """The network in float, and with 8 bits on these settings. Args: how, behind its name: how it was trained."""
    yield Row(f"float{how}", None, (measure_float(model, *test, metric=perplexity).accuracy,))
    yield from on_crossbars(f"W8A8{how}", model, (8, 8), settings, test, calibration)


def line(row: Row, float_perplexity: float) -> str:
    """A row of the table in Markdown: the mean of its chips, their deviation, and how much more than in float."""
    mean = statistics.fmean(row.perplexities)
    deviation = f" ± {statistics.stdev(row.perplexities):.4f}" if len(row.perplexities) > 1 else ""
    return (f"| {row.network} | {row.setting or 'no ADC' if row.network[0] == 'W' else ''} | {mean:.4f}{deviation} | "
            f"{100 * (mean / float_perplexity - 1):+.2f} % |")


def picture(rows: list[Row], file: Path) -> None:
    """How much perplexity the ADCs of the 8-bit network cost, over their bits."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    curves, in_float = {}, rows[0].perplexities[0]
    words = {"uniform": "as many for every read", "significance": "plan by significance", "ones": "plan by ones"}
    for row in rows:
        more = 100 * (row.perplexities[0] / in_float - 1)
        if row.network == "W8A8" and not row.setting:
            axes.axhline(more, color="0.6", linestyle="--", label="no ADC")
        elif row.network == "W8A8" and not row.setting.chips:
            spec = row.setting.spec
            curves.setdefault(f"{spec.cell_bits}-bit cells, {words[spec.adc_plan]}", []).append((spec.adc_bits, more))
    for name, points in curves.items():
        axes.plot(*zip(*points), "o-", label=name)
    axes.set(xlabel="ADC bits of a read, in the mean", ylabel="perplexity more than in float, %")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("save/language_model"), help="where its files are kept")
    parser.add_argument("--steps", type=int, default=7000, help="of training")
    parser.add_argument("--more_steps", type=int, help="of training on, with noise and without. Default: as many as the text is long")
    parser.add_argument("--width", type=int, default=256, help="numbers that stand for a character, a multiple of 4")
    parser.add_argument("--context", type=int, default=256, help="characters that the network sees at once")
    parser.add_argument("--windows", type=int, default=200, help="of the test text, that are measured")
    parser.add_argument("--chips", type=int, default=10, help="draws of the noise; of the device a third as many")
    given = parser.parse_args(argv)
    numbers = given.steps, given.width, given.context, given.windows, given.chips, 1 if given.more_steps is None else given.more_steps
    if min(numbers) < 1 or given.width % 4:
        parser.error("all numbers are at least 1, and --width is a multiple of 4")
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = text_of_library()
    if given.context >= (shortest := min(map(len, text.values()))):
        parser.error(f"--context {given.context}: the shortest part of the text has {shortest:,} characters, and a window needs one more")
    model = GPT(given.width, context=given.context)
    print(f"characters: {', '.join(f'{len(found):,} {part}' for part, found in text.items())}; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, text["training"], given.folder / "float.pt", given.steps, RATE)
    test, validation = (windows(text[part], given.context, given.windows) for part in ("test", "validation"))
    calibration = windows(text["training"], given.context, CALIBRATION)[0]
    print(f"perplexity of validation: {measure_float(model, *validation, metric=perplexity).accuracy:.4f}\n\n"
          f"{test[1].numel():,} characters of the test\n\n| network | on | perplexity | more than float |\n|---|---|---|---|")
    rows = []

    def show(found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row)
            print(line(row, rows[0].perplexities[0]), flush=True)

    of_chips = chips((8, 8), given.chips)
    show(table("", model, adcs((8, 8), {1: (8, 6, 5, 4, 3), 2: (8, 6, 5, 4)}, (3, 2, 1)) + of_chips, test, calibration))
    show(on_crossbars("W4A8", model, (4, 8), [], test, calibration))
    show(on_crossbars("W4A8, gptq", model, (4, 8), adcs((4, 8), {1: (6, 5, 4)}, (3, 2)), test, calibration, rounding="gptq"))
    more_steps = given.more_steps or len(text["training"]) // (BATCH * given.context)
    for file, how, noise in (("longer.pt", ", trained longer", 0.0), ("noise.pt", ", trained with noise", NOISE)):
        longer = copy.deepcopy(model)
        train(longer, text["training"], given.folder / file, more_steps, RATE / 2, noise)
        show(table(how, longer, of_chips, test, calibration))
    picture(rows, given.folder / "language_model.svg")


if __name__ == "__main__":
    main()
