"""Causal language models of Hugging Face's transformers, from a folder on this machine, and a text that they are measured on.

    task("hf_models/gpt2", "wiki.test.txt", window=1024, stride=512)

The text becomes tokens, and these windows, each of which goes through the model by itself. A token is counted once, in the first window
that holds it, so that with a stride below the window it is told from at least `window - stride` tokens before it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.quant import Metric, Task, perplexity
from models.quant.layers.loaders import IGNORED

from ..program.cli import UserError, needed, one_line, user_error

# transformers takes seconds to import: only what needs it does so.

LONGEST = 1024  # tokens of a window, where none is asked for
TOKENIZERS = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")  # what may hold the tokens; some models' have none without, silently
HERE = {"local_files_only": True, "trust_remote_code": False}  # nothing is downloaded, and no code of a folder is run
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


def task(folder: str, text: str, window: int | None = None, stride: int | None = None, batch_size: int = 8,
         calibration_windows: int = 8, calibration_text: str | None = None, validation_text: str | None = None) -> Task:
    """A causal language model with its perplexity on a text, which is that of Hugging Face's own recipe (`of_recipe`).

    The model comes in float32. Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: with `config.json`, a tokenizer and weights, as `save_pretrained` writes them.
        text: a file in UTF-8 that is measured.
        window: tokens that the model sees at a time; None: as many as it was made for, at most 1024.
        stride: tokens from the beginning of a window to that of the next; None: half a window.
        batch_size: windows that go through the model together.
        calibration_windows: how many windows, side by side, choose scales and ADC ranges: the first of `calibration_text`. Without that
            file the first of the text itself, whose tokens are then not measured: what is measured is the rest, as a text of its own.
        calibration_text: another file in UTF-8, such as a part of the training text.
        validation_text: another file in UTF-8, whose windows choose in a search; None: there are none.
    Raises: UserError for files that are missing or too short, what is no causal language model, and windows that the model cannot have.
    """
    config, tokenizer = described(folder)
    longest = getattr(config, "max_position_embeddings", None)
    window = min(longest or LONGEST, LONGEST) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 2 <= window <= (longest or window):
        raise UserError(f"--window {window}: allowed are 2 to {longest or 'any number of'} tokens, which {folder} was made for")
    if not 1 <= stride <= window:
        raise UserError(f"--stride {stride}: allowed are 1 to {window} tokens, the window")
    needs = calibration_windows * window
    tokens = tokens_of(text, tokenizer, config.vocab_size)
    first = tokens if calibration_text is None else tokens_of(calibration_text, tokenizer, config.vocab_size)
    rest = tokens[needs:] if calibration_text is None else tokens
    if len(first) < needs:
        raise UserError(f"{calibration_text or text} has {len(first):,} tokens, fewer than {calibration_windows} windows of {window} for "
                        "calibration; take a longer text, or a smaller --window")
    chosen_on = None if validation_text is None else tokens_of(validation_text, tokenizer, config.vocab_size)
    behind = " behind those for calibration (see --calibration_text)" if first is tokens else ""
    for part, name, where in ((rest, text, behind), (chosen_on, validation_text, "")):
        if part is not None and len(part) < window:
            raise UserError(f"{name} has {len(part):,} tokens{where}, fewer than a window of {window}; take a longer text, or a smaller "
                            "--window")
    calibration = [{"input_ids": part} for part in first[:needs].view(-1, window).split(batch_size)]
    data, validation = (part if part is None else windows_of(part, window, stride, batch_size) for part in (rest, chosen_on))
    return Task(model_of(folder), data, calibration, of_recipe, validation=validation, kind="windows of text")


# ---------------------------------------------------------------------------------------------------------------------
# The model and its tokens


def described(folder: str) -> tuple[Any, Any]:
    """(configuration, tokenizer) of a causal language model. Raises: UserError."""
    place = Path(folder)
    for files, what in ((("config.json",), "config.json"), (TOKENIZERS, "tokenizer"), (WEIGHTS, "weights (model.safetensors)")):
        if not any(found for pattern in files for found in place.glob(pattern)):
            lacks = f"has no {what}" if place.is_dir() else "is not there"
            raise UserError(f"--model hf/{folder}: the folder {lacks}; give one that save_pretrained of a model and of its tokenizer wrote")
    transformers = _transformers(folder)
    with _said_of(folder):
        config = transformers.AutoConfig.from_pretrained(folder, **HERE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **HERE)
        causal = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.architectures and causal.isdisjoint(config.architectures):
        raise UserError(f"--model hf/{folder} is a {config.architectures[0]}, which is no causal language model")
    return config, tokenizer


def model_of(folder: str) -> nn.Module:
    """The model, in float32. Raises: UserError."""
    with _said_of(folder):
        model, found = _transformers(folder).AutoModelForCausalLM.from_pretrained(folder, **HERE, output_loading_info=True)
    if lost := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise UserError(f"--model hf/{folder}: the weights are not those of its config.json: {lost[0]} is missing or has another shape")
    model.config.use_cache = False  # each window is seen once
    return model.float().eval()


def _transformers(folder):
    transformers = needed("transformers", f"--model hf/{folder} needs the package transformers: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _said_of(folder):
    """What transformers raises, which is nearly anything for damaged files, as one line."""
    return user_error(lambda error: f"--model hf/{folder} cannot be loaded: {one_line(error)[:200]}", Exception)


def tokens_of(path: str, tokenizer: Any, known: int) -> Tensor:
    """The tokens of a file, int64 `[T]`. Args: known, how many the model knows. Raises: UserError."""
    with (user_error(lambda _: f"{path} is no text in UTF-8", UnicodeDecodeError),
          user_error(lambda error: f"cannot read {path}: {error.strerror or error}", OSError)):
        text = Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(tokens) and tokens.max() >= known:
        raise UserError(f"the tokenizer makes token {tokens.max()} of {path}, and the model knows {known:,}: they do not belong together")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Windows and their perplexity


def windows_of(tokens: Tensor, window: int, stride: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches `{"input_ids": [N, T], "targets": [N, T]}` of windows of a text; the last one, shorter, alone.

    The target of output t of a window is token t + 1 of it, or `IGNORED` where an earlier window counted that, or where there is none.
    """
    alike: dict[int, list[Tensor]] = {}  # windows of one length
    for start in range(0, max(len(tokens) - window, 0) + stride, stride):
        own = tokens[start:start + window]
        targets = nn.functional.pad(own[1:], (0, 1), value=IGNORED)
        targets[:max(window - stride - 1, 0) if start else 0] = IGNORED  # which the window before counted
        alike.setdefault(len(own), []).append(torch.stack([own, targets]))
    batches = [part for found in alike.values() for part in torch.stack(found, 1).split(batch_size, 1)]
    return [{"input_ids": ids, "targets": targets} for ids, targets in batches if bool((targets != IGNORED).any())]


def _weighed(output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and tokens of each window, both times `1 - 1 / tokens` where its first output does not count."""
    nats, tokens = perplexity.numbers(output, target)
    share = 1 - (target[:, 0] == IGNORED).to(tokens) / tokens
    return nats * share, tokens * share


of_recipe: Metric = replace(perplexity, numbers=_weighed)
"""Perplexity as the page "Perplexity of fixed-length models" of transformers' documentation has it. A window counts there as one token
less than it has targets, also where all of these are counted, because its first token has a context: so all windows but the first with a
stride below the window. (At a stride of `window - 1` such windows look like the first one, and count as they are.)"""
