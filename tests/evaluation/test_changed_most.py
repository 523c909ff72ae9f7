"""`changed_most.py`: which edits are shown, and that both sides are."""

import pytest
from PIL import Image

from rcgrpo.evaluation.changed_most import SIDE, changed_most, thumbnail, write_changed_most
from rcgrpo.evaluation.held_out import HeldOut


def test_verdicts_come_first_and_scores_order_those_that_agree():
    before = [{"correct (%)": c, "edit score": s} for c, s in [(0, 0.5), (100, 0.5), (0, 0.5), (None, 0.5), (100, 0.5)]]
    after = [{"correct (%)": c, "edit score": s} for c, s in [(100, 0.4), (0, 0.9), (0, 0.6), (None, 0.2), (100, 0.5)]]
    assert changed_most(before, after) == ([0, 2], [1, 3])
    assert changed_most(before, after, 1) == ([0], [1])
    assert changed_most(before, before) == ([], [])


def test_without_a_judge_the_reward_says_it():
    assert changed_most([{"reward": 1.0}, {"reward": 1.0}], [{"reward": 0.5}, {"reward": 2.0}]) == ([1], [0])


def one(reward, colour, size=(40, 30), **kept):
    pictures = {
        "source": Image.new("RGB", size),
        "mask": Image.new("L", size),
        "edited": Image.new("RGB", size, colour),
    }
    return HeldOut(0, "paint it", {"reward": reward}, {}, **({"small": pictures} | kept))


def test_the_sheet_shows_both_sides_and_nothing_that_stayed(tmp_path):
    before = [one(0, "gray"), one(1, "gray"), one(1, "gray")]
    after = [one(1, "#00ff00"), one(0, "#ff0000"), one(1, "#0000ff")]
    write_changed_most(tmp_path / "sheet.png", before, after)
    colours = {colour for _, colour in Image.open(tmp_path / "sheet.png").getcolors(1 << 20)}
    assert {(0, 255, 0), (255, 0, 0)} <= colours and (0, 0, 255) not in colours


@pytest.mark.parametrize("after", [[one(0, "gray")], [one(1, "gray", small={})]])
def test_nothing_is_written_where_nothing_changed_or_was_kept(tmp_path, after):
    write_changed_most(tmp_path / "sheet.png", [one(0, "gray")], after)
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_small():
    large = Image.new("RGB", (1024, 512))
    assert thumbnail(large).size == (SIDE, SIDE // 2) and large.size == (1024, 512)
    assert thumbnail(Image.new("RGB", (64, 64))).size == (64, 64)
