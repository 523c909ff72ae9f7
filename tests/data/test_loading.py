"""`data/loading.py`: every preset on rows as its owner stores them, streams, splits, missing masks, files."""

import io
import json
import logging
import pickle

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edit_rows import BOX, COLUMNS, REGION, SIZE, check, compbench, edited, photo, table, white_mask, write_pictures
from rcgrpo.data.edits import EditRows
from rcgrpo.data.loading import is_held_out, load_edit_dataset, parse_split, read_stored_masks
from rcgrpo.data.presets import CANONICAL
from rcgrpo.editors.make_masks import MaskFolder
from rcgrpo.groups.rollout import Exploration
from rcgrpo.groups.turns import join_turns, next_edit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def painted():
    """MagicBrush: the picture with white paint on it."""
    pixels = np.asarray(photo()).copy()
    pixels[REGION] = 255
    return Image.fromarray(pixels)


def cut_out():
    """HumanEdit: black and transparent where the edit is."""
    rgba = np.dstack([np.asarray(photo()), np.full(SIZE[::-1], 255, np.uint8)])
    rgba[REGION] = 0
    return Image.fromarray(rgba, "RGBA")


OWNERS = {
    "compbench": compbench(),
    "magicbrush": {
        "img_id": "139",
        "turn_index": 2,
        "source_img": photo(),
        "mask_img": painted(),
        "instruction": "edit 0",
        "target_img": edited(),
    },
    "ultraedit": {
        "source_image": photo(),
        "edited_image": edited(),
        "mask_image": white_mask(),
        "edit_prompt": "edit 0",
        "source_caption": "a room",
    },
    "humanedit": {
        "IMAGE_ID": "7",
        "EDITING_TYPE": "Remove",
        "CORE": 1,
        "MASK": 1,
        "EDITING_INSTRUCTION": "edit 0",
        "OUTPUT_DESCRIPTION": "a room",
        "INPUT_IMG": photo(),
        "MASK_IMG": cut_out(),
        "OUTPUT_IMG": edited(),
    },
    "omniedit": {
        "omni_edit_id": "task_obj_swap_1",
        "task": "swap",
        "src_img": photo(),
        "edited_img": edited(),
        "edited_prompt_list": ["edit 0", "edit nought"],
        "width": 16,
    },
    "anyedit": {
        "image_id": "c_1",
        "edit_instruction": "edit 0",
        "edit_type": "remove",
        "image_file": photo(),
        "edited_file": edited(),
        "visual_input": None,
        "input": "a room",
        "output": "an empty room",
    },
    "gedit": {
        "task_type": "ps_human",
        "key": "k1",
        "instruction": "edit 0",
        "instruction_language": "en",
        "input_image": photo(),
    },
    "editscore-rl": {"input_images": [photo(), photo(1)], "instruction": "edit 0"},
    "edit-r1": {"image": photo(), "prompt": "edit 0"},
}
KEYS = {
    "compbench": ("replace/00000000/0/00000.png", "00000000"),
    "magicbrush": ("139/2", "139"),
    "ultraedit": ("train/0", "train/0"),
    "humanedit": ("7/Remove", "7"),
    "omniedit": ("task_obj_swap_1",) * 2,
    "anyedit": ("c_1/remove", "c_1"),
    "gedit": ("k1/en", "k1"),
    "editscore-rl": ("train/0", "train/0"),
    "edit-r1": ("train/0", "train/0"),
}
SOURCES = dict.fromkeys(("compbench", "magicbrush", "ultraedit", "humanedit"), "own")
SOURCES |= dict.fromkeys(("omniedit", "anyedit"), "difference") | dict.fromkeys(
    ("gedit", "editscore-rl", "edit-r1"), "full"
)


