"""The examples of a `Task`, which a function in a file brings with its network, as an evaluation looks at them (`Examples`)."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from typing import Any

from models.quant.layers.batches import Batch, First, length
from models.quant.layers.loaders import apart
from models.quant.measuring.images import Inputs
from models.quant.measuring.task import Task

from ..program.cli import UserError, one_line, user_error


class Examples:
    """Batches that a task gives, any number of times over.

    Args: batches, see `Task.data`; task, whose they are; name, what messages call them; digest, of plain values and tensors; limit, of the
        examples, in whole batches: those of the first ones that are needed for so many.
    Attributes: count, of the examples; of_all, how many there are without the limit; content, what tells them from others. `len()` is the
        number of batches.
    Raises: UserError for what is none, has no examples, or comes in another order each time.
    """

    def __init__(self, batches: Iterable[Any], task: Task, name: str, digest: Callable[[Any], str], limit: int | None = None) -> None:
        self.batches, self.network, self.take = batches, task.network, task.take
        if not hasattr(batches, "__iter__") or iter(batches) is batches:
            raise UserError(f"the {name} of the task is a {type(batches).__name__}; batches that can be gone through again are expected, "
                            "such as a list or a DataLoader")
        with user_error(lambda error: f"the {name} of the task: {one_line(error)}", Exception):  # code of others raises nearly anything
            parts = [(length(inputs), digest([inputs, target])) for inputs, target in map(self._apart, batches)]
            again = [digest([*self._apart(batch)]) for batch in islice(batches, 1)]
        if not parts or not all(size for size, _ in parts):
            raise UserError(f"the {name} of the task {'has no batches' if not parts else 'has a batch of no examples; leave it out'}")
        if again[0] != parts[0][1]:
            raise UserError(f"the {name} of the task comes in another order each time; let the DataLoader not shuffle")
        ends = [*accumulate(size for size, _ in parts)]
        self.shown = next((i for i, end in enumerate(ends, 1) if end >= (limit or ends[-1])), len(ends))
        self.count, self.of_all = ends[self.shown - 1], ends[-1]
        self.content = [each for _, each in parts[:self.shown]]

    def _apart(self, batch: Any) -> tuple[Batch, Any]:
        return apart(batch, self.network, self.take)

    def __len__(self) -> int:
        return self.shown

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, self.shown)

    def inputs(self) -> Inputs:
        """What the network is called with, on its device."""
        return Inputs(self, self.network, self.take)

    def cut(self, batch_size: int) -> "Examples":
        """Themselves: their batches are those of the task."""
        return self

    def first(self, count: int) -> Batch:
        """The inputs of the first examples, as one batch."""
        kept = First(count, 0)
        kept.fill(self.inputs())
        return kept.batch()
