import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.data.corruption import corrupt_dataset
from rcgrpo.regions import CORRUPTIONS, corrupt, is_full, mask_to_tensor


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
    dataset = own(region=[[[255, 0], [0, 0]], None, [[128, 0], [0, 0]]], distractor=[corner, corner, None])
    spoilt = corrupt_dataset(dataset, "wrong_object", 1, mask_column="region", other_column="distractor")
    region = spoilt["region"]
    assert np.asarray(region[0]).tolist() == corner
    assert region[1] is None  # no mask stays no mask
    assert np.asarray(region[2]).tolist() == [[0, 128], [0, 0]]  # no other object: mirrored, softness kept
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
