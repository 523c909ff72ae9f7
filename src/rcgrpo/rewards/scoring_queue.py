"""Scores batches beside the caller's work, so that a judge is busy while the next group is rolled out.

Where it fits: the trainer and the reward server submit batches here; what is scored is what `scoring.score` would give.

Gotchas: plain rewards see one batch at a time and in order, in a thread of the queue. Asynchronous rewards begin with a
batch while those of the batch before may still be waiting: pictures are encoded and sent meanwhile, and the judge does
not run dry between two batches. One that cannot have this uses a lock, as `LocalJudge` does for its GPU.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image

from .registry import Reward
from .scoring import ScoredBatch, Scoring, hand_on_logs, private_loop


class PendingScores:
    """A batch on its way through a `ScoringQueue`.

    Attributes:
        future: its scores, for who wants to wait in another way than `result` does; nothing is logged then.
    """

    def __init__(self, future: Future[ScoredBatch], scoring: Scoring, context: Mapping[str, Any] | None) -> None:
        self.future, self._scoring, self._context = future, scoring, context

    @property
    def started(self) -> float | None:
        """`time.perf_counter` when its scoring began; `None` until then."""
        return self._scoring.started

    @property
    def ended(self) -> float | None:
        """`time.perf_counter` when its scoring ended; `None` until then."""
        return self._scoring.ended

    def result(self) -> ScoredBatch:
        """Wait for the scores. What the rewards logged reaches the context's loggers here, in the calling thread.

        Raises:
            RewardError: as `score` does.
            concurrent.futures.CancelledError: the queue was closed before the batch's turn came.
        """
        scored = self.future.result()
        context, self._context = self._context, None  # asked again, it does not log again
        if context is not None:
            hand_on_logs(scored, context)
        return scored


class ScoringQueue:
    """Scores batches in the background, in the order of `submit`, while the caller goes on.

    Nothing in the results depends on timing: plain rewards see one batch at a time and in order, and the caller decides
    when it asks for which result. The caller must leave a submitted batch's pictures alone until then, and a reward
    must not draw from the global random generators, where its draws would mix with the caller's.

        with ScoringQueue() as queue:
            pending = [queue.submit(rewards, *batch) for batch in batches]   # rolls out between the submissions
            scores = [batch.result() for batch in pending]

    Args:
        workers: batches whose plain rewards are called at the same time. More than 1 only where every plain reward may
            be called from several threads at once. Asynchronous rewards are called for one batch more than that.
        timeout: seconds that one call of a reward may take, as in `score`.
    """

    def __init__(self, workers: int = 1, timeout: float | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers: got {workers}, expected at least 1")
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="rcgrpo-scoring")
        self._workers, self._timeout = workers, timeout
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}  # a loop that hangs is left behind

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
            RewardError, ValueError: the arguments are such that `score` would not begin.
            RuntimeError: the queue is closed.
        """
        turn = None
        if any(reward.is_async for reward in rewards):
            turn = self._turns.setdefault(private_loop(), asyncio.Semaphore(self._workers + 1))
        given = (prompts, images, source_images, masks, columns, labels, context)
        scoring = Scoring(rewards, *given, self._timeout, turn)
        # A new thread starts on the first GPU, whichever one this process was given.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> ScoredBatch:
            with nullcontext() if device is None else torch.cuda.device(device):
                return scoring.finish()

        try:
            future = self._executor.submit(work)
        except RuntimeError:
            scoring.cancel()
            raise
        future.add_done_callback(lambda _: scoring.cancel())  # also when its turn never came
        return PendingScores(future, scoring, context)

    def close(self) -> None:
        """Drop what has not begun and take no more; what is under way ends by itself, unwaited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
