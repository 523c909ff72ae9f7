"""`runs.py`: what a run's folder holds, at any stage, and one message for a folder that is none."""

import pytest
from PIL import Image

from app_pages import make_run
from rcgrpo.app import read_run
from rcgrpo.training.hub import LORA_FILE


def test_a_finished_run_shows_what_it_wrote(tmp_path):
    folder = make_run(tmp_path / "run", finished=True)
    run = read_run(f" {folder} ", tmp_path / "drawn")
    assert (run.step, run.max_steps, run.metrics) == (4, 4, "| metric |\n|---|\n")
    assert list(run.figures) == ["Curves", "Learning curve", "Changed most"]
    assert run.figures["Curves"] == folder / "reward_curves.png"
    assert run.figures["Learning curve"].parent == tmp_path / "drawn"  # which this one lacks
    first, second = run.candidates["training"]
    assert (first.step, second.step, second.picture) == (9, 10, None) and first.picture.name == "completions_00009.jpg"
    assert second.rows() == (["step", "candidate", "reward"], [[10, 0, 0.25], [10, 1, None]])
    assert [one.step for one in run.candidates["evaluation"]] == [4]


def test_a_run_in_progress_is_drawn_from_its_newest_whole_checkpoint(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')  # being written
    run = read_run(folder / "checkpoint-4", tmp_path / "drawn")
    assert run.folder == folder and run.step == 2 and len(run.log_history) == 3
    assert list(run.figures) == ["Curves"] and Image.open(run.figures["Curves"]).size[0] > 100


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "run: got .*expected a folder that exists"),
        ([], "expected the output_dir of a training run.*it holds none of them"),
        (["notes.txt"], "it holds none of them"),
        ([LORA_FILE], "a LoRA alone, which is no run"),
    ],
)
def test_a_folder_that_is_no_run_is_said(tmp_path, files, message):
    folder = tmp_path / "here"
    if files is not None:
        folder.mkdir()
    for name in files or []:
        (folder / name).touch()
    with pytest.raises(ValueError, match=message):
        read_run(folder, tmp_path)
    with pytest.raises(ValueError, match="run: got nothing"):
        read_run("  ", tmp_path)
