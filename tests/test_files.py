"""Files that are written whole or not at all."""

import os
import stat
import time

import pytest

from models.quant.storage.files import atomic_write


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    atomic_write(str(path), lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "[1] of *"])
def test_leftovers_of_killed_writers_are_removed_when_old(tmp_path, name):
    old, recent, others = (tmp_path / each for each in (f".{name}.abc.tmp", f".{name}.def.tmp", ".1 of other.abc.tmp"))
    for path in (old, recent, others):
        path.write_bytes(b"x")
    for path in (old, others):
        os.utime(path, (0, 0))
    atomic_write(tmp_path / name, lambda file: file.write(b"new"))
    assert not old.exists() and recent.exists()  # another process may be writing the recent one
    assert others.exists()


def test_a_writer_whose_clock_is_ahead_leaves_the_others_alone(tmp_path, monkeypatch):
    """By two hours: the files are stamped by the drive, which has one clock."""
    def second(file):
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 7200)
        atomic_write(tmp_path / "file", lambda file: file.write(b"second"))
        file.write(b"first")

    atomic_write(tmp_path / "file", second)
    assert (tmp_path / "file").read_bytes() == b"first"


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_rename_itself_is_on_the_disk(tmp_path, monkeypatch):
    """The content is flushed before the rename, the folder behind it."""
    done, fsync, rename = [], os.fsync, os.replace
    def noted(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert done == ["content", "rename", "folder"]