def stored(row):
    """As `datasets` stores it: pictures as PNG bytes."""

    def feature(value):
        if isinstance(value, Image.Image):
            return ImageFeature()
        if isinstance(value, list):
            return List(feature(value[0]))
        return ImageFeature() if value is None else Value("int32" if isinstance(value, int) else "string")

    return Dataset.from_list([row], features=Features({key: feature(value) for key, value in row.items()}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("preset", OWNERS)
def test_every_preset_on_its_owners_columns(preset, streaming):
    data = load_edit_dataset(stored(OWNERS[preset]), preset, streaming=streaming)
    assert isinstance(data, IterableDataset if streaming else Dataset)
    row = next(iter(data))
    assert row["input_image"].mode == "RGB" and row["input_image"].tobytes() == photo().tobytes()
    assert row["instruction"] in ("edit 0", "edit nought")
    assert (row["id"], row["group"]) == KEYS[preset]
    assert row["mask"].mode == "L" and row["mask"].size == SIZE and row["mask_source"] == SOURCES[preset]
    inside = np.asarray(row["mask"]) == 255
    if SOURCES[preset] == "own":
        assert np.array_equal(inside, REGION)
    elif SOURCES[preset] == "difference":
        assert inside[3:7, 4:8].all() and inside.mean() < 0.5
    else:
        assert inside.all()
    assert ("edited_image" in row) == (SOURCES[preset] != "full")
    if "edited_image" in row:
        assert row["edited_image"].tobytes() == edited().tobytes()
    owner = {"source_img", "INPUT_IMG", "src_img", "image_file", "edit_prompt", "edited_prompt_list", "prompt"}
    assert not owner & row.keys()
    if not streaming:
        assert data.column_names[:2] == ["input_image", "instruction"]
        edit = EditRows(data, "train").edit(0)
        assert np.array_equal(edit.mask.numpy() == 1, inside) and edit.source.tobytes() == photo().tobytes()


def pie_bench(folder):
    runs = [value for y in range(100, 200) for value in (y * 512 + 50, 40)]
    picture = folder / "annotation_images" / "1_change_object_80" / "x.jpg"
    picture.parent.mkdir(parents=True)
    photo(3, (512, 512)).save(picture)
    row = {"image_path": "1_change_object_80/x.jpg", "editing_instruction": "edit it", "mask": runs}
    rows = {
        "000000000000": {
            **row,
            "original_prompt": "a",
            "editing_prompt": "b",
            "editing_type_id": "1",
            "blended_word": "",
        },
        "111000000001": {
            **row,
            "original_prompt": "a",
            "editing_prompt": "b",
            "editing_type_id": "8",
            "blended_word": "",
        },
    }
    (folder / "mapping_file.json").write_text(json.dumps(rows))
    region = np.zeros((512, 512), dtype=bool)
    region[100:200, 50:90] = True
    return region


@pytest.mark.parametrize("streaming", [False, True])
def test_pie_bench_from_its_mapping_file(tmp_path, streaming):
    region = pie_bench(tmp_path)
    rows = list(load_edit_dataset(tmp_path, "piebench", streaming=streaming))
    assert [row["id"] for row in rows] == ["000000000000", "111000000001"]
    assert [row["task"] for row in rows] == ["1", "8"] and rows[0]["instruction"] == "edit it"
    assert rows[0]["input_image"].size == (512, 512) and "image_path" not in rows[0]
    assert np.array_equal(np.asarray(rows[1]["mask"]) == 255, region)
    bordered = load_edit_dataset(tmp_path / "mapping_file.json", "piebench", mask_encoding="runs-border")
    with_border = np.asarray(bordered[0]["mask"]) == 255
    assert with_border[0].all() and np.array_equal(with_border[1:-1, 1:-1], region[1:-1, 1:-1])


def test_a_list_of_instructions_gives_the_same_one_every_time_and_all_of_them_over_rows():
    rows = [{**OWNERS["omniedit"], "omni_edit_id": f"x{i}", "edited_prompt_list": ["a", "b", "c"]} for i in range(30)]
    first, second = ([row["instruction"] for row in load_edit_dataset(rows, "omniedit")] for _ in range(2))
    assert first == second and set(first) == {"a", "b", "c"}


# Splits


@given(
    st.dictionaries(st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(1, 4), min_size=1),
    st.floats(0, 0.99),
)
@settings(max_examples=50, deadline=None)
def test_a_video_is_on_one_side_whatever_the_share(videos, share):
    sides = {(video, is_held_out(video, share)) for video, frames in videos.items() for _ in range(frames)}
    assert len(sides) == len(videos)
    assert all(
        is_held_out(video, 0.99) for video, held in sides if held
    )  # a larger share keeps what a smaller one held


def test_the_share_of_groups_is_about_what_was_asked_for():
    held = sum(is_held_out(f"{i:08x}", 0.2) for i in range(4000))
    assert 0.18 < held / 4000 < 0.22


@pytest.mark.parametrize("streaming", [False, True])
def test_train_and_held_out_share_no_video_and_lose_no_row(streaming):
    videos = [f"{7919 * i:08x}" for i in range(12)]
    paths = [f"{v}/0/{k}.png" for v in videos for k in "01"] + [f"turn1_add/{v}_00002_t1.png" for v in videos]
    paths += [f"{v}_2_00016.png" for v in videos]
    rows = [
        {"task": "add", "image_path": path, "input_image": photo(), "instruction": "go", "mask": white_mask()}
        for path in paths
    ]
    parts = {
        split: list(load_edit_dataset(rows, "compbench", split, held_out=0.4, streaming=streaming))
        for split in ("train", "held_out")
    }
    groups = {split: {row["group"] for row in part} for split, part in parts.items()}
    assert groups["train"] and groups["held_out"] and not groups["train"] & groups["held_out"]
    assert sorted(row["image_path"] for part in parts.values() for row in part) == sorted(paths)
    shuffled = load_edit_dataset(rows[::-1], "compbench", "held_out", held_out=0.4)
    assert set(shuffled["group"]) == groups["held_out"]


def test_the_held_out_part_of_another_split():
    assert parse_split("multi_turn:held_out", 0.1) == ("multi_turn", True)
    assert parse_split("held_out", 0.1) == ("train", True)
    assert parse_split("multi_turn", 0.1) == ("multi_turn", False)
    rows = {
        "train": Dataset.from_list([compbench(0)]),
        "multi_turn": Dataset.from_list([compbench(i) for i in range(40)]),
    }
    held = load_edit_dataset(rows, "compbench", "multi_turn:held_out", held_out=0.3)
    kept = load_edit_dataset(rows, "compbench", "multi_turn", held_out=0.3)
    assert len(held) + len(kept) == 40 and not set(held["group"]) & set(kept["group"])
    assert {is_held_out(group, 0.3) for group in held["group"]} == {True}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "held_out"}, "split: got 'held_out' with held_out=0, expected the share"),
        ({"held_out": 1.0}, r"held_out: got 1.0, expected a share of the groups in \[0, 1\)"),
        ({"on_missing": "ful"}, "on_missing: got 'ful', expected one or several of difference, full, drop, error"),
        ({"mask_encoding": "png"}, "mask_encoding: got 'png', expected one of luma"),
        ({"preset": "compbnch"}, "preset: got 'compbnch'"),
        ({"columns": {"input_image": "nope"}}, r"columns\['input_image'\]: got 'nope'"),
        ({"mask_growth": 2}, "mask_growth: got 2, expected a share"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        load_edit_dataset([compbench()], **arguments)[0]


def test_rows_that_nothing_groups_are_split_one_by_one_and_it_is_said(caplog):
    rows = [{"image": photo(), "prompt": "go"} for _ in range(30)]
    data = load_edit_dataset(rows, "edit-r1", held_out=0.5)
    assert 0 < len(data) < 30 and "no column says which rows belong together" in caplog.text
    with pytest.raises(ValueError, match="a stream whose rows have neither a group nor an id"):
        load_edit_dataset(rows, "edit-r1", held_out=0.5, streaming=True)


def test_training_on_a_benchmark_is_remarked_on(caplog, tmp_path):
    rows = Dataset.from_list([compbench()])
    DatasetDict(train=rows, multi_turn=rows).save_to_disk(str(tmp_path / "set"))
    load_edit_dataset(tmp_path / "set", "compbench")
    assert "pass held_out=0.1 for training" in caplog.text
    caplog.clear()
    load_edit_dataset(tmp_path / "set", "compbench", split="multi_turn")
    assert "benchmark" not in caplog.text


# Missing masks


def with_and_without():
    empty = Image.new("L", SIZE)
    features = Features(
        {
            key: ImageFeature() if key in ("input_image", "edited_image", "mask") else Value("string")
            for key in compbench()
        }
    )
    rows = [
        compbench(0),
        compbench(1, mask=None),
        compbench(2, mask=empty),
        compbench(3, mask=None, edited_image=None),
    ]
    return Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("policy", "sources"),
    [
        (None, ["own", "difference", "difference", "full"]),
        ("full", ["own", "full", "full", "full"]),
        ("drop", ["own"]),
        (("difference", "drop"), ["own", "difference", "difference"]),
    ],
)
def test_what_stands_in_for_a_missing_or_empty_mask(policy, sources, streaming):
    settings = {} if policy is None else {"on_missing": policy}
    data = load_edit_dataset(with_and_without(), "compbench", streaming=streaming, **settings)
    rows = list(data)
    assert [row["mask_source"] for row in rows] == sources
    for row in rows:
        inside = np.asarray(row["mask"]) == 255
        assert inside.all() if row["mask_source"] == "full" else inside[3:7, 4:8].all() and inside.mean() < 0.5
    if not streaming:
        assert len(data) == len(sources) and data.format["format_kwargs"]["transform"].missing == 2


