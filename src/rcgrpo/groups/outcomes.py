"""What became of held-out edits, in a few numbers each: small enough to keep of every evaluation of a run.

Where it fits: an evaluation during training measures its groups here and keeps the numbers in the Trainer's
`log_history`, which is in checkpoints; `reporting.learning_curve` draws them, the guard watches them. Nobody trains on
`correct` and `closeness`: no reward asks the network that judges the first, none reads the ground truth's pixels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..inputs.extras import missing
from ..inputs.pictures import to_rgb
from ..maths.metrics import background_psnr
from ..rewards import get_second_scorer
from ..rewards.builtin import ADDS, REMOVES
from .diagnostics import target_closeness
from .rollout import Group

MEASURES = ("correct", "closeness", "psnr", "reward")
"""Correct by the second judge (100 or 0), closeness to the ground truth in the region, background PSNR in dB at the
picture's own size, the weighted reward."""

Outcome = dict[str, Any]
"""`row` of the edit in its data set, its `task`, and each of `MEASURES`, None where it does not apply."""


def outcomes(groups: Sequence[Group]) -> list[Outcome]:
    """Measure scored groups; each number is the mean over a group's candidates that have one.

    Args:
        groups: with scores. `correct` needs the extra `tiny` and the columns `task` and `caption`, with objects that
            the embedded data know, and for removals `edited_image`; `closeness` needs the last alone.
    """
    tasks = [str(group.edit.columns.get("task") or "") for group in groups]
    targets = [_target(group) for group in groups]
    judged = [i for i, group in enumerate(groups) if _can_be_judged(group, tasks[i], targets[i])]
    judged = [] if missing("tiny") else judged
    correct = dict(zip(judged, _correct([groups[i] for i in judged], [targets[i] for i in judged]), strict=True))
    results = []
    for i, (group, task, target) in enumerate(zip(groups, tasks, targets, strict=True)):
        count = len(group.images)
        masks, sources = [group.mask] * count, [group.source] * count
        results.append(
            {
                "row": group.edit.row,
                "task": task,
                "correct": _mean(correct.get(i, [])),
                "closeness": _mean(target_closeness(group.images, masks, [target] * count)),
                "psnr": _mean(background_psnr(group.images, sources, masks, None)),
                "reward": _mean(group.scores.tolist()),  # type: ignore[union-attr]
            }
        )
    return results


def _target(group: Group) -> Image.Image | None:
    """The ground truth at the candidates' size."""
    target = group.edit.columns.get("edited_image")
    if not isinstance(target, Image.Image):  # or a path that only rewards open
        return None
    return to_rgb(target).resize(group.images[0].size, Image.Resampling.BICUBIC)


def _can_be_judged(group: Group, task: str, target: Image.Image | None) -> bool:
    named = isinstance(group.edit.columns.get("caption"), str)
    return named and (task in ADDS or (task in REMOVES and target is not None))


def _correct(groups: Sequence[Group], targets: Sequence[Image.Image | None]) -> list[list[float | None]]:
    """100 or 0 for each candidate of each group, by the second judge, asked once; None for objects it does not know."""
    images, masks, captions, draws, wanted, before = [], [], [], [], [], []
    for group, target in zip(groups, targets, strict=True):
        count, draw = len(group.images), group.edit.columns["task"] in ADDS
        images += group.images
        masks += [group.mask] * count
        captions += [group.edit.columns["caption"]] * count
        draws += [draw] * count
        wanted += [None if draw else target] * count  # what is drawn is named, so these would cost as much for nothing
        before += [None if draw else group.source] * count
    verdicts = get_second_scorer().correct(images, masks, captions, draws, wanted, before) if images else []  # type: ignore[arg-type]
    each = iter(None if verdict is None else 100.0 * verdict for verdict in verdicts)
    return [[next(each) for _ in group.images] for group in groups]


def by_task(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each task, in the order in which tasks first come; nothing where there is one task only."""
    tasks = dict.fromkeys(one["task"] for one in found)
    return {task: [one for one in found if one["task"] == task] for task in tasks} if len(tasks) > 1 else {}


def means(found: Sequence[Outcome], prefix: str = "") -> dict[str, float]:
    """The mean of each measure over the edits that have it, by `prefix` and its name; left out where none has."""
    numbers = {prefix + name: _mean(one[name] for one in found) for name in MEASURES}
    return {name: value for name, value in numbers.items() if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
