"""`data/bounds.py`: rows name files of their own data set, and others only where the user says so."""

import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import EditRows, load_edit_dataset
from rcgrpo.data.bounds import check_inside, local_part

REFUSED = r"got '.*', which leads out of .*, expected a file in it; .*allow_outside=True, --allow_outside"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", cache / "downloads" / "extracted")


@pytest.fixture
def folder(tmp_path):
    """`data/` with pictures, and one beside it that is none of its business."""
    inside = tmp_path / "data"
    (inside / "deep").mkdir(parents=True)
    for path in (inside / "a.png", inside / "deep" / "b.png", tmp_path / "secret.png"):
        Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(path)
    Image.new("L", (8, 8), 255).save(inside / "mask.png")
    return inside


def table(folder, **changes):
    row = {"id": "row 3", "input_image": "a.png", "instruction": "x", "mask": "mask.png", **changes}
    (folder / "edits.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "edits.jsonl")


def test_paths_in_the_folder_are_read_however_they_are_written(folder):
    for path in ("a.png", "deep/b.png", "./deep/../a.png", str(folder / "deep" / "b.png"), f"file://{folder}/a.png"):
        assert load_edit_dataset(table(folder, input_image=path))[0]["input_image"].size == (8, 8)


@pytest.mark.parametrize("column", ["input_image", "mask", "edited_image"])
@pytest.mark.parametrize("how", ["relative", "absolute", "link", "linked folder", "file url"])
def test_paths_that_lead_elsewhere_are_refused_by_row_and_allowed_by_name(folder, column, how):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    paths = {
        "relative": "deep/../../secret.png",
        "absolute": str(folder.parent / "secret.png"),
        "link": "link.png",
        "linked folder": "up/secret.png",
        "file url": f"file://{folder.parent}/secret.png",
    }
    file = table(folder, **{column: paths[how]})
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"row row 3, column '{column}': {REFUSED}"):
            next(iter(load_edit_dataset(file, streaming=streaming)))
    assert next(iter(load_edit_dataset(file, allow_outside=True)))[column].size == (8, 8)


def test_system_files_are_never_opened(folder):
    with pytest.raises(ValueError, match=rf"row row 3, column 'input_image': {REFUSED}"):
        load_edit_dataset(table(folder, input_image="../../../../../../../../etc/passwd"))


def test_root_is_a_folder_too(folder):
    file = table(folder, input_image="secret.png", mask="data/mask.png")
    assert load_edit_dataset(file, root=folder.parent)[0]["input_image"].size == (8, 8)
    file = table(folder, input_image="b.png", mask=str(folder / "mask.png"))  # the file's own folder stays one
    assert load_edit_dataset(file, root=folder / "deep")[0]["mask"].size == (8, 8)


def test_rows_in_memory_are_the_users_own(folder):
    row = {"input_image": str(folder.parent / "secret.png"), "instruction": "x", "mask": str(folder / "mask.png")}
    assert load_edit_dataset([row])[0]["input_image"].size == (8, 8)
    with pytest.raises(ValueError, match=REFUSED):
        load_edit_dataset([row], root=folder)


def test_a_folder_of_pictures_with_metadata(folder):
    row = {"input_image_file_name": "a.png", "mask_file_name": "mask.png", "instruction": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert load_edit_dataset(str(folder))[0]["input_image"].size == (8, 8)
    (folder / "metadata.jsonl").write_text(json.dumps({**row, "input_image_file_name": "../secret.png"}) + "\n")
    with pytest.raises(ValueError, match=r"data: got pictures whose metadata cannot be read, .*'\.\./secret\.png'"):
        load_edit_dataset(str(folder))[0]


def test_a_picture_column_that_holds_a_path_instead_of_a_picture(folder):
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"input_image": stored, "instruction": datasets.Value("string"), "mask": stored}
    row = {
        "input_image": {"path": str(folder.parent / "secret.png"), "bytes": None},
        "instruction": "x",
        "mask": {"path": None, "bytes": (folder / "mask.png").read_bytes()},
    }
    datasets.Dataset.from_list([row], features=datasets.Features(features)).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=rf"row train/0, column 'input_image': {REFUSED}"):
        load_edit_dataset(str(folder / "train.parquet"))[0]


def test_regions_and_turns_stay_inside_too(folder):
    file = table(folder, regions="../secret.png")
    with pytest.raises(ValueError, match=rf"train row 0, column 'regions': {REFUSED}"):
        EditRows(load_edit_dataset(file), "train", labels_column="regions").edit(0)
    file = table(folder, turns=[{"instruction": "y", "mask": "../secret.png"}])
    with pytest.raises(ValueError, match=rf"train row 0, column 'turns': {REFUSED}"):
        EditRows(load_edit_dataset(file), "train", turns_column="turns").edit(0)


def test_stored_masks_stay_in_their_folder(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"id": "row 3", "file_name": "../secret.png"}) + "\n")
    with pytest.raises(ValueError, match=rf"masks, row row 3: {REFUSED}"):
        load_edit_dataset(table(folder), masks=folder)


def test_a_snapshot_of_the_hub_is_links_into_its_repository(tmp_path, folder):
    repository = tmp_path / "hub" / "datasets--me--edits"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("a.png", "mask.png", "edits.jsonl")):
        if name == "edits.jsonl":
            table(folder)
        os.replace(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert load_edit_dataset(str(snapshot / "edits.jsonl"))[0]["input_image"].size == (8, 8)
    (snapshot / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=REFUSED):
        check_inside(str(snapshot / "b.png"), [str(snapshot)], "here")


def test_what_datasets_downloaded_and_unpacked_may_be_named(tmp_path, folder):
    unpacked = tmp_path / "cache" / "downloads" / "extracted" / "123"
    unpacked.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(unpacked / "c.png")
    assert load_edit_dataset(table(folder, input_image=str(unpacked / "c.png")))[0]["input_image"].size == (8, 8)


def test_archives_are_files_and_what_is_far_away_is_not(folder):
    with zipfile.ZipFile(folder / "in.zip", "w") as archive:
        archive.write(folder / "a.png", "a.png")
    (folder.parent / "out.zip").write_bytes((folder / "in.zip").read_bytes())
    assert load_edit_dataset(table(folder, input_image=f"zip://a.png::{folder}/in.zip"))[0]["input_image"].size == (
        8,
        8,
    )
    with pytest.raises(ValueError, match=REFUSED):
        load_edit_dataset(table(folder, input_image=f"zip://a.png::{folder.parent}/out.zip"))[0]
    assert local_part("hf://datasets/me/edits/a.png") is None
    assert local_part("zip://a.png::hf://datasets/me/edits/a.zip") is None


@pytest.mark.parametrize("path", [9000 * "x", 300 * "deep/", "a\0b.png", "../" + 9000 * "x", 5000 * "QUJD"])
def test_what_is_no_path_is_said_shortly_by_row(folder, path):
    with pytest.raises(ValueError, match=r"column 'input_image': .*row 3|row row 3, column 'input_image'") as error:
        load_edit_dataset(table(folder, input_image=path))
    assert len(str(error.value)) < 800
