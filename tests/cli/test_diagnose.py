"""`rcgrpo diagnose`: what is refused before anything is loaded, and how the model is opened."""

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