@pytest.mark.parametrize("policy", ["error", "difference"])
def test_a_mask_that_nothing_stands_in_for_names_the_row_and_the_ways_out(policy):
    data = load_edit_dataset(with_and_without(), "compbench", on_missing=policy)
    rows = EditRows(data, "train")
    with pytest.raises(ValueError, match=r"train row 3, column 'mask': there is no mask.*rcgrpo data masks.*`masks`"):
        rows.edit(3)
    with pytest.raises(ValueError, match=r"data set train, row replace/00000001/0/00003.png, column 'mask'"):
        data[3]


def test_each_fallback_is_counted_by_row_and_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        data = load_edit_dataset(with_and_without(), "compbench")
        assert "2 of 4 rows have no mask; instead: difference, else full" in caplog.text
        caplog.clear()
        for _ in range(2):
            list(data)
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(said) == 2 and "difference between source and target" in said[0] and "region constraint is off" in said[1]
    )
    transform = data.format["format_kwargs"]["transform"]
    assert transform.fallbacks.counts == {"difference": 2, "full": 1}
    again = pickle.loads(pickle.dumps(transform))  # what was seen must not change the names of caches
    assert again == transform and again.fallbacks.counts == {}


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="no rows are left, expected at least one"):
        load_edit_dataset([compbench(0, mask=None)], "compbench", on_missing="drop")


