"""The report that a run writes of itself; metrics by name are `test_compbench.py`'s and `test_benchmark.py`'s."""

import json
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.evaluation.held_out import NUM_EXAMPLES, NUM_PICTURES, HeldOut, compare_tasks, mask_picture, write_report


def judged(edits, change, **scores):
    """One candidate for each edit, its source with another brightness, which is the reward; twelve have pictures."""
    shown = sorted(random.Random(0).sample(range(len(edits)), NUM_PICTURES))
    return [
        HeldOut(
            edit.row,
            edit.prompt,
            {"reward": change + i / 10, **{name: values[i] for name, values in scores.items()}},
            {"source": edit.source, "mask": mask_picture(edit.mask), "edited": brighter(edit, change)}
            if i in shown
            else {},
        )
        for i, edit in enumerate(edits)
    ]


def test_a_report_says_what_each_task_gained_and_lost(tmp_path, edits):
    """A mean over all would be 0 here."""

    def sides(change):
        gains = {"add": change, "remove": -change}
        return [
            HeldOut(i, "", {"correct (%)": 50.0 + gains.get(task, 0), "LP-I": 0.5}, {}, task)
            for i, task in enumerate(["add", "remove", "add", "remove", "replace"])
        ]

    tables = compare_tasks(sides(0), sides(25))
    assert list(tables) == ["add", "remove"]  # one edit alone has no interval
    for task, difference in (("add", 25), ("remove", -25)):
        (row,) = tables[task]
        assert (row.metric, row.n, row.difference) == ("correct (%)", 2, difference)
    assert compare_tasks(sides(0)[:1], sides(25)[:1]) == {}

    before, after = (
        [replace(one, task=("add", "remove")[one.row % 2], scores={"correct (%)": value}) for one in judged(edits, 0)]
        for value in (0.0, 100.0)
    )
    write_report(tmp_path, before, after, [], {})
    report = json.loads((tmp_path / "metrics.json").read_text())["by_task"]
    assert {task: rows[0]["difference"] for task, rows in report.items()} == {"add": 100, "remove": 100}
    assert (tmp_path / "metrics.md").read_text().count("correct (%)") == 3


def brighter(edit, change):
    return edit.source.point(lambda value: min(255, value + change))


@pytest.fixture(scope="module")
def edits():
    rows = EditRows(compbench_mini("test", 14), "held out")
    return [rows.edit(i) for i in range(14)]


def test_the_report_lists_what_was_measured_and_shows_some_edits(tmp_path, edits):
    before, after = judged(edits, 30), judged(edits, 10)
    history = [{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}]
    (row,) = write_report(tmp_path, before, after, history, {"seed": 3})
    assert row.metric == "reward" and row.difference == pytest.approx(-20) and row.n == 14
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["held_out"][0]["difference"] == row.difference and report["settings"] == {"seed": 3}
    assert report["per_sample"]["after"]["reward"][3] == 10.3
    assert len(report["examples"]) == NUM_EXAMPLES
    for example in report["examples"]:
        source, edited = (Image.open(tmp_path / example[name]) for name in ("source", "edited"))
        (edit,) = [e for e in edits if f"/{e.row:03d}_" in example["source"]]
        assert example["prompt"] == edit.prompt and source.tobytes() == edit.source.tobytes()
        assert 0 < max(high for _, high in ImageChops.difference(source, edited).getextrema()) <= 10
    listed = {example[name] for example in report["examples"] for name in ("source", "edited")}
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"metrics.json", "metrics.md", "reward_curves.png", "samples/contact_sheet.png", *listed}


def test_a_metric_that_nearly_no_edit_has_on_one_side_is_left_out(tmp_path, edits):
    """Such as a reward whose judge has gone by the end."""
    nearly, some = [None] * 13 + [1.0], [None, 0.5] * 7
    before, after = judged(edits, 30, gone=some, rare=nearly), judged(edits, 10, gone=[float("nan")] * 14, rare=some)
    assert [row.metric for row in write_report(tmp_path, before, after, [], {})] == ["reward"]
    before, after = judged(edits, 30, some=some), judged(edits, 10, some=some)
    assert [(row.metric, row.n) for row in write_report(tmp_path, before, after, [], {})] == [
        ("reward", 14),
        ("some", 7),
    ]
