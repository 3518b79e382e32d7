"""Whether a value that a file holds is of a kind: numbers, counts, texts, lists of them."""

import sys
from collections.abc import Callable
from typing import Any


def is_number(value: Any, low: float = 0, high: float = sys.float_info.max) -> bool:
    """Whether a value is a number of this span: NaN is none, and neither is what a float does not hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_percent(value: Any) -> bool:
    """Whether a value is a number from 0 to 100."""
    return is_number(value, high=100)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 up."""
    return is_number(value) and isinstance(value, int)


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_dict(value: Any) -> bool:
    """Whether a value is a dict."""
    return isinstance(value, dict)


def several(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """Whether a value is a list of what fits, of any length or this one."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value)) and length in (None, len(value))
