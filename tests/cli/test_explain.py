"""`rcgrpo explain`: what is refused before anything is loaded, and the picture of the embedded editor's update."""

import json

import pytest
from PIL import Image

from rcgrpo.cli import explain
from rcgrpo.cli.parsing import UsageError

OF_A_RUN = ["--disable_tqdm", "true", "--push_to_hub", "true", "--hub_model_id", "user/kontext", "--eval_steps", "1"]
"""What a run's configuration may say, and a look at one edit has no use for."""


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--edit", "-1"], "--edit: got -1, expected 0 or more"),
        (["--edi", "1"], "nearest known one is --edit"),
        (["--lora", "a", "--init_lora", "b"], "--lora: got a beside --init_lora b, expected one of them"),
        (["--lora", "nowhere"], "--init_lora: got 'nowhere', expected .*"),
        (["--num_generations", "1"], "num_generations: got 1"),
        (["--output_dir", "taken/out"], "--output_dir: got 'taken/out', expected a folder that can be written to"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises((UsageError, ValueError), match=message):
        explain.run(flags)


def test_one_update_of_the_embedded_editor(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explain.run(["--edit", "2", "--num_generations", "4", "--num_anchors", "2", *OF_A_RUN])
    folder = tmp_path / "rcgrpo-update"
    assert sorted(path.name for path in folder.iterdir()) == ["update.json", "update.md", "update.png"]
    found = json.loads((folder / "update.json").read_text())
    assert found["edit"] == "train row 2" and len(found["candidates"]) == 4
    assert found["noise_differs"]["inside"] > 5 * found["noise_differs"]["outside"]
    assert 0 < found["moved_inside"] < found["asked_inside"] < 1 and found["change"] > 0
    assert found["settings"]["script"]["reward_funcs"] == ["region_edit", "background_keep"]
    assert Image.open(folder / "update.png").width > 1000
    assert (folder / "update.md").read_text() in capsys.readouterr().out


def test_a_row_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "green").save("source.png")
    Image.linear_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 127)).save("mask.png")
    row = {"input_image": "source.png", "mask": "mask.png", "instruction": "remove the gift"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    own = ["--dataset", "rows.jsonl", "--reward_funcs", "background_keep", "--edit", "1"]
    with pytest.raises(UsageError, match="--edit: got 1, expected 0 to 0, the rows of train"):
        explain.run([*own, "--use_cpu", "true"])
