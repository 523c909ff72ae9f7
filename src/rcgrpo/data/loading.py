"""`load_edit_dataset`: any editing data set with the canonical columns, on top of `datasets.load_dataset`.

`opening` finds the rows; here they get their columns, their keys and their split. Columns are renamed and two key
columns are added, which copies no picture; pictures and masks are decoded when a row is looked at, so a set of 100,000
opens at once. `canonical` is that last step: a `with_transform` of a `datasets.Dataset`, a `map` of a stream.

Gotchas: a held-out part is drawn by a hash of the `group`, so its share of the rows is only about what was asked for,
but never depends on order, number of rows, machine or mode. Renaming columns after loading takes them from the
transform.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..inputs.pictures import is_encoded, short
from .bounds import caches, check_inside
from .canonical import LADDER, ON_MISSING, CanonicalRows, is_missing
from .edits import RowTransform
from .masks import ENCODINGS, PICTURE_ENCODINGS
from .opening import open_rows
from .presets import CANONICAL, PICTURES, PRESETS, ColumnMap, Preset, find_preset, map_columns, read

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"
METADATA = "metadata.jsonl"

# Splits ---------------------------------------------------------------------------------------------------------------


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the held-out part: a hash of its name, as a number in [0, 1), is below the share.

    A larger share holds out the same groups and more.
    """
    digest = hashlib.sha256(f"held out/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def parse_split(split: str, held_out: float) -> tuple[str, bool]:
    """The data set's own split, and whether its held-out part is meant.

    Raises:
        ValueError: a share outside [0, 1), or a held-out part of nothing.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: got {held_out}, expected a share of the groups in [0, 1)")
    base, _, part = split.rpartition(":") if split.endswith(f":{HELD_OUT}") else (split, "", "")
    wanted = split == HELD_OUT or part == HELD_OUT
    if wanted and not held_out:
        raise ValueError(
            f"split: got {split!r} with held_out=0, expected the share that training holds out too, e.g. held_out=0.1"
        )
    return ("train" if split == HELD_OUT else base), wanted


# Loading --------------------------------------------------------------------------------------------------------------


def read_stored_masks(folder: str | Path) -> dict[str, str]:
    """`id` to picture file, of a folder that `rcgrpo data masks` made.

    Raises:
        FileNotFoundError: there is no `metadata.jsonl`.
    """
    path = Path(folder) / METADATA
    if not path.exists():
        raise FileNotFoundError(
            f"masks: got {str(folder)!r} without {METADATA}, expected a folder of `rcgrpo data masks`"
        )
    with path.open(encoding="utf-8") as file:  # which ends lines where they end, and not at U+2028 as `str` does
        lines = [json.loads(line) for line in file if line.strip()]
    found = {line["id"]: str(Path(folder) / line["file_name"]) for line in lines}
    for name, place in found.items():
        check_inside(place, [str(folder)], f"masks, row {name}")
    return found


def load_edit_dataset(
    name_or_path: Any,
    preset: str | Preset | None = None,
    split: str = "train",
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    held_out: float = 0.0,
    on_missing: str | Sequence[str] = LADDER,
    streaming: bool = False,
    mask_encoding: str | None = None,
    masks: str | Path | None = None,
    mask_growth: float = 0.0,
    mask_feather: float = 0.0,
    root: str | Path | None = None,
    allow_outside: bool = False,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """An editing data set with the canonical columns.

    These are `input_image, instruction, mask`, where the data set has them `edited_image, caption, task, image_path`,
    and always `id` and `group`. Pictures are RGB, upright and at their own size, masks "L" at the source's size with
    255 = edit.

    Args:
        name_or_path: a Hub id; a folder; a JSONL, JSON, CSV, Parquet or tar file, or a pattern of such; or rows in
            memory (a `datasets.Dataset`, a list of mappings).
        preset: the name of a known data set (see `PRESETS`) or a `Preset`; recognised by the Hub id if not given.
        split: the data set's own split, here without what `held_out` takes away; `"held_out"` for that part of `train`;
            `"multi_turn:held_out"` for that of another.
        columns: canonical name to the data set's own, over the preset's, e.g. `{"input_image": "src", "instruction":
            "json.text", "group": "video"}`; a dot reaches into a column of mappings.
        held_out: the share of groups (CompBench's videos) that training must not see, in [0, 1).
        on_missing: for rows without a mask, or with an empty one: `"difference"` with the ground truth, `"full"` for
            the whole picture, `"drop"`, `"error"`, or several, tried in turn. What was used is in the column
            `mask_source`.
        streaming: a `datasets.IterableDataset`, nothing downloaded beforehand.
        mask_encoding: one of `masks.ENCODINGS`, over the preset's.
        masks: a folder of `rcgrpo data masks`, used for rows without a mask before `on_missing` is asked.
        mask_growth, mask_feather: grow every mask and soften its edge, shares of the short side. Leave them at 0 for
            evaluation, and for training too, as the trainer grows masks itself (`RCGRPOConfig.mask_growth`).
        root: where relative paths of pictures start; the folder of the file by default.
        allow_outside: whether rows of a file, folder or Hub id may name files outside that folder and the caches of
            `datasets` and the Hub. Rows in memory may anyway, unless `root` says where.
        kwargs: for `datasets.load_dataset`, e.g. `revision`, `cache_dir`, `token`.

    Raises:
        FileNotFoundError: neither a file, a folder nor a Hub id.
        ValueError: an unknown preset, column, encoding or policy; a file that cannot be read; columns, or pictures
            named by path, that cannot be found, or that lie elsewhere; rows with a transform of the user's own; nothing
            left.
    """
    name = str(name_or_path) if isinstance(name_or_path, str | Path) else "data set"
    chosen = find_preset(preset, name)
    steps = (on_missing,) if isinstance(on_missing, str) else tuple(on_missing)
    for step in steps:
        if step not in ON_MISSING:
            raise ValueError(f"on_missing: got {step!r}, expected one or several of {', '.join(ON_MISSING)}")
    encoding = mask_encoding or chosen.mask
    if encoding not in ENCODINGS:
        raise ValueError(f"mask_encoding: got {encoding!r}, expected one of {', '.join(ENCODINGS)}")
    base, wants_held_out = parse_split(split, held_out)
    rows, found_root = open_rows(name_or_path, base, streaming, **kwargs)
    streaming = isinstance(rows, IterableDataset)
    starts = [str(place) for place in (root, found_root) if place is not None]
    in_memory = not starts and not isinstance(name_or_path, str | Path)
    transform = CanonicalRows(
        name=f"{name} {split}",
        encoding=encoding,
        on_missing=steps,
        root=starts[0] if starts else None,
        folders=None if allow_outside or in_memory else (*starts, *caches(kwargs.get("cache_dir"))),
        stored=read_stored_masks(masks) if masks is not None else {},
        growth=mask_growth,
        feather=mask_feather,
    )
    available = rows.column_names or list(next(iter(rows), {}))
    settled = map_columns(chosen, available, columns, name)
    if held_out and not settled.group:
        if streaming and not settled.id:
            raise ValueError(
                f"held_out: got {held_out} for a stream whose rows have neither a group nor an id, expected one to "
                "split by; name it with columns={'group': ...}"
            )
        logger.warning("%s: no column says which rows belong together; each row is held out or not on its own", name)
    if not held_out and base == "train" and chosen is PRESETS["compbench"] and isinstance(name_or_path, str | Path):
        logger.warning(
            "%s: CompBench is a benchmark and its frames are near-duplicates; to train on it and report on it, pass "
            "held_out=0.1 for training and split='held_out' with the same share for the report",
            name,
        )
    part = partial(_in_part, share=held_out, wanted=wants_held_out)
    if streaming:
        return _stream(rows, settled, transform, base, part if held_out else None)
    return _addressed(rows, settled, transform, base, part if held_out else None)


def _in_part(group: str, share: float, wanted: bool) -> bool:
    return is_held_out(group, share) is wanted


def _addressed(
    rows: Dataset, settled: ColumnMap, transform: CanonicalRows, split: str, part: Callable[[str], bool] | None
) -> Dataset:
    """The rows of a `datasets.Dataset`: renamed, keyed, split, and decoded when they are looked at."""
    if rows.format["type"] == "custom" and not isinstance(rows.format["format_kwargs"]["transform"], RowTransform):
        raise ValueError(
            f"{transform.name}: got rows with a transform of your own (`with_transform`), which reading them with "
            "canonical columns would replace; apply it with `.map`, or pass the rows to the trainer as they are"
        )
    rows = rows.with_format(None)
    wanted = {*settled.fields.values(), *settled.id, *settled.group}
    for column in sorted(wanted - set(rows.column_names)):
        outer = column.split(".")[0]
        values = rows.select_columns([outer])[:][outer]
        rows = rows.add_column(column, [read({outer: value}, column) for value in values])
    sources = rows.select_columns(sorted({*settled.id, *settled.group}))[:] if settled.id or settled.group else {}
    count = len(rows)
    keys = [settled.keys({key: values[i] for key, values in sources.items()}, f"{split}/{i}") for i in range(count)]
    if transform.stored and len({key for key, _ in keys}) < len(keys):
        raise ValueError(
            f"masks: the ids of {transform.name} repeat, expected another one for each row; name the columns that tell "
            "rows apart with columns={'id': [...]}"
        )
    renamed = {own: canonical for canonical, own in settled.fields.items() if own != canonical}
    in_the_way = {*renamed.values(), "id", "group"} & set(rows.column_names) - set(renamed)
    rows = rows.remove_columns(sorted(in_the_way)).rename_columns(renamed)
    for column, values in (("id", [key for key, _ in keys]), ("group", [group for _, group in keys])):
        rows = rows.add_column(column, values, feature=datasets.Value("string"))
    if "mask" not in rows.column_names:
        rows = rows.add_column("mask", [None] * len(rows), feature=datasets.Image())
    first = [column for column in CANONICAL if column in rows.column_names]
    rows = rows.select_columns([*first, *(column for column in rows.column_names if column not in first)])
    missing = _without_mask(rows)
    if part is not None:
        chosen = [i for i, (_, group) in enumerate(keys) if part(group)]
        rows, missing = rows.select(chosen), missing[chosen]
    _check_files(rows, settled, transform)
    transform.missing = int(missing.sum())
    if transform.missing:
        instead = [*(["stored"] if transform.stored else []), *transform.on_missing]
        logger.warning(
            "%s: %d of %d rows have no mask; instead: %s",
            transform.name,
            transform.missing,
            len(rows),
            ", else ".join(instead),
        )
    if "drop" in transform.on_missing and len(rows):
        features = rows.features
        pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        for key in pictures:
            rows = rows.cast_column(key, datasets.Image(decode=False))
        rows = rows.filter(transform.has_mask, desc="rows with a mask")
        for key in pictures:
            rows = rows.cast_column(key, features[key])
    if not len(rows):
        raise ValueError(
            f"{transform.name}: no rows are left, expected at least one; look at `held_out` and `on_missing`"
        )
    return rows.with_transform(transform)


def _without_mask(rows: Dataset) -> np.ndarray:
    """Which rows `is_missing` says have no mask, without touching what the other rows hold."""
    masks = rows.data.column("mask")
    missing = masks.is_null()
    if pa.types.is_struct(masks.type) and {field.name for field in masks.type} == {"bytes", "path"}:
        missing = pc.and_(*(pc.is_null(pc.struct_field(masks, name)) for name in ("bytes", "path")))
    elif pa.types.is_string(masks.type) or pa.types.is_large_string(masks.type):
        missing = pc.fill_null(pc.equal(masks, ""), True)
    return missing.to_numpy()


def _check_files(rows: Dataset, settled: ColumnMap, transform: CanonicalRows) -> None:
    """Refuse paths that lead nowhere before training does: every row is asked, but no file is opened."""
    for column in PICTURES:
        named = getattr(rows.features.get(column), "dtype", None)
        values_are_paths = column != "mask" or transform.encoding in PICTURE_ENCODINGS
        if named not in ("string", "large_string") or not values_are_paths:
            continue
        paths = {
            name: path
            for name, path in zip(rows["id"][:], rows[column][:], strict=True)
            if not is_missing(path) and not is_encoded(path) and "://" not in path
        }
        own = f"column {settled.fields[column]!r}"
        places = {name: transform.located(path, f"{transform.name}, row {name}, {own}") for name, path in paths.items()}
        gone = [
            name for name, place in places.items() if not os.path.exists(place)
        ]  # `Path.exists` raises for long names
        if gone:
            raise ValueError(
                f"{transform.name}, {own}: {len(gone)} of {len(paths)} files are not there, first "
                f"{short(paths[gone[0]])} of row {gone[0]}; relative paths start at "
                f"{Path(transform.root or '.').resolve()}: say where else with `root`, or fix or drop the rows"
            )


def _stream(
    rows: IterableDataset, settled: ColumnMap, transform: CanonicalRows, split: str, part: Callable[[str], bool] | None
) -> IterableDataset:
    """The same for a stream; rows of another part leave it before a picture is decoded."""
    if rows.features:
        rows = rows.decode(False)
    renamed = [own for canonical, own in settled.fields.items() if own != canonical]
    rows = rows.map(partial(_prepare, settled=settled, split=split), with_indices=True, remove_columns=renamed)
    if part is not None:
        rows = rows.filter(part, input_columns=["group"])
    return rows.map(transform.row).filter(_is_kept)


def _prepare(row: Mapping[str, Any], index: int, settled: ColumnMap, split: str) -> dict[str, Any]:
    name, group = settled.keys(row, f"{split}/{index}")
    return {"mask": None, **{key: read(row, own) for key, own in settled.fields.items()}, "id": name, "group": group}


def _is_kept(row: Mapping[str, Any]) -> bool:
    return row["mask"] is not None
