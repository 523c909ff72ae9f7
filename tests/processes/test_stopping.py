"""`stopping.py`, in processes of its own that import nothing else: what a signal does and how they end."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

import rcgrpo.processes.stopping
from rcgrpo.processes.stopping import Interrupted, Stopped, stopped

HEAD = f"""
import importlib.util, os, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("stopping", {rcgrpo.processes.stopping.__file__!r})
s = importlib.util.module_from_spec(spec)
spec.loader.exec_module(s)
s.SAME_SECONDS = 0.0
"""


def run(body):
    """The exit status, the output and the errors, and how long it took."""
    began = time.monotonic()
    script = HEAD + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.split(), done.stderr, time.monotonic() - began


def test_a_signals_exception():
    assert stopped(signal.SIGTERM).code == 143 and str(stopped(signal.SIGTERM)) == "SIGTERM"
    assert not isinstance(stopped(signal.SIGTERM), KeyboardInterrupt)
    assert isinstance(stopped(signal.SIGINT), Interrupted | Stopped) and isinstance(stopped(2), KeyboardInterrupt)
    assert stopped(signal.SIGINT).code == 130


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_the_first_waits_and_the_second_ends_what_may_end(name, status):
    code, out, errors, _ = run(f"""
        with s.StopSignals() as signals:
            with s.interruptible():
                signal.raise_signal(signal.{name})
                print("first", signals.number, signals.overdue)
            signal.raise_signal(signal.{name})
            print("second", signals.overdue)
            with s.interruptible():
                print("never")
    """)
    assert (code, errors) == (status, "")
    assert out == ["first", str(status - 128), "False", "second", "True"]


def test_in_time_a_wait_ends_and_a_pool_that_hangs_is_left():
    code, out, errors, seconds = run("""
        from concurrent.futures import ThreadPoolExecutor
        s.GRACE_SECONDS, s.EXIT_SECONDS = 0.2, 0.2
        with s.StopSignals() as signals:
            try:
                with s.interruptible():
                    future = ThreadPoolExecutor(1).submit(time.sleep, 50)
                    os.kill(os.getpid(), signal.SIGTERM)
                    future.result()
            except s.Stopped as error:
                signals.reacted()
                print("out")
                s.leave_in_time(error.code)
                raise
    """)
    assert (code, out, errors) == (143, ["out"], "") and seconds < 30


def test_a_main_thread_that_hangs_is_left_behind():
    code, out, errors, seconds = run("""
        s.GRACE_SECONDS = s.HANG_SECONDS = 0.2
        with s.StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                time.sleep(50)  # where nothing may end it
            finally:
                print("never")
    """)
    assert (code, out) == (143, []) and seconds < 30
    assert "SIGTERM: the update hangs; left without a new checkpoint" in errors


def test_who_saves_is_given_time_and_handlers_come_back():
    code, out, errors, _ = run("""
        s.GRACE_SECONDS = s.HANG_SECONDS = 0.1
        with s.StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            signals.reacted()
            time.sleep(0.5)
            signal.raise_signal(signal.SIGTERM)
            with s.interruptible():
                print("saved")
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, s.StopSignals.active)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with s.StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            print(signals.number)
    """)
    assert (code, out, errors) == (0, ["saved", "True", "None", "0"], "")
