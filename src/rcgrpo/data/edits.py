"""From a dataset's rows to edits: source, instruction, mask, and whatever columns the rewards read.

Pictures stay undecoded until an edit is really needed, because a row may be fetched several times for one rollout.
Every complaint names the row and the column. `mask` is always 1 = edit. A data set that `load_edit_dataset` opened
brings its own `RowTransform`, which `EditRows` applies at that late moment too.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..regions import check_mask, is_full, mask_to_tensor


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


def decode_picture(value: Any, where: str) -> Image.Image:
    """`open_picture` with 8 bits a channel: 16-bit, 32-bit and floating pictures become 8-bit grey.

    The other modes stay as stored, as an alpha channel may be the mask; see `to_rgb`.
    """
    return _eight_bits(open_picture(value, where))


def open_picture(value: Any, where: str) -> Image.Image:
    """A PIL image, upright, from what a dataset may hold: PIL image, path, bytes, or `{"bytes", "path"}`.

    Nothing is resized, and the mode stays as stored. A path with a protocol (`hf://`, `zip://`), as a stream from afar
    brings, is read through `datasets`.

    Raises:
        ValueError: naming `where`, when the value is missing or no picture that Pillow can read.
    """
    try:
        if isinstance(value, Image.Image):
            image = value
            image.load()
        else:
            if isinstance(value, Mapping):
                value = value["bytes"] if value.get("bytes") is not None else value["path"]
            if isinstance(value, str) and "://" in value:
                image = datasets.Image().decode_example({"bytes": None, "path": value})
            else:
                image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else Path(value))
            image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, TypeError, KeyError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: got {_short(value)}, expected a picture that Pillow can decode; fix or drop the row ({error})"
        ) from error


def open_regions(value: Any, where: str) -> Any:
    """What `labels.split_regions` reads: a labelled picture, or a list of masks, opened where a path or bytes name it.

    Raises:
        ValueError: naming `where`, for what no picture can be made of.
    """
    if isinstance(value, list | tuple):
        return [decode_picture(mask, where) if _is_stored(mask) else mask for mask in value]
    return open_picture(value, where) if _is_stored(value) else value


def _is_stored(value: Any) -> bool:
    """Whether a picture is yet to be opened."""
    return isinstance(value, str | bytes) or (isinstance(value, Mapping) and value.keys() <= {"bytes", "path"})


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips where it should scale, so a 16-bit grey picture would turn white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F":
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        full = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.round(np.clip(values / full, 0, 1) * 255).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of the same size, as a viewer shows it: transparent pixels on white, palette and CMYK converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _short(value: Any) -> str:
    return (
        f"{len(value)} bytes"
        if isinstance(value, bytes)
        else repr(str(value) if isinstance(value, Path) else value)[:80]
    )


class RowTransform(ABC):
    """How a stored row becomes one with the canonical columns. For `datasets.Dataset.with_transform`.

    Whoever looks at such a data set sees canonical rows; `EditRows` fetches the stored ones and transforms a row when
    its edit is really needed.
    """

    @abstractmethod
    def row(self, stored: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The canonical row of a stored one; `where` is what messages call it."""

    def located(self, value: Any) -> Any:
        """A picture that a row names by a relative path, where it really is; everything else as it is."""
        return value

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Rows in the column layout that `datasets` hands to a transform."""
        rows = [self.row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else batch)}


class EditRows(Dataset):
    """Rows of an editing dataset, fetched undecoded, and how to make an `Edit` of one.

    Args:
        rows: a `datasets.Dataset` or any sequence of mappings.
        name: what messages call it, e.g. "train".
        image_column, prompt_column, mask_column: CompBench's names by default.
        required_columns: that rewards read.
        labels_column: several regions, opened if they are paths: a picture whose values are names, and not to be scaled
            to 8 bits, or a list of masks.
        turns_column: lists of further turns, whose paths get the same start as the row's own; nothing is opened.
        finish: what becomes of each decoded edit; nothing by default.

    Raises:
        ValueError: a column is missing, or there are no rows.
        TypeError: a streaming dataset, whose rows cannot be addressed.
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
                f"{name}_dataset: got {type(rows).__name__}, expected rows that can be addressed by number; turn a "
                "streaming dataset into a list or a `datasets.Dataset` first"
            )
        if not len(rows):
            raise ValueError(f"{name}_dataset: got no rows, expected at least one")
        self.pictures: set[str] = set()
        self.transform: RowTransform | None = None
        if isinstance(rows, datasets.Dataset):
            given = rows.format["format_kwargs"].get("transform")
            if isinstance(given, RowTransform):
                self.transform, rows = given, rows.with_format(None)
            self.pictures = {key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)}
            for key in self.pictures:
                rows = rows.cast_column(key, datasets.Image(decode=False))
        self.rows, self.name = rows, name
        self.image_column, self.prompt_column, self.mask_column = image_column, prompt_column, mask_column
        self.labels_column, self.turns_column, self.finish = labels_column, turns_column, finish
        self.pictures |= {image_column, mask_column}
        present = rows.column_names if isinstance(rows, datasets.Dataset) else list(rows[0])
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
        return index, self.rows[index]

    def edit(self, index: int, row: Mapping[str, Any] | None = None) -> Edit:
        """Decode one row.

        Raises:
            ValueError: naming row and column, for a picture that cannot be decoded, an instruction that is no text, or
                a mask that is missing, empty or of another size than its source.
        """
        row = self.rows[index] if row is None else row
        label = f"{self.name} row {index}"
        if self.transform is not None:
            row = self.transform.row(row, label)
        columns = {
            key: (open_picture if key == self.labels_column else decode_picture)(value, f"{label}, column {key!r}")
            if isinstance(value, Image.Image) or (key in self.pictures and value is not None)
            else value
            for key, value in row.items()
        }
        if self.labels_column is not None and self.labels_column in columns:
            where = f"{label}, column {self.labels_column!r}"
            columns[self.labels_column] = open_regions(self._located(columns[self.labels_column]), where)
        if isinstance(turns := columns.get(self.turns_column or ""), Sequence) and not isinstance(turns, str):
            columns[self.turns_column] = [self._located_turn(turn) for turn in turns]
        for column in (self.image_column, self.mask_column):
            if columns[column] is None:
                raise ValueError(
                    f"{label}, column {column!r}: got None, expected a picture; fill it in or drop the row"
                )
        source, prompt = to_rgb(columns.pop(self.image_column)), columns.pop(self.prompt_column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{label}, column {self.prompt_column!r}: got {prompt!r}, expected an instruction")
        mask = mask_to_tensor(columns.pop(self.mask_column))
        check_mask(mask, (source.height, source.width), f"{label}, column {self.mask_column!r}")
        edit = Edit(index, label, source, prompt, mask, columns)
        return edit if self.finish is None else self.finish(edit)

    def _located(self, value: Any) -> Any:
        """Paths of a picture or of a list of them, where they really are."""
        if isinstance(value, list | tuple):
            return [self._located(part) for part in value]
        return value if self.transform is None else self.transform.located(value)

    def _located_turn(self, turn: Any) -> Any:
        """A turn with its mask's and its regions' paths where they really are."""
        if not isinstance(turn, Mapping):
            return turn
        return {key: self._located(turn[key]) if key in ("mask", self.labels_column) else turn[key] for key in turn}

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
