"""How signed input codes drive word lines: as reads of codes that are not negative, put together digitally.

A word line has a pulse or none, so codes `A = lo .. hi` with `lo < 0` need an encoding:

    phases   `sum A w = sum max(A, 0) w - sum max(-A, 0) w`: two reads, one after the other, on the same cells
    ternary  word lines at -V, 0 or +V: each digit of |A| with the sign of A, in one read
    twos     two's complement: `A mod 2^a`, whose highest digit counts negative
    offset   `A - lo`, and `lo sum w` is added digitally; around the image stand pixels of code `-lo`

With no ADC, or one that changes no read, all give the same sums. They differ in what the ADC sees: with an offset or in two's complement
small negative inputs drive most word lines, and the sums are large where the result is small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ENCODINGS = ("phases", "ternary", "twos", "offset")
OTHER_PHASE = 2**40  # added to the numbers of images in a read of its own, whose noise is another


@dataclass(frozen=True)
class Part:
    """One input of the arrays.

    Attributes: codes, uint8 `[N, H, W, in]`; factor, what their sums count; image_shift, what is added to the numbers of the images;
        repeats, its reads are among those of another part, and count again; pairs, every word line stands twice, for both signs.
    """

    codes: Tensor
    factor: int = 1
    image_shift: int = 0
    repeats: bool = False
    pairs: bool = False

    @property
    def pulses(self) -> Tensor:
        """Sizes of what is applied to each word line, uint8."""
        return self.codes.unflatten(3, (-1, 2)).amax(4) if self.pairs else self.codes


def parts(codes: Callable[..., Tensor], lo: int, encoding: str, padding: tuple[int, int, int, int], bits: int) -> list[Part]:
    """What the word lines see of an input.

    Args: codes, that gives its codes, or those of one sign (`InputQuantizer.codes`); lo, smallest code; padding, of the convolution
        (top, bottom, left, right), which an offset puts in itself; bits, of the code.
    """
    if lo == 0:
        return [Part(codes())]
    if encoding == "offset":
        return [Part(codes(lift=-lo, padding=padding))]
    if encoding == "twos":  # the highest digit, once too often and positive in the first part, is taken off twice
        top, signed = 2 ** (bits - 1), codes()
        whole = Part(torch.where(signed < 0, signed + 2 * top, signed).to(torch.uint8))
        return [whole, Part((signed < 0).to(torch.uint8) * top, -2, repeats=True)]
    positive, negative = codes(least=0), codes(sign=-1, least=0)
    if encoding == "ternary":  # a word line of +V beside one of -V; see `ConvertedLayer._with_signed_rows`
        return [Part(torch.stack([positive, negative], -1).flatten(3), pairs=True)]
    return [Part(positive), Part(negative, -1, OTHER_PHASE)]
