"""`turns.py`: several instructions, on what the one before gave or at once."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.groups.rollout import Exploration
from rcgrpo.groups.turns import best_candidate, join_instructions, join_turns, next_edit

HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255
LABELS = np.zeros((8, 8), np.uint8)
LABELS[:2], LABELS[4:] = 1, 2


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


OWN = [LABELS, Image.fromarray(LABELS), encoded(LABELS), [LABELS == 1, encoded(255 * (LABELS == 2).astype(np.uint8))]]


@pytest.mark.parametrize("own", OWN)
def test_a_turn_has_the_regions_that_it_brings_or_its_mask_alone(own):
    """Whatever the turn before had, and at the size of the result."""
    exploration, result = Exploration(regions_column="labels"), Image.new("RGB", (16, 32))
    first = edit_of(turn_of("two"), turn_of("three", labels=own), turn_of("four", labels=None), labels=1 + LABELS)
    seen, edit = [], first
    for number in (2, 3, 4):
        edit = next_edit(edit, result, "turns", number, "labels")
        seen.append(exploration.masks(edit))
    half = torch.zeros(1, 32, 16)
    half[:, :, :8] = 1
    both = torch.zeros(2, 32, 16)
    both[0, :8] = both[1, 16:] = 1
    assert torch.equal(seen[0], half) and torch.equal(seen[1], both) and torch.equal(seen[2], half)
    assert torch.equal(edit.mask, half[0]), "rewards see the turn's mask"


@pytest.mark.parametrize("regions", [False, True])
def test_masks_of_turns_have_the_first_sources_shape_at_any_size(regions):
    def tall(height, width):
        mask = np.full((height, width), 255, np.uint8)
        return turn_of("next", mask, labels=[mask]) if regions else turn_of("next", mask)

    wide = replace(edit_of(), source=Image.new("RGB", (30, 17)), mask=torch.ones(17, 30))
    result, column = Image.new("RGB", (32, 16)), "labels" if regions else None  # an editor's sizes are multiples
    turns = [tall(17, 30), tall(34, 60), tall(9, 15), tall(16, 32)]
    edit = replace(wide, columns={"turns": turns})
    for number in (2, 3, 4):
        edit = next_edit(edit, result, "turns", number, column)
        assert edit.mask.shape == (16, 32) and edit.first_size == (30, 17)
    bad = [tall(30, 17), tall(17, 17), tall(16, 40)]
    if regions:
        bad = [{**turn, "mask": np.full((17, 30), 255, np.uint8)} for turn in bad]
    for turn in bad:
        with pytest.raises(ValueError, match=r"turn 2, .*got a mask of height × width .*first source, \(17, 30\)"):
            next_edit(replace(wide, columns={"turns": [turn]}), result, "turns", 2, column)
    if not regions:
        with pytest.raises(ValueError, match="resizing would distort it"):
            join_turns(replace(wide, columns={"turns": bad[:1]}), "turns")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((8, 8), int), "got no region"),
        ([HALF, HALF[:4]], r"got height × width \(4, 8\), expected the first region's \(8, 8\)"),
        (b"nothing", "got 7 bytes, expected a picture"),
    ],
)
def test_regions_of_a_turn_that_cannot_be_read_are_named(labels, message):
    with pytest.raises(ValueError, match=f"train row 7, turn 2, column 'turns': {message}"):
        next_edit(edit_of(turn_of(labels=labels)), Image.new("RGB", (8, 8)), "turns", 2, "labels")


def test_turns_end():
    result = Image.new("RGB", (8, 8))
    edit = edit_of(turn_of("two"), turn_of("three"))
    second = next_edit(edit, result, "turns", 2)
    third = next_edit(second, result, "turns", 3)
    assert (third.prompt, third.label) == ("three", "train row 7, turn 3")
    assert next_edit(third, result, "turns", 4) is None
    assert next_edit(edit_of(turns=None), result, "turns", 2) is None


def test_the_best_candidate_goes_on():
    nan, weights = float("nan"), torch.tensor([2.0, 1.0])

    def best(scores, rewards):
        group = SimpleNamespace(images=["a", "b", "c"], scores=torch.tensor(scores), rewards=torch.tensor(rewards))
        return best_candidate(group, weights)

    rewards = [[1.0, 9.0], [3.0, 0.0], [2.0, 0.0]]
    assert best([0.1, 0.3, 0.2], rewards) == "b" and best([nan, -5.0, -9.0], rewards) == "b"
    # a reward failed on all of them: the other one decides
    assert best([nan] * 3, [[nan, 1.0], [nan, 0.0], [nan, 2.0]]) == "c"
    assert best([nan] * 3, [[nan, nan]] * 3) == "a"


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


def test_turns_that_are_no_list_are_refused():
    for turns in ({"instruction": ["two"], "mask": [HALF]}, "two"):
        with pytest.raises(ValueError, match=r"train row 7, column 'turns': got (dict|str), expected a list of turns"):
            next_edit(edit_of(turns=turns), Image.new("RGB", (8, 8)), "turns", 2)


# ------------------------------------------------------------------------------------ at once


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (["Add a cube."], "Add a cube."),
        (["add a cube", "remove the dog"], "add a cube and remove the dog"),
        (["Add a cube.", " Remove the dog. ", "Paint it red."], "Add a cube, remove the dog and paint it red"),
        (["Add it...", "IKEA's lamp is to go.", "I want it red!"], "Add it, IKEA's lamp is to go and I want it red!"),
    ],
)
def test_instructions_become_one_sentence(parts, sentence):
    assert join_instructions(parts) == sentence


def test_joined_turns_are_one_edit_with_a_region_each():
    corner = np.zeros((16, 16), np.uint8)
    corner[8:, 8:] = 255
    alone = edit_of(turn_of("Two.", mask=corner, caption="second"), turn_of("three", mask=encoded(HALF)))
    mask = torch.zeros(8, 8)
    mask[0] = 0.2
    edit = join_turns(replace(alone, mask=mask), "turns")
    expected = torch.zeros(3, 8, 8)
    expected[0], expected[1, 4:, 4:], expected[2, :, :4] = mask, 1, 1
    assert torch.equal(Exploration(regions_column="regions").masks(edit), expected)
    assert torch.equal(edit.mask, expected.amax(0))
    assert (edit.row, edit.label, edit.source, edit.prompt) == (7, "train row 7", alone.source, "one, two and three")
    assert {**edit.columns, "regions": None} == {**alone.columns, "regions": None}, "the row's columns stay"
    single = join_turns(edit_of(turns=None), "turns")
    assert single.prompt == "one" and Exploration(regions_column="regions").masks(single).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_of(turn_of(), "two"), "train row 7, turn 3, column 'turns': got str, expected a mapping"),
        (edit_of(turn_of("...")), "train row 7, turn 2, column 'turns': got '...', expected an instruction"),
        (edit_of(turn_of(mask=0 * HALF)), "train row 7, turn 2, column 'turns': got an empty mask"),
        (edit_of(turn_of(), regions=[]), "train row 7: got a column 'regions', expected none.*rename it"),
    ],
)
def test_turns_that_cannot_be_joined_are_named(edit, message):
    with pytest.raises(ValueError, match=message):
        join_turns(edit, "turns")
