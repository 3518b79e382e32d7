"""The loop over work items that all large kernels share: each is compiled once, and called by its address. Threads take the next item when
they are done with one, so that a core which is slower, or has other work, holds up nobody.

Numba compiles a function with a `prange` four times over: the loop's body as a function of its own, that in two wrappers, and all of them
in the function. With the large kernels that is half of the time that a user waits for them. So the loop is one small function.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import _dispatcher, njit, prange, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from ....kernels.cache import SOURCES, compiled_once


class Kernel:
    """What is done with each work item of a layer.

    Args:
        work: `(arguments, item, sources=SOURCES)`, its first line `a, b, ... = loaded(arguments)`. What it closes over is part of its key
            in Numba's cache, so plain numbers only: a compiled function has a number of its own in each process.
        name: that of its files in the cache, where kernels of one function that close over other numbers need names of their own.
    """

    def __init__(self, work: Callable, name: str) -> None:
        work.__qualname__ = name
        self.compiled = njit(cache=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(work)
        self._address: dict[bytes, int] = {}

    def __call__(self, items: int, *arguments: np.ndarray | int | float | tuple) -> None:
        """Do the items 0 .. items - 1 with these arguments, on Numba's threads. Raises: MemoryError, of what their buffers need."""
        kind = _dispatcher.compute_fingerprint(arguments)  # what Numba tells types apart by, too, 50 times faster than `typeof`
        if kind not in self._address:
            self._address[kind] = self._compile(numba.typeof(arguments))
        # Asking for their number also starts the threads, which a `_start` from the disk relies on.
        if _start(self._address[kind], arguments, items, numba.get_num_threads()):
            raise MemoryError(f"the kernel {self.compiled.__name__} could not do its work: there is not enough memory for its buffers")

    def _compile(self, arguments):
        """The address of the machine code for arguments of these types."""
        signature = types.CPointer(arguments), types.intp, types.Omitted(SOURCES)
        with compiled_once(self.compiled):
            self.compiled.compile(signature)
        result = self.compiled.overloads[signature]
        return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


def bands_of(images: int, height: int) -> int:
    """Bands of output rows that each image is cut into, a work item each, where there are fewer images than threads can share."""
    return min(height, max(1, 8 * numba.get_num_threads() // max(images, 1)))


@intrinsic
def loaded(typing, arguments):
    """The tuple at the address `arguments`."""
    def generate(context, builder, signature, values):
        value = context.data_model_manager[arguments.dtype].load_from_data_pointer(builder, values[0])
        context.nrt.incref(builder, arguments.dtype, value)
        return value

    return arguments.dtype(arguments), generate


@intrinsic
def _address_of(typing, arguments):
    """Where a copy of a tuple lies on the stack of the function that asks, as long as that runs."""
    def generate(context, builder, signature, values):
        model = context.data_model_manager[arguments]
        place = alloca_once(builder, model.get_data_type())
        builder.store(model.as_data(builder, values[0]), place)
        return builder.ptrtoint(place, ir.IntType(64))

    return types.intp(arguments), generate


@intrinsic
def _call(typing, address, arguments, item):
    """Call the compiled work of a kernel. Returns: 1 where it raised something, which can only be for want of memory, else 0."""
    def generate(context, builder, signature, values):
        kinds = types.intp, types.intp
        function = builder.inttoptr(values[0], context.call_conv.get_function_type(types.none, kinds).as_pointer())
        status, _ = context.call_conv.call_function(builder, function, types.none, kinds, values[1:])
        return builder.zext(status.is_error, ir.IntType(64))

    return types.int64(types.intp, types.intp, types.intp), generate


@intrinsic
def _take(typing, counter):
    """The number at an address, which is one more for who asks next."""
    def generate(context, builder, signature, values):
        integer = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(values[0], integer.as_pointer()), integer(1), "monotonic")

    return types.int64(types.intp), generate


@njit(cache=True, parallel=True)
def _on_threads(address, arguments, items, threads, sources=SOURCES):
    """Each thread takes the next item when it is done with one: cores may be of different speed, or have other work to do."""
    counter, failed = np.zeros(1, np.int64), 0
    for _ in prange(threads):
        item = _take(counter.ctypes.data)
        while item < items:
            failed += _call(address, arguments, item)
            item = _take(counter.ctypes.data)
    return failed


@njit(cache=True)
def _start(address, arguments, items, threads, sources=SOURCES):
    """`_on_threads` from Python: how many items raised something. Args: address, of the compiled work; arguments, a tuple."""
    return _on_threads(address, _address_of(arguments), items, threads)
