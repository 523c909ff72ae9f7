import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from rcgrpo.data import EditRows, compbench_mini, load_edit_dataset
from rcgrpo.data.corruption import corrupt_dataset
from rcgrpo.maths.regions import CORRUPTIONS, corrupt, is_full, mask_to_tensor


@pytest.fixture(scope="module")
def mini():
    return compbench_mini("test", num_samples=5, size=48)


def undecoded(dataset, column):
    return dataset.cast_column(column, Image(decode=False))[column][:]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_masks_are_corrupted_by_row_and_seed_and_nothing_else_changes(mini, kind):
    spoilt = corrupt_dataset(mini, kind, 0.6, seed=3)
    assert spoilt.features == mini.features and len(spoilt) == len(mini)
    for row, (before, after) in enumerate(zip(mini["mask"], spoilt["mask"], strict=True)):
        assert after.mode == "L"
        assert torch.equal(mask_to_tensor(after), corrupt(before, kind, 0.6, (3, row)))
    for column in ("input_image", "edited_image"):
        assert undecoded(spoilt, column) == undecoded(mini, column)
    assert (
        spoilt.remove_columns(["mask", "input_image", "edited_image"])[:]
        == mini.select_columns(["task", "image_path", "instruction", "caption"])[:]
    )


def test_another_seed_draws_other_faults(mini):
    masks = [[np.asarray(mask).tobytes() for mask in corrupt_dataset(mini, "holes", 0.5, s)["mask"]] for s in (0, 1, 0)]
    assert masks[0] != masks[1] and masks[0] == masks[2]


def test_severity_0_keeps_every_pixel(mini):
    spoilt = corrupt_dataset(mini, "shift", 0)
    assert [np.asarray(m).tobytes() for m in spoilt["mask"]] == [np.asarray(m).tobytes() for m in mini["mask"]]


def test_missing_masks_are_full_ones_which_a_trainer_can_read_and_counts(mini):
    rows = EditRows(corrupt_dataset(mini, "missing", 1), "train")
    assert rows.check(limit=5) == 5
    assert is_full(rows.edit(0).mask)


def own(**columns):
    """Rows of masks given as nested lists; None is a missing one."""
    pictures = {
        name: [None if m is None else PILImage.fromarray(np.array(m, dtype=np.uint8)) for m in masks]
        for name, masks in columns.items()
    }
    return Dataset.from_dict(pictures, features=Features(dict.fromkeys(columns, Image())))


def test_any_column_can_be_the_mask_and_another_the_wrong_object():
    corner = [[0, 0], [0, 255]]
    dataset = own(region=[[[255, 0], [0, 0]], None, [[128, 0], [255, 0]]], distractor=[corner, corner, None])
    spoilt = corrupt_dataset(dataset, "wrong_object", 1, mask_column="region", other_column="distractor")
    region = spoilt["region"]
    assert np.asarray(region[0]).tolist() == corner
    assert region[1] is None  # no mask stays no mask
    assert np.asarray(region[2]).tolist() == [[0, 128], [0, 255]]  # no other object: mirrored, softness kept
    assert undecoded(spoilt, "distractor") == undecoded(dataset, "distractor")


