"""The edits that training changed most, for the better and for the worse: one sheet that shows both.

Where it fits: beside the contact sheet, whose edits are drawn by chance and mostly look as before. Why it exists: a
mean hides what broke, and a reader sees in a minute what a run does to edits when it does something.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..reporting.sheets import contact_sheet, outline

if TYPE_CHECKING:
    from .held_out import HeldOut

NUM_EACH = 6
"""Edits on each side of the sheet."""

JUDGES = ("correct (%)", "edit score", "reward")
"""What says how much an edit changed: the first that both sides have, and where that is the same the next."""

SIDE = 128
"""Pixels of the longer side, at most, of the pictures that are kept of every edit."""


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy within `SIDE` pixels, small enough to keep one of every held-out edit."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def changed_most(
    before: Sequence[Mapping[str, float | None]], after: Sequence[Mapping[str, float | None]], count: int = NUM_EACH
) -> tuple[list[int], list[int]]:
    """Places of the edits that rose most and of those that fell most, the largest change first.

    Args:
        before, after: each edit's scores, by metric.
        count: of either, at most; an edit that did not rise is not among the first, and so for the second.
    """
    changes = []
    for old, new in zip(before, after, strict=True):
        pairs = [(old.get(name), new.get(name)) for name in JUDGES]
        changes.append(tuple(b - a if a is not None and b is not None else 0.0 for a, b in pairs))
    order = sorted(range(len(changes)), key=lambda i: changes[i], reverse=True)
    nothing = (0.0,) * len(JUDGES)
    better = [i for i in order if changes[i] > nothing][:count]
    worse = [i for i in reversed(order) if changes[i] < nothing][:count]
    return better, worse


def write_changed_most(path: Path, before: Sequence["HeldOut"], after: Sequence["HeldOut"]) -> None:
    """Write the sheet; nothing where no edit changed, or where none was kept as a picture."""
    better, worse = changed_most([one.scores for one in before], [one.scores for one in after])
    places = [i for i in (*better, *worse) if before[i].small and after[i].small]
    if not places:
        return
    columns = {
        "source": [outline(after[i].small["source"], after[i].small["mask"]) for i in places],
        "before": [before[i].small["edited"] for i in places],
        "after": [after[i].small["edited"] for i in places],
    }
    captions = [f"{'better' if i in better else 'worse'}: {after[i].prompt}" for i in places]
    contact_sheet(columns, captions, path=path)
