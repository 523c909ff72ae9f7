"""What a run shows for itself in numbers: means and differences with error bars, tables.

Evaluation, the model card and the command line draw from here; pictures are drawn by `curves` and `sheets`. Plain
numbers come in; no model, no metric and no trainer is known.

Gotcha: the intervals cover the choice of test samples only, not that of the training seed.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

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

    By hand, as `scipy.stats.bootstrap`, which draws the same numbers, would make every report need SciPy for ten lines.

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

    All columns see the same resamples. A column of differences gives a paired interval. SciPy's bootstrap draws neither
    clusters nor several strata at once.

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
    """A markdown table of cells, the first line its head; columns in `left` are set left, numbers to the right.

    By hand, as tabulate would be one more dependency for these ten lines.
    """
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


# Files ----------------------------------------------------------------------------------------------------------------