def test_a_bad_row_is_named():
    with pytest.raises(ValueError, match="row 1, column 'mask': mask: got an empty mask"):
        corrupt_dataset(own(mask=[[[255]], [[0]]]), "grow", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_column": "masks"}, r"mask_column: the dataset has no column 'masks', expected one of \['caption'"),
        ({"other_column": "thing"}, "other_column: the dataset has no column 'thing'"),
        ({"kind": "blur"}, "kind, severity: got 'blur', 0.5"),
        ({"severity": 2}, "kind, severity: got 'grow', 2"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_row(mini, arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt_dataset(mini, **{"kind": "grow", "severity": 0.5, **arguments})


# Data sets that `load_edit_dataset` opened

SIDE = 16
REGION = np.zeros((SIDE, SIDE), dtype=np.uint8)
REGION[4:10, 3:9] = 255
RUNS = [value for y in range(4 * 32, 10 * 32) for value in (y * 512 + 3 * 32, 6 * 32)]
COUNTS = np.diff([0, *(np.flatnonzero(np.diff(REGION.T.ravel() > 0)) + 1), REGION.size]).tolist()
RGB = PILImage.new("RGB", (SIDE, SIDE), (90, 100, 110))


def painted(alpha):
    rgba = np.dstack([np.asarray(RGB), np.full((SIDE, SIDE), 255, np.uint8)])
    rgba[REGION > 0] = 0 if alpha else 255
    return PILImage.fromarray(rgba)


MASKS = {
    "luma": PILImage.fromarray(REGION),
    "nonzero": PILImage.fromarray(REGION // 255 * 3),
    "alpha": painted(alpha=True),
    "paint": painted(alpha=False).convert("RGB"),
    "runs": RUNS,
    "rle": {"size": [SIDE, SIDE], "counts": COUNTS},
    "boxes-xyxy": [[3, 4, 9, 10]],
    "boxes-xywh": [[3, 4, 6, 6]],
    "boxes-xyxy-relative": [[3 / 16, 4 / 16, 9 / 16, 10 / 16]],
    "boxes-xywh-relative": [[3 / 16, 4 / 16, 6 / 16, 6 / 16]],
}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("encoding", MASKS)
def test_every_encoding_that_can_be_loaded_can_be_corrupted(encoding, own_cache):
    rows = [{"input_image": RGB, "instruction": f"edit {i}", "mask": MASKS[encoding]} for i in range(2)]
    data = load_edit_dataset(rows, mask_encoding=encoding)
    assert np.array_equal(np.asarray(data[0]["mask"]), REGION)
    spoilt = corrupt_dataset(data, "shift", 0.5, seed=1)
    for i, row in enumerate(spoilt):
        assert torch.equal(mask_to_tensor(row["mask"]), corrupt(REGION, "shift", 0.5, (1, i)))
        assert row["mask_source"] == "own" and row["id"] == f"train/{i}" and row["input_image"].size == (SIDE, SIDE)
    stored = spoilt.with_format(None)
    assert stored.features["mask"] == Image() and stored[0]["mask"].mode == "L"
    assert undecoded(stored, "input_image") == undecoded(data.with_format(None), "input_image")
    assert EditRows(spoilt, "train").edit(1).mask.shape == (SIDE, SIDE)


def test_what_the_loader_does_to_a_mask_is_done_to_the_spoilt_one(own_cache, tmp_path):
    MASKS["nonzero"].save(tmp_path / "m.png")
    RGB.save(tmp_path / "p.png")
    features = {"input_image": "p.png", "edited_image": None, "instruction": "x"}
    rows = [{**features, "mask": mask} for mask in ("m.png", None, "")]
    data = load_edit_dataset(rows, mask_encoding="nonzero", root=tmp_path, mask_growth=1 / SIDE)
    spoilt = corrupt_dataset(data, "shift", 1, seed=4)
    assert [row["mask_source"] for row in spoilt] == ["own", "full", "full"]
    expected = corrupt(REGION, "shift", 1, (4, 0)).numpy() > 0
    grown = np.zeros_like(expected)
    for y, x in np.argwhere(expected):
        grown[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = True
    assert np.array_equal(np.asarray(spoilt[0]["mask"]) > 0, grown)  # grown once, after the fault
    assert spoilt.with_format(None)["mask"][1:] == [None, None]
    twice = corrupt_dataset(spoilt, "shift", 0)
    assert np.array_equal(np.asarray(twice[0]["mask"]), np.asarray(spoilt[0]["mask"]))


def test_the_mask_of_another_object_is_read_in_the_same_encoding(own_cache):
    other = [[10, 11, 14, 15]]
    rows = [{"input_image": RGB, "instruction": "x", "mask": MASKS["boxes-xyxy"], "thing": other}]
    data = load_edit_dataset(rows, mask_encoding="boxes-xyxy")
    mask = np.asarray(corrupt_dataset(data, "wrong_object", 1, other_column="thing")[0]["mask"])
    assert (mask[11:15, 10:14] == 255).all() and mask.sum() == 16 * 255


def test_a_mask_that_cannot_be_decoded_is_named(own_cache):
    rows = [{"input_image": RGB, "instruction": "x", "mask": [[9, 9, 3, 3]]}]
    data = load_edit_dataset(rows, mask_encoding="boxes-xyxy")
    with pytest.raises(
        ValueError, match=r"row 0, column 'mask': got .*encoded as 'boxes-xyxy' .a box that ends before"
    ):
        corrupt_dataset(data, "grow", 0.5)
