"""What a run shows for itself: means and differences with error bars, tables and training curves.

Evaluation, the model card and the command line draw from here; pictures are drawn by `sheets`. Plain numbers come in;
no model, no metric and no trainer is known. Every file is written through `write_atomically`, so a reader never meets
half of one.

Gotchas:
- The intervals cover the choice of test samples only, not that of the training seed.
- matplotlib is imported where it is used, and through its object API: no backend or global style of the caller changes.
"""

import math
import os
import uuid
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

PathLike = str | os.PathLike[str]

# Statistics -----------------------------------------------------------------------------------------------------------


FEWEST_PAIRS = 6
"""Fewer say nothing: that all of five go one way has a chance of 2 / 2^5 = 6 % where nothing changes (sign test), and a
bootstrap of so few draws its interval too narrow."""


@dataclass(frozen=True)
class PairedDifference:
    """The mean of one metric before and after training on the same samples, and an interval of the difference.

    Attributes:
        metric: Its name; a name that contains "psnr" is printed as dB, with two decimals.
        before, after: Means over the `n` pairs.
        difference: `after - before`.
        low, high: Ends of the interval of the difference.
        n: How many pairs took part.
        higher_is_better: False for a metric such as LPIPS.
        confidence: What share of such intervals would hold the true difference, in (0, 1).
    """

    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    higher_is_better: bool = True
    confidence: float = 0.95

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero, of `FEWEST_PAIRS` at least."""
        return self.n >= FEWEST_PAIRS and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """The direction as an arrow and its worth as a word."""
        if self.n < FEWEST_PAIRS:
            return "too few to tell"
        if not self.significant:
            return "≈ no clear change"
        word = "better" if (self.difference > 0) == self.higher_is_better else "worse"
        return f"{'↑' if self.difference > 0 else '↓'} {word}"


def paired_bootstrap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    metric: str = "",
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    higher_is_better: bool = True,
) -> PairedDifference:
    """Percentile bootstrap of the mean paired difference, resampling the samples.

    Args:
        before, after: One value per sample, in the same order. A pair with a `None` or NaN on either side is left out.
        metric: Name for the table and for error messages.
        confidence: In (0, 1).
        num_resamples: How many times the samples are drawn again.
        seed: The same seed and values give the same interval.

    Raises:
        ValueError: Lists of different lengths, or fewer than two complete pairs.
    """
    if len(before) != len(after):
        raise ValueError(
            f"{metric or 'before'}: got {len(before)} values before and {len(after)} after; expected pairs."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected a number between 0 and 1, such as 0.95.")
    pairs = np.array([before, after], dtype=np.float64)  # None becomes NaN
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    differences = pairs[1] - pairs[0]
    n = len(differences)
    if n < 2:
        raise ValueError(
            f"{metric or 'before'}: {n} of {len(before)} pairs are complete; an interval needs at least 2."
        )
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // n)  # 16 MiB of indices at a time
    means = np.concatenate(
        [
            differences[rng.integers(n, size=(min(chunk, num_resamples - start), n))].mean(axis=1)
            for start in range(0, num_resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        metric=metric,
        before=float(pairs[0].mean()),
        after=float(pairs[1].mean()),
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        n=n,
        higher_is_better=higher_is_better,
        confidence=confidence,
    )


def compare(
    before: Mapping[str, Sequence[float | None]],
    after: Mapping[str, Sequence[float | None]],
    lower_is_better: Collection[str] = (),
) -> list[PairedDifference]:
    """`paired_bootstrap` of every metric, in the order of `before`.

    Raises:
        ValueError: The two do not hold the same metrics, or what `paired_bootstrap` refuses.
    """
    if before.keys() != after.keys():
        raise ValueError(f"Metrics on one side only: {sorted(before.keys() ^ after.keys())}; measure them on both.")
    return [
        paired_bootstrap(before[metric], after[metric], metric, higher_is_better=metric not in lower_is_better)
        for metric in before
    ]


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its bootstrap interval, NaN where there is nothing to resample; `n` values took part."""

    mean: float
    low: float
    high: float
    n: int


