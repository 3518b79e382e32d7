"""Images as calibration takes them: a tensor, or batches one after the other, along whichever dimension a network has its batch."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BATCH = 64  # images that run together: counts do not depend on it, but a conversion fits scales to samples of each batch


def batches_of(images: Tensor | Iterable[Tensor], dim: int, size: int = BATCH) -> Iterable[Tensor]:
    """The batches that are given, or those of so many images that a tensor is cut into. Args: dim, along which images lie."""
    return images.split(size, dim) if isinstance(images, Tensor) else images


def first_of(batch: Tensor, count: int, dim: int) -> Tensor:
    """The first images of a batch, as a view."""
    return batch.narrow(dim, 0, min(count, batch.shape[dim]))


class First:
    """Keeps the first images that pass by, for a source that can be read only once. Args: count, of images; dim, along which they lie."""

    def __init__(self, count: int, dim: int) -> None:
        self.missing, self.dim, self.kept = count, dim, []

    def of(self, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches of `images`, the first of which are kept."""
        for batch in batches_of(images, self.dim):
            if self.missing > 0:
                self.kept.append(first_of(batch, self.missing, self.dim))
                self.missing -= batch.shape[self.dim]
            yield batch

    def fill(self, images: Tensor | Iterable[Tensor]) -> None:
        """Read no more of `images` than is kept."""
        for _ in self.of(images):
            if self.missing <= 0:
                break

    def batch(self) -> Tensor | None:
        """What was kept, as one batch; None where there was nothing."""
        return torch.cat(self.kept, self.dim) if self.kept else None
