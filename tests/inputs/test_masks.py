"""`mask_reader.py`: the same values are the same region, or the same refusal, wherever they are handed in."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from rcgrpo.cli.edit import read_mask
from rcgrpo.data import EditRows, load_edit_dataset
from rcgrpo.data.corruption import corrupt_dataset
from rcgrpo.editors import RegionDecoupledFluxKontextPipeline
from rcgrpo.groups.turns import next_edit
from rcgrpo.inputs.masks import mask_picture, mask_to_tensor, split_masks
from rcgrpo.maths.labels import split_regions
from tiny_kontext import build_tiny_kontext

HEIGHT, WIDTH = 16, 24
REGION = np.zeros((HEIGHT, WIDTH), dtype=bool)
REGION[4:10, 5:15] = True
ONES = REGION.astype(np.uint8)
RIGHT = torch.from_numpy(REGION).float()
SOURCE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def layer(colour, alpha):
    """An RGBA picture of one colour, or of an array of greys."""
    colour = np.broadcast_to(np.asarray(colour, dtype=np.uint8), (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.dstack([colour, np.broadcast_to(np.asarray(alpha, np.uint8), (HEIGHT, WIDTH))]))


def palette(colour, index=1):
    image = Image.fromarray(ONES * np.uint8(index), "P")
    image.putpalette([0, 0, 0] * index + list(colour))
    return image


GREY = np.repeat(ONES[..., None] * 255, 3, axis=-1)
PICTURES = {
    **{f"grey {value}": Image.fromarray(ONES * np.uint8(value)) for value in (1, 2, 38, 128, 200, 254, 255)},
    "bilevel": Image.fromarray(REGION),
    "VOC's aeroplane": palette((128, 0, 0)),
    "VOC's person": palette((192, 128, 128), 15),
    "yellow": palette((255, 255, 0)).convert("RGB"),
    "nearly black": palette((1, 0, 0)).convert("RGB"),
    "CMYK": Image.fromarray(GREY).convert("CMYK"),
    **{f"16 bits {value}": Image.fromarray(ONES.astype(np.uint16) * np.uint16(value)) for value in (1, 300, 65535)},
    **{f"32 bits {value}": Image.fromarray(ONES.astype(np.int32) * value) for value in (1, 255, 70000)},
    **{f"floating {value}": Image.fromarray(ONES.astype(np.float32) * value) for value in (1, 255)},
    "alpha on white": layer(255, ONES * 255),
    "alpha on red": layer((255, 0, 0), ONES * 255),
    "alpha of a brush": layer((255, 45, 120), ONES * 153),
    "opaque": layer(GREY, 255),
    "alpha and colours": layer(GREY, ONES * 255),
    "half transparent": layer(GREY, 128),
    "grey and alpha": layer(255, ONES * 255).convert("LA"),
}
NUMBERS = {
    **{str(dtype): ONES.astype(dtype) for dtype in (bool, "uint8", "int8", "uint16", "int64", "float16", "float64")},
    "uint8 255": ONES * np.uint8(255),
    "uint16 65535": ONES.astype(np.uint16) * np.uint16(65535),
    "int64 65535": ONES.astype(np.int64) * 65535,
    "float 255": ONES * 255.0,
    "[1, H, W]": ONES[None],
    "[H, W, 1]": ONES[..., None],
    "tensor": torch.from_numpy(REGION),
    "tensor [1, H, W]": torch.from_numpy(ONES)[None].bfloat16(),
    "tensor of 255": torch.from_numpy(ONES * 255).half()[..., None],
    "tensor with a gradient": RIGHT.clone().requires_grad_(),
    "list of bool": REGION.tolist(),
    "list of int": ONES.tolist(),
    "list of float": (ONES * 1.0).tolist(),
    "list of 255": (ONES.astype(int) * 255).tolist(),
    "tuples": tuple(map(tuple, ONES.tolist())),
}

two = np.where(REGION, 1, 0).astype(np.uint8)
two[:, :4] = 2
void = np.zeros((HEIGHT, WIDTH), np.uint8)
void[3:11, 4:16] = 255
void[REGION] = 15
colours = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
colours[REGION], colours[:, :4] = (128, 0, 0), (0, 128, 0)
BELOW_HALF = "values, whose brightest is .*, expected white = edit; make edit white"
REFUSED = {
    "labels 1 and 2": (Image.fromarray(two), BELOW_HALF),
    "labels 1 and 2 in 16 bits": (Image.fromarray(two.astype(np.uint16) * np.uint16(500)), BELOW_HALF),
    "an array of labels": (two.astype(np.int64), BELOW_HALF),
    "a list of labels": (two.tolist(), BELOW_HALF),
    "dim greys": (np.linspace(0, 100, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8), BELOW_HALF),
    "VOC with its border of 255": (Image.fromarray(void), "areas of values below half of 255, which look like labels"),
    "two colours": (Image.fromarray(colours), "a picture of several colours, which may be labels or a photograph"),
    "a photograph": (SOURCE, "a picture of several colours"),
    "0 and 1 divided by 255": (ONES / np.float32(255), r"values in \[0.0, 0.0039.*\], expected \[0, 1\]"),
    "alpha 0 over a mask": (layer(GREY, 0), "colours say something else than its alpha"),
    "alpha the other way round": (layer(GREY, 255 - ONES * 255), "a picture that is black and transparent"),
    "black with alpha": (layer(0, ONES * 255), "a picture that is black and transparent, expected white = edit"),
    "a hole in a photograph": (
        Image.merge("RGBA", (*SOURCE.split(), Image.fromarray(255 - ONES * 255))),
        "colours say something else than its alpha.*mask_encoding='alpha'",
    ),
    "ragged": ([[0, 1], [1]], r"lists of unequal lengths, expected \[height, width\]"),
    "three channels": (np.ones((HEIGHT, WIDTH, 3)), r"shape \(16, 24, 3\), expected \[height, width\]"),
    "negative": (np.where(REGION, 1, -1), r"values in \[-1, 1\], expected \[0, 1\]"),
    "not a number": (np.where(REGION, 1, np.nan), r"values in \[nan, nan\]"),
    "complex": (ONES.astype(complex), "values of type complex128, expected booleans or numbers"),
}


@pytest.mark.parametrize("mask", [*PICTURES.values(), *NUMBERS.values()], ids=[*PICTURES, *NUMBERS])
def test_two_values_are_keep_and_edit_whatever_they_are(mask):
    read = mask_to_tensor(mask)
    assert read.dtype == torch.float32 and torch.equal(read, RIGHT)


@pytest.mark.parametrize(("mask", "said"), REFUSED.values(), ids=REFUSED)
def test_what_could_mean_several_things_is_refused_with_what_to_do(mask, said):
    with pytest.raises(ValueError, match=f"^train row 7: got .*{said}"):
        mask_to_tensor(mask, "train row 7")


@pytest.mark.parametrize("value", [1, 128, 255])
def test_a_mask_of_one_value_is_full_and_of_zeros_empty(value):
    assert mask_to_tensor(Image.new("L", (3, 2), value)).eq(1).all()
    assert mask_to_tensor(np.full((2, 3), value)).eq(1).all()
    assert mask_to_tensor(layer(0, 255)).eq(0).all() and mask_to_tensor(layer(255, 0)).eq(0).all()


# Soft masks


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_a_soft_mask_is_its_greys(mode):
    soft = Image.fromarray(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8))
    assert torch.equal(mask_to_tensor(soft.convert(mode)), torch.from_numpy(np.asarray(soft, np.float32) / 255))
    assert torch.equal(mask_to_tensor(np.asarray(soft).astype(np.int64)), mask_to_tensor(soft))


def test_a_deep_soft_mask_is_scaled_by_its_depth():
    soft = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    right = torch.from_numpy(soft.astype(np.float32) / 65535)
    for mask in (soft, Image.fromarray(soft), Image.fromarray(soft.astype(np.int32)), soft.astype(np.float64)):
        assert torch.equal(mask_to_tensor(mask), right)


def test_floating_numbers_are_weights_as_they_stand():
    assert torch.equal(mask_to_tensor(REGION * 0.2), RIGHT * torch.tensor(0.2))
    assert mask_to_tensor(np.array([[0, 127.6, 255]])).tolist() == [[0, pytest.approx(127.6 / 255), 1]]


def test_alpha_of_a_soft_brush_is_soft():
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    assert torch.equal(mask_to_tensor(layer((255, 0, 0), alpha)), torch.from_numpy(alpha.astype(np.float32) / 255))


def test_soft_edges_and_compression_are_no_labels():
    rng = np.random.default_rng(0)
    for _ in range(12):
        hard = Image.new("L", (96, 64))
        ImageDraw.Draw(hard).polygon([(int(rng.integers(96)), int(rng.integers(64))) for _ in range(6)], fill=255)
        for method in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.BOX):
            for size in ((31, 21), (200, 150)):
                soft = hard.resize(size, method)
                assert torch.equal(mask_to_tensor(soft), torch.from_numpy(np.asarray(soft, np.float32) / 255))
        for form, mode in (("JPEG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB")):
            file = io.BytesIO()
            hard.convert(mode).save(file, form, quality=75)
            stored = Image.open(file)
            right = torch.from_numpy(np.asarray(stored.convert("L"), np.float32) / 255)
            assert torch.equal(mask_to_tensor(stored), right)


def test_what_this_library_made_is_read_as_it_was_made():
    weights = torch.tensor([[0.0, 0.2, 0.0]])
    again = mask_picture(weights).resize((6, 2), Image.Resampling.NEAREST)
    assert torch.equal(mask_to_tensor(again), weights.repeat_interleave(2, 0).repeat_interleave(2, 1))


# One reader


@pytest.fixture(scope="module")
def pipe():
    return RegionDecoupledFluxKontextPipeline(**build_tiny_kontext().components)


def as_stored(mask):
    """Numbers as JSON and `datasets` hold them."""
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().float().numpy()
    mask = mask.tolist() if isinstance(mask, np.ndarray) else mask
    return [list(row) for row in mask] if isinstance(mask, tuple) else mask


def readers(pipe, folder):
    def row(mask):
        return {"input_image": SOURCE, "instruction": "x", "mask": mask}

    def from_file(mask):
        if not isinstance(mask, Image.Image) or mask.mode in ("F", "I", "CMYK"):  # which no PNG holds
            return mask_to_tensor(mask)
        mask.save(folder / "mask.png")
        return read_mask(folder / "mask.png", (HEIGHT, WIDTH))

    return {
        "plain rows": lambda mask: EditRows([row(mask)], "train").edit(0).mask,
        "a dataset": lambda mask: EditRows(Dataset.from_list([row(as_stored(mask))]), "train").edit(0).mask,
        "the loader": lambda mask: (
            EditRows(load_edit_dataset([row(as_stored(mask))], on_missing="error"), "train").edit(0).mask
        ),
        "the pipeline": lambda mask: pipe._align(
            {"image": SOURCE, "prompt": "x", "prompt_embeds": None, "generator": None}, mask
        )[1][0],
        "rcgrpo edit": from_file,
    }


CHOSEN = ("grey 1", "grey 200", "VOC's aeroplane", "16 bits 1", "32 bits 255", "floating 1", "alpha on red")


@pytest.mark.parametrize("name", ["plain rows", "a dataset", "the loader", "the pipeline", "rcgrpo edit"])
def test_every_way_in_reads_the_same(name, pipe, tmp_path):
    read = readers(pipe, tmp_path)[name]
    numbers = {key: value for key, value in NUMBERS.items() if np.ndim(as_stored(value)) == 2}
    pictures = {key: PICTURES[key] for key in CHOSEN} if name in ("a dataset", "the loader") else PICTURES
    for mask in (pictures | numbers).values():
        assert torch.equal(read(mask), RIGHT)
    said = set()
    for key in ("labels 1 and 2", "labels 1 and 2 in 16 bits"):
        with pytest.raises(ValueError, match=BELOW_HALF) as error:
            read(REFUSED[key][0])
        said.add(str(error.value).partition(": got ")[2])
    assert said == {
        "several values, whose brightest is 2 of 255, expected white = edit; " + REMEDY,
        "several values, whose brightest is 1000 of 65535, expected white = edit; " + REMEDY,
    }


REMEDY = (
    "make edit white (255, 1 or True) and keep black, or, in a data set, set mask_encoding='nonzero', for which every "
    "value but 0 is edit"
)


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_column_of_arrays_in_any_format(form):
    features = Features(
        {"input_image": ImageFeature(), "instruction": Value("string"), "mask": Array2D((HEIGHT, WIDTH), "uint8")}
    )
    rows = [{"input_image": SOURCE, "instruction": "x", "mask": ONES}]
    data = Dataset.from_list(rows, features=features).with_format(form)
    assert torch.equal(EditRows(data, "train").edit(0).mask, RIGHT)


def test_several_masks_in_one_call():
    pair = [Image.fromarray(ONES), RIGHT]
    for masks in (pair, np.stack([ONES, ONES]), np.stack([ONES, ONES])[:, None], [ONES.tolist(), ONES.tolist()]):
        assert [torch.equal(mask_to_tensor(mask), RIGHT) for mask in split_masks(masks)] == [True, True]
    for mask in (ONES.tolist(), ONES[None], ONES[..., None], Image.fromarray(ONES), [ONES.tolist()]):
        (one,) = split_masks(mask)
        assert torch.equal(mask_to_tensor(one), RIGHT)


def test_regions_and_turns_are_read_by_the_same_rules(tmp_path):
    Image.fromarray(ONES).save(tmp_path / "ones.png")
    other = ~REGION
    right = torch.stack([RIGHT, 1 - RIGHT])
    for regions in (
        [Image.fromarray(ONES), other.tolist()],
        [str(tmp_path / "ones.png"), other],
        [ONES.tolist(), other.astype(int).tolist()],
        np.stack([REGION, other]),
        np.where(REGION, 1, 2).tolist(),  # labels
    ):
        rows = [{"input_image": SOURCE, "instruction": "x", "mask": RIGHT, "regions": regions}]
        columns = EditRows(rows, "train", labels_column="regions").edit(0).columns
        assert torch.equal(split_regions(columns["regions"], (HEIGHT, WIDTH)), right)
    with pytest.raises(ValueError, match=rf"row 3\[1\]: got several {BELOW_HALF}"):
        split_regions([ONES, two], where="row 3")
    for mask in (str(tmp_path / "ones.png"), Image.fromarray(ONES), ONES.tolist(), REGION, RIGHT[None]):
        row = {"input_image": SOURCE, "instruction": "x", "mask": ONES, "turns": [{"instruction": "y", "mask": mask}]}
        edit = EditRows([row], "train", turns_column="turns").edit(0)
        assert torch.equal(next_edit(edit, SOURCE, "turns", 2).mask, RIGHT)


def test_masks_that_are_to_be_spoilt_are_read_first():
    rows = [{"input_image": SOURCE, "instruction": "x", "mask": ONES.tolist()}]
    for data in (Dataset.from_list(rows), load_edit_dataset(rows)):
        spoilt = corrupt_dataset(data, "box", 1)
        assert np.array_equal(np.asarray(spoilt[0]["mask"]) == 255, REGION)  # a box is its own bounding box


def test_nonzero_takes_arrays_too():
    rows = [{"input_image": SOURCE, "instruction": "x", "mask": two.tolist()}]
    mask = load_edit_dataset(rows, mask_encoding="nonzero")[0]["mask"]
    assert np.array_equal(np.asarray(mask) == 255, two > 0)


def test_a_path_is_opened(tmp_path):
    PICTURES["VOC's person"].save(tmp_path / "voc.png")
    for path in (tmp_path / "voc.png", str(tmp_path / "voc.png"), (tmp_path / "voc.png").read_bytes()):
        assert torch.equal(mask_to_tensor(path), RIGHT)
    with pytest.raises(ValueError, match=r"^--mask: got .*gone.png.*, expected a picture that Pillow can decode"):
        mask_to_tensor(Path("gone.png"), "--mask")
