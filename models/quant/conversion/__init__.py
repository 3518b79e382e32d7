"""Networks of any code on crossbars; the door is `convert`."""

from .convert import convert

__all__ = ["convert"]
