"""`completions.py`: what a run keeps of its candidates while it trains."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rcgrpo.data.edits import Edit
from rcgrpo.groups.rollout import Group
from rcgrpo.training.completions import draw_groups, record, show, shown_rows, write_completions

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def flat(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def group_of(scores, colors=(RED, GREEN, BLUE), row=4, **given):
    """A scored group with pictures of one colour each; its source is white."""
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    edit = Edit(row, f"train row {row}", flat("white"), "paint it", mask, {})
    images = [flat(color) for color in colors]
    advantages = torch.tensor([-1.0, 1.0, 0.0])
    known = {"rewards": torch.tensor(scores).unsqueeze(1), "scores": torch.tensor(scores), "advantages": advantages}
    rest = [SimpleNamespace(height=64, width=64), None, torch.ones(16), torch.ones(1)]
    return Group(edit, *rest, images, None, None, **(known | given))


def left_edge(sheet, color):
    return int(np.nonzero((np.asarray(sheet) == color).all(axis=-1))[1].min())


def test_a_group_becomes_rows():
    columns = record(group_of([0.5, float("nan"), 2.0]), ["bright"], [], draw=False).columns
    assert columns == {
        "edit": ["train row 4"] * 3,
        "prompt": ["paint it"] * 3,
        "candidate": [0, 1, 2],
        "rewards/bright": [0.5, None, 2.0],
        "reward": [0.5, None, 2.0],
        "advantage": [-1.0, 1.0, 0.0],
    }


def test_each_region_has_its_own_advantages():
    advantages = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -2.0]])
    columns = record(group_of([0.0, 1.0, 2.0], advantages=advantages), ["a"], ["edit", "keep"], draw=False).columns
    assert "advantage" not in columns
    assert columns["advantage/edit"] == [1.0, -1.0, 0.0] and columns["advantage/keep"] == [0.0, 2.0, -2.0]


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ([1, None, 3], [1, None, 3]),
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([torch.tensor(1.5), np.float32(2), True], [1.5, 2.0, 1.0]),
        (["good", None, "bad"], ["good", None, "bad"]),
        (["good", 3, None], ["good", "3", None]),
        ([{"a": 1}, [2], None], ["{'a': 1}", "[2]", None]),
        ([None] * 3, [None] * 3),
    ],
)
def test_what_rewards_logged_stands_beside_them(tmp_path, logged, expected):
    kept = record(group_of([0.0, 1.0, 2.0], logged={"why": logged, "reward": ["taken"] * 3}), ["a"], [], draw=False)
    assert kept.columns["why"] == expected and kept.columns["reward"] == [0.0, 1.0, 2.0]
    assert write_completions(tmp_path, "completions", 7, [kept]) is None
    assert pq.read_table(tmp_path / "completions_00007.parquet")["why"].to_pylist() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["completions_00007.parquet"]


def test_a_table_of_groups_that_logged_different_things(tmp_path):
    told = [{"why": ["a", "b", "c"]}, {"why": [1, 2, 3], "also": [1.5, 2, 3]}, {}]
    groups = [record(group_of([0.0, 1.0, 2.0], row=i, logged=t), ["a"], [], draw=False) for i, t in enumerate(told)]
    write_completions(tmp_path / "new", "completions", 12, groups)
    table = pq.read_table(tmp_path / "new" / "completions_00012.parquet").to_pydict()
    assert table["step"] == [12] * 9 and table["edit"][::3] == ["train row 0", "train row 1", "train row 2"]
    assert table["why"] == ["a", "b", "c", "1", "2", "3", None, None, None]
    assert table["also"] == [None] * 3 + [1.5, 2.0, 3.0] + [None] * 3


def test_candidates_are_drawn_best_first_and_unscored_ones_last(tmp_path):
    group = record(group_of([0.5, float("nan"), 2.0]), ["a"], [], draw=True)
    sheet = write_completions(tmp_path, "completions", 1, [group])
    assert left_edge(sheet, BLUE) < left_edge(sheet, RED) < left_edge(sheet, GREEN)
    pink = left_edge(sheet, (255, 45, 120))  # the region's outline on the source
    assert pink < left_edge(sheet, BLUE)
    with Image.open(tmp_path / "completions_00001.jpg") as saved:
        assert saved.size == sheet.size


def test_one_candidate_is_no_ranking_and_groups_may_differ_in_size():
    alone = record(group_of([1.0], [RED], advantages=torch.zeros(1)), ["a"], [], draw=True)
    three = record(group_of([0.0, 1.0, 2.0]), ["a"], [], draw=True)
    assert draw_groups([alone]).width < draw_groups([alone, three]).width == draw_groups([three]).width


def test_at_most_eight_edits_are_drawn_and_all_are_written(tmp_path):
    groups = [record(group_of([0.0, 1.0, 2.0], row=i), ["a"], [], draw=i > 0) for i in range(12)]
    sheet = write_completions(tmp_path, "completions", 1, groups)
    assert sheet.size == draw_groups(groups[1:9]).size
    assert len(pq.read_table(tmp_path / "completions_00001.parquet")) == 36


def test_large_pictures_are_kept_small():
    group = group_of([0.0, 1.0, 2.0])
    group.images = [flat(RED, (1024, 512))] * 3
    assert [picture.size for picture in record(group, ["a"], [], draw=True).pictures] == [(192, 96)] * 4


def test_an_evaluation_shows_the_same_rows_each_time():
    assert shown_rows(200) == shown_rows(200) and len(shown_rows(200)) == 8
    assert shown_rows(200) < set(range(200)) and max(shown_rows(200)) > 20
    assert shown_rows(3) == {0, 1, 2}


def test_trackers_get_the_picture(monkeypatch):
    sent = []
    for name, run in (("wandb", object()), ("trackio", None)):
        module = SimpleNamespace(Image=lambda picture: picture.size, log=sent.append, run=run)
        monkeypatch.setitem(sys.modules, name, module)
    board = SimpleNamespace(add_image=lambda *given, **options: sent.append((given[0], given[1].shape, given[2])))
    callbacks = [object(), SimpleNamespace(tb_writer=board), SimpleNamespace(tb_writer=None)]
    picture = flat(RED, (40, 30))
    show(picture, "completions", 5, ["wandb", "trackio"], callbacks)
    logged = {"completions": (40, 30), "train/global_step": 5}
    assert sent == [logged, logged, ("completions", (30, 40, 3), 5)]
    sent.clear()
    monkeypatch.setattr(sys.modules["wandb"], "run", None)
    show(picture, "completions", 5, ["wandb"], [])
    show(picture, "completions", 5, [], [])
    assert sent == []


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_a_real_board_takes_it(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    show(flat(RED), "completions", 5, ["tensorboard"], [SimpleNamespace(tb_writer=writer)])
    writer.close()
    assert b"completions" in next(tmp_path.glob("events*")).read_bytes()
