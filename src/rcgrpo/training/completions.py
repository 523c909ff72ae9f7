"""What the log keeps of candidates, as `log_completions` asks: a table and a picture each time it is written.

TRL's name and folder: `completions/completions_00010.parquet` has a row for each candidate of the latest update, and
the picture beside it shows some of these edits, candidates best first. Evaluations have files of their own,
`eval_completions_...`, always with the same edits, so that their pictures can be compared. The trainer records groups
as it scores them; the picture also goes to the trackers that show pictures.

Gotcha: what is recorded is small, pictures shrunk and tensors gone, as it is kept until the log is written and travels
between processes.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from ..groups.rollout import Group
from ..inputs.pictures import to_rgb
from ..reporting.files import write_atomically
from ..reporting.sheets import contact_sheet, outline

SHOWN = 8
"""Edits in a picture."""

CELL = 192
"""Side of a candidate in it, in pixels."""


@dataclass(frozen=True)
class Completions:
    """One group.

    Args:
        row: of the edit in its data set.
        columns: of the table, one entry per candidate: `edit`, `prompt`, `candidate`, `rewards/NAME`, `reward`, which
            is their weighted sum, `advantage`, or with region advantages `advantage/REGION`, and what the rewards
            logged; None where there is no score.
        pictures: the source with the region's outline, then the candidates; none where only numbers are kept.
    """

    row: int
    columns: dict[str, list[Any]]
    pictures: Sequence[Image.Image] = ()


def shown_rows(number: int) -> frozenset[int]:
    """The rows of a data set that an evaluation shows, the same each time; the first ones may be all of a kind."""
    return frozenset(random.Random(0).sample(range(number), min(SHOWN, number)))


def record(group: Group, rewards: Sequence[str], regions: Sequence[str], draw: bool) -> Completions:
    """What is kept of a scored group with advantages.

    Args:
        rewards: names of the columns of `group.rewards`.
        regions: with region advantages, the names of the rows of `group.advantages`.
        draw: keep pictures too.
    """
    assert group.rewards is not None and group.scores is not None and group.advantages is not None
    size = len(group.images)
    advantages = torch.atleast_2d(group.advantages)
    columns: dict[str, list[Any]] = {
        "edit": [group.edit.label] * size,
        "prompt": [group.edit.prompt] * size,
        "candidate": list(range(size)),
        **{f"rewards/{name}": _numbers(group.rewards[:, i]) for i, name in enumerate(rewards)},
        "reward": _numbers(group.scores),
        **{f"advantage/{regions[i]}" if regions else "advantage": _numbers(row) for i, row in enumerate(advantages)},
    }
    columns |= {name: _plain(values) for name, values in group.logged.items() if name not in columns}
    pictures = [outline(group.source, group.mask), *group.images] if draw else []
    return Completions(group.edit.row, columns, [_shrunk(picture) for picture in pictures])


def write_completions(folder: Path, name: str, step: int, groups: Sequence[Completions]) -> Image.Image | None:
    """Write the table and the picture, each whole or not at all.

    Args:
        folder: made if it is missing.
        name: of the files, before the step.
        groups: of any sizes; the first `SHOWN` with pictures are drawn.

    Returns:
        The picture; None, and no such file, where no group has pictures.
    """
    names = dict.fromkeys(name for group in groups for name in group.columns)
    table: dict[str, list[Any]] = {"step": [], **{name: [] for name in names}}
    for group in groups:
        size = len(group.columns["candidate"])
        table["step"] += [step] * size
        for column in names:
            table[column] += group.columns.get(column, [None] * size)
    # What one batch's rewards logged as numbers may be text in another's.
    table = {column: _plain(values) for column, values in table.items()}
    with write_atomically(folder / f"{name}_{step:05d}.parquet") as part:
        pyarrow.parquet.write_table(pyarrow.table(table), part)
    drawn = [group for group in groups if group.pictures][:SHOWN]
    if not drawn:
        return None
    sheet = draw_groups(drawn)
    with write_atomically(folder / f"{name}_{step:05d}.jpg") as part:
        sheet.save(part, quality=85)
    return sheet


def draw_groups(groups: Sequence[Completions]) -> Image.Image:
    """A row for each group: its source, then its candidates, best first, with the reward below each."""
    ranked = [_best_first(group) for group in groups]
    most = max(map(len, ranked))
    places = ["edited"] if most == 1 else ["best", *(str(place) for place in range(2, most + 1))]
    blank = Image.new("RGB", (1, 1), "white")
    columns = {"source": [group.pictures[0] for group in groups]}
    labels = {}
    for place, name in enumerate(places):
        chosen = [candidates[place] if place < len(candidates) else (blank, "") for candidates in ranked]
        columns[name], labels[name] = [picture for picture, _ in chosen], [text for _, text in chosen]
    return contact_sheet(columns, [group.columns["prompt"][0] for group in groups], CELL, labels=labels)


def show(picture: Image.Image, name: str, step: int, report_to: Iterable[str], callbacks: Iterable[Any]) -> None:
    """Send the picture to the trackers of a run that show pictures: Weights & Biases, Trackio, TensorBoard.

    Args:
        name: under which it stands there.
        report_to: as in `TrainingArguments`, a list.
        callbacks: the trainer's, of which TensorBoard's has the writer.
    """
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({name: wandb.Image(picture), "train/global_step": step})
    if "trackio" in report_to:
        import trackio

        trackio.log({name: trackio.Image(picture), "train/global_step": step})
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")


def _best_first(group: Completions) -> list[tuple[Image.Image, str]]:
    """Candidates with their rewards; those without a score come last."""
    scores = group.columns["reward"]
    order = sorted(range(len(scores)), key=lambda i: (scores[i] is None, -(scores[i] or 0)))
    return [(group.pictures[1 + i], "no score" if scores[i] is None else f"{scores[i]:#.4g}") for i in order]


def _numbers(values: Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]


def _plain(values: Sequence[Any]) -> list[Any]:
    """Numbers, or texts, or whatever there is as text, so that a column has one type."""
    known = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    for kind in (bool, int | float, str):
        if all(value is None or isinstance(value, kind) for value in known):
            break
    else:
        return [None if value is None else str(value) for value in known]
    if any(isinstance(value, float) for value in known):
        return [None if value is None else float(value) for value in known]
    return known


def _shrunk(picture: Image.Image) -> Image.Image:
    small = to_rgb(picture).copy()
    small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return small