def test_growth_and_feather_apply_to_every_mask():
    data = load_edit_dataset([compbench(0)], "compbench", mask_growth=0.1, mask_feather=0.2)
    mask = np.asarray(data[0]["mask"])
    assert (mask[1:9, 2:10] == 255).all() and 0 < mask[9, 5] < 255 and not mask[11:, :].any()


def test_one_column_alone_is_decoded_as_far_as_it_goes():
    data = load_edit_dataset(with_and_without(), "compbench")
    assert data["instruction"][1] == "edit 1" and data["mask"][1].mode == "L"
    alone = data.select_columns(["mask"])
    assert alone[1]["mask"] is None and np.array_equal(np.asarray(alone[0]["mask"]) == 255, REGION)


def test_it_survives_what_users_do_with_a_dataset():
    data = load_edit_dataset([compbench(i) for i in range(6)], "compbench")
    changed = (
        data.shuffle(seed=1).select(range(4)).filter(lambda name: not name.endswith("0.png"), input_columns=["id"])
    )
    assert 0 < len(changed) <= 4 and all(row["mask_source"] == "own" for row in changed)
    assert EditRows(changed, "train").edit(0).columns["mask_source"] == "own"


# Files and folders


def test_a_dot_reaches_into_one_mapping_and_leaves_others_whole():
    inside = REGION.T.ravel().view(np.int8)
    counts = np.diff([0, *(np.flatnonzero(np.diff(inside)) + 1), inside.size]).tolist()
    mask = {"size": list(REGION.shape), "counts": counts}
    rows = [{"src": photo(i), "meta": {"say": {"en": f"edit {i}"}}, "region": mask} for i in range(3)]
    columns = {"input_image": "src", "instruction": "meta.say.en", "mask": "region"}
    for streaming in (False, True):
        check(load_edit_dataset(rows, columns=columns, mask_encoding="rle", streaming=streaming))


def test_rows_taken_from_a_stream_can_be_trained_on():
    stream = load_edit_dataset(with_and_without(), "compbench", streaming=True)
    taken = EditRows(Dataset.from_list(list(stream.take(2))), "train")
    assert taken.edit(0).mask.sum() == REGION.sum() and taken.edit(1).columns["mask_source"] == "difference"


