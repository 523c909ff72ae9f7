"""Calls every reward on a batch of candidates and keeps what failed apart from what scored.

Where it fits: the trainer and the evaluation call `score` once per batch; advantages read `ScoredBatch.values`, where
NaN leaves a candidate out of its group's statistics. Why it exists: a bad reward must stop the step or leave it, never
poison it. A failure is not a 0.0, one candidate's failure is not the batch's, and a bug is not bad luck.

Gotchas: asynchronous rewards run on a private event loop in a daemon thread, so `score` also works where a loop is
running already (Jupyter). The loop lives as long as the process, hence sessions that a reward keeps stay usable. While
the trainer waits for them, the plain rewards run, one after the other, in the caller's own thread. `ScoringQueue` (in
`scoring_queue.py`) takes the two halves of a `Scoring` apart, so that a judge works while the next group is rolled out;
what is scored, and the order in which it is handed back, is the same either way.
"""

import asyncio
import inspect
import logging
import math
import numbers
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .registry import Reward, RewardError

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 3
"""So many candidates in a row that fail alone mean that the reward is broken, not the candidates."""

LOGGERS = ("log_extra", "log_metric")

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
        logged: calls of `log_extra` and `log_metric` that the rewards made, by reward in the order of `names`.
    """

    names: tuple[str, ...]
    values: Tensor
    failures: list[RewardFailure] = field(default_factory=list)
    logged: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)


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
    lists would not match the batch. What a reward logs reaches the context's loggers when all rewards are done, in the
    order of the rewards and in the caller's thread.

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
    scored = Scoring(rewards, prompts, images, source_images, masks, columns, labels, context).finish()
    hand_on_logs(scored, context or {})
    return scored


def hand_on_logs(scored: ScoredBatch, context: Mapping[str, Any]) -> None:
    """Give the context's loggers what the rewards logged."""
    for logger_name, arguments in scored.logged:
        context[logger_name](*arguments)


class Scoring:
    """A batch being scored, in two halves: making one starts the asynchronous rewards, `finish` does the rest.

    Args:
        turn: entered on the private loop before the asynchronous rewards begin, and left when they are done.
        others: as for `score`.

    Attributes:
        started, ended: `time.perf_counter` when the first reward began and when `finish` was done; `None` until then.

    Raises:
        RewardError: a reward lacks a column.
        ValueError: an argument does not have one entry per image.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        prompts: list[str],
        images: list[Image.Image],
        source_images: list[Image.Image],
        masks: list[Image.Image],
        columns: Mapping[str, list[Any]],
        labels: list[str],
        context: Mapping[str, Any] | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
    ) -> None:
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
                    f"reward {reward.name!r} needs the column(s) {', '.join(missing)}, which this data set does not "
                    f"have; it has {', '.join(columns) or 'none'}"
                )
        self._rewards, self._labels = rewards, labels
        self._per_candidate, self._shared = per_candidate, shared
        self._logs: dict[str, list[tuple[str, tuple[Any, ...]]]] = {reward.name: [] for reward in rewards}
        self._outcomes: dict[str, list[float | str | None]] = {}
        self.started: float | None = None
        self.ended: float | None = None
        self._waiting: Future[None] | None = None
        if any(reward.is_async for reward in rewards):
            self._waiting = asyncio.run_coroutine_threadsafe(self._ask(turn or nullcontext()), _private_loop())

    def finish(self) -> ScoredBatch:
        """The plain rewards, in the calling thread; then wait for the others. What was logged is in the result only."""
        try:
            self._begun()
            for reward in self._rewards:
                if not reward.is_async:
                    _run_here(self._score(reward))
            if self._waiting:
                self._waiting.result()
        finally:
            self.cancel()
            self.ended = perf_counter()

        values = torch.full((len(self._labels), len(self._rewards)), math.nan, dtype=torch.float32, device="cpu")
        failures = []
        for column, reward in enumerate(self._rewards):
            for row, outcome in enumerate(self._outcomes[reward.name]):
                if isinstance(outcome, str):
                    failures.append(RewardFailure(reward.name, self._labels[row], outcome))
                elif outcome is not None:
                    values[row, column] = outcome
        names = tuple(reward.name for reward in self._rewards)
        return ScoredBatch(names, values, failures, [call for name in names for call in self._logs[name]])

    def cancel(self) -> None:
        """Stop asynchronous rewards that are still under way."""
        if self._waiting:
            self._waiting.cancel()

    async def _ask(self, turn: AbstractAsyncContextManager[Any]) -> None:
        async with turn:
            self._begun()
            await asyncio.gather(*(self._score(reward) for reward in self._rewards if reward.is_async))

    async def _score(self, reward: Reward) -> None:
        log = self._logs[reward.name]
        loggers = {name: _recorder(log, name) for name in LOGGERS if name in self._shared}
        self._outcomes[reward.name] = await _score_one(reward, self._per_candidate, self._shared | loggers)

    def _begun(self) -> None:
        self.started = self.started or perf_counter()


def _recorder(log: list[tuple[str, tuple[Any, ...]]], name: str) -> Callable[[Any, Any], None]:
    """A logger `(column or name, value)` that keeps its calls for later."""
    return lambda key, value: log.append((name, (key, value)))


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

    shared = {name: _ignore if name in LOGGERS else value for name, value in shared.items()}
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
    reasons: dict[int, str] = {}
    # Copies, so that a reward which edits its arguments in place harms neither the next reward nor a repetition.
    copies = {name: list(value) for name, value in per_candidate.items()}
    returned = reward.function(**copies, **{**shared, "log_failure": reasons.__setitem__})
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
    return [reasons.get(index) if value is None else _outcome(value) for index, value in enumerate(returned)]


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
