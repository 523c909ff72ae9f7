"""`data/presets.py`: what each known data set's own columns become, and what a user may say instead."""

import re

import pytest

from rcgrpo.data.masks import ENCODINGS
from rcgrpo.data.presets import CANONICAL, CUSTOM, PRESETS, REQUIRED, VIDEO_ID, Preset, find_preset, map_columns, read


def test_every_preset_is_sound():
    for preset in PRESETS.values():
        assert preset.columns.keys() <= set(CANONICAL) and set(REQUIRED) <= preset.columns.keys(), preset.name
        assert preset.mask in ENCODINGS
        assert len(set(preset.columns.values())) == len(preset.columns)
    assert len({preset.repo for preset in PRESETS.values() if preset.repo}) == 9
    named = "compbench magicbrush ultraedit humanedit piebench omniedit anyedit gedit editscore-rl edit-r1"
    assert " ".join(PRESETS) == named


def test_a_preset_is_found_by_name_or_by_its_hub_id():
    assert find_preset("humanedit").mask == "alpha"
    assert find_preset(None, "osunlp/MagicBrush") is PRESETS["magicbrush"]
    assert find_preset("compbench", "osunlp/MagicBrush") is PRESETS["compbench"]
    assert find_preset(None, "me/mine") is CUSTOM
    own = Preset("own", columns={"input_image": "a"})
    assert find_preset(own) is own
    with pytest.raises(ValueError, match=r"preset: got 'magicbrsh', expected one of compbench.*nearest: magicbrush"):
        find_preset("magicbrsh")


@pytest.mark.parametrize(
    ("path", "video"),
    [
        ("001ca3cb/0/00003.png", "001ca3cb"),
        ("02b72b8d_2_00016.png", "02b72b8d"),
        ("02b72b8d_00002.png", "02b72b8d"),
        ("turn1_add/02b72b8d_00002_t1.png", "02b72b8d"),
        ("00000.png", None),
        ("001ca3cbf/0.png", None),
    ],
)
def test_the_video_in_compbenchs_paths(path, video):
    found = re.search(VIDEO_ID, path)
    assert (found and found.group()) == video
    settled = map_columns(PRESETS["compbench"], ["task", "image_path", "input_image", "instruction"])
    assert settled.keys({"task": "add", "image_path": path}, "train/0") == (f"add/{path}", video or f"add/{path}")


def test_turns_of_one_pair_share_their_group():
    settled = map_columns(PRESETS["compbench"], ["task", "image_path", "input_image", "instruction"])
    rows = [
        {"task": f"multi_turn_{t}", "image_path": f"turn{i}_{t}/02b72b8d_00002_t{i}.png"}
        for i, t in ((1, "add"), (2, "remove"))
    ]
    names, groups = zip(*(settled.keys(row, "0") for row in rows), strict=True)
    assert len(set(names)) == 2 and set(groups) == {"02b72b8d"}


def test_a_users_columns_go_over_the_presets():
    available = ["source_img", "target_img", "instruction", "mask_img", "img_id", "turn_index", "note", "scene"]
    settled = map_columns(
        PRESETS["magicbrush"], available, {"instruction": "note", "group": "scene", "id": ["scene", "turn_index"]}
    )
    assert settled.fields == {
        "input_image": "source_img",
        "edited_image": "target_img",
        "mask": "mask_img",
        "instruction": "note",
    }
    assert settled.keys({"scene": 3, "turn_index": 1}, "0") == ("3/1", "3")


def test_canonical_names_are_found_without_a_preset_and_others_are_left_out():
    settled = map_columns(CUSTOM, ["input_image", "instruction", "caption", "other", "group"])
    assert settled.fields == {"input_image": "input_image", "instruction": "instruction", "caption": "caption"}
    assert settled.keys({"group": "g", "other": 1}, "train/7") == ("train/7", "g")
    assert settled.keys({"group": None}, "train/7") == ("train/7", "train/7")


def test_a_column_that_serves_as_the_source_is_not_also_image_path():
    settled = map_columns(PRESETS["piebench"], ["image_path", "editing_instruction", "mask", "key"])
    assert settled.fields == {"input_image": "image_path", "instruction": "editing_instruction", "mask": "mask"}


def test_a_dot_reaches_into_mappings():
    settled = map_columns(CUSTOM, ["src.png", "json"], {"input_image": "src.png", "instruction": "json.say.en"})
    row = {"src.png": b"", "json": {"say": {"en": "go"}}}
    assert read(row, settled.fields["instruction"]) == "go" and read(row, settled.fields["input_image"]) == b""


@pytest.mark.parametrize(
    ("available", "columns", "said"),
    [
        (
            ["a", "b"],
            {},
            r"set: got columns a, b, expected one for 'input_image'; say which with columns=\{'input_image'",
        ),
        (["input_image"], {}, "expected one for 'instruction'"),
        (["a"], {"inptu_image": "a"}, "columns: got the key 'inptu_image', expected one of .*nearest: input_image"),
        (["a"], {"input_image": "b"}, r"columns\['input_image'\]: got 'b', expected one column of set: a"),
        (["a", "b"], {"input_image": ["a", "b"]}, "expected one column of"),
        (["a"], {"input_image": "a", "instruction": "a"}, "columns: a of set is used more than once"),
        (
            ["a", "b"],
            {"input_image": "a", "instruction": "b", "id": []},
            r"columns\['id'\]: got \[\], expected columns of",
        ),
    ],
)
def test_a_wrong_map_is_answered_with_what_is_there(available, columns, said):
    with pytest.raises(ValueError, match=said):
        map_columns(CUSTOM, available, columns, "set")


def test_a_presets_missing_column_is_named():
    with pytest.raises(ValueError, match="preset 'omniedit' looks for 'src_img'"):
        map_columns(PRESETS["omniedit"], ["edited_prompt_list"])