def test_boxes_and_coco_masks_through_a_column_map(tmp_path):
    write_pictures(tmp_path / "p")
    lines = [{**line, "region": [[BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1]]]} for line in table()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check(load_edit_dataset(tmp_path / "a.jsonl", columns=COLUMNS, mask_encoding="boxes-xywh"), "v")
    inside = REGION.T.ravel().view(np.int8)
    counts = np.diff([0, *(np.flatnonzero(np.diff(inside)) + 1), inside.size]).tolist()
    lines = [{**line, "region": {"size": list(REGION.shape), "counts": counts}} for line in table()]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check(load_edit_dataset(tmp_path / "b.jsonl", columns=COLUMNS, mask_encoding="rle"), "v")


def test_a_column_in_the_way_gives_way_to_the_one_that_is_asked_for():
    rows = [{"src": photo(0), "instruction": "global words", "say": "edit 0", "mask": white_mask(), "id": 5}]
    data = load_edit_dataset(rows, columns={"input_image": "src", "instruction": "say"})
    assert data[0]["instruction"] == "edit 0" and data[0]["id"] == "5"
    assert set(data.column_names) <= set(CANONICAL)


def test_a_picture_that_cannot_be_read_is_named_by_row_and_column(tmp_path):
    write_pictures(tmp_path / "p")
    (tmp_path / "p" / "src0.png").write_bytes(photo_bytes()[:60])
    (tmp_path / "a.jsonl").write_text(json.dumps(table()[0]))
    data = load_edit_dataset(tmp_path / "a.jsonl", columns=COLUMNS)
    with pytest.raises(ValueError, match=r"train row 0, column 'input_image': got .*p/src0.png', expected a picture"):
        EditRows(data, "train").edit(0)


def photo_bytes():
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    return buffer.getvalue()


def test_paths_that_lead_nowhere_are_found_at_loading_and_root_says_where_else(tmp_path):
    write_pictures(tmp_path / "elsewhere" / "p")
    (tmp_path / "elsewhere" / "p" / "mask1.png").unlink()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, table())))
    with pytest.raises(
        ValueError, match=rf"column 'src': 3 of 3 files are not there, first 'p/src0.png' .* {tmp_path}:"
    ):
        load_edit_dataset(path, columns=COLUMNS)
    with pytest.raises(
        ValueError, match=r"column 'region': 1 of 3 files are not there, first 'p/mask1.png' of row train/1"
    ):
        load_edit_dataset(path, columns=COLUMNS, root=tmp_path / "elsewhere")
    write_pictures(tmp_path / "elsewhere" / "p")
    check(load_edit_dataset(path, columns=COLUMNS, root=tmp_path / "elsewhere"))
    lines = [
        {**line, "src": str(tmp_path / "elsewhere" / line["src"])} for line in table()
    ]  # absolute, whatever the root
    lines = [{**line, "region": str(tmp_path / "elsewhere" / line["region"])} for line in lines]
    path.write_text("\n".join(map(json.dumps, lines)))
    check(load_edit_dataset(path, columns=COLUMNS, root="/nowhere"))


# Odd pictures


def one(tmp_path, **columns):
    """A JSONL file of one row with pictures by path, and its only row."""
    line = {"instruction": "edit 0"}
    for name, (suffix, image, options) in columns.items():
        image.save(tmp_path / f"{name}.{suffix}", **options)
        line[name] = f"{name}.{suffix}"
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    return load_edit_dataset(tmp_path / "a.jsonl")[0]


def test_a_cmyk_jpeg_and_a_16_bit_mask(tmp_path):
    sixteen = Image.fromarray(REGION.astype(np.uint16) * 65535)
    row = one(tmp_path, input_image=("jpg", photo().convert("CMYK"), {"quality": 95}), mask=("png", sixteen, {}))
    assert row["input_image"].mode == "RGB" and row["mask_source"] == "own"
    assert np.abs(np.asarray(row["input_image"]).astype(int).mean() - np.asarray(photo()).mean()) < 3
    assert np.array_equal(np.asarray(row["mask"]) == 255, REGION)


def test_a_turned_photograph_is_upright_and_a_mask_of_the_file_as_stored_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    columns = {"input_image": ("png", turned, {"exif": exif})}
    row = one(tmp_path, **columns, mask=("png", white_mask(), {}))
    assert row["input_image"].tobytes() == photo().tobytes() and np.array_equal(np.asarray(row["mask"]) == 255, REGION)
    with pytest.raises(ValueError, match=r"column 'mask': got a mask of width × height \(12, 16\), .*the orientation"):
        one(tmp_path, **columns, mask=("png", white_mask().transpose(Image.Transpose.ROTATE_90), {}))


