"""`turns.py`: the next instruction on what the turn before gave."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.turns import best_candidate, next_edit

HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def edit_of(*turns, **columns):
    columns = {"turns": list(turns), "caption": "first", "task": "add", **columns}
    return Edit(7, "train row 7", Image.new("RGB", (8, 8)), "one", torch.ones(8, 8), columns)


def turn_of(prompt="two", mask=HALF, **columns):
    return {"instruction": prompt, "mask": mask, **columns}


@pytest.mark.parametrize("mask", [HALF, Image.fromarray(HALF), torch.from_numpy(HALF), encoded(HALF)])
def test_the_next_turn_edits_the_result_at_its_size(mask):
    result = Image.new("RGB", (16, 16), "red")
    edit = next_edit(edit_of(turn_of(mask=mask, caption="second")), result, "turns", 2)
    assert (edit.row, edit.label, edit.prompt) == (7, "train row 7, turn 2", "two")
    assert edit.source.size == (16, 16) and edit.source.getpixel((0, 0)) == (255, 0, 0)
    expected = torch.zeros(16, 16)
    expected[:, :8] = 1
    assert torch.equal(edit.mask, expected)
    assert (edit.columns["caption"], edit.columns["task"], edit.columns["turn"]) == ("second", "add", 2)


def test_turns_end():
    result = Image.new("RGB", (8, 8))
    edit = edit_of(turn_of("two"), turn_of("three"))
    second = next_edit(edit, result, "turns", 2)
    third = next_edit(second, result, "turns", 3)
    assert (third.prompt, third.label) == ("three", "train row 7, turn 3")
    assert next_edit(third, result, "turns", 4) is None
    assert next_edit(edit_of(turns=None), result, "turns", 2) is None


def test_the_best_candidate_goes_on():
    images = ["a", "b", "c"]
    for scores, expected in [([0.1, 0.3, 0.2], "b"), ([float("nan"), -5.0, -9.0], "b"), ([float("nan")] * 3, "a")]:
        assert best_candidate(SimpleNamespace(images=images, scores=torch.tensor(scores))) == expected
    assert best_candidate(SimpleNamespace(images=images, scores=None)) == "a"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"instruction": "two"}, r"got \['instruction'\], expected a mapping with 'instruction' and 'mask'"),
        ("two", "got str, expected a mapping"),
        (turn_of(" "), "got ' ', expected an instruction"),
        (turn_of(mask=np.zeros((8, 8))), "got an empty mask"),
        (turn_of(mask=b"nothing"), "got 7 bytes, expected a picture"),
    ],
)
def test_a_turn_that_cannot_be_played_is_named(turn, message):
    with pytest.raises(ValueError, match=f"train row 7, turn 2, column 'turns': {message}"):
        next_edit(edit_of(turn), Image.new("RGB", (8, 8)), "turns", 2)
