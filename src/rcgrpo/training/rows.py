"""From a data set to rows that are known to work: what a row cannot do is said before the first rollout.

Where it fits: `make_rows` before a model is loaded, with what the configuration alone tells; `check_played` when there
is an editor, whose sizes and tokenizer tell the rest.

Gotcha: an edit has turns only while the trainer plays them; joined turns (`turns_at_once`) are one edit from the start.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from ..data.edits import Edit, EditRows
from ..editors.base import FlowEditor
from ..editors.sizes import fit_size
from ..groups.rollout import Exploration, words_of
from ..groups.turns import join_turns, next_edit
from ..rewards import Reward, refuse_columns
from .config import RCGRPOConfig

logger = logging.getLogger(__name__)


def some_rows(number: int, count: int | None) -> list[int]:
    """So many of a data set's rows, all for None, the same each time; even spacing would fall in step with tasks."""
    return sorted(random.Random(0).sample(range(number), min(count or number, number)))


def make_rows(
    dataset: Any, name: str, args: RCGRPOConfig, rewards: Sequence[Reward], exploration: Exploration
) -> EditRows | None:
    """A data set's rows, those of `check_rows` looked at; None for none.

    Args:
        dataset: rows with a source, an instruction, a mask and the columns that the rewards read.
        name: `"train"`, `"eval"` or `"eval_NAME"`, for messages.

    Raises:
        TypeError, ValueError: it has no such rows.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"{name}_dataset: got a dictionary of {sorted(map(str, dataset))}, expected one set of rows; pick one, or "
            "join them with `datasets.concatenate_datasets`; only eval_dataset may be several"
        )
    required = sorted({column for reward in rewards for column in reward.columns})
    columns = (args.image_column, args.prompt_column, args.mask_column)
    at_once = args.turns_column if args.turns_at_once else None
    join = None if at_once is None else partial(join_turns, column=at_once)
    rows = EditRows(dataset, name, *columns, required, args.regions_column, args.turns_column, join)
    if name != "train" and args.num_eval_edits is not None and args.num_eval_edits > len(rows):
        logger.warning("num_eval_edits: got %d, but %s_dataset has %d rows", args.num_eval_edits, name, len(rows))
    first = rows.edit(0)
    refuse_columns(first.columns, first.label)
    if args.turns_column is not None and args.turns_column not in first.columns:
        raise ValueError(
            f"turns_column: got {args.turns_column!r}, expected a column of {name}_dataset, which has "
            f"{', '.join(first.columns)}; rows without further turns have None there"
        )
    most = 0

    def look(edit: Edit) -> None:
        nonlocal most
        # Before a model is loaded; a token of every FLUX.1-Kontext covers 16 × 16 pixels.
        height, width = fit_size(edit.source.height, edit.source.width, args.resolution**2, 16)
        most = max(most, check_edit(edit, args, exploration, (max(height, 16), max(width, 16))))

    full = rows.check(args.check_rows, look)
    missing = [n for n in args.named_regions if n.startswith("region_") and int(n.removeprefix("region_")) > most]
    # Turns that are played one after the other may bring more regions than their row.
    if missing and most and (args.turns_column is None or args.turns_at_once):
        logger.warning(
            "reward_regions: none of the checked rows of %s_dataset has %s, so rewards there teach nothing; the "
            "most regions of one edit are %d",
            name,
            ", ".join(missing),
            most,
        )
    if full:
        logger.warning(
            "%s_dataset: %d of the checked rows have a mask that covers the whole picture; for them nothing is "
            "kept and the region constraint is off",
            name,
            full,
        )
    return rows


def each_set(dataset: Any, make: Callable[[Any, str], EditRows | None]) -> Any:
    """Held-out rows, made by `make(rows, name)`: of one set, or as a dictionary of those of several."""
    if isinstance(dataset, Mapping):
        return {str(key): make(rows, f"eval_{key}") for key, rows in dataset.items()}
    return make(dataset, "eval")


def check_edit(edit: Edit, args: RCGRPOConfig, exploration: Exploration, size: tuple[int, int]) -> int:
    """Regions and words that cannot be read are known before the first rollout; the number of regions.

    A region may vanish at the (height, width) of the edit, where rewards look at it.
    """
    refuse_columns(edit.columns, edit.label)
    if args.attention_words_column is not None:
        words_of(edit, args.attention_words_column)
    if edit.mask_at((size[1], size[0])).getbbox() is None:
        raise ValueError(
            f"{edit.label}: got a region that vanishes at the edit's height × width {size}, expected at least one "
            "pixel of it to stay; drop the row, grow its mask, or raise `resolution`"
        )
    return len(exploration.regions(edit))


def check_played(rows: EditRows | None, args: RCGRPOConfig, exploration: Exploration, editor: FlowEditor) -> None:
    """Turns and words that cannot be read are known before the first rollout.

    Turns are read at the size at which they will be played, which only the editor knows: there a mask may vanish.
    Words may be cut off by `max_sequence_length`, which takes its tokenizer.
    """

    def play(edit: Edit, following: int = 2) -> None:
        height, width = editor.size_for(edit.source)
        check_edit(edit, args, exploration, (height, width))
        if args.attention_words_column is not None:
            words = words_of(edit, args.attention_words_column)
            editor.instruction_weights(edit.prompt, words)
        turn = following_turn(edit, Image.new("RGB", (width, height)), following, args)
        if turn is not None:
            play(turn, following + 1)

    in_turns = args.turns_column is not None and not args.turns_at_once
    if rows is not None and (in_turns or args.attention_words_column is not None):
        rows.check(args.check_rows, play)


def following_turn(edit: Edit, result: Image.Image, number: int, args: RCGRPOConfig) -> Edit | None:
    """The next turn, or None if there is none or all were one edit from the start."""
    if args.turns_column is None or args.turns_at_once:
        return None
    return next_edit(edit, result, args.turns_column, number, args.regions_column)
