"""Errors in one line, consoles that go away or lack letters, the log file, stopping; what is known of the machine."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiment.program import cli, distributed, machine
from experiment.program.cli import UserError
from models import quant

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": ""}  # a console as users have it
IMPORTS = "import sys; sys.modules.update(numba=sys, torch=sys); from experiment.program import cli"  # without what takes seconds


def program(body, environment=(), **options):
    """A process that runs `body`, the body of a main(), by run_main."""
    lines = [IMPORTS, "def main():", *("    " + line for line in body.splitlines()), "cli.run_main(main)"]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env=ENVIRONMENT | dict(environment),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# -- errors


@pytest.mark.parametrize("error, code, text", [
    (UserError("no such\n network"), 2, "error: no such network\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
    (OSError(errno.ENOSPC, "No space left on device", "some/file"), 2, "error: the disk is full: cannot write some/file\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full\n"),
    (UserError(), 2, "error: UserError\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_errors_are_one_line_and_an_exit_code(error, code, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        cli.run_main(main)
    assert raised.value.code == code and capsys.readouterr() == ("", text)


def test_the_exit_code_is_that_of_main():
    with pytest.raises(SystemExit) as raised:
        cli.run_main(lambda: 7)
    assert raised.value.code == 7


def test_a_mistake_in_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda: 1 // 0)
    with pytest.raises(UnicodeEncodeError):
        cli.run_main(lambda: "\xfc".encode("ascii"))


def test_names_that_a_library_cannot_pass_on_are_one_line(capsys):
    """TensorBoard encodes them as UTF-8."""
    with pytest.raises(SystemExit) as raised:
        cli.run_main(lambda: "save/\udcc3\udcbc".encode())
    assert raised.value.code == 2 and capsys.readouterr().err == (
        "error: the name of a file has letters that the locale lacks; set PYTHONUTF8=1\n")


@pytest.mark.parametrize("code, says", [
    (None, "take it: pip install gone"),
    ("import missing_part", "gone is installed, but cannot be imported (ModuleNotFoundError: No module named 'missing_part'): install it"),
    ("raise OSError('libx.so: no\\nsuch file')", "gone is installed, but cannot be imported (OSError: libx.so: no such file): install it")])
def test_packages_that_are_not_whole_are_one_line(tmp_path, monkeypatch, code, says):
    monkeypatch.syspath_prepend(tmp_path)
    if code:
        Path(tmp_path, "gone.py").write_text(code)
    with pytest.raises(UserError) as error:
        cli.needed("gone", "take it: pip install gone")
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/file/folder: Not a directory"):
        cli.check_writable(tmp_path / "file" / "folder")
    cli.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


# -- console


LOGGED = """
log = cli.get_logger("run.log")
for i in range(3):
    log.info(f"line {i}")
    sys.stdin.readline()
    print(i, file=sys.stderr)
