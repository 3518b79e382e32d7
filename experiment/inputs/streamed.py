"""Images that are read when they are looked at: for networks of 224 pixels a side and more, whose images memory does not hold."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..program import distributed
from ..program.cli import UserError, one_line, user_error
from .folders import in_rgb

Transform = Callable[[Image.Image], torch.Tensor]  # a picture in RGB to float [channels, height, width]
LOOKED_AT = 8  # inputs that tell one transform from another
Source = Path | np.ndarray  # a file, or uint8 [height, width, 3]


class Streamed:
    """A sequence of pictures seen through a network's transform. Taking some of them, by a slice or indices, reads none.

    Args: sources, files or pictures; transform, see `Transform`; device, where `read` puts the inputs.
    """

    def __init__(self, sources: Sequence[Source], transform: Transform, device: torch.device | str = "cpu") -> None:
        self.sources, self.transform, self.device = sources, transform, torch.device(device)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, pick: slice | torch.Tensor) -> "Streamed":
        some = self.sources[pick] if isinstance(pick, slice) else [self.sources[i] for i in pick.tolist()]
        return Streamed(some, self.transform, self.device)

    def to(self, device: torch.device | str) -> "Streamed":
        """The same pictures for a network on another device."""
        return Streamed(self.sources, self.transform, device)

    def split(self, size: int) -> list["Streamed"]:
        """Parts of `size` pictures, the last of as many as are left."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def identity(self) -> list:
        """Plain values that tell these inputs from others: SHA-256 of every source, and some inputs, which tell transforms apart."""
        some = range(0, len(self), max(1, len(self) // LOOKED_AT))
        return [[hashlib.sha256(_content(source)).hexdigest() for source in self.sources], [self[i:i + 1].read().cpu() for i in some]]

    def read(self) -> torch.Tensor:
        """All of them as network inputs, float32 `[N, channels, height, width]`.

        Raises: UserError that names a file that cannot be decoded, or what the transform makes of a picture.
        """
        with ThreadPoolExecutor(min(8, distributed.cores())) as pool:  # PIL decodes outside the interpreter lock
            inputs = list(pool.map(self._input, self.sources))
        if odd := {tuple(x.shape) for x in inputs} - {tuple(x.shape) for x in inputs[:1]}:
            raise UserError(f"the transform makes pictures of {list(inputs[0].shape)} and of {list(odd.pop())}; a batch needs one shape")
        return torch.stack(inputs).to(self.device)

    def _input(self, source: Source) -> torch.Tensor:
        what = "a picture in memory" if isinstance(source, np.ndarray) else source
        # A damaged file can make PIL raise nearly anything, and the transform may be the user's.
        with user_error(lambda error: f"cannot read {what}: {one_line(error)}", Exception):
            with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
                found = self.transform(in_rgb(image))
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            what = f"a tensor of {found.dtype}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            raise UserError(f"the transform gives {what}; a float tensor [channels, height, width] is expected")
        return found.float()


def _content(source: Source) -> bytes:
    return source.tobytes() if isinstance(source, np.ndarray) else source.read_bytes()
