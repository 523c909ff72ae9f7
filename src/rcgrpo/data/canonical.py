"""A row of any data set, its columns already named canonically, decoded: pictures, mask, instruction.

Where it fits: the last step of `loading`, a `with_transform` of a `datasets.Dataset` or a `map` of a stream. Where a
row has no mask of its own, the ladder `on_missing` says what stands in, and `Fallbacks` counts it.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs.masks import as_weights
from ..inputs.pictures import decode_picture, is_encoded, to_rgb
from .bounds import check_inside, local_part
from .edits import RowTransform
from .masks import PICTURE_ENCODINGS, Size, decode_mask, difference_mask, feather_mask, grow_mask

logger = logging.getLogger(__name__)

ON_MISSING = ("difference", "full", "drop", "error")
LADDER = ("difference", "full")
"""What stands in for a missing mask by default: the difference with the ground truth, or else the full picture."""

SAID = {
    "stored": "the stored one is used",
    "difference": "the difference between source and target is used",
    "full": "the full picture is used, so nothing is kept and the region constraint is off for it",
    "drop": "the row is left out",
}


@dataclass
class Fallbacks:
    """Which rows had no mask of their own and what stood in for it: counted by row, said once for each kind."""

    rows: dict[str, set[str]] = field(default_factory=dict)

    def note(self, kind: str, row: str, where: str) -> None:
        """Count one row, and say so if it is the first of its kind."""
        if kind not in self.rows:
            logger.warning(
                "%s: there is no mask, or an empty one; %s. Further rows are counted, not said", where, SAID[kind]
            )
        self.rows.setdefault(kind, set()).add(row)

    @property
    def counts(self) -> dict[str, int]:
        """Rows seen so far, by what stood in for their mask."""
        return {kind: len(rows) for kind, rows in self.rows.items()}


@dataclass
class CanonicalRows(RowTransform):
    """Decode a row whose columns already have their canonical names.

    Pictures become RGB, upright, at their own size; the mask "L" at the source's size with 255 = edit; an instruction
    that is a list becomes one of its texts, always the same for the same `id`. `mask_source` says where the mask is
    from: "own", "stored", "difference", "full", or "drop" with a mask of `None`.

    Attributes:
        name: what messages call the data set.
        encoding: of the mask column.
        on_missing: what stands in for a missing or empty mask, tried in turn.
        root: where relative paths of pictures start.
        folders: in which the files must lie that rows name; anywhere if `None`.
        stored: `id` to a mask made beforehand, used before anything of `on_missing`.
        growth, feather: of every mask, as shares of the short side.
        fallbacks: what was used so far in this process.
        missing: how many rows hold no mask, counted at loading; `None` for a stream.
    """

    name: str = "data set"
    encoding: str = "luma"
    on_missing: tuple[str, ...] = LADDER
    root: str | None = None
    folders: tuple[str, ...] | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    growth: float = 0.0
    feather: float = 0.0
    fallbacks: Fallbacks = field(default_factory=Fallbacks, repr=False, compare=False)
    missing: int | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # What has been seen is no part of the settings, from which `datasets` makes the names of its caches.
        return {**self.__dict__, "fallbacks": Fallbacks()}

    def row(self, stored: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The canonical row, decoded.

        A row without some of the columns, as when a single column is asked for, is decoded as far as it goes.

        Raises:
            ValueError: naming row and column, for a picture or a mask that cannot be decoded, or a mask that is missing
                when nothing of `on_missing` applies.
        """
        row = dict(stored)
        where = where or f"{self.name}, row {row.get('id', '?')}"
        for key in ("input_image", "edited_image"):
            if key in row:
                absent = is_missing(row[key]) and key != "input_image"
                row[key] = None if absent else self.picture(row[key], f"{where}, column {key!r}")
        if isinstance(row.get("instruction"), list | tuple):
            texts = [text for text in row["instruction"] if text]
            digest = hashlib.sha256(str(row.get("id")).encode()).digest()
            row["instruction"] = texts[int.from_bytes(digest[:8], "big") % len(texts)] if texts else None
        if "instruction" in row and not (isinstance(row["instruction"], str) and row["instruction"].strip()):
            given = row["instruction"]
            raise ValueError(
                f"{where}, column 'instruction': got {given!r}, expected a text; fill it in or drop the row"
            )
        if "input_image" in row:
            row["mask"], row["mask_source"] = self._mask(row, where)
        elif "mask" in row:
            row["mask"] = self.own_mask(row["mask"], None, f"{where}, column 'mask'")
        return row

    def own_mask(self, value: Any, size: Size | None, where: str) -> Image.Image | None:
        """The mask that a row itself holds, neither grown nor feathered, or `None` where there is none.

        Args:
            value: as it is stored, in the data set's encoding.
            size: the source's (width, height), which the mask is brought to; `None` leaves it.
            where: what messages call it.

        Raises:
            ValueError: naming `where`, for a mask that cannot be decoded or has other proportions than the source.
        """
        if is_missing(value):
            return None
        mask = decode_mask(
            self.located(value, where) if self.encoding in PICTURE_ENCODINGS else value, self.encoding, size, where
        )
        return None if mask.getbbox() is None else as_weights(mask)

    def has_mask(self, stored: Mapping[str, Any]) -> bool:
        """Whether the row has a mask, of its own or another, so that it is not dropped."""
        return self.row(stored)["mask"] is not None

    def located(self, value: Any, where: str = "") -> Any:
        """A stored picture, a relative path made absolute with `root`.

        Raises:
            ValueError: naming `where`, for a path that leads out of `folders`.
        """
        if isinstance(value, Mapping) and value.get("bytes") is None and "path" in value:
            value = value["path"]
        if not isinstance(value, str) or not value or is_encoded(value):
            return value
        if self.root is not None and "://" not in value:
            value = str(Path(self.root) / value)
        file = local_part(value)
        if file is not None:
            check_inside(file, self.folders, where or self.name)
        return value

    def picture(self, value: Any, where: str) -> Image.Image:
        """A stored picture, of a list the first, decoded.

        Raises:
            ValueError: naming `where`, where there is none that can be decoded.
        """
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError(f"{where}: got an empty list, expected at least one picture; fix or drop the row")
            value = value[0]
        if is_missing(value):
            raise ValueError(f"{where}: got {value!r}, expected a picture; fill it in or drop the row")
        return to_rgb(decode_picture(self.located(value, where), where))

    def _mask(self, row: Mapping[str, Any], where: str) -> tuple[Image.Image | None, str]:
        source, name, column = row["input_image"], str(row.get("id")), f"{where}, column 'mask'"
        mask, kind = self.own_mask(row.get("mask"), source.size, column), "own"
        if mask is None:
            mask, kind = self._stand_in(row, source, name, column)
            self.fallbacks.note(kind, name, where)
        if mask is not None:
            mask = as_weights(feather_mask(grow_mask(mask, self.growth), self.feather))
        return mask, kind

    def _stand_in(
        self, row: Mapping[str, Any], source: Image.Image, name: str, where: str
    ) -> tuple[Image.Image | None, str]:
        if name in self.stored:
            return decode_mask(self.stored[name], "luma", source.size, f"stored mask of {name}"), "stored"
        for step in self.on_missing:
            if step == "full":
                return Image.new("L", source.size, 255), "full"
            if step == "drop":
                return None, "drop"
            if step == "difference" and row.get("edited_image") is not None:
                mask = difference_mask(source, row["edited_image"])
                if mask is not None:
                    return mask, "difference"
        raise ValueError(
            f"{where}: there is no mask, or an empty one, and nothing of on_missing={list(self.on_missing)} stands in; "
            "add 'difference' (with a ground truth), 'full' (no region constraint) or 'drop', or make masks with "
            "`rcgrpo data masks` and pass their folder as `masks`"
        )


def is_missing(value: Any) -> bool:
    """Whether a column of pictures or masks holds nothing in a row: null, "", or neither bytes nor a path."""
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        return all(part is None for part in value.values())
    return value is None or (isinstance(value, str | bytes) and not value)
