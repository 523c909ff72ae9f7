import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.data.edits import decode_picture

SIZE = (12, 8)  # width, height


def picture(seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)).convert(mode)


def mask(value=255):
    image = Image.new("L", SIZE)
    image.paste(value, (2, 3, 6, 5))
    return image


def row(**changes):
    return {"input_image": picture(), "instruction": "make it red", "mask": mask(), "task": "replace", **changes}


def encoded(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **kwargs})
    return buffer.getvalue()


def turned():
    """A JPEG whose camera was held sideways: stored 12 × 8, meant 8 × 12."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), format="JPEG", exif=exif, quality=95)


def refused(changes, message, error=ValueError):
    with pytest.raises(error, match=message):
        EditRows([row(), row(**changes)], "train").edit(1)


def test_an_edit_holds_what_the_row_says():
    edit = EditRows([row(), row(input_image=picture(1, "RGBA"), extra=[1, 2])], "train").edit(1)
    assert (edit.row, edit.label, edit.prompt) == (1, "train row 1", "make it red")
    assert edit.source.mode == "RGB"
    assert np.array_equal(np.asarray(edit.source), np.asarray(picture(1)))
    assert edit.mask.shape == (8, 12) and edit.mask.sum() == 8 and edit.mask[3:5, 2:6].all()
    assert edit.columns == {"task": "replace", "extra": [1, 2]}


def test_every_way_to_hold_a_picture_reads_the_same(tmp_path):
    content = encoded(picture())
    path = tmp_path / "a.png"
    path.write_bytes(content)
    forms = [picture(), content, path, str(path), {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    for form in [*forms, {"bytes": content, "path": "gone.png"}]:
        assert decode_picture(form, "here").tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("value", "got"),
    [(b"no picture", "10 bytes"), ("gone.png", "'gone.png'"), (7, "7"), ({"path": None}, "None"), ({}, "{}")],
)
def test_what_cannot_be_decoded_is_named_by_row_and_column(value, got):
    message = f"train row 1, column 'input_image': got {re.escape(got)}, expected a picture that Pillow can decode"
    refused({"input_image": value}, message)


def test_a_truncated_picture_is_refused():
    refused(
        {"mask": encoded(picture(), format="BMP")[:200]}, "train row 1, column 'mask': got 200 bytes, expected a pic"
    )


def test_a_header_that_claims_a_giant_is_refused():
    content = bytearray(encoded(picture(), format="BMP"))
    content[18:26] = (100_000).to_bytes(4, "little") * 2
    refused({"input_image": bytes(content)}, "train row 1, column 'input_image': got .* bytes, expected a picture")


@pytest.mark.parametrize("column", ["input_image", "mask"])
def test_a_missing_picture_is_refused(column):
    refused({column: None}, f"train row 1, column '{column}': got None, expected a picture")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Image.new("L", SIZE), "got an empty mask"),
        (Image.new("L", SIZE[::-1], 255), r"got a mask of height × width \(12, 8\), .* picture's \(8, 12\)"),
    ],
)
def test_a_mask_that_no_edit_can_use_is_refused(value, message):
    refused({"mask": value}, f"train row 1, column 'mask': {message}")


@pytest.mark.parametrize("prompt", ["", " \n", None, 3, ["make it red"]])
def test_an_instruction_must_say_something(prompt):
    refused({"instruction": prompt}, "train row 1, column 'instruction': got .*, expected an instruction")


def test_pictures_are_turned_upright():
    upright = decode_picture(turned(), "here")
    assert upright.size == (8, 12)
    stored = np.asarray(Image.open(io.BytesIO(turned())))
    assert np.array_equal(np.asarray(upright), np.rot90(stored, -1))
    standing = mask().transpose(Image.Transpose.ROTATE_270)
    edit = EditRows([row(input_image=turned(), mask=standing)], "train").edit(0)
    assert edit.source.size == (8, 12) and edit.mask.shape == (12, 8)
    refused({"input_image": turned()}, r"train row 1, column 'mask': .* source picture's \(12, 8\)")


@pytest.mark.parametrize("field", ["image_column", "prompt_column", "mask_column"])
def test_a_missing_column_names_the_field_that_sets_it(field):
    with pytest.raises(
        ValueError, match=rf"{field}: eval_dataset has no column 'nope', .*'instruction'.*set `{field}`"
    ):
        EditRows([row()], "eval", **{field: "nope"})


def test_a_column_that_a_reward_reads_must_be_there():
    with pytest.raises(
        ValueError, match=r"train_dataset: got columns .*, expected also 'caption', which a reward reads"
    ):
        EditRows([row()], "train", required_columns=["task", "caption"])


def test_columns_can_have_other_names():
    rows = [{"a": picture(), "b": "make it red", "c": mask()}]
    edit = EditRows(rows, "train", image_column="a", prompt_column="b", mask_column="c").edit(0)
    assert edit.prompt == "make it red" and edit.columns == {}


def test_no_rows_and_streams_are_refused():
    with pytest.raises(ValueError, match="train_dataset: got no rows"):
        EditRows([], "train")
    with pytest.raises(TypeError, match="eval_dataset: got generator, expected rows that can be addressed by number"):
        EditRows((r for r in [row()]), "eval")


def test_a_hub_style_dataset_is_fetched_undecoded_and_decoded_when_needed():
    features = Features(
        {"input_image": ImageFeature(), "instruction": Value("string"), "mask": ImageFeature(), "other": ImageFeature()}
    )
    good = encoded(picture())
    columns = {
        "input_image": [{"bytes": good, "path": None}, {"bytes": b"broken", "path": None}],
        "instruction": ["make it red"] * 2,
        "mask": [mask()] * 2,
        "other": [picture(2), None],
    }
    rows = EditRows(Dataset.from_dict(columns, features=features), "train")
    index, fetched = rows[1]
    assert index == 1 and fetched["input_image"]["bytes"] == b"broken"
    with pytest.raises(ValueError, match="train row 1, column 'input_image': got 6 bytes, expected a picture"):
        rows.edit(1)
    edit = rows.edit(*rows[0])
    assert edit.columns["other"].tobytes() == picture(2).tobytes()


def test_check_counts_full_masks_and_finds_the_bad_row():
    full = Image.new("L", SIZE, 255)
    rows = [row(), row(mask=full), row(), row(mask=full), row(mask=full)]
    assert EditRows(rows, "train").check(100) == 3
    assert EditRows(rows, "train").check(5) == 3
    assert EditRows(rows, "train").check(2) == 1  # rows 0 and 3
    assert EditRows(rows, "train").check(0) == 0
    bad = [*rows[:2], row(instruction=""), *rows[2:]]
    with pytest.raises(ValueError, match="train row 2"):
        EditRows(bad, "train").check(6)


def test_the_embedded_set_passes():
    rows = EditRows(compbench_mini(num_samples=6), "train", required_columns=["caption", "edited_image"])
    assert len(rows) == 6 and rows.check(6) == 0
    edit = rows.edit(2)
    assert isinstance(edit.columns["edited_image"], Image.Image)
    inside = edit.mask.bool()
    source, target = (torch.from_numpy(np.array(i)) for i in (edit.source, edit.columns["edited_image"]))
    assert torch.equal(source[~inside], target[~inside]) and not torch.equal(source[inside], target[inside])
