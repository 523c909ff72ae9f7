"""From a dataset's rows to edits: source, instruction, mask, and whatever columns the rewards read.

Pictures stay undecoded until an edit is really needed, because a row may be fetched several times for one rollout.
Every complaint names the row and the column. `mask` is always 1 = edit. A data set that `load_edit_dataset` opened
brings its own `RowTransform`, which `EditRows` applies at that late moment too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..inputs.masks import as_weights, is_numbers, mask_to_tensor
from ..inputs.pictures import decode_picture, is_stored, open_picture, to_rgb
from ..maths.regions import check_mask, is_full


@dataclass(frozen=True)
class Edit:
    """One editing task: `source` RGB, `mask` `[height, width]` of the same size, `columns` for the rewards.

    A further turn knows the width and height of the first one's source, `first_size`, which its masks follow.
    """

    row: int
    label: str
    source: Image.Image
    prompt: str
    mask: Tensor
    columns: dict[str, Any]
    first_size: tuple[int, int] | None = None

    def mask_at(self, size: tuple[int, int]) -> Image.Image:
        """The mask (not grown) at a candidate's (width, height), 255 = edit: what rewards and metrics see of it."""
        mask = as_weights(Image.fromarray((self.mask * 255).byte().numpy()))
        return mask.resize(size, Image.Resampling.NEAREST)


def open_regions(value: Any, where: str) -> Any:
    """What `labels.split_regions` reads: a labelled picture, or a list of masks, opened where a path or bytes name it.

    Raises:
        ValueError: naming `where`, for what no picture can be made of.
    """
    if isinstance(value, list | tuple):
        return [open_picture(mask, where) if is_stored(mask) else mask for mask in value]
    return open_picture(value, where) if is_stored(value) else value


TABLES = ("arrow", "pandas", "polars")
"""Formats of `datasets` in which a row is no mapping."""


class RowTransform(ABC):
    """How a stored row becomes one with the canonical columns. For `datasets.Dataset.with_transform`.

    Whoever looks at such a data set sees canonical rows; `EditRows` fetches the stored ones and transforms a row when
    its edit is really needed.
    """

    @abstractmethod
    def row(self, stored: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The canonical row of a stored one; `where` is what messages call it."""

    def located(self, value: Any, where: str = "") -> Any:
        """A picture that a row names by a relative path, where it really is; everything else as it is.

        `where` is what messages call it.
        """
        return value

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Rows in the column layout that `datasets` hands to a transform."""
        rows = [self.row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else batch)}


