"""Networks of any code on crossbars; the door is `convert`."""

from .convert import convert
from .training import Training, recalibrate, recalibrate_every, train_through

__all__ = ["Training", "convert", "recalibrate", "recalibrate_every", "train_through"]
