"""Rows of the embedded data at 32 x 32 pixels."""

import pytest

from rcgrpo import compbench_mini


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def held_out():
    return compbench_mini("test", 3, 32)
