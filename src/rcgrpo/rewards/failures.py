"""What failed over a run: counts for the log, and when a silent reward ends the run, on every process at once.

Where it fits: the trainer hands each batch that `scoring.score` returned to a `FailureWatch`, adds `fault_counts` to
its log, and does `with failing_together(...)` what may fail on one process of several.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..processes.lockstep import FailedElsewhereError
from ..processes.stopping import Interrupted, Stopped, interruptible
from .registry import Reward, RewardError
from .scoring import RewardFailure, ScoredBatch

logger = logging.getLogger(__name__)


class RequiredRewardError(RuntimeError):
    """A required reward has failed for too long to go on training."""


def fault_counts(rewards: Sequence[Reward]) -> dict[str, int]:
    """`{"rewards/<name>/faults/<kind>": count}` since the start, of the rewards that count their faults.

    A reward does so with an attribute `faults`, a mapping from a fault's kind to a number.
    """
    return {
        f"rewards/{reward.name}/faults/{kind}": number
        for reward in rewards
        for kind, number in dict(getattr(reward.function, "faults", {})).items()
    }


def agree_on_failure(accelerator: Any, error: BaseException | None) -> None:
    """Raise on every process of a run when any of them has an error, the same one everywhere.

    A process that raises alone leaves the others waiting for it in the next collective operation, until a timeout of
    half an hour or for ever. So each catches what it raises and calls this at the same place, every time, as
    `failing_together` does.

    Args:
        accelerator: accelerate's.
        error: this process's, or `None`.

    Raises:
        RewardError, RequiredRewardError, FloatingPointError: the lowest failed process has one of these; with its
            message and rank.
        Stopped: a signal stops the lowest of those processes.
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

    told = gather_object([None if _of_another(error) else (type(error).__name__, str(error))])
    rank, (kind, text) = next((rank, report) for rank, report in enumerate(told) if report is not None)
    stops: dict[str, type[Stopped]] = {c.__name__: c for c in (Stopped, Interrupted)}
    known: dict[str, type[Exception]] = {c.__name__: c for c in (RewardError, RequiredRewardError, FloatingPointError)}
    if kind in stops:
        raise agreed(stops[kind](text)) from error
    if kind not in known:
        text = f"{kind}: {text}"
    raise agreed(known.get(kind, RuntimeError)(f"process {rank}: {text}")) from error


def _of_another(error: BaseException | None) -> bool:
    return error is None or isinstance(error, FailedElsewhereError)


def agreed(error: BaseException) -> BaseException:
    """The error, marked as one that every process raises at this place."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether every process raises this error, at the same place, because they agreed on it."""
    return getattr(error, "agreed", False)


@contextmanager
def failing_together(accelerator: Any, can_stop: bool = True) -> Iterator[None]:
    """Run a block on every process; where it raises on any of them, all raise what `agree_on_failure` says.

    Inside, nothing may wait for the other processes. A signal that stops a run for good is agreed on too, and may end
    the block half-way unless `can_stop` is False. Any other interrupt is nobody's failure and is not agreed on.
    """
    error: BaseException | None = None
    try:
        with interruptible() if can_stop else nullcontext():
            yield
    except (Exception, Stopped) as caught:
        error = caught
    agree_on_failure(accelerator, error)


class FailureWatch:
    """Counts failures over a run, says what has gone silent, and stops the run when a required reward has.

    Args:
        rewards: the run's rewards.
        patience: so many batches in a row without one score, because the reward failed, end the run if it is required,
            and are a warning if not; at least 1.

    Attributes:
        counts: failed candidates per reward since the start, every reward included.
        silent: for each reward, the batches in a row, up to the latest, that it failed on without one score.
        unscored: the batches in a row in which no candidate had a score to be compared by, so that nothing was taught.
    """

    def __init__(self, rewards: Sequence[Reward], patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience: got {patience}, expected at least 1 batch")
        self.patience = patience
        self.counts = {reward.name: 0 for reward in rewards}
        self.silent = dict(self.counts)
        self.unscored = 0
        self._required = {reward.name for reward in rewards if reward.required}

    def update(self, scored: ScoredBatch) -> None:
        """Takes note of a batch. One in which a reward applied to no candidate neither counts nor resets.

        Raises:
            RequiredRewardError: `patience` batches in a row brought no score from a required reward.
        """
        failed = Counter(failure.reward for failure in scored.failures)
        for name, number in failed.items():
            self.counts[name] += number
        for column, name in enumerate(scored.names):
            if not scored.values[:, column].isnan().all():
                self.silent[name] = 0
            elif failed[name]:
                self.silent[name] += 1
                last = [failure for failure in scored.failures if failure.reward == name][-1]
                self._report(name, last)

    def _report(self, name: str, last: RewardFailure) -> None:
        number = self.silent[name]
        text = (
            f"reward {name!r} failed on every candidate of {number} batches in a row; the last time, on "
            f"{last.sample_label}, it {last.reason}. Repair the reward (or the server behind it)"
        )
        if name in self._required and number >= self.patience:
            raise RequiredRewardError(
                f"the required {text} and resume from the last checkpoint, or set its `required` to False to train "
                "without it"
            ) from last.error
        if number % self.patience == 0:
            logger.error("%s: candidates that it fails on teach nothing. Set `required` to stop such a run", text)

    def update_scores(self, scored: bool) -> None:
        """Takes note of whether any candidate of a batch had a score to be compared by."""
        self.unscored = 0 if scored else self.unscored + 1
        if self.unscored and self.unscored % self.patience == 0:
            logger.error(
                "no candidate of %d batches in a row has a score, because rewards failed on it or do not apply, so "
                "nothing is trained; see the warnings before this one, and rewards/<name>/mean in the log",
                self.unscored,
            )
