"""`outcomes.py`: a held-out edit in four numbers."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import rcgrpo.groups.outcomes as module
from rcgrpo.data.edits import Edit
from rcgrpo.groups.outcomes import by_task, means, outcomes
from rcgrpo.groups.rollout import Group


def grey(level, size=8):
    return Image.new("RGB", (size, size), (level,) * 3)


def group(row, images, scores, **columns):
    """The left half of a dark square is to be edited."""
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    edit = Edit(row, f"row {row}", grey(51), "make it grey", mask, columns)
    one = torch.ones(1)
    return Group(edit, None, None, one, one, images, None, None, scores=torch.tensor(scores))


class Judge:
    """Calls what is drawn correct if it is bright, what is removed if it is as its target; knows no unicorns."""

    def __init__(self):
        self.asked = []

    def correct(self, images, masks, captions, draws, targets, sources):
        self.asked.append(SimpleNamespace(captions=captions, draws=draws, targets=targets, sources=sources))
        rows = zip(images, captions, draws, targets, strict=True)
        return [
            None if caption == "unicorn" else image.getpixel((0, 0))[0] > 99 if draw else image == target
            for image, caption, draw, target in rows
        ]


@pytest.fixture
def judge(monkeypatch):
    asked = Judge()
    monkeypatch.setattr(module, "get_second_scorer", lambda: asked)
    return asked


def test_each_number_by_hand_averaged_over_candidates(judge):
    """The ground truth is brighter by .4; a candidate half as bright is half as close and not correct."""
    drawn = group(3, [grey(153), grey(51)], [1.0, 0.5], task="add", caption="apple", edited_image=grey(153, 16))
    gone = group(5, [grey(51)], [float("nan")], task="remove", caption="apple", edited_image=grey(51))
    strange = group(6, [grey(76)], [0.25], task="add", caption="unicorn", edited_image=grey(51))
    plain = group(7, [grey(77)], [0.0])
    found = outcomes([drawn, gone, strange, plain])
    assert [(one["row"], one["task"]) for one in found] == [(3, "add"), (5, "remove"), (6, "add"), (7, "")]
    assert [one["correct"] for one in found] == [50.0, 100.0, None, None]
    assert [one["closeness"] for one in found] == [pytest.approx(0.8), 1.0, pytest.approx(1 - 25 / 255), None]
    assert [one["reward"] for one in found] == [0.75, None, 0.25, 0.0]
    # Half of the frame differs by 26 / 255.
    assert found[3]["psnr"] == pytest.approx(-10 * torch.tensor((26 / 255) ** 2 / 2).log10().item(), abs=1e-4)
    (asked,) = judge.asked  # once, for all that can be judged
    assert asked.captions == ["apple", "apple", "apple", "unicorn"] and asked.draws == [True, True, False, True]
    assert [picture is None for picture in asked.targets] == [True, True, False, True]
    assert asked.sources[2] == grey(51) and asked.sources[0] is None


def test_means_leave_out_what_does_not_apply():
    found = [
        {"row": 0, "task": "add", "correct": 100.0, "closeness": None, "psnr": 20.0, "reward": 1.0},
        {"row": 1, "task": "remove", "correct": None, "closeness": None, "psnr": 30.0, "reward": None},
        {"row": 2, "task": "add", "correct": 0.0, "closeness": None, "psnr": float("inf"), "reward": 0.0},
    ]
    assert means(found, "eval_") == {"eval_correct": 50.0, "eval_psnr": 25.0, "eval_reward": 0.5}
    assert {task: means(some)["psnr"] for task, some in by_task(found).items()} == {"add": 20.0, "remove": 30.0}
    assert by_task(found[:1]) == {}


def test_without_its_extra_the_second_judge_is_not_asked(monkeypatch, judge):
    monkeypatch.setattr(module, "missing", lambda extra: ["timm"] if extra == "tiny" else [])
    (found,) = outcomes([group(0, [grey(153)], [1.0], task="add", caption="apple", edited_image=grey(153))])
    assert found["correct"] is None and found["closeness"] == 1.0 and not judge.asked
