"""The report that a run writes of itself; metrics by name are `test_compbench.py`'s and `test_benchmark.py`'s."""

import json
import random

import pytest
from PIL import Image, ImageChops

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.evaluation.held_out import NUM_EXAMPLES, NUM_PICTURES, HeldOut, mask_picture, write_report


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
