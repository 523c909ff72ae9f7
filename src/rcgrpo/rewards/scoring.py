"""Calls every reward on a batch of candidates and keeps what failed apart from what scored.

Where it fits: the trainer and the evaluation call `score` once per batch; advantages read `ScoredBatch.values`, where
NaN leaves a candidate out of its group's statistics. Why it exists: a bad reward must stop the step or leave it, never
poison it. A failure is not a 0.0, one candidate's failure is not the batch's, and a bug is not bad luck.

Gotchas: asynchronous rewards run on a private event loop in a daemon thread, so `score` also works where a loop is
running already (Jupyter). The loop lives as long as the process, hence sessions that a reward keeps stay usable. While
the trainer waits for them, the plain rewards run, one after the other, in the caller's own thread. `ScoringQueue` does
all of it in a thread of its own, so that a judge works while the next group is rolled out; what is scored, and the
order in which it is handed back, is the same either way.
"""

import asyncio
import inspect
import logging
import math
import numbers
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

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
    scored = _score(rewards, prompts, images, source_images, masks, columns, labels, context)
    _hand_on_logs(scored, context or {})
    return scored


def _hand_on_logs(scored: ScoredBatch, context: Mapping[str, Any]) -> None:
    for logger_name, arguments in scored.logged:
        context[logger_name](*arguments)


def _score(
    rewards: Sequence[Reward],
    prompts: list[str],
    images: list[Image.Image],
    source_images: list[Image.Image],
    masks: list[Image.Image],
    columns: Mapping[str, list[Any]],
    labels: list[str],
    context: Mapping[str, Any] | None,
) -> ScoredBatch:
    """`score`, with what was logged kept in the result and not handed on."""
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

    logs: dict[str, list[tuple[str, tuple[Any, ...]]]] = {reward.name: [] for reward in rewards}

    def scoring(reward: Reward) -> Coroutine[Any, Any, list[float | str | None]]:
        log = logs[reward.name]
        loggers = {name: _recorder(log, name) for name in LOGGERS if name in shared}
        return _score_one(reward, per_candidate, shared | loggers)

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
    logged = [call for reward in rewards for call in logs[reward.name]]
    return ScoredBatch(tuple(reward.name for reward in rewards), values, failures, logged)


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


class PendingScores:
    """A batch on its way through a `ScoringQueue`.

    Attributes:
        future: its scores, for who wants to wait in another way than `result` does; nothing is logged then.
        started, ended: `time.perf_counter` when its scoring began and ended; `None` until then.
    """

    future: Future[ScoredBatch]

    def __init__(self, context: Mapping[str, Any] | None) -> None:
        self._context = context
        self.started: float | None = None
        self.ended: float | None = None

    def result(self) -> ScoredBatch:
        """Wait for the scores. What the rewards logged reaches the context's loggers here, in the calling thread.

        Raises:
            RewardError, ValueError: as `score` does.
            concurrent.futures.CancelledError: the queue was closed before the batch's turn came.
        """
        scored = self.future.result()
        context, self._context = self._context, None  # asked again, it does not log again
        if context is not None:
            _hand_on_logs(scored, context)
        return scored


class ScoringQueue:
    """Scores batches in the background, one after the other in the order of `submit`, while the caller goes on.

    Nothing in the results depends on timing: rewards see one batch at a time and in order, and the caller decides when
    it asks for which result. The caller must leave a submitted batch's pictures alone until then, and a reward must not
    draw from the global random generators, where its draws would mix with the caller's.

        with ScoringQueue() as queue:
            pending = [queue.submit(rewards, *batch) for batch in batches]   # rolls out between the submissions
            scores = [batch.result() for batch in pending]

    Args:
        workers: batches that are scored at the same time. More than 1 only where every plain reward may be called from
            several threads at once; asynchronous rewards of several batches then overlap as well.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers: got {workers}, expected at least 1")
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="rcgrpo-scoring")

    def submit(
        self,
        rewards: Sequence[Reward],
        prompts: list[str],
        images: list[Image.Image],
        source_images: list[Image.Image],
        masks: list[Image.Image],
        columns: Mapping[str, list[Any]],
        labels: list[str],
        context: Mapping[str, Any] | None = None,
    ) -> PendingScores:
        """Queue a batch, with `score`'s arguments, and return at once.

        Raises:
            RuntimeError: the queue is closed.
        """
        pending = PendingScores(context)
        # A new thread starts on the first GPU, whichever one this process was given.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> ScoredBatch:
            pending.started = perf_counter()
            try:
                with nullcontext() if device is None else torch.cuda.device(device):
                    return _score(rewards, prompts, images, source_images, masks, columns, labels, context)
            finally:
                pending.ended = perf_counter()

        pending.future = self._executor.submit(work)
        return pending

    def close(self) -> None:
        """Drop what has not begun and take no more; what is under way ends by itself, unwaited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fault_counts(rewards: Sequence[Reward]) -> dict[str, int]:
    """`{"rewards/<name>/faults/<kind>": count}` since the start, of the rewards that count their faults.

    A reward does so with an attribute `faults`, a mapping from a fault's kind to a number.
    """
    return {
        f"rewards/{reward.name}/faults/{kind}": number
        for reward in rewards
        for kind, number in dict(getattr(reward.function, "faults", {})).items()
    }


def agree_on_failure(accelerator: Any, error: Exception | None) -> None:
    """Raise on every process of a run when any of them has an error, the same one everywhere.

    A process that raises alone leaves the others waiting for it in the next collective operation, until a timeout of
    half an hour or for ever. So each catches what its own scoring raises and calls this at the same place, every time:

        error = None
        try:
            ...  # gather scores, update the FailureWatch
        except Exception as caught:
            error = caught
        agree_on_failure(accelerator, error)

    Args:
        accelerator: accelerate's.
        error: this process's, or `None`.

    Raises:
        RewardError, RequiredRewardError: the lowest failed process has one of these; with its message and rank.
        RuntimeError: it has any other error. On a single process `error` itself is raised.
    """
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    flag = torch.tensor([0 if error is None else 1], device=accelerator.device)
    if not int(accelerator.reduce(flag, reduction="sum").item()):
        return
    from accelerate.utils import gather_object

    told = gather_object([None if error is None else (type(error).__name__, str(error))])
    rank, (kind, text) = next((rank, report) for rank, report in enumerate(told) if report is not None)
    known: dict[str, type[Exception]] = {cls.__name__: cls for cls in (RewardError, RequiredRewardError)}
    if kind in known:
        raise known[kind](f"process {rank}: {text}") from error
    raise RuntimeError(f"process {rank}: {kind}: {text}") from error


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
