"""Train a small GPT on the sources of Python's standard library, and put it on crossbars.

    python examples/language_model.py                       # half an hour of training on two CPU cores, then the table
    python examples/language_model.py --steps 20 --width 64 # to look at it

Tokens are characters. Whole modules are in training, validation or test, by the check sum of their names, so no text of the test was
trained on. Files are kept in `--folder`: where a run was stopped, the next one goes on.
"""

import argparse
import math
import sys
import sysconfig
import zlib
from pathlib import Path
from string import printable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

NO_CODE = {"site-packages", "test", "tests", "encodings", "pydoc_data"}  # packages of others, data, tables and texts
HELD_OUT = {0: "test", 1: "validation"}  # by a check sum's last digit; the other eight are training


def text_of_library() -> dict[str, Tensor]:
    """The characters of the standard library as numbers `[length]`, int64, of training, validation and test; a character beyond ASCII is
    a question mark."""
    number, parts = {letter: i for i, letter in enumerate(printable)}, {"training": [], "validation": [], "test": []}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).with_suffix("").parts
        if not NO_CODE & set(inside):
            text = path.read_text(encoding="utf-8", errors="replace")
            part = HELD_OUT.get(zlib.crc32(inside[0].encode()) % 10, "training")
            parts[part] += [number.get(letter, number["?"]) for letter in text]
    return {part: torch.tensor(found) for part, found in parts.items()}


def windows(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """A text cut into windows that do not overlap: inputs and the characters that follow each of theirs, both `[windows, context]`."""
    count = (len(text) - 1) // context
    return text[:count * context].view(count, context), text[1:count * context + 1].view(count, context)


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


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean of `-log p(next character)`, in nats."""
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """`exp` of the mean cross-entropy of all characters."""
    losses = [cross_entropy(model, *batch) * len(batch[0]) for batch in zip(inputs.split(32), targets.split(32))]
    return math.exp(sum(losses) / len(inputs))


def train(model: GPT, text: Tensor, file: Path, steps: int, rate: float = 2e-3, batch: int = 8) -> None:
    """AdamW, a short warm-up, then a cosine to 0. The state is in `file`, where an earlier call went on to."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], rate, (0.9, 0.99), weight_decay=0.1)
    state = {"step": 0}
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    mean, warm_up = None, max(steps // 50, 1)
    with tqdm(total=steps, initial=state["step"], desc=file.stem, mininterval=1 if sys.stderr.isatty() else 30) as bar:
        for step in range(state["step"], steps):
            first = torch.randint(len(text) - model.context, (batch, 1), generator=torch.Generator().manual_seed(step))
            chosen = text[first + torch.arange(model.context + 1)]
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model, chosen[:, :-1], chosen[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(perplexity=f"{math.exp(mean):.3f}", refresh=False)
            if (step + 1) % 250 == 0 or step + 1 == steps:
                state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("save/language_model"), help="where its files are kept")
    parser.add_argument("--steps", type=int, default=7000, help="of training")
    parser.add_argument("--width", type=int, default=256, help="numbers of a character")
    parser.add_argument("--context", type=int, default=256, help="characters that the network sees at once")
    parser.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = text_of_library()
    model = GPT(given.width, context=given.context)
    print(f"characters: {', '.join(f'{len(found):,} {part}' for part, found in text.items())}; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, text["training"], given.folder / "float.pt", given.steps, given.rate)
    print(f"perplexity of validation: {perplexity(model, *windows(text['validation'], given.context)):.4f}")


if __name__ == "__main__":
    main()
