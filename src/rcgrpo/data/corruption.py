"""A dataset whose masks are wrong in a known way, for studies of how good a mask has to be."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from ..regions import CORRUPTIONS, Corruption, corrupt
from .edits import decode_picture


def corrupt_dataset(
    dataset: Dataset,
    kind: Corruption,
    severity: float,
    seed: int = 0,
    mask_column: str = "mask",
    other_column: str | None = None,
) -> Dataset:
    """The same rows with `rcgrpo.regions.corrupt` applied to every mask; other columns keep their bytes.

    Args:
        dataset: any dataset with a column of masks, 255 = edit.
        kind, severity: see `corrupt`. `missing` writes a full mask, with which the trainer runs unconstrained and says
            so.
        seed: with the row's number the key of the fault, so corrupt before shuffling or selecting.
        mask_column: the column that is replaced, stored as lossless "L". A row without a mask stays without one.
        other_column: for `wrong_object`, a column with the mask of another object; without it, or where it is empty,
            the region moves to a mirrored place.

    Raises:
        ValueError: a missing column, masks in another encoding, or what `corrupt` refuses, naming the row.
    """
    for field, column in {"mask_column": mask_column, "other_column": other_column}.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"{field}: the dataset has no column {column!r}, expected one of {sorted(dataset.column_names)}"
            )
    if kind not in CORRUPTIONS or not 0 <= severity <= 1:  # before the first of many rows
        raise ValueError(
            f"kind, severity: got {kind!r}, {severity}, expected one of {', '.join(CORRUPTIONS)} and a number in [0, 1]"
        )
    encoding = getattr(dataset.format["format_kwargs"].get("transform"), "encoding", "luma")
    if encoding != "luma":
        raise ValueError(
            f"dataset: its masks are read as {encoding!r}, expected plain 255 = edit; make them once with `rcgrpo data "
            "masks --every_row true` and open the data set with `masks=`"
        )
    columns = [mask_column] if other_column is None else [mask_column, other_column]
    undecoded = dataset
    for column in columns:
        undecoded = undecoded.cast_column(column, Image(decode=False))
    return undecoded.map(
        _corrupt_row,
        with_indices=True,
        input_columns=columns,
        fn_kwargs={"column": mask_column, "kind": kind, "severity": severity, "seed": seed},
        features=Features({**dataset.features, mask_column: Image()}),
        desc=f"{kind} {severity}",
    )


def _corrupt_row(*values: Any, column: str, kind: Corruption, severity: float, seed: int) -> Mapping[str, Any]:
    mask, *others, row = values
    if mask is None:
        return {column: None}
    other = decode_picture(others[0], f"row {row}, other column") if others and others[0] is not None else None
    try:
        spoilt = corrupt(decode_picture(mask, "mask"), kind, severity, key=(seed, row), other=other)
    except ValueError as error:
        raise ValueError(f"row {row}, column {column!r}: {error}") from error
    return {column: PILImage.fromarray((spoilt * 255).round().byte().numpy())}
