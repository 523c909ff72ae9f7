"""The report that a run writes of itself; metrics by name are `test_compbench.py`'s and `test_benchmark.py`'s."""

import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from PIL import Image, ImageChops

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.evaluation import NUM_EXAMPLES, mask_picture, write_report


def groups(edits, change):
    """One candidate for each edit: its source with another brightness; the reward is the brightness."""
    return [
        SimpleNamespace(
            edit=edit,
            source=edit.source,
            mask=mask_picture(edit.mask),
            images=[edit.source.point(lambda value: min(255, value + change))],
            scores=torch.tensor([change + i / 10]),
            rewards=torch.tensor([[change + i / 10]]),
            attention_maps=None,
        )
        for i, edit in enumerate(edits)
    ]


def test_the_report_lists_what_was_measured_and_shows_some_edits(tmp_path):
    rows = EditRows(compbench_mini("test", 5), "held out")
    edits = [replace(rows.edit(i), columns={}) for i in range(5)]
    before, after = groups(edits, 30), groups(edits, 10)
    history = [{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}]
    table = write_report(tmp_path, before, after, ["brightness"], history, {"seed": 3})
    assert [row.metric for row in table] == ["reward", "background PSNR (dB)", "background SSIM"]
    assert table[0].difference == -20 and table[1].difference > 5  # less was changed
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["held_out"][0]["difference"] == -20 and report["settings"] == {"seed": 3}
    assert len(report["examples"]) == NUM_EXAMPLES
    for example in report["examples"]:
        source, edited = (Image.open(tmp_path / example[name]) for name in ("source", "edited"))
        (edit,) = [e for e in edits if e.prompt == example["prompt"]]
        assert source.tobytes() == edit.source.tobytes()
        assert 0 < max(high for _, high in ImageChops.difference(source, edited).getextrema()) <= 10
    listed = {example[name] for example in report["examples"] for name in ("source", "edited")}
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"metrics.json", "metrics.md", "reward_curves.png", "samples/contact_sheet.png", *listed}
