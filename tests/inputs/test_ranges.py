"""`ranges.py`: what numbers may be, for the configuration and every command, and how failures of others are told."""

import errno
import math
from dataclasses import dataclass, fields
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from rcgrpo import RCGRPOConfig
from rcgrpo.cli import app, data, data_tux, diagnose, edit, evaluate, explain, plan, rewards, train
from rcgrpo.inputs.ranges import LONGEST, RANGES, Range, check_ranges, lacking, naming, one_line

SETTINGS = (
    RCGRPOConfig,
    train.ScriptArguments,
    evaluate.EvaluateArguments,
    diagnose.DiagnoseArguments,
    edit.EditArguments,
    explain.ExplainArguments,
    app.AppArguments,
    data.InspectArguments,
    data.MaskArguments,
    data_tux.BuildTuxArguments,
    plan.PlanArguments,
    rewards.ServeArguments,
)


def numbers(cls):
    """The fields that are a number, or a number or None."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        if {hint, *get_args(hint)} & {int, float} and get_origin(hint) is not list:
            yield field


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_number_has_a_range_that_holds_its_default(cls):
    assert [field.name for field in numbers(cls) if field.name not in RANGES] == []
    assert [
        field.name for field in numbers(cls) if field.default is not None and field.default not in RANGES[field.name]
    ] == []


def test_every_range_belongs_to_a_number():
    assert {field.name for cls in SETTINGS for field in numbers(cls)} == set(RANGES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1], None, 1 + 0j, -2, -(10**400)])
def test_no_range_holds_what_is_no_finite_number_or_lies_far_below_0(value):
    assert [name for name, allowed in RANGES.items() if value in allowed] == []


@pytest.mark.parametrize(
    ("given", "inside", "outside", "text"),
    [
        (Range(1, whole=True), [1, 7, np.int64(3), 10**30], [0, 1.0, 1.5, np.float32(2)], "at least 1"),
        (Range(0), [0, 0.5, np.float32(3), 1e300], [-1e-9], "0 or more"),
        (Range(0, above=True), [1e-300, 2], [0, -0.0], "a number above 0"),
        (Range(0, 1), [0, 1, 0.5], [1.0001, -0.1], "a number in [0, 1]"),
        (Range(0, 1, below=True), [0, 0.999], [1], "a number in [0, 1)"),
        (Range(0, 65535, whole=True), [0, 65535], [65536, -1], "0 to 65535"),
        (Range(0, above=True, whole_above=1), [0.5, 1, 2.0, 30], [2.5, 0], "a number above 0"),
        (Range(1, whole=True, also=(-1,), text="some"), [-1, 1], [0, -2], "some"),
        (Range(), [-1e9, 0], [], "a finite number"),
    ],
)
def test_ranges_and_how_they_are_told(given, inside, outside, text):
    assert [value for value in inside if value not in given] == []
    assert [value for value in outside if value in given] == []
    assert str(given) == text


@dataclass
class Settings:
    num_samples: int | None = None
    seed: int = 0
    guidance_scale: float = 3.5
    note: str = "any"


def test_the_first_wrong_number_is_named():
    check_ranges(Settings())
    check_ranges(Settings(num_samples=3, seed=2**32 - 1, guidance_scale=0))
    for given, said in (
        ({"num_samples": 0}, "--num_samples: got 0, expected at least 1, or none"),
        ({"num_samples": "3"}, "--num_samples: got '3', expected a whole number, at least 1, or none"),
        ({"seed": None}, "--seed: got None, expected a whole number, 0 to 4294967295"),
        ({"seed": 1.5}, "--seed: got 1.5, expected a whole number, 0 to 4294967295"),
        ({"guidance_scale": math.nan}, "--guidance_scale: got nan, expected 0 or more"),
    ):
        with pytest.raises(LookupError) as refused:
            check_ranges(Settings(**given), "--", LookupError)
        assert str(refused.value) == said


def test_what_there_is_too_little_of():
    assert lacking(MemoryError()) == lacking(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "memory"
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert lacking(refused.value) == "memory"
    with pytest.raises(ValueError) as huge:
        np.zeros(2**60)
    assert lacking(huge.value) == "memory"
    assert lacking(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "GPU memory"
    assert lacking(OSError(errno.ENOSPC, "No space left on device")) == lacking(OSError(errno.EDQUOT, "x")) == "disk"
    assert lacking(RuntimeError("I/O error: No space left on device (os error 28)")) == "disk"
    assert lacking(OSError(errno.ENOENT, "No such file")) is None and lacking(ValueError("memory")) is None


def test_what_a_library_says_is_told_of_a_field_in_one_line():
    with (
        pytest.raises(ValueError, match=r"^model: got 'x', expected a model \(KeyError: 'part'\)$") as refused,
        naming("model", "x", "a model"),
    ):
        raise KeyError("part")
    assert isinstance(refused.value.__cause__, KeyError)
    with pytest.raises(MemoryError), naming("model", "x", "a model"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), naming("model", "x", "a model"):
        raise KeyboardInterrupt
    assert one_line(ValueError("a\n  b\n\nc")) == "a b c" and one_line(KeyError()) == "KeyError"
    long = one_line(ValueError("start " + "x" * 20_000 + " end"))
    assert len(long) < LONGEST + 10 and long.startswith("start") and long.endswith("end")