def test_a_mask_of_another_size_is_fitted_or_refused(tmp_path):
    twice = white_mask().resize((32, 24), Image.Resampling.NEAREST)
    columns = {"input_image": ("png", photo(), {})}
    assert np.array_equal(np.asarray(one(tmp_path, **columns, mask=("png", twice, {}))["mask"]) == 255, REGION)
    with pytest.raises(ValueError, match=r"row train/0, column 'mask': got a mask of width × height \(20, 20\)"):
        one(tmp_path, **columns, mask=("png", Image.new("L", (20, 20), 255), {}))


def test_a_palette_with_transparency(tmp_path):
    picture = Image.new("P", SIZE, 1)
    picture.putpalette([9, 9, 9, 200, 30, 30])
    picture.paste(0, BOX)
    row = one(tmp_path, input_image=("png", picture, {"transparency": 0}), mask=("png", white_mask(), {}))
    assert (np.asarray(row["input_image"])[REGION] == 255).all()
    assert (np.asarray(row["input_image"])[~REGION] == (200, 30, 30)).all()


@pytest.mark.parametrize("value", ["", None, {"bytes": None, "path": None}])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_way_to_say_that_there_is_no_mask(value, streaming):
    rows = [{"input_image": photo(), "instruction": "x", "mask": value, "edited_image": value} for _ in range(2)]
    data = load_edit_dataset(rows, streaming=streaming)
    assert [row["mask_source"] for row in data] == ["full", "full"]
    assert streaming or data.format["format_kwargs"]["transform"].missing == 2
    assert next(iter(data))["edited_image"] is None


@pytest.mark.parametrize("instruction", [5, None, " ", []])
def test_an_instruction_that_is_no_text_is_named(instruction):
    data = load_edit_dataset([{"input_image": photo(), "instruction": instruction, "mask": white_mask()}])
    with pytest.raises(ValueError, match=r"row train/0, column 'instruction': got .*, expected a text; fill it in"):
        data[0]


def test_a_row_without_a_source_is_named():
    rows = [{"input_image": picture, "instruction": "x", "mask": white_mask()} for picture in (photo(), None)]
    data = load_edit_dataset(rows)
    with pytest.raises(
        ValueError, match=r"row train/1, column 'input_image': got None, expected a picture; fill it in"
    ):
        data[1]


@pytest.mark.parametrize("high", [1, 7])
def test_labels_are_refused_unless_they_are_said_to_be_one_region(high):
    labels = REGION.astype(np.uint8) * np.uint8(high)
    labels[0, 0] = 9
    rows = [{"input_image": photo(), "instruction": "x", "mask": Image.fromarray(labels)}]
    with pytest.raises(ValueError, match=r"train/0, column 'mask': got .* brightest is 9 of 255, .*'nonzero'"):
        load_edit_dataset(rows)[0]
    mask = load_edit_dataset(rows, mask_encoding="nonzero")[0]["mask"]
    assert np.array_equal(np.asarray(mask) == 255, labels > 0)


def test_a_field_that_is_not_in_a_mapping_is_named():
    rows = [{"src": photo(i), "meta": {"say": "x"}} for i in range(2)]
    with pytest.raises(ValueError, match="columns: got 'text', expected one of say"):
        load_edit_dataset(rows, columns={"input_image": "src", "instruction": "meta.text"})


