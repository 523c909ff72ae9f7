"""A dataset whose masks are wrong in a known way, for studies of how good a mask has to be."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, Image

from ..inputs.masks import mask_picture, mask_to_tensor
from ..maths.regions import CORRUPTIONS, Corruption, corrupt
from .canonical import CanonicalRows


def corrupt_dataset(
    dataset: Dataset,
    kind: Corruption,
    severity: float,
    seed: int = 0,
    mask_column: str = "mask",
    other_column: str | None = None,
) -> Dataset:
    """The same rows with `rcgrpo.maths.regions.corrupt` applied to every mask; other columns keep their bytes.

    Args:
        dataset: one that `load_edit_dataset` opened, whatever the encoding of its masks: each is decoded at its
            source's size, and what the loader does later (growth, feather, stand-ins for missing masks) is done to the
            spoilt one. Or any dataset with a column of masks, 255 = edit.
        kind, severity: see `corrupt`. `missing` writes a full mask, with which the trainer runs unconstrained and says
            so.
        seed: with the row's number the key of the fault, so corrupt before shuffling or selecting.
        mask_column: the column that is replaced, stored as lossless "L", 255 = edit. A row without a mask stays without
            one; so does a row with an empty one that `load_edit_dataset` opened, since that counts as missing there.
        other_column: for `wrong_object`, a column with the mask of another object, in the same encoding; without it, or
            where it is empty, the region moves to a mirrored place.

    Raises:
        ValueError: a missing column, or what the decoder or `corrupt` refuses, naming the row.
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
    opened = dataset.format["format_kwargs"].get("transform")
    opened = opened if isinstance(opened, CanonicalRows) else None
    columns = [mask_column] if other_column is None else [mask_column, other_column]
    needed = columns if opened is None or "input_image" not in dataset.column_names else [*columns, "input_image"]
    undecoded = dataset if opened is None else dataset.with_format(None)
    for column in needed:
        if isinstance(dataset.features[column], Image):
            undecoded = undecoded.cast_column(column, Image(decode=False))
    spoilt = undecoded.map(
        _corrupt_row,
        with_indices=True,
        input_columns=needed,
        fn_kwargs={"columns": needed, "other": other_column, "opened": opened}
        | {"kind": kind, "severity": severity, "seed": seed},
        features=Features({**dataset.features, mask_column: Image()}),
        desc=f"{kind} {severity}",
    )
    if opened is None:
        return spoilt
    return spoilt.with_transform(replace(opened, encoding="luma") if mask_column == "mask" else opened)


def _corrupt_row(
    *values: Any,
    columns: list[str],
    other: str | None,
    opened: CanonicalRows | None,
    kind: Corruption,
    severity: float,
    seed: int,
) -> Mapping[str, Any]:
    """Of the values of `columns`, the mask's first, and the row's number."""
    stored, row = dict(zip(columns, values[:-1], strict=True)), values[-1]
    where, size = f"row {row}, column {columns[0]!r}", None
    if opened is not None and stored[columns[0]] is not None and stored.get("input_image") is not None:
        size = opened.picture(stored["input_image"], f"row {row}, column 'input_image'").size

    def decoded(column: str, where: str) -> Any:
        if opened is not None:
            return opened.own_mask(stored[column], size, where)
        return None if stored[column] is None else mask_to_tensor(stored[column], where)

    mask = decoded(columns[0], where)
    if mask is None:
        return {columns[0]: None}
    another = None if other is None else decoded(other, f"row {row}, column {other!r}")
    try:
        spoilt = corrupt(mask, kind, severity, key=(seed, row), other=another)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {columns[0]: mask_picture(spoilt)}
