"""`rcgrpo diagnose`: what is refused before anything is loaded, and how the model is opened."""

import json
from pathlib import Path

import pytest

from rcgrpo.cli import diagnose
from rcgrpo.cli.parsing import UsageError


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_generations", "1"], "--num_generations: got 1"),
        (["--edit_strength", "1.5"], "--edit_strength: got 1.5"),
        (["--num_generations", "3", "--antithetic"], "even number"),
        (["--solver", "foo"], "--solver: got 'foo', expected one of euler, heun, dpmpp_2m, unipc"),
        (["--resolution", "0"], "--resolution: got 0, expected 16 to 8192 pixels"),
        (
            ["--output", "taken/out"],
            "--output_dir: got 'taken/out', expected a folder that can be written to .*Not a dir",
        ),
        (["--dataset", "some/where"], "--reward: got none"),
        (["--num_edit", "3"], "nearest known one is --num_edits"),
        (["--gradient", "--num_draws", "1"], "--num_draws: got 1, expected at least 2, to tell noise apart"),
        (["--num_samples", "1", "--gradient"], "--num_samples: got 1, expected at least 2"),
        (["--gradient", "--learning_rat", "1"], "learning_rate"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(UsageError, match=message):
        diagnose.run(flags)


def test_the_model_is_opened_as_other_commands_do(monkeypatch, tmp_path):
    opened = []

    def stop(model):
        opened.append(model)
        raise UsageError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rcgrpo.cli.opening.open_pipeline", stop)  # with its dtype and device
    Path("some/model").mkdir(parents=True)
    Path("some/model/model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(UsageError, match="far enough"):
        diagnose.run(["--model", "some/model", "--num_samples", "2"])
    assert opened == ["some/model"]


def test_the_gradient_of_a_configuration(tmp_path, capsys):
    """The main job's recipe, in small; nothing is trained, and no checkpoint is left."""
    flags = ["--num_samples", "2", "--num_draws", "2", "--num_generations", "4", "--num_anchors", "2"]
    flags += ["--per_device_train_batch_size", "1", "--disable_tqdm", "true", "--eval_strategy", "no"]
    flags += ["--push_to_hub", "true", "--hub_model_id", "user/kontext"]  # of a run's configuration; no use for it here
    diagnose.run(["--gradient", *flags, "--output_dir", str(tmp_path / "found")])
    report = json.loads((tmp_path / "found" / "gradient.json").read_text())
    parts = {part["part"]: part for part in report["parts"]}
    assert list(parts)[:4] == ["all", "edit tokens", "keep tokens", "later calls"]
    assert "transformer_blocks.attn.to_q" in parts and "single_transformer_blocks.proj_mlp" in parts
    kinds = [part for name, part in parts.items() if name not in list(parts)[:4]]
    for number in ("signal", "within", "between"):
        assert sum(kind[number] for kind in kinds) == pytest.approx(parts["all"][number], rel=1e-3)
    assert parts["all"]["within"] > 0 and report["seconds_per_group"] > 0
    assert report["settings"]["num_draws"] == 2 and report["settings"]["num_generations"] == 4
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["gradient.json", "gradient.md"]
    out = capsys.readouterr().out
    assert "kontext-tiny on 2 edits of compbench-mini × 2 groups of 4 candidates" in out
    assert (tmp_path / "found" / "gradient.md").read_text() in out
