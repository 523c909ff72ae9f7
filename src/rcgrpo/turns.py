"""Edits in several turns: the next instruction and region, applied to what the turn before gave.

Each turn is an edit and a group like any other, so everything holds for it: noise is shared outside its own region, its
rewards compare its own candidates, and what earlier turns did is part of the source that it has to keep. Gotcha: the
row's columns speak of the first turn; a turn brings its own for rewards that read them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .data.edits import Edit, decode_picture
from .regions import check_mask, mask_to_tensor
from .rollout import Group


def best_candidate(group: Group) -> Image.Image:
    """The picture with the highest score, the first one if nobody has a score."""
    if group.scores is None:
        return group.images[0]
    return group.images[int(group.scores.nan_to_num(-float("inf")).argmax())]


def next_edit(edit: Edit, result: Image.Image, column: str, number: int) -> Edit | None:
    """The edit of turn `number` (2, 3, ...), or None if there is none.

    Args:
        edit: the turn before; its `column` holds a list of further turns, each a mapping with `instruction`, `mask` (of
            the first source's shape, at any size, 1 or 255 = edit) and whatever columns change with it.
        result: what the turn before gave: the source of this one.
        column: the edit's column with the turns.
        number: of the turn; the first is the row's own.

    Raises:
        ValueError: a turn without instruction or with a mask that cannot be used.
    """
    turns = edit.columns.get(column) or []
    if len(turns) < number - 1:
        return None
    label = f"{edit.label.partition(', turn ')[0]}, turn {number}"
    turn = turns[number - 2]
    if not isinstance(turn, Mapping) or not {"instruction", "mask"} <= turn.keys():
        given = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise ValueError(f"{label}, column {column!r}: got {given}, expected a mapping with 'instruction' and 'mask'")
    prompt = turn["instruction"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{label}, column {column!r}: got {prompt!r}, expected an instruction")
    mask = _mask_of_size(turn["mask"], result.size, f"{label}, column {column!r}")
    others = {key: value for key, value in turn.items() if key not in ("instruction", "mask")}
    columns = {**edit.columns, **others, "turn": number}
    return replace(edit, label=label, source=result.convert("RGB"), prompt=prompt, mask=mask, columns=columns)


def _mask_of_size(value: Any, size: tuple[int, int], where: str) -> Tensor:
    """The mask at the result's size, which is the resolution of the run and not that of the data."""
    ready = isinstance(value, Tensor | np.ndarray | Image.Image)
    mask = mask_to_tensor(value if ready else decode_picture(value, where))
    picture = Image.fromarray((mask * 255).round().byte().numpy()).resize(size, Image.Resampling.NEAREST)
    resized = mask_to_tensor(picture)
    check_mask(resized, where=where)
    return resized
