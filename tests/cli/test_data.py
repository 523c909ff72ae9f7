"""`cli/data.py`: the sheet is really drawn, the counts are right, masks are made once."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from rcgrpo.cli.data import VERBS, InspectArguments, MaskArguments, _maker, run, tint
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data.canonical import CanonicalRows
from rcgrpo.data.loading import load_edit_dataset

SIZE = (48, 32)
BOX = (8, 8, 28, 24)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save(count=6, without=(1, 4), name="set"):
    """A CompBench of small grey pictures on disk: even rows add, odd ones remove, two rows share a video."""
    rows = []
    for i in range(count):
        source, target, mask = (
            Image.new("RGB", SIZE, "#808080"),
            Image.new("RGB", SIZE, "#808080"),
            Image.new("L", SIZE),
        )
        target.paste((0, 0, 255), BOX)
        mask.paste(255, BOX)
        row = {"task": ("add", "remove")[i % 2], "image_path": f"{i // 2:08x}/0/{i:05d}.png", "input_image": source}
        row |= {"edited_image": target, "instruction": f"remove thing {i}", "mask": None if i in without else mask}
        rows.append(row)
    pictures = ("input_image", "edited_image", "mask")
    features = Features({key: ImageFeature() if key in pictures else Value("string") for key in rows[0]})
    Dataset.from_list(rows, features=features).save_to_disk(name)
    return name


def counts(out):
    return dict(re.findall(r"^  (\w[\w ]*?)  +(.+)$", out, re.MULTILINE))


def pink(picture):
    array = np.asarray(picture).astype(int)
    return (array[..., 0] - array[..., 1] > 25) & (array[..., 2] - array[..., 1] > 5)


def test_the_region_is_tinted_and_outlined_and_the_rest_is_untouched():
    mask = Image.new("L", SIZE)
    mask.paste(255, BOX)
    shown = tint(Image.new("RGB", SIZE, "#808080"), mask)
    inside = np.asarray(mask) == 255
    ring = np.zeros_like(inside)
    ring[BOX[1] - 1 : BOX[3] + 1, BOX[0] - 1 : BOX[2] + 1] = True
    assert np.array_equal(pink(shown), ring)
    values = np.asarray(shown).astype(int)
    assert (values[~ring] == 128).all()
    assert (values[ring & ~inside] == (255, 45, 120)).all()  # the line is opaque
    assert (values[inside] == values[BOX[1], BOX[0]]).all() and 128 < values[BOX[1], BOX[0], 0] < 255


def test_inspect_draws_a_sheet_and_counts(capsys):
    run(["inspect", save(), "--preset", "compbench", "--num_samples", "3", "--output", "a/sheet.png", "--cell", "96"])
    said = counts(capsys.readouterr().out)
    assert said["rows"] == "6 rows" and said["groups"] == "3" and said["tasks"] == "add 3, remove 3"
    assert said["no mask"] == "2 of 6 rows (33.3%)" and said["masks shown"] == "own 2, difference 1"
    assert re.fullmatch(r"2\d\.\d% of the picture on average, 20.8% to 2\d\.\d%", said["region"])
    assert said["change"] == "100% of it in the region on average"  # the mask that came from the change does not count
    sheet = Image.open("a/sheet.png")
    assert sheet.mode == "RGB" and sheet.width >= 2 * 96 and sheet.height >= 3 * 96
    drawn = pink(sheet)
    columns = np.flatnonzero(drawn.any(0))
    assert drawn.sum() > 3 * 0.2 * 48 * 32 * 3 and columns.max() < 16 + 96  # in the source's column alone
    array = np.asarray(sheet).astype(int)
    blue = (array[..., 2] > 200) & (array[..., :2].max(-1) < 80)
    assert blue.sum() > 3 * 0.2 * 48 * 32 * 3 and np.flatnonzero(blue.any(0)).min() > 16 + 96  # the target's
    ink = (array.max(-1) < 140) & (np.ptp(array, axis=-1) < 25)
    assert ink[:, :112].any(1).sum() > 30  # words below the pictures


def test_inspect_points_out_masks_that_miss_the_change(capsys, monkeypatch):
    captions = []
    monkeypatch.setattr("rcgrpo.reporting.sheets.contact_sheet", lambda columns, names, *rest: captions.extend(names))
    rows = load_edit_dataset(save(without=()), "compbench").with_format(None)

    def move(row, i):
        corner = (28, 8, 48, 24) if i == 2 else BOX
        mask = Image.new("L", SIZE)
        mask.paste(255, corner)
        return {"mask": mask}

    rows.map(move, with_indices=True).save_to_disk("moved")
    run(["inspect", "moved", "--num_samples", "6"])
    said = counts(capsys.readouterr().out)
    assert said["change"].startswith("83% of it in the region on average; below half in 1 of 6 rows")
    assert [name.endswith("(0% of the change in the mask)") for name in captions] == [i == 2 for i in range(6)]


def test_inspect_goes_on_without_what_compares_masks_with_the_change(capsys, monkeypatch):
    folder = save(without=())
    monkeypatch.setitem(sys.modules, "scipy", None)
    run(["inspect", folder, "--preset", "compbench", "--num_samples", "2"])
    said = counts(capsys.readouterr().out)
    assert said["masks shown"] == "own 2" and said["change"].endswith("pip install 'rcgrpo[masks]'")


def test_inspect_counts_empty_masks_among_the_rows_shown(capsys):
    rows = load_edit_dataset(save(6), "compbench").with_format(None)
    black = {"mask": Image.new("L", SIZE)}
    rows.map(lambda row, i: black if i in (0, 3) else row, with_indices=True).save_to_disk("black")
    run(["inspect", "black", "--num_samples", "4"])
    assert counts(capsys.readouterr().out)["no mask"] == "2 of 6 rows (33.3%); an empty one in 2 of the 4 shown"


def test_inspect_without_targets_shows_the_source_alone(capsys):
    save()
    rows = load_edit_dataset("set", "compbench").with_format(None).remove_columns("edited_image")
    rows.save_to_disk("alone")
    run(["inspect", "alone", "--num_samples", "2", "--cell", "96"])
    said = counts(capsys.readouterr().out)
    assert said["masks shown"] == "own 2" and "change" not in said
    assert Image.open("sheet.png").width < 2 * 96


def test_inspect_a_stream_says_what_it_has_seen(capsys):
    run(["inspect", save(), "--preset", "compbench", "--num_samples", "4", "--streaming", "true"])
    said = counts(capsys.readouterr().out)
    assert said["rows"] == "the first 4 rows of a stream" and said["groups"] == "2" and "no mask" not in said


def test_inspect_reads_columns_from_flags_and_holds_out(capsys):
    rows = load_edit_dataset(save(24), "compbench").with_format(None)
    rows = rows.select_columns(["input_image", "instruction", "mask", "group"])
    rows.rename_columns({"input_image": "src", "instruction": "say", "mask": "m", "group": "video"}).save_to_disk("own")
    flags = ["--columns", "input_image=src", "instruction=say", "mask=m", "group=video", "id=video,say"]
    totals = 0
    for split in ("train", "held_out"):
        run(["inspect", "own", *flags, "--split", split, "--held_out", "0.5", "--num_samples", "1"])
        totals += int(counts(capsys.readouterr().out)["rows"].split()[0])
    assert totals == 24


def test_inspect_the_embedded_set(capsys, monkeypatch):
    from rcgrpo.data import compbench_mini

    monkeypatch.setattr("rcgrpo.data.compbench_mini", lambda split: compbench_mini(split, 6))
    run(["inspect", "compbench-mini", "--split", "test", "--num_samples", "2"])
    said = counts(capsys.readouterr().out)
    assert said["rows"] == "6 rows" and said["masks shown"] == "own 2" and said["no mask"].startswith("0 of 6")


def test_masks_are_made_for_the_rows_that_lack_one_and_the_second_call_resumes(capsys, monkeypatch):
    from rcgrpo.editors import make_masks

    run(["masks", save(), "--preset", "compbench", "--output", "m", "--num_samples", "3"])
    assert "m: 1 masks (1 new), 0 rows without" in capsys.readouterr().out
    first = next(Path("m").glob("*.png")).stat().st_mtime_ns
    asked = []
    made = make_masks.from_difference
    monkeypatch.setattr(make_masks, "from_difference", lambda row: asked.append(row["id"]) or made(row))
    run(["masks", "set", "--preset", "compbench", "--output", "m"])
    assert "m: 2 masks (1 new)" in capsys.readouterr().out
    assert asked == ["add/00000002/0/00004.png"]
    assert min(path.stat().st_mtime_ns for path in Path("m").glob("*.png")) == first
    decoded, decode = [], CanonicalRows.row
    monkeypatch.setattr(CanonicalRows, "row", lambda self, row, *a: decoded.append(row["id"]) or decode(self, row, *a))
    run(["masks", "set", "--preset", "compbench", "--output", "m"])
    assert "2 masks (0 new)" in capsys.readouterr().out and len(asked) == 1
    assert len(decoded) == 4 and not any(name.endswith(("1.png", "4.png")) for name in decoded)
    lines = [json.loads(line) for line in Path("m/metadata.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["remove", "add"]

    data = load_edit_dataset("set", "compbench", masks="m")
    assert [row["mask_source"] for row in data] == ["own", "stored", "own", "own", "stored", "own"]
    assert (np.asarray(data[1]["mask"]) == 255)[10:22, 10:26].all()


def test_masks_of_every_row_by_the_embedded_editors_velocity(capsys):
    flags = ["--method", "velocity", "--num_draws", "1", "--threshold", "0.2", "--every_row", "true"]
    run(["masks", save(2, ()), "--preset", "compbench", "--output", "v", *flags])
    assert "v: 2 masks (2 new)" in capsys.readouterr().out
    assert all(Image.open(path).size == SIZE for path in Path("v").glob("*.png"))
    assert {json.loads(line)["method"] for line in Path("v/metadata.jsonl").read_text().splitlines()} == {"velocity"}


def test_flags_reach_the_text_prompted_makers(monkeypatch):
    from rcgrpo.editors import make_masks

    seen = {}
    for name in ("FromText", "FromConcept"):
        monkeypatch.setattr(make_masks, name, lambda *args, name=name: seen.setdefault(name, args))
    _maker(MaskArguments("x", method="grounding-sam", box_threshold=0.2, phrase_column="caption"))
    _maker(MaskArguments("x", method="sam3", score_threshold=0.7, segmenter="mine"))
    models = ("IDEA-Research/grounding-dino-tiny", "facebook/sam2.1-hiera-small")
    assert seen["FromText"][:-1] == (*models, "caption", 0.2, 0.25)
    assert seen["FromConcept"][:-1] == ("mine", None, 0.7)


def test_a_column_of_phrases_that_is_not_there_is_refused_before_a_model_is_loaded():
    save()
    with pytest.raises(UsageError, match="--phrase_column: got 'captoin', expected one of input_image, instruction"):
        run(["masks", "set", "--preset", "compbench", "--method", "sam3", "--phrase_column", "captoin"])


def test_a_set_that_lacks_no_mask_is_said_to():
    with pytest.raises(UsageError, match="set: no row lacks a mask; --every_row true makes one"):
        run(["masks", save(2, ()), "--preset", "compbench"])


def test_rows_that_get_none_are_listed(capsys):
    save()
    rows = load_edit_dataset("set", "compbench").with_format(None).remove_columns(["edited_image", "id", "group"])
    rows.save_to_disk("alone")
    run(["masks", "alone", "--preset", "compbench", "--output", "m"])
    assert "m: 0 masks (0 new), 2 rows without, see skipped.log" in capsys.readouterr().out
    assert "there is no ground truth" in Path("m/skipped.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got 'no verb', expected one of inspect: draw"),
        (["inspct"], "got 'inspct', expected one of inspect: draw"),
        (["inspect", "x", "--num_sample", "3"], "unknown flag '--num_sample'; the nearest known one is --num_samples"),
        (["inspect", "set", "--num_samples", "0"], "--num_samples: got 0"),
        (["inspect", "set", "--output", "sheet"], "--output: got 'sheet', expected a picture's name"),
        (
            ["inspect", "set", "--output", "taken/s.png"],
            "--output: got 'taken', expected a folder that can be written to",
        ),
        (
            ["masks", "set", "--output", "taken/m"],
            "--output_dir: got 'taken/m', expected a folder that can be written to",
        ),
        (["inspect", "compbench-mini", "--split", "nope"], "--split: got 'nope', expected train or test, which"),
        (["inspect", "set", "--columns", "input_image"], "--columns: got 'input_image', expected canonical=own"),
        (
            ["masks", "set", "--method", "magic"],
            "--method: got 'magic', expected one of difference, judge, velocity, grounding-sam, sam3",
        ),
    ],
)
def test_typing_errors_are_answered(arguments, said):
    Path("taken").touch()
    with pytest.raises(UsageError, match=said):
        run(arguments)


def test_help_names_every_verb_and_flag(capsys):
    run(["--help"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    for verb, cls in (("inspect", InspectArguments), ("masks", MaskArguments)):
        with pytest.raises(SystemExit):
            run([verb, "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: rcgrpo data {verb}")
        assert [name for name in cls.__dataclass_fields__ if f"--{name}" not in shown] == []


def test_the_verb_of_the_photographic_set_is_handed_on(monkeypatch):
    from rcgrpo.cli import data_tux

    seen = []
    monkeypatch.setattr(data_tux, "run", seen.append)
    run(["build-tux", "--size", "64"])
    assert seen == [["--size", "64"]]
