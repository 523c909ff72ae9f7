"""`cli/failing.py`: whatever is raised ends in one line and an exit code, and what was not foreseen keeps its trace."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcgrpo import cli
from rcgrpo.cli import main
from rcgrpo.cli.parsing import UsageError
from rcgrpo.inputs.ranges import naming


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.delenv("RCGRPO_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def end(monkeypatch, raising):
    """What `rcgrpo edit` exits with when its work calls this."""
    monkeypatch.setattr("rcgrpo.cli.edit.run", lambda arguments: raising())
    with pytest.raises(SystemExit) as stop:
        main(["edit"])
    return stop.value.code


def thrower(error):
    def throw():
        raise error

    return throw


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            MemoryError("Unable to allocate 298. GiB"),
            r"memory: got too little \(MemoryError: Unable.*298. GiB\), .*lower",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "GPU memory: got too little .*--train_micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "disk: got too little .*x.png.*--output_dir"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk: got too little .*free some"),
    ],
)
def test_too_little_of_something(monkeypatch, error, said, tmp_path):
    assert re.fullmatch(f"rcgrpo edit: {said}.*", end(monkeypatch, thrower(error)))
    assert not list(tmp_path.glob("*.trace"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("a\nb\n" + "c" * 9000), "RuntimeError: a b c+ [.]{3} c+"),
        (ImportError("No module named 'y'"), "ImportError: No module named 'y'; install what is missing"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "PermissionError: /x: Permission denied"),
        (AssertionError(), "AssertionError: AssertionError"),
        (TypeError("'NoneType' object is not subscriptable"), "TypeError: 'NoneType' object is not subscriptable"),
    ],
)
def test_what_was_not_foreseen_keeps_its_trace_in_a_file(monkeypatch, error, said, tmp_path):
    line = end(monkeypatch, thrower(error))
    found = re.fullmatch(rf"rcgrpo edit: {said} \(if it is no mistake of yours, report it with its trace, (.*)\)", line)
    assert found is not None, line
    trace = Path(found[1]).read_text()
    assert Path(found[1]).parent == tmp_path and "Traceback" in trace and "in throw" in trace


def test_a_full_disk_does_not_hide_what_happened(monkeypatch):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *a, **b: thrower(OSError(errno.ENOSPC, "full"))())
    assert end(monkeypatch, thrower(KeyError("x"))).startswith("rcgrpo edit: KeyError: 'x' (RCGRPO_TRACEBACK=1 shows")


def test_what_the_library_refuses_is_told_as_it_is(monkeypatch, tmp_path):
    from rcgrpo.rewards import resolve_rewards

    line = end(monkeypatch, lambda: resolve_rewards([]))
    assert line == "rcgrpo edit: reward_funcs: got an empty list, expected at least one reward"

    def open_it():
        with naming("model", "x", "a model"):
            raise KeyError("part")

    line = end(monkeypatch, open_it)
    assert line == (
        "rcgrpo edit: model: got 'x', expected a model (KeyError: 'part') (RCGRPO_TRACEBACK=1 shows where this comes "
        "from)"
    )
    assert not list(tmp_path.glob("*.trace"))


def test_ctrl_c_and_exits_of_the_work_itself(monkeypatch, capsys):
    assert end(monkeypatch, thrower(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "rcgrpo edit: stopped by Ctrl-C\n"
    assert end(monkeypatch, thrower(SystemExit(143))) == 143  # a run that has saved by itself


@pytest.mark.parametrize("error", [KeyError("x"), UsageError("x"), KeyboardInterrupt()])
def test_with_the_variable_exceptions_pass(monkeypatch, error):
    monkeypatch.setenv("RCGRPO_TRACEBACK", "1")
    monkeypatch.setattr("rcgrpo.cli.edit.run", lambda arguments: thrower(error)())
    with pytest.raises(type(error)):
        main(["edit"])


def test_a_reader_that_goes_away_is_no_error():
    code = "from rcgrpo.cli import main; main(['rewards'])"
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ran.returncode == 141 and ran.stderr == ""


def test_every_command_has_its_help():
    assert cli.COMMANDS.keys() == {name for name in cli.COMMANDS if f"  {name} " in cli.USAGE}
