"""From cells' results to a table's numbers, page and plot. Pure on results; nothing here runs a model.

Two intervals, because two things vary. Over *seeds*: Student's t of each seed's mean, and of each seed's difference to
the baseline. Over *edits*: `statistics.paired_bootstrap` of each edit's difference, averaged over the seeds before. A
difference is called clear when both exclude zero; of one or two seeds only the second exists, and nothing is clear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rcgrpo.reporting.statistics import paired_bootstrap

from .fronts import compare_fronts
from .record import Results, per_edit
from .tables import BASE, COSTS, RATES, Table

Row = tuple[str, str]
"""Variant and arm."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and half the width of its 95 % interval, NaN for fewer than three."""

    mean: float
    half: float
    seeds: int


@dataclass(frozen=True)
class Test:
    """A paired difference to the baseline, with intervals over seeds and over edits, NaN where there is none."""

    difference: float
    seeds_low: float
    seeds_high: float
    edits_low: float
    edits_high: float

    @property
    def clear(self) -> bool:
        """Whether every interval that the metric has excludes zero, the one over seeds at least."""
        over_seeds = self.seeds_low > 0 or self.seeds_high < 0
        over_edits = math.isnan(self.edits_low) or self.edits_low > 0 or self.edits_high < 0
        return over_seeds and over_edits


def over_seeds(values: Sequence[float | None]) -> Mean:
    """Student's 95 % interval of a mean over seeds, NaN of one or two; None and NaN are left out."""
    from scipy.stats import t

    known = np.array([value for value in values if value is not None and not math.isnan(value)])
    if not len(known):
        return Mean(math.nan, math.nan, 0)
    if len(known) < 3:  # of two it is 13 times their spread and says nothing
        return Mean(float(known.mean()), math.nan, len(known))
    half = t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
    return Mean(float(known.mean()), float(half), len(known))


def of_cell(arm: Mapping[str, Any], metric: str) -> float:
    """A metric of one cell: its value, or the mean over its edits."""
    if metric in arm["values"]:
        value = arm["values"][metric]
        return math.nan if value is None else float(value)
    values = per_edit(arm, metric)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def rows_of(table: Table, results: Results) -> list[Row]:
    """Variants with a result, each shown arm of its own, in the table's order."""
    found = []
    for variant in table.variants:
        for (name, _), result in results.items():
            if name == variant.name:
                shown = [arm for arm in result["arms"] if table.arms is None or arm in table.arms]
                found += [(name, arm) for arm in shown if (name, arm) not in found]
    return found


def seeds_of(row: Row, results: Results) -> list[int]:
    return sorted(seed for (name, seed), result in results.items() if name == row[0] and row[1] in result["arms"])


def with_rates(results: Results, base: str = BASE.name) -> dict[tuple[str, int], dict[str, Any]]:
    """The results with what training gained in reward over the base of the same seed, for what it cost.

    `reward_per_1000_units` by counted compute, the same on every machine; `reward_per_minute` by the processor time of
    the training process, which other work on the machine changes little, where the clock on the wall would tell of it.
    """
    rated = {}
    for (name, seed), result in results.items():
        start = results.get((base, seed))
        arms = {}
        for arm, content in result["arms"].items():
            values = dict(content["values"])
            if start is not None and name != base and arm in start["arms"]:
                gain = of_cell(content, "reward") - of_cell(start["arms"][arm], "reward")
                if values.get("units"):
                    values["reward_per_1000_units"] = 1000 * gain / values["units"]
                if values.get("cpu_minutes"):
                    values["reward_per_minute"] = gain / values["cpu_minutes"]
            arms[arm] = {**content, "values": values}
        rated[name, seed] = {**result, "arms": arms}
    return rated


def baselines_of(table: Table, row: Row) -> list[Row]:
    """What a row is tested against; nothing for the baseline itself and where a table has none."""
    if table.baseline is None and table.baseline_arm is None:
        return []
    own = next((variant.against for variant in table.variants if variant.name == row[0]), ())
    arm = table.baseline_arm if table.baseline_arm is not None else row[1]
    return [other for name in own or (table.baseline or row[0],) if (other := (name, arm)) != row]


