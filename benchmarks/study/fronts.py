"""Whose trade between two metrics lies further out: the area that a method's points dominate, compared over edits.

A method is a handful of points, one for each weight between its rewards; each point is a pair of changes from the base.
Not to train is open to everyone, so the base, (0, 0), belongs to every front. The area counts from a floor on, a change
so bad that nobody would take it (the hypervolume indicator with the floor as its reference point; Zitzler and Thiele,
1998). Edits are resampled for all methods together, so the intervals are those of paired differences; they are widened
for the number of comparisons (Bonferroni).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .record import Results, per_edit
from .tables import BASE, Table

RESAMPLES = 10_000


@dataclass(frozen=True)
class FrontTest:
    """One method's area, and how much less or more another's is; intervals are over edits."""

    metrics: tuple[str, str]
    method: str
    other: str
    area: float
    other_area: float
    difference: float
    low: float
    high: float
    level: float


def hypervolume(points: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """The area above the floor that points dominate, more is better on both axes.

    Args:
        points: `[..., points, 2]`.
        floor: `[2]`.

    Returns:
        `[...]`; zero where no point lies above the floor on both axes.
    """
    sides = np.maximum(points - floor, 0.0)
    order = np.argsort(-sides[..., 0], axis=-1, kind="stable")
    sides = np.take_along_axis(sides, order[..., None], axis=-2)
    # From the right: each point adds what it is higher than all to its right.
    heights = np.maximum.accumulate(sides[..., 1], axis=-1)
    below = np.concatenate([np.zeros_like(heights[..., :1]), heights[..., :-1]], axis=-1)
    return (sides[..., 0] * (heights - below)).sum(axis=-1)


def changes_of(name: str, metric: str, results: Results) -> np.ndarray:
    """Changes from the base by edit, `[edits]`, averaged over the seeds that both have; NaN where there is none."""
    seeds = [seed for variant, seed in results if variant == name and (BASE.name, seed) in results]
    if not seeds:
        return np.array([])

    def values(variant: str, seed: int) -> np.ndarray:
        return per_edit(results[variant, seed]["arms"][""], metric)

    return np.mean([values(name, seed) - values(BASE.name, seed) for seed in seeds], axis=0)


def compare_fronts(table: Table, results: Results, seed: int = 0) -> list[FrontTest]:
    """The first method of the table's fronts against each other one, for each pair of metrics in `table.floors`."""
    methods: dict[str, list[str]] = {}
    for variant in table.variants:
        if variant.front is not None and any(name == variant.name for name, _ in results):
            methods.setdefault(variant.front, []).append(variant.name)
    if not table.floors or len(methods) < 2:
        return []
    first, *others = methods
    level = 1 - 0.05 / (len(others) * len(table.floors))
    found = []
    for floors in table.floors:
        metrics, floor = tuple(floors), np.array(list(floors.values()))
        areas = _areas(methods, metrics, floor, results, seed)
        for other in others:
            difference = areas[first] - areas[other]
            low, high = np.quantile(difference[1:], [(1 - level) / 2, (1 + level) / 2])
            numbers = (areas[first][0], areas[other][0], difference[0], low, high, level)
            found.append(FrontTest((metrics[0], metrics[1]), first, other, *map(float, numbers)))
    return found


def _areas(
    methods: Mapping[str, Sequence[str]], metrics: Sequence[str], floor: np.ndarray, results: Results, seed: int
) -> dict[str, np.ndarray]:
    """Each method's area, `[1 + RESAMPLES]`: of all edits, then of each resample, the same edits for every method."""
    changes = {
        name: np.stack([changes_of(name, metric, results) for metric in metrics], axis=-1)
        for names in methods.values()
        for name in names
    }
    edits = len(next(iter(changes.values())))
    draws = np.random.default_rng(seed).multinomial(edits, [1 / edits] * edits, size=RESAMPLES)
    counts = np.concatenate([np.ones((1, edits)), draws])
    means = {}
    for name, change in changes.items():
        known = ~np.isnan(change)
        means[name] = counts @ np.where(known, change, 0.0) / np.maximum(counts @ known, 1)
    base = np.zeros((len(counts), 2))
    return {
        method: hypervolume(np.stack([base, *(means[name] for name in names)], axis=-2), floor)
        for method, names in methods.items()
    }