class EditRows(Dataset):
    """Rows of an editing dataset, fetched undecoded, and how to make an `Edit` of one.

    Args:
        rows: a `datasets.Dataset` or any sequence of mappings. A transform of the user's own (`with_transform`) is what
            makes the rows; of a format (`set_format`) the columns and the types of what rewards read are kept.
        name: what messages call it, e.g. "train".
        image_column, prompt_column, mask_column: CompBench's names by default.
        required_columns: that rewards read.
        labels_column: several regions, opened if they are paths: a picture whose values are names, and not to be scaled
            to 8 bits, or a list of masks.
        turns_column: lists of further turns, whose paths get the same start as the row's own; nothing is opened.
        finish: what becomes of each decoded edit; nothing by default.

    Raises:
        ValueError: a column is missing, or there are no rows.
        TypeError: a streaming dataset, whose rows cannot be addressed, or a format of tables (pandas, arrow, polars).
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        image_column: str = "input_image",
        prompt_column: str = "instruction",
        mask_column: str = "mask",
        required_columns: Sequence[str] = (),
        labels_column: str | None = None,
        turns_column: str | None = None,
        finish: Callable[[Edit], Edit] | None = None,
    ) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise TypeError(
                f"{name}_dataset: got {type(rows).__name__}, expected rows that can be addressed by number, as a "
                "resumed run and other processes fetch the same ones again; turn a streaming dataset into a list or a "
                "`datasets.Dataset` first, e.g. `list(stream.take(2000))`"
            )
        if not len(rows):
            raise ValueError(f"{name}_dataset: got no rows, expected at least one")
        self.pictures: set[str] = set()
        self.transform: RowTransform | None = None
        self.formatted: datasets.Dataset | None = None
        if isinstance(rows, datasets.Dataset):
            rows = self._undecoded(rows, name)
        self.rows, self.name = rows, name
        self.image_column, self.prompt_column, self.mask_column = image_column, prompt_column, mask_column
        self.labels_column, self.turns_column, self.finish = labels_column, turns_column, finish
        self.pictures |= {image_column, mask_column}
        present = list(self[0][1])
        fields = {"image_column": image_column, "prompt_column": prompt_column, "mask_column": mask_column}
        for field, column in fields.items():
            if column not in present:
                raise ValueError(
                    f"{field}: {name}_dataset has no column {column!r}, expected one of {sorted(present)}; set "
                    f"`{field}` or rename the column"
                )
        for column in required_columns:
            if column not in present:
                raise ValueError(
                    f"{name}_dataset: got columns {sorted(present)}, expected also {column!r}, which a reward reads; "
                    "add the column or leave the reward out"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        formatted = {} if self.formatted is None else self.formatted[index]
        return index, {**self.rows[index], **formatted}

    def _undecoded(self, rows: datasets.Dataset, name: str) -> datasets.Dataset:
        """The rows with pictures as they are stored, unless a transform of the user's own makes them."""
        form = rows.format
        kind, options = form["type"], form["format_kwargs"]
        if kind in TABLES:
            raise TypeError(
                f"{name}_dataset: got rows in the format {kind!r}, expected rows that are mappings; pass "
                "`dataset.with_format(None)`"
            )
        if isinstance(options.get("transform"), RowTransform):
            self.transform, kind = options["transform"], None
        elif kind == "custom":
            return rows
        plain = rows.with_format(None)
        if not form["output_all_columns"]:
            plain = plain.select_columns(form["columns"])
        self.pictures = {key for key, feature in plain.features.items() if isinstance(feature, datasets.Image)}
        for key in self.pictures:
            plain = plain.cast_column(key, datasets.Image(decode=False))
        others = [column for column in plain.column_names if column not in self.pictures]
        if kind is not None and others:
            self.formatted = plain.select_columns(others).with_format(kind, **options)
        return plain

    def edit(self, index: int, row: Mapping[str, Any] | None = None) -> Edit:
        """Decode one row.

        Raises:
            ValueError: naming row and column, for a picture that cannot be decoded, an instruction that is no text, or
                a mask that is missing, empty or of another size than its source.
        """
        row = self[index][1] if row is None else row
        label = f"{self.name} row {index}"
        if self.transform is not None:
            row = self.transform.row(row, label)
        raw = {self.mask_column, self.labels_column}  # what their values mean is not to be scaled away
        columns = {
            key: (open_picture if key in raw else decode_picture)(value, f"{label}, column {key!r}")
            if isinstance(value, Image.Image) or (key in self.pictures - raw and value is not None)
            else value
            for key, value in row.items()
        }
        if self.labels_column is not None and self.labels_column in columns:
            where = f"{label}, column {self.labels_column!r}"
            columns[self.labels_column] = open_regions(self._located(columns[self.labels_column], where), where)
        turns_column = self.turns_column or ""
        if isinstance(turns := columns.get(turns_column), Sequence) and not isinstance(turns, str):
            columns[turns_column] = [self._located_turn(turn, label) for turn in turns]
        for column in (self.image_column, self.mask_column):
            if columns[column] is None:
                raise ValueError(
                    f"{label}, column {column!r}: got None, expected a picture; fill it in or drop the row"
                )
        source, prompt = to_rgb(columns.pop(self.image_column)), columns.pop(self.prompt_column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{label}, column {self.prompt_column!r}: got {prompt!r}, expected an instruction")
        given, where = columns.pop(self.mask_column), f"{label}, column {self.mask_column!r}"
        mask = mask_to_tensor(given, where)
        check_mask(mask, (source.height, source.width), where)
        edit = Edit(index, label, source, prompt, mask, columns)
        return edit if self.finish is None else self.finish(edit)

    def _located(self, value: Any, where: str) -> Any:
        """Paths of a picture or of a list of them, where they really are."""
        if self.transform is None or is_numbers(value):
            return value
        if isinstance(value, list | tuple):
            return [self._located(part, where) for part in value]
        return self.transform.located(value, where)

    def _located_turn(self, turn: Any, label: str) -> Any:
        """A turn with its mask's and its regions' paths where they really are."""
        if not isinstance(turn, Mapping):
            return turn
        where = f"{label}, column {self.turns_column!r}"
        return {
            key: self._located(value, where) if key in ("mask", self.labels_column) else value
            for key, value in turn.items()
        }

    def check(self, limit: int, further: Callable[[Edit], None] = lambda edit: None) -> int:
        """Decode up to `limit` rows, spread over the set, so that a bad one is found before training.

        Args:
            limit: 0 checks none.
            further: raises on an edit that cannot be used.

        Returns:
            How many of them have a full mask, for which the region constraint is off.
        """
        stride = max(1, -(-len(self) // limit)) if limit else len(self)
        chosen = range(0, len(self), stride) if limit else range(0)
        progress = tqdm(chosen, desc=f"checking {self.name} rows", leave=False, delay=2)
        full = 0
        for index in progress:
            edit = self.edit(index)
            further(edit)
            full += is_full(edit.mask)
        return full
