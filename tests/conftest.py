"""For all rooms: Ctrl-C as a terminal has it, and rows of the embedded data at 32 x 32 pixels."""

import signal

import pytest

from rcgrpo import compbench_mini

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a shell started this in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def held_out():
    return compbench_mini("test", 3, 32)
