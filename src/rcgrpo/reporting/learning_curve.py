"""The learning curve of a run: the same held-out edits, from the same noise, every so many updates.

The trainer keeps each evaluation's numbers edit by edit in the Trainer's `log_history` (hence in checkpoints), under
`EDITS`; here they become a curve, paired intervals and a picture. So a curve can be drawn of a running or a killed run:
`plot_learning_curve(Curve.of(json.load(open(".../checkpoint-N/trainer_state.json"))["log_history"]), "curve.png")`.

Gotcha: an interval is of the change on these edits, so it says nothing of another training seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..inputs.extras import require
from .curves import BLUE, FAINT, HAIR, INK
from .files import PathLike, write_atomically
from .statistics import PairedDifference, paired_bootstrap

EDITS = "edits"
"""Key of `log_history`'s rows behind the evaluation's prefix, such as `eval_`: a column for each measure, `row` and
`task`, one entry for each held-out edit."""

TITLES = {"correct": "correct (%)", "psnr": "background PSNR (dB)", "closeness": "closeness", "reward": "reward"}
"""Measures in the order in which they are drawn; others come after them."""

RESAMPLES = 2000
"""Of a band, which has many intervals; a report's table draws more."""


@dataclass(frozen=True)
class Curve:
    """Held-out edits over a run.

    Attributes:
        steps: updates behind each evaluation.
        rows, tasks: of each edit, in its data set.
        scores: measure to `[evaluations][edits]`, None where it does not apply.
    """

    steps: list[int]
    rows: list[int]
    tasks: list[str]
    scores: dict[str, list[list[float | None]]]

    @classmethod
    def of(cls, log_history: Sequence[Mapping[str, Any]], prefix: str = "eval_") -> "Curve":
        """The evaluations of the edits that the latest one looked at; the last one of each step counts.

        Args:
            prefix: of the evaluations' names in the log; of one of several held-out sets `eval_NAME_`.
        """
        found = {row["step"]: row[prefix + EDITS] for row in log_history if prefix + EDITS in row}
        last = found[max(found)] if found else {"row": [], "task": []}
        found = {step: edits for step, edits in sorted(found.items()) if edits["row"] == last["row"]}
        measures = sorted(last.keys() - {"row", "task"}, key=[*TITLES, *sorted(last)].index)
        missing: list[None] = [None] * len(last["row"])
        scores = {name: [edits.get(name, missing) for edits in found.values()] for name in measures}
        return cls(list(found), list(last["row"]), list(last["task"]), scores)

    def values(self, measure: str, evaluation: int, task: str | None = None) -> list[float | None]:
        """Of each edit of a task, or of all."""
        pairs = zip(self.scores[measure][evaluation], self.tasks, strict=True)
        return [value for value, own in pairs if task in (None, own)]

    def mean(self, measure: str, evaluation: int, task: str | None = None) -> float:
        """Over the edits that have a value; NaN where none has."""
        values = [value for value in self.values(measure, evaluation, task) if value is not None]
        return float(np.mean(values)) if values else float("nan")

    def change(self, measure: str, since: int, until: int, task: str | None = None) -> PairedDifference | None:
        """From one evaluation to another, edit by edit; None where fewer than two edits have both values."""
        before, after = (self.values(measure, evaluation, task) for evaluation in (since, until))
        if sum(a is not None and b is not None for a, b in zip(before, after, strict=True)) < 2:
            return None
        return paired_bootstrap(before, after, measure, num_resamples=RESAMPLES)


def plot_learning_curve(curve: Curve, path: PathLike) -> None:
    """Draw a curve as small multiples: a row for each measure, a column for all edits and one for each task.

    The band is the 95 % interval of the paired change since the first evaluation, drawn around the mean; so it has no
    width there, and what lies outside the first value's line has changed on these edits.

    Args:
        path: of the picture; the suffix decides the format (PNG at 150 dots an inch).

    Raises:
        ValueError: fewer than two evaluations.
    """
    if len(curve.steps) < 2:
        raise ValueError(
            f"learning curve: got {len(curve.steps)} evaluations, expected at least two; set eval_strategy"
        )
    require("report", "a learning curve")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = dict.fromkeys(curve.tasks)
    columns: dict[str, str | None] = {f"all {len(curve.rows)} edits": None}
    if len(tasks) > 1:
        columns |= {f"{task.replace('_', ' ')} ({curve.tasks.count(task)})": task for task in tasks}
    measures = [name for name in curve.scores if any(np.isfinite(_means(curve, name, None)))]
    figure = Figure(figsize=(1.0 + 1.75 * len(columns), 0.7 + 1.6 * len(measures)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(measures), len(columns), sharex=True, sharey="row", squeeze=False)
    for panels, measure in zip(grid, measures, strict=True):
        for axes, task in zip(panels, columns.values(), strict=True):
            _panel(axes, curve, measure, task)
        panels[0].set_ylabel(TITLES.get(measure, measure), fontsize=8.5, color=INK)
    for top, bottom, title in zip(grid[0], grid[-1], columns, strict=True):
        top.set_title(title, loc="left", fontsize=8.5, color=INK)
        bottom.set_xlabel("update", fontsize=8, color=FAINT)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")


def _panel(axes: Any, curve: Curve, measure: str, task: str | None) -> None:
    means = _means(curve, measure, task)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(HAIR)
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    axes.locator_params(axis="both", nbins=4)
    if not np.isfinite(means).any():
        axes.text(0.5, 0.5, "does not apply", transform=axes.transAxes, ha="center", fontsize=7, color=FAINT)
        return
    changes = [curve.change(measure, 0, i, task) for i in range(len(curve.steps))]
    low, high = (
        [means[0] + getattr(change, end) if change else np.nan for change in changes] for end in ("low", "high")
    )
    if measure == "correct":
        high = np.minimum(high, 100).tolist()  # nothing is more than correct
    axes.axhline(means[0], color=HAIR, linewidth=1, zorder=0)
    axes.fill_between(curve.steps, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(curve.steps, means, color=BLUE, linewidth=1.6, marker="o", markersize=2.5)


def _means(curve: Curve, measure: str, task: str | None) -> list[float]:
    return [curve.mean(measure, i, task) for i in range(len(curve.steps))]
