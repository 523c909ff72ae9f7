"""`pictures.py`: what is no file here, and messages that stay short. How files are decoded: `data/test_edits.py`."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import EditRows, load_edit_dataset
from rcgrpo.inputs.pictures import decode_picture, open_picture, short

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def encoded(form, **options):
    file = io.BytesIO()
    PICTURE.save(file, form, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("form", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif")])
def test_base64_is_a_picture_with_and_without_the_head_of_a_data_url(form, mime):
    text = encoded(form)
    right = Image.open(io.BytesIO(base64.b64decode(text))).tobytes()
    for value in (text, f"data:image/{mime};base64,{text}", {"bytes": None, "path": text}):
        assert open_picture(value, "here").tobytes() == right


def test_base64_in_rows_and_in_a_file(tmp_path):
    mask = io.BytesIO()
    Image.new("L", PICTURE.size, 255).save(mask, "PNG")
    row = {"input_image": f"data:image/png;base64,{encoded('PNG')}", "instruction": "x"}
    row |= {"mask": base64.b64encode(mask.getvalue()).decode()}
    assert EditRows([row], "train").edit(0).source.tobytes() == PICTURE.tobytes()
    assert load_edit_dataset([row])[0]["input_image"].tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        "https://example.org/a.png",
        "http://example.org/" + 5000 * "a" + ".png",
        encoded("PNG")[:-2000] + "!",
        "data:image/png;base64,!!!",
        "data:image/png;base64," + 9000 * "QUJD",
        20000 * "x",
        20000 * "x/",
        "file:///nowhere/a.png",
        {"bytes": 9000 * b"x", "path": None},
        [1, 2, 3] * 5000,
        "a\0b",
    ],
    ids=lambda value: short(value)[:24],
)
def test_what_is_no_picture_is_said_shortly_with_row_and_column(value):
    rows = [{"input_image": value, "instruction": "x", "mask": Image.new("L", (8, 8), 255)}]
    with pytest.raises(ValueError, match=r"^train row 0, column 'input_image': got .*, expected a picture") as error:
        EditRows(rows, "train").edit(0)
    assert len(str(error.value)) < 600


def test_web_addresses_are_to_be_downloaded_first():
    with pytest.raises(ValueError, match=r"expected a picture that is here; download it, and give its path or its"):
        decode_picture("https://example.org/a.png", "here")


def test_a_path_that_begins_like_base64_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("R0lGOD.png")
    assert open_picture("R0lGOD.png", "here").tobytes() == PICTURE.tobytes()
    assert open_picture(f"file://{tmp_path}/R0lGOD.png", "here").tobytes() == PICTURE.tobytes()
