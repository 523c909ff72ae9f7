"""Scores of groups, and what their candidates are worth beside each other.

Where it fits: between rollout and update. `begin` hands candidates to the rewards, which work beside the next rollout;
`receive` waits for a batch, `fill_in` writes its scores into the groups, `compare` their advantages.

Gotchas: what rewards log arrives in `receive`, in the caller's thread. Candidates on whom a reward failed keep what the
others said of them, but are compared with nobody (`objective.comparable`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from ..maths.objective import batch_advantages, comparable, total_scores
from ..rewards import PendingScores, Reward, RewardFailure, ScoredBatch, ScoringQueue
from .rollout import Group

logger = logging.getLogger(__name__)

MOST_WARNINGS = 5
"""Failures of one batch that are told one by one."""


@dataclass
class GroupScoring:
    """The rewards of a run, what each weighs and where it acts.

    Args:
        rewards: as `resolve_rewards` gives them.
        weights: of the rewards, `[rewards]`.
        reward_regions: with region advantages, the region of each reward; else none.
        named_regions: these regions, each once, in the order of the rows of advantages.
        importance: of the named regions; all alike by default.
        how, scale_rewards, std_floor, min_std, power, negative_clip: of `objective.batch_advantages`.
        queue: calls the rewards.

    Attributes:
        extra_columns: what rewards logged with `log_extra` on the latest batch, one entry per candidate.
    """

    rewards: list[Reward]
    weights: Tensor
    reward_regions: list[str] = field(default_factory=list)
    named_regions: Sequence[str] = ()
    importance: Sequence[float] | None = None
    how: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    std_floor: float = 0.0
    min_std: float = 0.0
    power: float = 0.8
    queue: ScoringQueue = field(default_factory=ScoringQueue)
    negative_clip: float = inf
    extra_columns: dict[str, list[Any]] = field(default_factory=dict, init=False)

    @property
    def spans_the_batch(self) -> bool:
        """Whether advantages depend on all groups of an update, so that none can be had before all are scored."""
        return self.scale_rewards == "batch" or self.how == "normalize_then_sum"

    @property
    def rows(self) -> list[list[bool]]:
        """Which rewards belong to each named region; nothing without region advantages."""
        return [[region == name for region in self.reward_regions] for name in self.named_regions]

    @property
    def say(self) -> Tensor:
        """What each reward weighs in all that an update learns from, 0 in a region of no weight."""
        if not self.reward_regions or self.importance is None:
            return self.weights
        of_region = dict(zip(self.named_regions, self.importance, strict=True))
        return self.weights * torch.tensor([of_region[region] for region in self.reward_regions])

    def begin(self, groups: Sequence[Group], labels: list[str] | None = None, **context: Any) -> PendingScores:
        """Score every candidate of the groups, in one call of each reward, beside whatever comes next.

        Args:
            groups: rolled out.
            labels: of the candidates, for warnings.
            context: handed to the rewards besides the edits' columns, `log_extra` and what was recorded of attention.
        """
        per_candidate = [(group, i) for group in groups for i in range(len(group.images))]
        sources, masks = {id(g): g.source for g in groups}, {id(g): g.mask for g in groups}
        names = set.intersection(*(set(g.edit.columns) for g in groups))
        columns = {name: [g.edit.columns[name] for g, _ in per_candidate] for name in sorted(names)}
        context["log_extra"] = self._log_extra
        if all(g.attention is not None for g in groups):
            for measure in ("mass", "density", "contrast"):
                context[f"attention_{measure}"] = [float(getattr(g.attention, measure)[i]) for g, i in per_candidate]
        return self.queue.submit(
            self.rewards,
            [g.edit.prompt for g, _ in per_candidate],
            [g.images[i] for g, i in per_candidate],
            [sources[id(g)] for g, _ in per_candidate],
            [masks[id(g)] for g, _ in per_candidate],
            columns,
            labels or _candidate_labels(groups),
            context,
        )

    def receive(self, pending: PendingScores) -> ScoredBatch:
        """Wait for a batch; its extra columns take the place of the last one's."""
        self.extra_columns = {}
        return pending.result()

    def _log_extra(self, column: str, values: list[Any]) -> None:
        self.extra_columns[column] = list(values)

    def fill_in(self, groups: Sequence[Group], scored: ScoredBatch) -> None:
        """Fill in rewards and scores of the groups of the batch that came last; warn of candidates without a score."""
        _warn_of(scored.failures)
        lost = {(failure.sample_label, failure.reward) for failure in scored.failures}
        labels, sizes, rows = _candidate_labels(groups), [len(group.images) for group in groups], self.rows
        failures = torch.tensor([[(label, name) in lost for name in scored.names] for label in labels])
        extra = {name: values for name, values in self.extra_columns.items() if len(values) == len(labels)}
        end = 0
        for group, rewards, failed in zip(groups, scored.values.split(sizes), failures.split(sizes), strict=True):
            start, end = end, end + len(group.images)
            group.logged = {name: values[start:end] for name, values in extra.items()}
            group.rewards, group.scores = rewards, total_scores(rewards, self.weights, failed)
            group.compared = compared = comparable(rewards, self.say, failed)
            if rows:
                each = [total_scores(compared[:, chosen], self.weights[chosen]) for chosen in rows]
                group.region_scores = torch.stack(each)

    def compare(self, groups: Sequence[Group], others: Sequence[Tensor] = ()) -> None:
        """Fill in the advantages of scored groups.

        Args:
            others: what is compared of the groups that other processes have, which belong to the batch too.
        """
        # With region advantages each region's rewards are compared among themselves.
        results = [
            batch_advantages(
                [rewards[:, chosen] for rewards in (*(group.compared for group in groups), *others)],  # type: ignore[index]
                self.weights[chosen],
                how=self.how,
                scale_rewards=self.scale_rewards,
                std_floor=self.std_floor,
                min_std=self.min_std,
                power=self.power,
                negative_clip=self.negative_clip,
            )
            for chosen in self.rows or [[True] * len(self.rewards)]
        ]
        for i, group in enumerate(groups):
            group.advantages = torch.stack([result[i] for result in results]) if self.rows else results[0][i]


def _candidate_labels(groups: Sequence[Group]) -> list[str]:
    return [f"{group.edit.label}, candidate {i}" for group in groups for i in range(len(group.images))]


def _warn_of(failures: Sequence[RewardFailure]) -> None:
    for failure in failures[:MOST_WARNINGS]:
        logger.warning("reward %r failed on %s: %s", failure.reward, failure.sample_label, failure.reason)
    if len(failures) > MOST_WARNINGS:
        logger.warning("... and %d more reward failures in this batch", len(failures) - MOST_WARNINGS)
