"""Calls every reward on a batch of candidates and keeps what failed apart from what scored.

Where it fits: the trainer and the evaluation call `score` once per batch; advantages read `ScoredBatch.values`, where
NaN leaves a candidate out of its group's statistics. Why it exists: a bad reward must stop the step or leave it, never
poison it. A failure is not a 0.0, one candidate's failure is not the batch's, and a bug is not bad luck.

Gotchas: asynchronous rewards run on a private event loop in a daemon thread, so `score` also works where a loop is
running already (Jupyter). The loop lives as long as the process, hence sessions that a reward keeps stay usable. While
the trainer waits for them, the plain rewards run, one after the other, in the caller's own thread.
"""

import asyncio
import inspect
import logging
import math
import numbers
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .registry import Reward, RewardError

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 3
"""So many candidates in a row that fail alone mean that the reward is broken, not the candidates."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RewardFailure:
    """One candidate that one reward could not score, and why."""

    reward: str
    sample_label: str
    reason: str


@dataclass(frozen=True)
class ScoredBatch:
    """What `score` returns.

    Args:
        names: the rewards' names, in the order of `values`' columns.
        values: fp32 `[candidates, rewards]`; NaN where there is no score: not applicable, or failed.
        failures: the failed ones, by reward in the order of `names`.
    """

    names: tuple[str, ...]
    values: Tensor
    failures: list[RewardFailure] = field(default_factory=list)


def score(
    rewards: Sequence[Reward],
    prompts: list[str],
    images: list[Image.Image],
    source_images: list[Image.Image],
    masks: list[Image.Image],
    columns: Mapping[str, list[Any]],
    labels: list[str],
    context: Mapping[str, Any] | None = None,
) -> ScoredBatch:
    """Scores `n` candidates with every reward.

    A call that raises is repeated for each candidate alone, to find out which one it fails on; after three in a row the
    others are given up with the last reason. In these repetitions `log_extra` and `log_metric` do nothing, as their
    lists would not match the batch.

    Args:
        rewards: from `resolve_rewards`.
        prompts: `n` instructions.
        images: `n` candidates, PIL RGB.
        source_images: `n` sources, PIL RGB.
        masks: `n` masks, PIL "L", 255 = edit.
        columns: the other columns of the data set, each a list of `n`.
        labels: `n` strings that name the candidates in failures, such as "train row 17, candidate 3".
        context: further keyword arguments (`trainer_state`, `log_extra`, `log_metric`, `attention_density`, …). Lists
            among them hold one entry per candidate.

    Returns:
        Scores as `[n, len(rewards)]`, and the failures.

    Raises:
        RewardError: a reward lacks a column, returned something other than `n` entries, or raised `RewardError` itself.
        ValueError: an argument does not have `n` entries.
    """
    per_candidate: dict[str, list[Any]] = {"prompts": prompts, "images": images, "completions": images}
    per_candidate |= {"source_images": source_images, "masks": masks, **columns}
    shared: dict[str, Any] = {}
    for name, value in (context or {}).items():
        (per_candidate if isinstance(value, list) else shared)[name] = value
    for name, value in {**per_candidate, "labels": labels}.items():
        if len(value) != len(images):
            raise ValueError(f"score: {name!r} has {len(value)} entries, expected {len(images)}, one per image")
    for reward in rewards:
        if missing := [column for column in reward.columns if column not in per_candidate]:
            raise RewardError(
                f"reward {reward.name!r} needs the column(s) {', '.join(missing)}, which this data set does not have; "
                f"it has {', '.join(columns) or 'none'}"
            )

    def scoring(reward: Reward) -> Coroutine[Any, Any, list[float | str | None]]:
        return _score_one(reward, per_candidate, shared)

    async def scoring_together() -> list[list[float | str | None]]:
        return await asyncio.gather(*(scoring(reward) for reward in rewards if reward.is_async))

    waiting = None
    if any(reward.is_async for reward in rewards):
        waiting = asyncio.run_coroutine_threadsafe(scoring_together(), _private_loop())
    try:
        plain = iter([_run_here(scoring(reward)) for reward in rewards if not reward.is_async])
        remote = iter(waiting.result() if waiting else [])
    except BaseException:
        if waiting:
            waiting.cancel()
        raise

    values = torch.full((len(images), len(rewards)), math.nan, dtype=torch.float32, device="cpu")
    failures = []
    for column, reward in enumerate(rewards):
        for row, outcome in enumerate(next(remote if reward.is_async else plain)):
            if isinstance(outcome, str):
                failures.append(RewardFailure(reward.name, labels[row], outcome))
            elif outcome is not None:
                values[row, column] = outcome
    return ScoredBatch(tuple(reward.name for reward in rewards), values, failures)


async def _score_one(
    reward: Reward, per_candidate: dict[str, list[Any]], shared: dict[str, Any]
) -> list[float | str | None]:
    """One outcome per candidate: a finite score, `None` for not applicable, or a string, the reason of a failure."""
    count = len(per_candidate["images"])
    try:
        return await _call(reward, per_candidate, shared)
    except RewardError:
        raise
    except Exception as error:
        if count == 1:
            return [_reason(error)]
        logger.warning("reward %r raised on %d candidates; trying each alone", reward.name, count, exc_info=True)

    shared = {name: _ignore if name in ("log_extra", "log_metric") else value for name, value in shared.items()}
    outcomes: list[float | str | None] = []
    in_a_row = 0
    for index in range(count):
        try:
            alone = {name: value[index : index + 1] for name, value in per_candidate.items()}
            outcomes += await _call(reward, alone, shared)
            in_a_row = 0
        except RewardError:
            raise
        except Exception as error:
            outcomes.append(_reason(error))
            in_a_row += 1
            if in_a_row == GIVE_UP_AFTER:
                return outcomes + [_reason(error)] * (count - len(outcomes))
    return outcomes


async def _call(
    reward: Reward, per_candidate: dict[str, list[Any]], shared: dict[str, Any]
) -> list[float | str | None]:
    # Copies, so that a reward which edits its arguments in place harms neither the next reward nor a repetition.
    returned = reward.function(**{name: list(value) for name, value in per_candidate.items()}, **shared)
    if reward.is_async:
        returned = await returned
    elif inspect.iscoroutine(returned):
        returned.close()
        raise RewardError(f"reward {reward.name!r} returned a coroutine; define it with `async def` itself")
    if isinstance(returned, Tensor | np.ndarray):
        returned = returned.tolist()
    count = len(per_candidate["images"])
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
        kind = type(returned).__name__
        raise RewardError(f"reward {reward.name!r} returned {kind}, expected a list of {count} numbers or None")
    if len(returned) != count:
        raise RewardError(
            f"reward {reward.name!r} returned {len(returned)} scores, expected {count}, one per image; use None where "
            "it does not apply"
        )
    return [_outcome(value) for value in returned]


def _outcome(value: Any) -> float | str | None:
    if value is None:
        return None
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, numbers.Real):
        return f"returned {value!r}, which is not a number"
    if not abs(float(number)) <= torch.finfo(torch.float32).max:
        return f"returned {value!r}, which is not finite in fp32"
    return float(number)


def _reason(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"


def _ignore(*args: Any) -> None:
    """Stands in for the loggers while candidates are tried alone."""


def _run_here(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine that never waits, in this thread, without an event loop: plain rewards may bring one."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a plain reward's coroutine waited for something")


@lru_cache(maxsize=1)
def _private_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rcgrpo-rewards", daemon=True).start()
    return loop


class RequiredRewardError(RuntimeError):
    """A required reward has failed for too long to go on training."""


class FailureWatch:
    """Counts failures over a run and stops it when a required reward has gone silent.

    Args:
        rewards: the run's rewards.
        patience: so many batches in a row without one score, because the reward failed, end the run; at least 1.

    Attributes:
        counts: failed candidates per reward since the start, every reward included.
    """

    def __init__(self, rewards: Sequence[Reward], patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience: got {patience}, expected at least 1 batch")
        self.patience = patience
        self.counts = {reward.name: 0 for reward in rewards}
        self._silent = {reward.name: 0 for reward in rewards if reward.required}

    def update(self, scored: ScoredBatch) -> None:
        """Takes note of a batch. One in which a required reward applied to no candidate neither counts nor resets.

        Raises:
            RequiredRewardError: `patience` batches in a row brought no score from a required reward.
        """
        failed = Counter(failure.reward for failure in scored.failures)
        for name, number in failed.items():
            self.counts[name] += number
        for column, name in enumerate(scored.names):
            if name not in self._silent:
                continue
            if not scored.values[:, column].isnan().all():
                self._silent[name] = 0
            elif failed[name]:
                self._silent[name] += 1
            if self._silent[name] >= self.patience:
                last = [failure for failure in scored.failures if failure.reward == name][-1]
                raise RequiredRewardError(
                    f"the required reward {name!r} failed on every candidate of {self._silent[name]} batches in a row; "
                    f"the last time, on {last.sample_label}, it {last.reason}. Repair the reward (or the server behind "
                    "it) and resume from the last checkpoint, or set its `required` to False to train without it"
                )
