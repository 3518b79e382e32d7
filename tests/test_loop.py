"""engines/cpu/vectors/loop.py: kernels that one loop calls by their address."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numba
import numpy as np
import pytest
import torch

from models.quant.engines.cpu.vectors import loop
from models.quant.kernels import simd
from models.quant.kernels.cache import SOURCES, compiled_once
from models.quant.engines.cpu.groups.grouped_kernel import Ranges
from models.quant.engines.cpu.vectors.loop import Kernel, _take, loaded

ROOT = Path(__file__).resolve().parent.parent


def of_ranges(arguments, item, sources=SOURCES):
    ranges, factor, wide, out = loaded(arguments)
    out[item] = ranges.minus_low[item] * factor + ranges.factor if wide else -1


def with_buffers(arguments, item, sources=SOURCES):
    out, size = loaded(arguments)
    buffer = np.empty(size if item == 2 else 1, np.uint8)
    buffer[0] = item
    out[item] = buffer[0]


def waits(arguments, item, sources=SOURCES):
    """The first item waits until all others are done, which add one to `done` each, as its own asking does."""
    done, items, out = loaded(arguments)
    if item:
        _take(done.ctypes.data)
        return
    for asked in range(500_000_000):  # some seconds
        if _take(done.ctypes.data) - asked == items - 1:
            out[0] = 1
            return


def test_arguments_arrive_whatever_their_types():
    """Named tuples of the package only: the disk keeps the types of all kernels' arguments in one list, which any process reads."""
    kernel = Kernel(of_ranges, "of_ranges")
    for a in (np.arange(5), np.arange(5.0), np.arange(10)[::2]):
        for factor, wide in ((3, True), (np.float32(0.5), True), (3, False)):
            out = np.zeros(5)
            kernel(len(out), Ranges(a, 0, 7), factor, wide, out)
            np.testing.assert_array_equal(out, a * factor + 7 if wide else np.full(5, -1.0))
    out = np.zeros(5)
    kernel(0, Ranges(np.arange(5), 0, 7), 3, True, out)
    assert not out.any()


def test_want_of_memory_is_said():
    kernel, out = Kernel(with_buffers, "with_buffers"), np.zeros(5)
    kernel(5, out, 100)
    np.testing.assert_array_equal(out, np.arange(5))
    with pytest.raises(MemoryError, match="^the kernel with_buffers could not do its work"):
        kernel(5, out, 2**60)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread does all items")
def test_a_thread_that_is_held_up_leaves_the_items_to_the_others():
    before, out = numba.get_num_threads(), np.zeros(1)
    numba.set_num_threads(2)
    try:
        Kernel(waits, "waits")(64, np.zeros(1, np.int64), 64, out)
    finally:
        numba.set_num_threads(before)
    assert out[0] == 1


def test_kernels_of_the_disk_run_in_a_new_process(tmp_path):
    """Whose threads nothing else has started: the loop comes from the disk, and then what starts it too. The processes are forked once
    all is imported that takes each of them seconds."""
    (tmp_path / "program.py").write_text(f"""\
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from models.quant.engines.cpu.vectors.loop import SOURCES, Kernel, loaded

def work(arguments, item, sources=SOURCES):
    a, out = loaded(arguments)
    out[item] = a[item]

for kinds in sys.argv[1:]:
    if os.fork():
        print(os.wait()[1], flush=True)
        continue
    for kind in kinds.split():
        out = np.zeros(4)
        Kernel(work, "work")(4, np.arange(4).astype(kind), out)
        print(out.sum())
    break
""")
    done = subprocess.run([sys.executable, "program.py", "i8", "f4", "f4 i8"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")})
    assert done.stdout.split() == ["6.0", "0", "6.0", "0", "6.0", "6.0", "0"], (done.stdout, done.stderr)


def stand_in(folder):
    """What `compiled_once` asks of a function."""
    return SimpleNamespace(__qualname__="function", stats=SimpleNamespace(cache_path=str(folder)))


def test_who_wants_what_another_compiles_waits_for_it(tmp_path):
    order, inside = [], threading.Event()

    def other():
        inside.wait()
        with compiled_once(stand_in(tmp_path)):
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with compiled_once(stand_in(tmp_path)):
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_a_kernel_is_compiled_in_one_process_at_a_time():
    kernel = Kernel(of_ranges, "locked_ranges")
    with patch.object(loop, "compiled_once", wraps=compiled_once) as locked:
        kernel(0, Ranges(np.arange(5), 0, 7), 3, True, np.zeros(5))
        kernel(0, Ranges(np.arange(5), 0, 7), 3, True, np.zeros(5))
    locked.assert_called_once_with(kernel.compiled)
    assert Path(kernel.compiled.stats.cache_path, "locked_ranges.lock").exists()


def test_who_hangs_and_a_folder_that_is_gone_hold_up_nobody(tmp_path):
    began = time.monotonic()
    with compiled_once(stand_in(tmp_path)), compiled_once(stand_in(tmp_path), patience=0.1), compiled_once(stand_in(tmp_path / "absent")):
        assert time.monotonic() - began < 60  # and not the 120 s that it has where nothing else is said


def test_threads_within_threads_have_no_threads():
    """Numba's start asks OpenMP for them; PyTorch's attention then takes 60 times as long."""
    omppool = pytest.importorskip("numba.np.ufunc.omppool")
    simd.set_threads()
    for user in (omppool, torch._C):
        levels = getattr(ctypes.CDLL(user.__file__), "omp_get_max_active_levels", None)
        assert levels is None or levels() == 1