def macro_bootstrap(
    values: ArrayLike,
    strata: Sequence[Hashable],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> list[Estimate]:
    """The mean over strata of each stratum's mean, and a percentile bootstrap of it, for several columns at once.

    All columns see the same resamples. A column of differences gives a paired interval.

    Args:
        values: `[samples, columns]`; NaN (or None) is left out of its column.
        strata: of each sample, such as its sub-task; all of one stratum make a plain mean.
        clusters: what is drawn again as a whole, such as the video that a frame comes from; by default each sample
            by itself. Neighbouring frames drawn one by one would make the interval too narrow.
        confidence: in (0, 1).
        num_resamples: how many times the clusters are drawn again.
        seed: the same seed and values give the same intervals.

    Returns:
        One estimate per column; its interval is NaN where fewer than two clusters have a value.

    Raises:
        ValueError: values, strata and clusters of different lengths, or no samples.
    """
    table = np.asarray(values, dtype=np.float64)
    clusters = range(len(table)) if clusters is None else clusters
    if table.ndim != 2 or not len(table) == len(strata) == len(clusters) or not len(table):
        raise ValueError(
            f"macro_bootstrap: got values of shape {table.shape}, {len(strata)} strata and {len(clusters)} clusters; "
            "expected [samples, columns] and one of each for every sample."
        )
    known = ~np.isnan(table)
    stratum, cluster = (_codes(labels) for labels in (strata, clusters))
    num_strata, num_clusters = stratum.max() + 1, cluster.max() + 1
    # [2, strata, clusters, columns]: sums and counts
    totals = np.zeros((2, num_strata, num_clusters, table.shape[1]))
    np.add.at(totals[0], (stratum, cluster), np.where(known, table, 0))
    np.add.at(totals[1], (stratum, cluster), known)

    def macro_mean(drawn: np.ndarray) -> np.ndarray:
        """`[resamples, columns]` from how often each cluster was drawn, `[resamples, clusters]`."""
        sums, counts = np.einsum("rc,tsck->tsrk", drawn, totals, optimize=True)
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        present = ~np.isnan(means)
        number = present.sum(axis=0)
        return np.divide(np.nansum(means, axis=0), number, out=np.full(number.shape, np.nan), where=number > 0)

    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // num_clusters)  # 16 MiB at a time
    resampled = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        places = rng.integers(num_clusters, size=(size, num_clusters)) + num_clusters * np.arange(size)[:, None]
        drawn = np.bincount(places.ravel(), minlength=size * num_clusters).reshape(size, num_clusters)
        resampled.append(macro_mean(drawn.astype(np.float64)))
    means = macro_mean(np.ones((1, num_clusters)))[0]
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    estimates = []
    for column, draws in enumerate(np.concatenate(resampled).T):
        with_value = len(np.unique(cluster[known[:, column]]))
        low, high = np.nanquantile(draws, ends) if with_value > 1 else (math.nan, math.nan)
        estimates.append(Estimate(float(means[column]), float(low), float(high), int(known[:, column].sum())))
    return estimates


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """Each label's number, in the order of first appearance."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels])


# Tables ---------------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[PairedDifference]) -> str:
    """A markdown table, padded so that it reads as well in a terminal; no newline at its end.

    Values have three decimals, decibels two, and more where the interval is narrower than that.
    """
    confidence = " / ".join(f"{100 * value:g}" for value in sorted({row.confidence for row in rows}))
    lines = [["metric", "n", "before", "after", "difference", f"{confidence} % interval".strip(), "verdict"]]
    for row in rows:
        places = _decimals(row)
        lines.append(
            [
                row.metric.replace("|", "\\|"),
                str(row.n),
                *(_number(value, places) for value in (row.before, row.after)),
                _number(row.difference, places, "+"),
                f"[{_number(row.low, places, '+')}, {_number(row.high, places, '+')}]",
                row.verdict,
            ]
        )
    return pad_table(lines, left=(0, len(lines[0]) - 1))


def pad_table(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A markdown table of cells, the first line its head; columns in `left` are set left, numbers to the right."""
    widths = [max(2, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rule = ["-" * width if column in left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _decimals(row: PairedDifference) -> int:
    usual = 2 if "psnr" in row.metric.lower() else 3
    width = row.high - row.low
    return usual if width < 1e-9 else min(6, max(usual, -math.floor(math.log10(width))))


def _number(value: float, places: int, sign: str = "-") -> str:
    return f"{round(value, places) + 0.0:{sign}.{places}f}"  # adding 0.0 turns -0.0 into 0.0


# Curves ---------------------------------------------------------------------------------------------------------------

SINGLE_CURVES = {
    "reward": "reward",
    "reward_std": "reward spread within a group",
    "frac_reward_zero_std": "share of groups without spread",
    "kl": "KL to the reference",
}
MAX_PANELS_IN_ONE_ROW = 3
FEWEST_TO_SMOOTH = 20
BLUE, ORANGE = "#2563eb", "#ea580c"
INK, FAINT, HAIR = "#1f2328", "#57606a", "#c9ced6"


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Draw a run's logs as small multiples: what was logged, its moving mean if long, and the evaluations as points.

    There is a panel for the reward, for each reward function, for each `background/…` and `attention/…` value, for the
    spread of rewards and for the KL; a panel without values is left out.

    Args:
        log_history: `trainer.state.log_history`: rows that hold "step" and some of TRL's names (`reward`, `reward_std`,
            `rewards/NAME/mean`, `eval_reward`, …). `None` and NaN are skipped.
        path: Of the picture; the suffix decides the format (PNG at 150 dots an inch).

    Raises:
        ValueError: No row holds anything that can be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(log_history)
    if not panels:
        raise ValueError(f"plot_curves: none of {len(log_history)} rows holds a `step` and a reward or another curve.")
    num_columns = min(MAX_PANELS_IN_ONE_ROW, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.2 * max(num_columns, 1.4), 2.7 * num_rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    last_step = max([1, *(row["step"] for row in log_history if "step" in row)])
    handles: dict[str, Any] = {}
    for index, (key, title) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        steps, values = _curve(log_history, key)
        if len(steps):
            noisy = len(steps) >= FEWEST_TO_SMOOTH
            raw = axes.plot(
                steps, values, color=BLUE, alpha=0.3 if noisy else 1, linewidth=1, marker="" if noisy else "."
            )
            handles.setdefault("as logged", raw[0])
            if noisy:
                mean = axes.plot(steps, _moving_mean(values), color=BLUE, linewidth=1.8)
                handles.setdefault("moving mean", mean[0])
        steps, values = _curve(log_history, f"eval_{key}")
        if len(steps):
            points = axes.plot(steps, values, "o", color=ORANGE, markersize=5, markeredgecolor="white", clip_on=False)
            handles.setdefault("evaluation", points[0])
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(HAIR)
        axes.tick_params(colors=FAINT, labelsize=8, length=0)
        axes.grid(color="#eaeef2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlim(0, 1.02 * last_step)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        if index + num_columns >= len(panels):
            axes.set_xlabel("step", fontsize=9, color=FAINT)
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")


def _panels(log_history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Key to title of every curve that has a value, the reward first."""
    keys = dict.fromkeys(key.removeprefix("eval_") for row in log_history for key in row)
    titles = {"reward": SINGLE_CURVES["reward"]}
    for key in sorted(keys):
        if key.startswith("rewards/") and key.endswith("/mean"):
            titles[key] = f"reward: {key.removeprefix('rewards/').removesuffix('/mean')}"
    for prefix in ("background/", "attention/"):
        for key in sorted(keys):
            if key.startswith(prefix):
                title = key.replace("/", " ").replace("_", " ")
                titles[key] = title.replace("psnr", "PSNR (dB)").replace("ssim", "SSIM")
    titles |= SINGLE_CURVES
    return {k: v for k, v in titles.items() if any(len(_curve(log_history, name)[0]) for name in (k, f"eval_{k}"))}


def _curve(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in log_history if "step" in row and row.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a tenth of the curve; at the ends over what there is."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; moved over it on success, removed on failure.

    Folders that are missing are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
