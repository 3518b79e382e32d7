"""The version, in one place: of the installed package, of kernels that are kept, and of whatever is written into results.

The package has two names: `torchrram` where it is installed, `models.quant` in a checkout. In one process they would be two packages, of
which neither knows the layers of the other: a network of one would pass the other as if it had no crossbars, without a word. So the second
one is refused.
"""

import sys

__version__ = "0.4.0"

_own = __name__.rpartition(".")[0]
for _other in {"models.quant", "torchrram"} - {_own}:
    if hasattr(sys.modules.get(_other), "CrossbarSpec"):
        raise ImportError(f"this package is imported already as {_other}, which would not know the layers of {_own}; use one of the two "
                          "names in a process")