print("end")
return 5
"""


@pytest.mark.parametrize("gone", [{"stdout"}, {"stderr"}, {"stdout", "stderr"}])
def test_a_console_that_is_closed_ends_nothing(gone, tmp_path):
    """`eval.py | head -1`, `2>&1 | head -1`: the log goes on, the exit code is as it would have been, and nothing is said."""
    process = program(LOGGED.replace("run.log", str(tmp_path / "run.log")), stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"line 0\n"
    for name in gone:
        getattr(process, name).close()
    process.stdin.write(b"go\n" * 3)
    process.stdin.close()
    out = b"" if "stdout" in gone else process.stdout.read()
    err = b"" if "stderr" in gone else process.stderr.read()
    assert process.wait(60) == 5
    assert (out, err) == (b"" if "stdout" in gone else b"line 1\nline 2\nend\n", b"" if "stderr" in gone else b"0\n1\n2\n")
    assert [line.split("  ")[1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["line 0", "line 1", "line 2"]
    for stream in (process.stdout, process.stderr):
        stream.close()


def test_a_terminal_that_is_closed_ends_nothing():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        stream = cli._lasting(terminal)
        os.close(ours)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(theirs, b"x")
        print("text", file=stream, flush=True)


def test_a_terminal_shows_every_line_at_once():
    ours, theirs = pty.openpty()
    with open(theirs, "w", buffering=1, encoding="latin-1") as terminal:
        stream = cli._lasting(terminal)
        assert (stream.line_buffering, stream.encoding, stream.isatty()) == (True, "latin-1", True)
    os.close(ours)


def test_what_was_printed_before_stays_before():
    code = f"{IMPORTS}; print('first'); cli.run_main(lambda: print('second'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("first\nsecond\n", "", 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_come_at_once_on_any_console(unbuffered):
    code = (f"import os; {IMPORTS}; "
            "cli.run_main(lambda: [(print(line, file=sys.stderr), os.write(2, b'second\\n')) for line in ['first']] and 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
                          capture_output=True, text=True)
    assert done.stderr.split() == ["first", "second"]


def test_a_full_disk_is_no_closed_console():
    """What was printed is missed by somebody."""
    process = program('print("result")\nreturn 0')
    assert process.communicate(timeout=60) == (b"result\n", b"") and process.returncode == 0
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", f"{IMPORTS}; cli.run_main(lambda: print('result'))"],
                                 cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE)
    assert (process.returncode, process.stderr) == (2, b"error: the disk is full\n")


def test_help_into_a_closed_console_is_no_error():
    process = program("sys.stdin.readline()\nprint('help ' * 10_000)\nsys.exit(0)", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    process.stderr.close()


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_letters_that_the_console_lacks(environment, tmp_path):
    """The console shows their code, the log file the letters. Bytes of a file's name that are no text are no error either."""
    body = f"log = cli.get_logger({str(tmp_path / 'run.log')!r})\nlog.info(chr(0xfc) + ' caf' + chr(0xe9) + chr(0xdcff))"
    process = program(body, {"PYTHONUTF8": "0"} | environment)
    assert process.communicate(timeout=60) == (b"\\xfc caf\\xe9\\udcff\n", b"") and process.returncode == 0
    assert (tmp_path / "run.log").read_text(encoding="utf-8").endswith("  ü café\\udcff\n")


def test_streams_come_back(capfd):
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        cli.run_main(lambda: print("text"))
    assert (sys.stdout, sys.stderr) == before and capfd.readouterr().out == "text\n"


def test_the_log_file_is_appended_to_and_has_the_time(tmp_path, capsys, caplog):
    for text in ("first", "second"):
        cli.get_logger(tmp_path / "run.log").info(text)
    assert capsys.readouterr() == ("first\nsecond\n", "")  # each once: the handlers of the first call are gone
    assert caplog.records == []  # those of other programs do not hear of it
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[4::3][:2] + line[19:] for line in lines] == ["--  first", "--  second"]
    with pytest.raises(UserError, match=f"cannot write the log file {tmp_path}: Is a directory"):
        cli.get_logger(tmp_path)


# -- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_check_and_a_second_ctrl_c_does_not(number):
    before = signal.getsignal(number)
    with distributed.StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(distributed.Stopped):
            stop.check()
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)  # a launcher and a batch system may both send one
    assert signal.getsignal(number) is before
    distributed.StopRequest().check()  # every request has a signal of its own


# -- the machine


def test_machine_info_is_plain_values():
    facts = machine.machine_info()
    assert json.loads(json.dumps(facts)) == facts and facts["torch"] == torch.__version__ and type(facts["torch"]) is str
    assert facts["torchrram"] == quant.__version__
    assert facts["threads"] == torch.get_num_threads() and facts["cpu"] and machine._version("no-such-package") is None


def test_bf16_is_the_default_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert machine.has_fast_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not machine.has_fast_bf16(torch.device("cpu"))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device() == machine.pick_device(0) == torch.device("cpu")
    with pytest.raises(UserError, match="finds no CUDA GPU"):
        machine.pick_device(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.pick_device() == machine.pick_device(1) == torch.device("cuda")
    with pytest.raises(UserError, match="--ngpu 2: give 0 for the CPU, or 1, a GPU for each process"):
        machine.pick_device(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for asked in (None, 2):
        with pytest.raises(UserError, match="--ngpu 2: PyTorch finds 1 CUDA GPU here"):
            machine.pick_device(asked)


def test_random_numbers_go_on_where_they_were():
    state = machine.rng_state()
    expected = torch.rand(5)
    machine.set_rng_state(state)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("count, restored", [(1, False), (2, True)])
def test_random_numbers_of_gpus_are_restored_where_there_are_as_many(count, restored, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", calls.append)
    machine.set_rng_state({"cpu": torch.get_rng_state(), "cuda": ["first", "second"]})
    assert calls == ([["first", "second"]] if restored else [])
