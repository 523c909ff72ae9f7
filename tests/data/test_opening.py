"""`data/opening.py`: rows from files, folders and archives, as users have them."""

import io
import json
import tarfile

import pytest
from datasets import Dataset

from edit_rows import COLUMNS, check, compbench, photo, table, white_mask, write_pictures
from rcgrpo.data.loading import load_edit_dataset
from rcgrpo.data.opening import is_one_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_table_with_paths_relative_to_it(tmp_path, suffix, streaming):
    write_pictures(tmp_path / "p")
    path = tmp_path / f"edits.{suffix}"
    rows = Dataset.from_list(table())
    if suffix == "parquet":
        rows.to_parquet(str(path))
    elif suffix == "csv":
        rows.to_csv(str(path))
    else:
        rows.to_json(str(path), lines=suffix == "jsonl")
    check(load_edit_dataset(path, columns=COLUMNS, streaming=streaming), "v")
    check(load_edit_dataset(tmp_path, columns=COLUMNS, streaming=streaming), "v")  # the only table of its folder
    check(load_edit_dataset(str(tmp_path / f"*.{suffix}"), columns=COLUMNS, streaming=streaming), "v")
    sliced = load_edit_dataset(path, columns=COLUMNS, split="train[1:]") if not streaming else None
    assert sliced is None or sliced["instruction"][:] == ["edit 1", "edit 2"]


def test_parquet_with_pictures_in_it(tmp_path):
    rows = [{"src": photo(i), "region": white_mask(), "say": f"edit {i}", "video": f"v{i}"} for i in range(3)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    check(load_edit_dataset(tmp_path / "a.parquet", columns=COLUMNS), "v")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_imagefolder_with_metadata(tmp_path, streaming):
    write_pictures(tmp_path / "set" / "train")
    lines = [
        {"input_image_file_name": f"src{i}.png", "mask_file_name": f"mask{i}.png", "instruction": f"edit {i}"}
        for i in range(3)
    ]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check(load_edit_dataset(tmp_path / "set", streaming=streaming))


def test_a_metadata_file_that_names_no_files_is_a_table(tmp_path):
    write_pictures(tmp_path / "p")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table())))
    check(load_edit_dataset(tmp_path, columns=COLUMNS))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_archives(tmp_path, streaming):
    for shard in range(3):
        with tarfile.open(tmp_path / f"edits-{shard:03d}.tar", "w") as tar:
            record = json.dumps({"say": f"edit {shard}", "video": f"v{shard}"}).encode()
            for end, content in (("src.png", png(photo(shard))), ("region.png", png(white_mask())), ("json", record)):
                info = tarfile.TarInfo(f"{shard:05d}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    columns = {
        "input_image": "src.png",
        "mask": "region.png",
        "instruction": "json.say",
        "group": "json.video",
        "id": "__key__",
    }
    data = load_edit_dataset(tmp_path, columns=columns, streaming=streaming)
    check(data, "v")
    assert [row["id"] for row in data] == ["00000", "00001", "00002"]


def test_what_datasets_saved(tmp_path):
    rows = [{"src": photo(i), "region": white_mask(), "say": f"edit {i}", "video": f"v{i}"} for i in range(3)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    check(load_edit_dataset(tmp_path / "one", columns=COLUMNS), "v")


def test_unknown_files_and_splits_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ending in '.txt', expected one of .jsonl, .json"):
        load_edit_dataset(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"name_or_path: got .*0 files"):
        load_edit_dataset(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match="split: got 'dev', expected one of train"):
        load_edit_dataset({"train": Dataset.from_list([compbench()])}, "compbench", "dev")


def test_a_single_table_has_one_split(tmp_path):
    write_pictures(tmp_path / "p")
    text = "\n".join(map(json.dumps, table()))
    (tmp_path / "edits.jsonl").write_text(text)
    Dataset.from_list([{"src": photo(0), "say": "x"}]).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "edits.jsonl", tmp_path, tmp_path / "saved", str(tmp_path / "*.jsonl")):
        assert is_one_table(source)
        with pytest.raises(ValueError, match=r"split: got 'test' of .*, expected 'train', as one table has no other.*"):
            load_edit_dataset(source, split="test", columns=COLUMNS)
    with pytest.raises(ValueError, match="split: got 'test'"):
        load_edit_dataset(tmp_path, split="test", held_out=0.5, columns=COLUMNS)
    (tmp_path / "edits.jsonl").rename(tmp_path / "test.jsonl")  # a folder's tables may be splits by their names
    assert not is_one_table(tmp_path) and not is_one_table("owner/name")
    check(load_edit_dataset(tmp_path, split="test", columns=COLUMNS), "v")
    with pytest.raises(ValueError, match='Unknown split "train"'):
        load_edit_dataset(tmp_path, columns=COLUMNS)


