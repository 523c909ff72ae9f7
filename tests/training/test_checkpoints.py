"""`checkpoints.py`: whole or not there, whatever is cut off, changed, missing or left behind."""

import os
import shutil

import pytest

from checkpoint_files import FILES, empty, gone, half, sealed, write_checkpoint, zeros
from rcgrpo.training.checkpoints import (
    SEAL,
    UNFINISHED,
    by_step,
    clear_leftovers,
    fault,
    newest_whole,
    read_seal,
    require_whole,
    rotate,
    seal,
)


@pytest.mark.parametrize("name", [*FILES, SEAL])
@pytest.mark.parametrize("damage", [half, zeros, empty])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    checkpoint = sealed(tmp_path, 1)
    assert fault(checkpoint) is None
    damage(checkpoint / name)
    assert name in fault(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    checkpoint = sealed(tmp_path, 1)
    gone(checkpoint / name)
    assert fault(checkpoint) == f"{name} is missing"


def test_the_card_may_be_edited(tmp_path):
    checkpoint = sealed(tmp_path, 1)
    (checkpoint / "README.md").write_text("mine")
    assert fault(checkpoint) is None and read_seal(checkpoint)["optimizer"] == "SGD"


@pytest.mark.parametrize("name", FILES[:4])
@pytest.mark.parametrize("damage", [half, empty])
def test_checkpoints_of_other_writers_are_opened(tmp_path, name, damage):
    checkpoint = write_checkpoint(tmp_path, 1)
    assert fault(checkpoint) is None and read_seal(checkpoint) == {}
    damage(checkpoint / name)
    assert name in fault(checkpoint)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"global_step": null}', "\x00"])
def test_a_state_without_a_step_is_none(tmp_path, text):
    (write_checkpoint(tmp_path, 1) / "trainer_state.json").write_text(text)
    assert "trainer_state.json cannot be read" in fault(tmp_path / "checkpoint-1")


def test_a_folder_with_nothing_in_it(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert fault(tmp_path / "checkpoint-1") == "trainer_state.json is missing"
    assert fault(tmp_path / "checkpoint-2") == "there is no such folder"
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    assert fault(tmp_path / "checkpoint-1") == "it has no weights"


def test_the_newest_whole_one_by_number_and_what_was_passed_over(tmp_path):
    for step in (2, 9, 10):
        sealed(tmp_path, step)
    for name in ("checkpoint-11", "checkpoint-final", "other-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").touch()
    half(tmp_path / "checkpoint-10" / "optimizer.pt")
    assert list(by_step(tmp_path)) == [2, 9, 10, 11]
    newest, passed = newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-9" and list(passed) == ["checkpoint-11", "checkpoint-10"]
    require_whole(newest)
    with pytest.raises(ValueError, match=r"got '.*checkpoint-10', expected a whole .*optimizer.pt .*give .*-9$"):
        require_whole(tmp_path / "checkpoint-10")
    assert newest_whole(tmp_path / "nowhere") == (None, {})
    with pytest.raises(ValueError, match="no such folder; there is no whole one beside it: train from the start"):
        require_whole(tmp_path / "nowhere" / "checkpoint-1")


def test_a_new_checkpoint_takes_the_place_of_one_of_its_name(tmp_path):
    old = sealed(tmp_path, 1)
    (old / "old").touch()
    half(old / "optimizer.pt")
    assert sealed(tmp_path, 1) == old and fault(old) is None and not (old / "old").exists()
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_leftovers_go_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / UNFINISHED, 3)  # not sealed, so nobody knows whether it was written to its end
    sealed(tmp_path, 2)
    litter = [".tmpAb12_9", "_pytorch_lora_weights.safetensors.tmp"]
    mine = [".tmpfile-of-mine", ".tmp", "_notes.tmp", "a.tmp"]
    for name in litter + mine:
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["checkpoint-2", *mine])
    clear_leftovers(tmp_path / "nowhere")


def test_a_checkpoint_that_only_lacked_its_name_gets_it(tmp_path):
    """Killed between the older one's making way and the newer one's taking its place."""
    for step, damage in ((1, None), (2, half)):
        checkpoint = write_checkpoint(tmp_path / UNFINISHED, step)
        seal(checkpoint, {})
        if damage:
            damage(checkpoint / "optimizer.pt")
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-1"] and fault(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, {"checkpoint-3"}, [1, 2, 3]),
        (0, {"checkpoint-3"}, [1, 2, 3]),
        (2, {"checkpoint-3"}, [2, 3]),
        (1, {"checkpoint-3"}, [3]),
        (1, {"checkpoint-3", "checkpoint-1"}, [1, 3]),
        (2, {"checkpoint-3", "checkpoint-1"}, [1, 3]),
        (9, {"checkpoint-3"}, [1, 2, 3]),
    ],
)
def test_the_oldest_go_first_and_the_best_stays(tmp_path, limit, keep, left):
    for step in (1, 2, 3):
        os.utime(sealed(tmp_path, step), (step, step))
    rotate(tmp_path, limit, keep)
    assert list(by_step(tmp_path)) == left and not (tmp_path / UNFINISHED).exists()


def test_one_that_is_being_deleted_counts_no_more(tmp_path, monkeypatch):
    for step in (1, 2):
        os.utime(sealed(tmp_path, step), (step, step))
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: seen.append(list(by_step(tmp_path))))
    rotate(tmp_path, 1, {"checkpoint-2"})
    assert seen == [[2]]