def test_stored_masks_come_before_the_fallbacks(tmp_path):
    stored_mask = Image.new("L", SIZE)
    stored_mask.paste(255, (0, 0, 2, 2))
    stored_mask.save(tmp_path / "x.png")
    line = {"file_name": "x.png", "id": "replace/00000000/0/00001.png", "method": "velocity"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    data = load_edit_dataset(with_and_without(), "compbench", masks=tmp_path)
    assert [row["mask_source"] for row in data] == ["own", "stored", "difference", "full"]
    assert (np.asarray(data[1]["mask"]) == 255).sum() == 4
    with pytest.raises(FileNotFoundError, match=r"without metadata.jsonl, expected a folder of `rcgrpo data masks`"):
        load_edit_dataset(with_and_without(), "compbench", masks=tmp_path / "none")
    with pytest.raises(ValueError, match=r"the ids of .* repeat"):
        load_edit_dataset([compbench(0), compbench(0)], "compbench", masks=tmp_path)
    assert load_dataset("imagefolder", data_dir=str(tmp_path), split="train")[0]["id"] == line["id"]


def test_paths_of_regions_and_turns_start_at_the_file_wherever_one_is(tmp_path, monkeypatch):
    """Written beside the file, read from somewhere else; a labelled picture keeps its numbers."""
    (tmp_path / "data").mkdir()
    labels = np.zeros(SIZE[::-1], np.uint8)
    labels[:4], labels[8:] = 1, 2
    white_mask().save(tmp_path / "data" / "mask.png")
    photo().save(tmp_path / "data" / "photo.png")
    Image.fromarray(labels).save(tmp_path / "data" / "labels.png")
    row = {"input_image": "photo.png", "instruction": "one", "mask": "mask.png"}
    turn = {"instruction": "two", "mask": "mask.png", "parts": ["mask.png", "mask.png"]}
    rows = [{**row, "parts": "labels.png", "turns": [turn]}, {**row, "parts": "labels.png", "turns": [turn, turn]}]
    path = tmp_path / "data" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    edit = EditRows(load_edit_dataset(path), "train", labels_column="parts", turns_column="turns").edit(1)
    assert np.array_equal(edit.columns["parts"], labels)
    assert [turn["instruction"] for turn in edit.columns["turns"]] == ["two", "two"]
    masks = Exploration(regions_column="parts").masks
    assert np.array_equal(masks(edit)[1], labels == 2)
    following = next_edit(edit, edit.source, "turns", 2, "parts")
    assert np.array_equal(following.mask, REGION) and masks(following).shape == (2, *REGION.shape)
    joined = join_turns(edit, "turns")
    assert len(joined.columns["regions"]) == 3 and np.array_equal(joined.mask, REGION)


def test_a_list_of_mask_paths_is_a_region_each_and_a_wrong_one_is_named(tmp_path):
    white_mask().save(tmp_path / "mask.png")
    photo().save(tmp_path / "photo.png")
    row = {"input_image": "photo.png", "instruction": "one", "mask": "mask.png", "parts": ["mask.png", "mask.png"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, {**row, "parts": ["mask.png", "none.png"]})))
    rows = EditRows(load_edit_dataset(path), "train", labels_column="parts")
    assert Exploration(regions_column="parts").masks(rows.edit(0)).shape == (2, *REGION.shape)
    with pytest.raises(ValueError, match=r"train row 1, column 'parts': got '.*none.png', expected a picture"):
        rows.edit(1)


# Lines, formats and transforms


SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
"""What `str.splitlines` takes for ends of lines, and JSON does not escape."""


def test_json_lines_end_at_newlines_alone(tmp_path):
    photo().save(tmp_path / "a.png")
    white_mask().save(tmp_path / "m.png")
    rows = [
        {"input_image": "a.png", "instruction": SEPARATORS, "mask": "m.png", "id": f"{SEPARATORS} {i}"} for i in (0, 1)
    ]
    (tmp_path / "edits.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline=""
    )
    data = load_edit_dataset(str(tmp_path / "edits.jsonl"))
    assert len(data) == 2 and data[1]["instruction"] == SEPARATORS

    folder = MaskFolder(tmp_path / "masks", "difference")
    for row in data:
        folder.add(row, white_mask())
    folder.skip({"id": f"{SEPARATORS} 2"}, SEPARATORS)
    again = MaskFolder(tmp_path / "masks", "difference")
    assert again.made == {row["id"] for row in rows} and again.skipped == {f"{SEPARATORS} 2": SEPARATORS}
    assert set(read_stored_masks(tmp_path / "masks")) == again.made
    metadata = tmp_path / "masks" / "metadata.jsonl"
    metadata.write_bytes(metadata.read_bytes()[:-40])  # killed while it wrote, perhaps within a character
    assert MaskFolder(tmp_path / "masks", "difference").made == {rows[0]["id"]}


def test_a_transform_of_the_users_own_is_not_replaced_unsaid():
    data = Dataset.from_list([{"input_image": photo(), "instruction": "x", "mask": white_mask()}])
    with pytest.raises(ValueError, match=r"data set train: got rows with a transform of your own .*apply it with"):
        load_edit_dataset(data.with_transform(lambda batch: batch))
    for form in ("numpy", "torch"):
        assert load_edit_dataset(data.with_format(form))[0]["input_image"].tobytes() == photo().tobytes()
    assert load_edit_dataset(load_edit_dataset(data))[0]["instruction"] == "x"