def test_against(metric: str, row: Row, other: Row, results: Results) -> Test | None:
    """The paired test of one metric over the seeds that both rows have; `None` without any.

    An edit counts for a seed where it has a value on both sides.
    """
    seeds = [seed for seed in seeds_of(row, results) if seed in seeds_of(other, results)]
    if not seeds:
        return None
    sides = [[results[name, seed]["arms"][arm] for seed in seeds] for name, arm in (other, row)]
    if any(metric in arm["values"] for side in sides for arm in side):
        cells = [[of_cell(arm, metric) for arm in side] for side in sides]
        difference = over_seeds([after - before for before, after in zip(*cells, strict=True)])
        return _test(difference, math.nan, math.nan)
    stacked = np.array([[per_edit(arm, metric) for arm in side] for side in sides])  # [2, seeds, edits]
    complete = ~np.isnan(stacked).any(axis=0)
    stacked = np.where(complete, stacked, 0.0)

    def means(axis: int) -> np.ndarray:
        counted = complete.sum(axis=axis)
        total = stacked.sum(axis=axis + 1)
        return np.divide(total, counted, out=np.full(total.shape, np.nan), where=counted > 0)

    by_seed, by_edit = means(axis=1), means(axis=0)
    difference = over_seeds((by_seed[1] - by_seed[0]).tolist())
    if (complete.any(axis=0)).sum() < 2:
        return _test(difference, math.nan, math.nan)
    tested = paired_bootstrap(by_edit[0].tolist(), by_edit[1].tolist(), metric)
    return _test(difference, tested.low, tested.high)


def tests_of(metrics: Sequence[str], row: Row, other: Row | None, results: Results) -> dict[str, dict[str, Any]]:
    """`test_against` of each metric that has one, as plain data; nothing without another row."""
    if other is None:
        return {}
    found = {metric: test_against(metric, row, other, results) for metric in metrics}
    return {metric: {**asdict(test), "clear": test.clear} for metric, test in found.items() if test is not None}


def _test(difference: Mean, low: float, high: float) -> Test:
    mean, half = difference.mean, difference.half
    return Test(mean, mean - half, mean + half, low, high)


def summarise(table: Table, results: Results) -> dict[str, Any]:
    """Every row's means and tests, as plain data."""
    rated = with_rates(results)
    rows = []
    for row in rows_of(table, rated):
        seeds = seeds_of(row, rated)
        arms = [rated[row[0], seed]["arms"][row[1]] for seed in seeds]
        by_seed = {metric: [of_cell(arm, metric) for arm in arms] for metric in table.metrics}
        others = baselines_of(table, row)
        start = None if row[0] == BASE.name else (BASE.name, row[1])
        compared = [metric for metric in table.metrics if metric not in COSTS]
        tests = [tests_of(compared, row, other, rated) for other in others]
        gains = tests_of([m for m in table.metrics if m not in COSTS | RATES], row, start, rated)
        curves = {
            name: [asdict(over_seeds(point)) for point in zip(*(arm["curves"][name] for arm in arms), strict=True)]
            for name in arms[0].get("curves", {})
        }
        rows.append(
            {
                "variant": row[0],
                "arm": row[1],
                "seeds": seeds,
                "means": {m: asdict(over_seeds(values)) for m, values in by_seed.items()},
                "by_seed": by_seed,
                "against": [" ".join(part for part in other if part) for other in others],
                "tests": tests,
                "gains": gains,
                "curves": curves,
            }
        )
    fronts = [asdict(test) for test in compare_fronts(table, results)]
    return {
        "title": table.title,
        "question": table.question,
        "metrics": dict(table.metrics),
        "rows": rows,
        **({"fronts": fronts} if fronts else {}),
    }


def fill_in(summary: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Put an earlier summary's intervals over edits, and curves, into rows of the same seeds that have none.

    They need more than a cell's means, and means are all that is left of some (`note` in the published results). An
    interval is taken only where the difference is the same.
    """
    before = {(row["variant"], row["arm"]): row for row in earlier["rows"]}
    for row in summary["rows"]:
        same = before.get((row["variant"], row["arm"]))
        if same is None or same["seeds"] != row["seeds"]:
            continue
        row["curves"] = row["curves"] or same["curves"]
        pairs = [(row["gains"], same["gains"])]
        known = dict(zip(same["against"], same["tests"], strict=True))
        pairs += [(tests, known.get(other, {})) for other, tests in zip(row["against"], row["tests"], strict=True)]
        for tests, kept in pairs:
            for metric, test in tests.items():
                if not math.isnan(test["edits_low"]) or (old := kept.get(metric)) is None or old["edits_low"] is None:
                    continue
                if math.isclose(test["difference"], old["difference"], rel_tol=1e-3, abs_tol=1e-5):
                    test |= {part: old[part] for part in ("edits_low", "edits_high", "clear")}
