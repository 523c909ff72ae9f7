import io
import re
import zipfile

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.data.edits import RowTransform, decode_picture, to_rgb

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


def test_labels_are_names_and_stay_as_they_are():
    labels = Image.fromarray(np.full((4, 4), 2, np.uint16))
    rows = EditRows([row(labels=labels, grey=labels)], "train", labels_column="labels")
    columns = rows.edit(0).columns
    assert np.asarray(columns["labels"]).max() == 2 and np.asarray(columns["grey"]).max() == 0


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


def ramp(dtype, top):
    return Image.fromarray(np.linspace(0, top, 8 * 12).reshape(8, 12).astype(dtype))


@pytest.mark.parametrize("image", [ramp(np.uint16, 65535), ramp(np.int32, 65535), ramp(np.float32, 1)])
def test_deep_pictures_are_scaled_and_not_clipped(image):
    grey = decode_picture(image, "here")
    assert grey.mode == "L" and np.abs(np.asarray(grey, dtype=int) - np.asarray(ramp(np.uint8, 255))).max() <= 1
    if image.mode == "I;16":
        stored = decode_picture(encoded(image), "here")
        assert np.array_equal(np.asarray(stored), np.asarray(grey))
    assert EditRows([row(input_image=image)], "train").edit(0).source.mode == "RGB"


def test_transparent_pixels_are_white_and_others_keep_their_colour():
    rgba = picture(1, "RGBA")
    rgba.putalpha(mask())
    shown = np.asarray(to_rgb(rgba))
    region = np.asarray(mask()) == 255
    assert np.array_equal(shown[region], np.asarray(picture(1))[region]) and (shown[~region] == 255).all()
    grey = Image.merge("LA", (picture(1).convert("L"), mask()))
    assert (np.asarray(to_rgb(grey))[~region] == 255).all()


def test_palette_cmyk_and_bilevel_pictures_become_rgb():
    palette = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12) % 2, mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30) and to_rgb(palette).getpixel((1, 0)) == (200, 100, 50)
    clear = decode_picture(encoded(palette, transparency=0), "here")
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255) and to_rgb(clear).getpixel((1, 0)) == (200, 100, 50)
    ink = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    red = to_rgb(decode_picture(encoded(ink, format="JPEG", quality=95), "here")).getpixel((3, 3))
    assert red[0] > 240 and max(red[1:]) < 15
    assert to_rgb(Image.new("1", SIZE, 1)).getpixel((0, 0)) == (255, 255, 255)
    for image in (palette, clear, ink):
        edit = EditRows([row(input_image=image)], "train").edit(0)
        assert edit.source.mode == "RGB" and edit.source.size == SIZE


def test_a_path_with_a_protocol_is_read_through_datasets(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture()))
    value = {"bytes": None, "path": f"zip://a.png::{tmp_path}/a.zip"}
    assert decode_picture(value, "here").tobytes() == picture().tobytes()
    refused(
        {"input_image": f"zip://b.png::{tmp_path}/a.zip"},
        "train row 1, column 'input_image': got 'zip://b.png.*, expected a pic",
    )


class Renamed(RowTransform):
    """Counts how often a row is really made."""

    def __init__(self):
        self.made = 0

    def row(self, stored, where=""):
        self.made += 1
        return {**stored, "instruction": f"{stored['instruction']} ({where})", "extra": 1}


def test_a_row_transform_is_applied_when_the_edit_is_made_and_not_when_the_row_is_fetched():
    transform = Renamed()
    data = Dataset.from_list([row(), row(instruction="go")]).with_transform(transform)
    assert data[1]["instruction"] == "go ()" and data[:]["extra"] == [1, 1] and transform.made == 3
    rows = EditRows(data, "train")
    fetched = rows[1]
    assert transform.made == 3 and fetched[1]["input_image"]["bytes"]
    edit = rows.edit(*fetched)
    assert transform.made == 4 and edit.prompt == "go (train row 1)" and edit.columns["extra"] == 1


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


# What users do to a dataset


def stored_rows():
    rows = [row(other=picture(2), numbers=[1.0, 2.0]), row(instruction="go", other=picture(3), numbers=[3.0, 4.0])]
    return Dataset.from_list(rows)


def test_a_transform_of_the_users_own_makes_the_rows():
    def turn(batch):
        pictures = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in batch["input_image"]]
        return {"input_image": pictures, "instruction": [f"please {text}" for text in batch["instruction"]]} | {
            key: batch[key] for key in ("mask", "task")
        }

    rows = EditRows(stored_rows().with_transform(turn), "train", required_columns=["task"])
    edit = rows.edit(*rows[1])
    assert edit.prompt == "please go" and set(edit.columns) == {"task"} and rows.check(2) == 0
    assert np.array_equal(np.asarray(edit.source), np.asarray(picture())[:, ::-1])
    assert edit.mask.sum() == 8
    with pytest.raises(
        ValueError, match=r"got columns \['input_image', .*, expected also 'other', which a reward reads"
    ):
        EditRows(stored_rows().with_transform(turn), "train", required_columns=["other"])


@pytest.mark.parametrize(("form", "kind"), [("numpy", np.ndarray), ("torch", torch.Tensor)])
def test_a_format_decides_what_rewards_are_given_and_not_how_pictures_are_read(form, kind):
    rows = EditRows(stored_rows().with_format(form), "train")
    edit = rows.edit(*rows[1])
    assert edit.prompt == "go" and edit.mask.sum() == 8
    assert edit.source.tobytes() == picture().tobytes() and edit.columns["other"].tobytes() == picture(3).tobytes()
    assert isinstance(edit.columns["numbers"], kind) and edit.columns["numbers"].tolist() == [3, 4]


def test_columns_that_a_format_leaves_out_are_left_out():
    data = stored_rows()
    data.set_format("torch", columns=["input_image", "instruction", "mask", "numbers"])
    assert set(EditRows(data, "train").edit(0).columns) == {"numbers"}
    data.set_format("torch", columns=["numbers"], output_all_columns=True)
    assert set(EditRows(data, "train").edit(0).columns) == {"task", "other", "numbers"}
    data.set_format(columns=["input_image", "instruction"])
    with pytest.raises(
        ValueError, match=r"mask_column: train_dataset has no column 'mask', expected one of \['input_im"
    ):
        EditRows(data, "train")


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_tables_are_no_rows(form):
    with pytest.raises(TypeError, match=rf"train_dataset: got rows in the format '{form}', .*with_format\(None\)"):
        EditRows(stored_rows().with_format(form), "train")