# What users do to names


@pytest.mark.parametrize("folder", ["a set", "Bilder für später", "v1 [old]", "100% #1", "what?", "a*b", "{x}"])
def test_any_name_of_a_folder_or_file_will_do(tmp_path, folder):
    place = tmp_path / folder
    write_pictures(place / "p")
    for i in range(3):
        (place / "p" / f"src{i}.png").rename(place / "p" / f"[{i}] é #%20 ?.png")
    lines = [{**line, "src": f"p/[{i}] é #%20 ?.png"} for i, line in enumerate(table())]
    path = place / f"{folder}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for source in (path, place):
        check(load_edit_dataset(source, columns=COLUMNS), "v")
    check(load_edit_dataset(path, columns=COLUMNS, streaming=True), "v")


@pytest.mark.parametrize("folder", ["a set", "v1 [old]", "100% #1"])
def test_any_name_of_an_imagefolder_will_do(tmp_path, folder):
    write_pictures(tmp_path / folder)
    lines = [
        {"input_image_file_name": f"src{i}.png", "mask_file_name": f"mask{i}.png", "instruction": f"edit {i}"}
        for i in range(3)
    ]
    (tmp_path / folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check(load_edit_dataset(tmp_path / folder))


def test_a_name_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("datasets.load_dataset", ask)
    for name in ("edits.jsonl", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"name_or_path: got '.*', expected a file or folder that is there"):
            load_edit_dataset(name)


@pytest.mark.parametrize(
    ("suffix", "content", "builder"),
    [
        ("jsonl", "no table", "json"),
        ("jsonl", "", "json"),
        ("csv", "a,b\n1,2\n1,2,3\n", "csv"),
        ("parquet", "no table", "parquet"),
        ("tar", "no table", "webdataset"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, suffix, content, builder):
    (tmp_path / f"edits.{suffix}").write_text(content)
    with pytest.raises(
        ValueError, match=rf"edits.{suffix}: got a file that cannot be read as {builder}, expected rows"
    ):
        load_edit_dataset(tmp_path / f"edits.{suffix}")


def test_an_empty_folder_and_a_hub_that_cannot_be_reached_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"name_or_path: got the folder .*, expected a table, archives, or"):
        load_edit_dataset(tmp_path)

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=r"name_or_path: got 'me/mine', expected .* you can reach \(no route\)"):
        load_edit_dataset("me/mine")


def test_parquet_with_structs_of_bytes_that_know_nothing_of_datasets(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def struct(image):
        return {"bytes": None if image is None else png(image), "path": None}

    def write(last):
        rows = [{"src": struct(photo(i)), "region": struct(white_mask()), "say": f"edit {i}"} for i in range(3)]
        rows[2]["region"] = struct(last)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        columns = {key: value for key, value in COLUMNS.items() if key != "group"}
        return load_edit_dataset(tmp_path / "a.parquet", columns=columns, cache_dir=str(tmp_path / str(last)))

    check(write(white_mask()))
    lacking = write(None)
    assert lacking.format["format_kwargs"]["transform"].missing == 1
    assert [row["mask_source"] for row in lacking] == ["own", "own", "full"]
