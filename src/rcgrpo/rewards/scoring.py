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
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .calling import Failed, FailureKind, Outcome, TookTooLong, call
from .registry import Reward, RewardError, refuse_columns

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 3
"""So many candidates in a row that fail alone mean that the reward is broken, not the candidates."""

LOGGERS = ("log_extra", "log_metric")

SLOW = 60.0
"""Seconds after which the log says which rewards are being waited for."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RewardFailure:
    """One candidate that one reward could not score, and why; `error` is the exception behind it, if there is one."""

    reward: str
    sample_label: str
    reason: str
    kind: FailureKind = field(default="raised", compare=False)
    error: BaseException | None = field(default=None, compare=False, repr=False)


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
    timeout: float | None = None,
) -> ScoredBatch:
    """Scores `n` candidates with every reward.

    A call that raises is repeated for each candidate alone, to find out which one it fails on; after three in a row the
    others are given up with the last reason. One that takes too long has failed on all of its candidates. In
    repetitions `log_extra` and `log_metric` do nothing, as their lists would not match the batch. What a reward logs
    reaches the context's loggers when all rewards are done, in the order of the rewards and in the caller's thread.
    What it draws on its pictures reaches nobody: each call gets copies.

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
        timeout: seconds that one call of a reward may take; `None`: as long as it likes. The log says after a minute
            what is being waited for.

    Returns:
        Scores as `[n, len(rewards)]`, and the failures.

    Raises:
        RewardError: a reward lacks a column, returned something other than `n` entries, or raised `RewardError` itself.
        ValueError: an argument does not have `n` entries, or a column the name of another argument.
    """
    scored = Scoring(rewards, prompts, images, source_images, masks, columns, labels, context, timeout).finish()
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
        ValueError: an argument does not have one entry per image, or a column has the name of another argument.
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
        timeout: float | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
    ) -> None:
        per_candidate: dict[str, list[Any]] = {"prompts": prompts, "images": images, "completions": images}
        per_candidate |= {"source_images": source_images, "masks": masks}
        shared: dict[str, Any] = {"completion_ids": None}
        for name, value in (context or {}).items():
            (per_candidate if isinstance(value, list) else shared)[name] = value
        refuse_columns(columns, "score: columns", (*per_candidate, *shared, "log_failure"))
        per_candidate |= columns
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
        self._outcomes: dict[str, list[Outcome]] = {}
        self._under_way: dict[str, None] = {}  # names, in the order in which they began
        self.started: float | None = None
        self.ended: float | None = None
        self._timeout = timeout
        self._waiting: Future[None] | None = None
        if any(reward.is_async for reward in rewards):
            self._loop = private_loop()
            self._waiting = asyncio.run_coroutine_threadsafe(self._ask(turn or nullcontext()), self._loop)

    def finish(self) -> ScoredBatch:
        """The plain rewards, in the calling thread; then wait for the others. What was logged is in the result only."""
        patience = threading.Timer(SLOW, self._say_what_is_slow)
        patience.daemon = True
        patience.start()
        try:
            self._begun()
            for reward in self._rewards:
                if not reward.is_async:
                    _run_here(self._score(reward))
            if self._waiting:
                self._wait(self._waiting)
        finally:
            patience.cancel()
            self.cancel()
            self.ended = perf_counter()

        values = torch.full((len(self._labels), len(self._rewards)), math.nan, dtype=torch.float32, device="cpu")
        failures = []
        for column, reward in enumerate(self._rewards):
            for row, outcome in enumerate(self._outcomes[reward.name]):
                if isinstance(outcome, Failed):
                    why = (outcome.reason, outcome.kind, outcome.error)
                    failures.append(RewardFailure(reward.name, self._labels[row], *why))
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
        self._under_way[reward.name] = None
        found = await _score_one(reward, self._per_candidate, self._shared | loggers, self._timeout)
        self._under_way.pop(reward.name)
        self._outcomes[reward.name] = found

    def _wait(self, waiting: Future[None]) -> None:
        """Until the asynchronous rewards are done; not for ever, where calls have a timeout.

        They end themselves in time, unless one of them blocks the event loop, as `time.sleep` does. That loop and who
        was on it are left behind then.
        """
        while True:
            try:
                return waiting.result(self._timeout)
            except TimeoutError:
                answers = threading.Event()
                self._loop.call_soon_threadsafe(answers.set)
                if not answers.wait(self._timeout):
                    break
        private_loop.cache_clear()
        reason = f"was not done after {self._timeout:g} s: an asynchronous reward, this or another, does not `await`"
        for reward in self._rewards:
            if reward.is_async and reward.name not in self._outcomes:
                self._outcomes[reward.name] = [Failed(reason, "timeout")] * len(self._labels)

    def _say_what_is_slow(self) -> None:
        logger.warning(
            "still waiting for %s after %g s, on %d candidates from %s on%s",
            ", ".join(f"reward {name!r}" for name in list(self._under_way)) or "the rewards of an earlier batch",
            SLOW,
            len(self._labels),
            self._labels[0],
            "" if self._timeout else "; reward_timeout counts calls that take too long as failed",
        )

    def _begun(self) -> None:
        self.started = self.started or perf_counter()


def _recorder(log: list[tuple[str, tuple[Any, ...]]], name: str) -> Callable[[Any, Any], None]:
    """A logger `(column or name, value)` that keeps its calls for later."""
    return lambda key, value: log.append((name, (key, value)))


async def _score_one(
    reward: Reward, per_candidate: dict[str, list[Any]], shared: dict[str, Any], timeout: float | None
) -> list[Outcome]:
    """One outcome per candidate."""
    count = len(per_candidate["images"])
    try:
        return await call(reward, per_candidate, shared, timeout)
    except RewardError:
        raise
    except TookTooLong as error:
        return [Failed(str(error), "timeout", error)] * count
    except Exception as error:
        if count == 1:
            return [_raised(error)]
        reason = _raised(error).reason
        logger.warning("reward %r %s on %d candidates; trying each alone", reward.name, reason, count)
        logger.debug("where reward %r raised it", reward.name, exc_info=True)

    shared = {name: _ignore if name in LOGGERS else value for name, value in shared.items()}
    outcomes: list[Outcome] = []
    in_a_row = 0
    for index in range(count):
        try:
            alone = {name: value[index : index + 1] for name, value in per_candidate.items()}
            outcomes += await call(reward, alone, shared, timeout)
            in_a_row = 0
        except RewardError:
            raise
        except TookTooLong as error:
            return outcomes + [Failed(str(error), "timeout", error)] * (count - len(outcomes))
        except Exception as error:
            outcomes.append(_raised(error))
            in_a_row += 1
            if in_a_row == GIVE_UP_AFTER:
                return outcomes + [_raised(error)] * (count - len(outcomes))
    return outcomes


def _raised(error: Exception) -> Failed:
    return Failed(f"raised {type(error).__name__}: {error}", "raised", error)


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
def private_loop() -> asyncio.AbstractEventLoop:
    """The event loop of asynchronous rewards, in a thread that lives as long as the process."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while not loop.is_closed():
            with suppress(KeyboardInterrupt, SystemExit):  # which end the loop, and are in the task's result besides
                loop.run_forever()

    threading.Thread(target=run, name="rcgrpo-rewards", daemon=True).start()
    return loop
