"""`learning_curve.py`: what a run's log says of its held-out edits."""

import numpy as np
import pytest
from PIL import Image

from rcgrpo.reporting.learning_curve import Curve, plot_learning_curve

EDITS = "eval_edits"


def evaluation(step, reward, tasks=("add", "remove"), **more):
    rows = [4 * i for i in range(len(reward))]
    return {"step": step, EDITS: {"row": rows, "task": [*tasks] * (len(rows) // 2), "reward": reward, **more}}


def test_a_curve_is_the_last_evaluation_of_each_step_on_the_latest_edits():
    log = [
        {"step": 0, "reward": 1.0},
        evaluation(0, [0.0] * 6),  # of more edits, before somebody resumed with fewer
        evaluation(5, [0.25, 0.5]),
        evaluation(10, [9.0, 9.0]),
        evaluation(10, [0.5, None], psnr=[20.0, 30.0]),
    ]
    curve = Curve.of(log)
    assert (curve.steps, curve.rows, curve.tasks) == ([5, 10], [0, 4], ["add", "remove"])
    assert curve.scores == {"psnr": [[None, None], [20.0, 30.0]], "reward": [[0.25, 0.5], [0.5, None]]}
    assert [curve.mean("reward", i) for i in (0, 1)] == [0.375, 0.5] and curve.mean("reward", 0, "remove") == 0.5
    assert np.isnan(curve.mean("psnr", 0)) and np.isnan(curve.mean("reward", 1, "remove"))
    assert curve.change("reward", 0, 1) is None  # one edit has both
    assert Curve.of(log[:1]) == Curve([], [], [], {}) == Curve.of(log, "eval_other_")
    assert Curve.of([{"step": 3, "eval_other_edits": log[1][EDITS]}], "eval_other_").steps == [3]


def test_changes_are_paired():
    """All gain a quarter, whatever lies between them; removals lose one."""
    before = [float(i) for i in range(20)]
    after = [value + (0.25 if i % 2 == 0 else -1) for i, value in enumerate(before)]
    curve = Curve.of([evaluation(0, before), evaluation(3, after)])
    gain, loss = (curve.change("reward", 0, 1, task) for task in ("add", "remove"))
    assert (gain.difference, gain.low, gain.high, gain.n) == (0.25, 0.25, 0.25, 10)
    assert (loss.low, loss.high) == (-1.0, -1.0)
    both = curve.change("reward", 0, 1)
    assert both.difference == -0.375 and both.low < -0.375 < both.high < 0 and both.confidence == 0.95


def test_the_picture_has_a_row_for_each_measure_and_a_column_for_each_task(tmp_path):
    log = [evaluation(s, [0.1 * s] * 4, correct=[0.0, 100.0] * 2, psnr=[None] * 4) for s in (0, 1, 2)]
    sizes = {}
    for name, some in {
        "both": log,
        "one": [dict(row, **{EDITS: {**row[EDITS], "task": ["add"] * 4}}) for row in log],
    }.items():
        plot_learning_curve(Curve.of(some), tmp_path / f"{name}.png")
        sizes[name] = Image.open(tmp_path / f"{name}.png").size
    assert sizes == {"both": (int(150 * (1 + 3 * 1.75)), 585), "one": (int(150 * 2.75), 585)}
    with pytest.raises(ValueError, match="got 1 evaluations, expected at least two; set eval_strategy"):
        plot_learning_curve(Curve.of(log[:1]), tmp_path / "none.png")
