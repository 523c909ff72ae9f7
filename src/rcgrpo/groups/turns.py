"""Several instructions, each with a region of its own: one after the other, or all at once.

One after the other, each turn is an edit and a group like any other, applied to what the turn before gave: noise is
shared outside its own region, its rewards compare its own candidates, and what earlier turns did is part of the source
that it has to keep. At once they are one edit with one instruction and several regions.

Gotchas: the row's columns speak of the first turn; a turn brings its own for rewards that read them. Joined turns have
one set of columns, the row's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.edits import Edit, open_regions
from ..inputs.masks import mask_picture, mask_to_tensor
from ..maths.labels import split_regions
from ..maths.objective import total_scores
from ..maths.regions import check_mask
from .rollout import Group

REGIONS = "regions"
"""The column that `join_turns` fills with the regions of a joined edit."""


def best_candidate(group: Group, weights: Tensor) -> Image.Image:
    """The picture with the highest score.

    Where a reward failed on the whole group, nobody has a score, and the other rewards decide; the first picture where
    there are none.

    Args:
        weights: of the rewards, `[rewards]`.
    """
    scores: Tensor = group.scores  # type: ignore[assignment]
    if bool(scores.isnan().all()):
        scores = total_scores(group.rewards, weights)  # type: ignore[arg-type]
    return group.images[int(scores.nan_to_num(-float("inf")).argmax())]


def next_edit(
    edit: Edit, result: Image.Image, column: str, number: int, regions_column: str | None = None
) -> Edit | None:
    """The edit of turn `number` (2, 3, ...), or None if there is none.

    Args:
        edit: the turn before; its `column` holds a list of further turns, each a mapping with `instruction`, `mask` (of
            the first source's shape, at any size, 1 or 255 = edit) and whatever columns change with it.
        result: what the turn before gave: the source of this one.
        column: the edit's column with the turns.
        number: of the turn; the first is the row's own.
        regions_column: the column with several regions, if there is one, see `labels.split_regions`. A turn may bring
            its own, at any size; without them its mask is its one region, whatever the turn before had.

    Raises:
        ValueError: a turn without instruction, or with a mask or regions that cannot be used or have another shape.
    """
    turns = _turns_of(edit, column)
    if len(turns) < number - 1:
        return None
    label = f"{edit.label.partition(', turn ')[0]}, turn {number}"
    turn, where, first = turns[number - 2], f"{label}, column {column!r}", edit.first_size or edit.source.size
    prompt, mask = _read_pair(turn, first, result.size, where)
    others = {key: value for key, value in turn.items() if key not in ("instruction", "mask")}
    if regions_column is not None:
        own = others.get(regions_column)
        others[regions_column] = (
            [mask_picture(mask)] if own is None else _regions_of_size(own, first, result.size, where)
        )
    columns = {**edit.columns, **others, "turn": number}
    source = result.convert("RGB")
    return replace(edit, label=label, source=source, prompt=prompt, mask=mask, columns=columns, first_size=first)


def join_turns(edit: Edit, column: str) -> Edit:
    """The edit and its further turns as one, whose region is the union of theirs.

    Its columns are the row's: what else a turn brings stays where it is, in `column`. The masks stand in a new column,
    `"regions"`, in the order of the instructions and as pictures of the source's size, 255 = edit.

    Args:
        edit: its `column` holds a list of further turns, as for `next_edit`, or nothing.
        column: the edit's column with the turns.

    Raises:
        ValueError: a turn without instruction or with a mask that cannot be used; a row with a column `"regions"`.
    """
    if REGIONS in edit.columns:
        raise ValueError(
            f"{edit.label}: got a column {REGIONS!r}, expected none, as turns_at_once puts the turns' masks there; "
            "rename it"
        )
    pairs = [
        _read_pair(turn, edit.source.size, edit.source.size, f"{edit.label}, turn {number}, column {column!r}")
        for number, turn in enumerate(_turns_of(edit, column), start=2)
    ]
    prompts, masks = zip((edit.prompt, edit.mask), *pairs, strict=True)
    columns = {**edit.columns, REGIONS: [mask_picture(mask) for mask in masks]}
    return replace(edit, prompt=join_instructions(prompts), mask=torch.stack(masks).amax(0), columns=columns)


def join_instructions(parts: Sequence[str]) -> str:
    """One sentence of several: "add a cube, remove the dog and paint the door red".

    Full stops at their ends go, and from the second on a capital letter that only begins the sentence. A single one
    stays as it is.
    """
    if len(parts) == 1:
        return parts[0]
    first, *others = (part.strip().rstrip(". ") for part in parts)
    clauses = [first, *(part[0].lower() + part[1:] if part[1:2].islower() else part for part in others)]
    return f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def _turns_of(edit: Edit, column: str) -> Sequence[Any]:
    turns = edit.columns.get(column)
    if turns is None:
        return []
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"{edit.label}, column {column!r}: got {type(turns).__name__}, expected a list of turns")
    return turns


def _read_pair(turn: Any, first: tuple[int, int], size: tuple[int, int], where: str) -> tuple[str, Tensor]:
    """A turn's instruction, and its mask, of the first source's shape, at this size; sizes are (width, height)."""
    if not isinstance(turn, Mapping) or not {"instruction", "mask"} <= turn.keys():
        given = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise ValueError(f"{where}: got {given}, expected a mapping with 'instruction' and 'mask'")
    prompt = turn["instruction"]
    if not isinstance(prompt, str) or not prompt.strip(". \n"):
        raise ValueError(f"{where}: got {prompt!r}, expected an instruction")
    given = mask_to_tensor(turn["mask"], where)
    _check_shape(given, first, where)
    mask = mask_to_tensor(mask_picture(given).resize(size, Image.Resampling.NEAREST))
    check_mask(mask, where=where)
    return prompt, mask


def _check_shape(mask: Tensor, first: tuple[int, int], where: str) -> None:
    """Refuse a mask that scaling alone does not bring to the first source's (width, height), to a pixel of either."""
    (height, width), (first_width, first_height) = mask.shape, first
    if abs(width * first_height - height * first_width) > max(height, width, first_height, first_width):
        raise ValueError(
            f"{where}: got a mask of height × width {(height, width)}, expected the shape of the first source, "
            f"{(first_height, first_width)}, at any size; resizing would distort it"
        )


def _regions_of_size(value: Any, first: tuple[int, int], size: tuple[int, int], where: str) -> list[Image.Image]:
    """A mask for each of a turn's own regions, of the first source's shape, at the result's size."""
    masks = split_regions(open_regions(value, where), where=where)
    _check_shape(masks[0], first, where)
    return [mask_picture(mask).resize(size, Image.Resampling.NEAREST) for mask in masks]
