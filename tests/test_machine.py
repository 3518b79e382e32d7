"""What the memory of the machine is told to do."""

import mmap

import pytest

from experiment.program import machine


@pytest.mark.parametrize("found, trimmed", [([2, 2], 0), ([3, 1.5], 1), ([3, 1.5, 2.5, 3.5, 1.25, 2.25], 2)])
def test_memory_is_given_back_where_it_has_doubled(monkeypatch, found, trimmed):
    """found, in units of LITTLE: before each time, and after those that give some back."""
    calls, left = [], [number * machine.LITTLE for number in found]
    monkeypatch.setattr(machine, "_needed", machine.LITTLE)
    monkeypatch.setattr(machine, "_memory", lambda: left.pop(0))
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: type("C", (), {"malloc_trim": calls.append})())
    while left:
        machine.give_back_memory()
    assert calls == [0] * trimmed


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(machine, "_memory", None)
    machine.give_back_memory()


@pytest.mark.skipif(machine.platform.libc_ver()[0] != "glibc", reason="no glibc here")
def test_memory_of_this_process():
    """So much more as is written to. It is mapped anew, as an array may lie in memory that was freed before."""
    before = machine._memory()
    with mmap.mmap(-1, 2**26) as written:
        written.write(bytes(2**26))
        assert 2**25 < machine._memory() - before < 2**28
