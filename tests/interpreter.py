"""The Triton engine for tests: without a GPU in Triton's interpreter.

The interpreter is chosen when a kernel is defined, so `load` imports the engine with TRITON_INTERPRET set. It is set again only
within `running`: to all other tests the engine has no GPU.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import models.quant.engines as engines

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@contextlib.contextmanager
def chosen():
    """Within the block kernels are defined for the interpreter, where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield patch


def load():
    """The Triton engine."""
    with chosen():
        return engines.load("triton")


def fused(x, y, z):
    """`x y + z` of float32 numbers, rounded once. Float64 holds the product, and not all sums: where something is left over, the last
    bit is made odd, on the side where the sum lies, so that float32 sees that it lies between."""
    product = x.astype(np.float64) * y
    total = product + z
    added = total - product
    left = (product - (total - added)) + (z - added)
    even = (left != 0) & (total.view(np.int64) % 2 == 0)
    return np.where(even, np.nextafter(total, np.copysign(np.inf, left)), total).astype(np.float32)


def once(init, key):
    """An `__init__` that runs once for each key of its arguments: other objects get the attributes of the first."""
    known = {}

    def init_once(self, *args):
        of = key(*args)
        if of not in known:
            init(self, *args)
            known[of] = dict(vars(self))
        vars(self).update(known[of])

    return init_once


@contextlib.contextmanager
def running():
    """Triton's interpreter without what makes it slow: device functions that patch the language at each call, checks for integers
    that wrap, and types and shapes that are made anew for each result. Older ones, the last for Python 3.10 among them, round fused
    products twice: these are made here."""
    with chosen() as patch:
        if not GPU:
            import triton
            from triton.language import core
            from triton.runtime import interpreter
            assert not isinstance(load().triton_kernel.kernel, triton.JITFunction), "triton was imported before the tests that need it"
            patched, patch_language, execute = set(), interpreter._patch_lang, interpreter.GridExecutor.__call__
            of_type = once(core.tensor.__init__, lambda handle, kind: kind.name)
            dtype_of, dtypes = interpreter._get_np_dtype, {}

            def patch_once(function):
                if id(function.__globals__) in patched:
                    return None
                patched.add(id(function.__globals__))
                return patch_language(function)

            def execute_patched(*args, **kwargs):
                patched.clear()
                return execute(*args, **kwargs)

            def tensor(self, handle, kind):
                of_type(self, None, kind)
                self.handle, self.type = handle, kind

            def dtype_once(kind):
                if kind.name not in dtypes:
                    dtypes[kind.name] = dtype_of(kind)
                return dtypes[kind.name]

            patch.setattr(core.tensor, "__init__", tensor)
            patch.setattr(core.block_type, "__init__", once(core.block_type.__init__, lambda element, shape: (
                element.name, *map(core._unwrap_if_constexpr, shape))))
            patch.setattr(interpreter, "_get_np_dtype", dtype_once)
            patch.setattr(interpreter, "_patch_lang", patch_once)
            patch.setattr(interpreter.GridExecutor, "__call__", execute_patched)
            patch.setattr(interpreter.interpreter_builder, "options",
                          replace(interpreter.interpreter_builder.options, sanitize_overflow=False))
            if not hasattr(interpreter._interpreter, "fma_fp32"):
                patch.setattr(interpreter.InterpreterBuilder, "create_fma", lambda builder, x, y, z: interpreter.TensorHandle(
                    fused(x.data, y.data, z.data), z.dtype.scalar))
        yield
