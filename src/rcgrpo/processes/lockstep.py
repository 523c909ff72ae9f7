"""Calls that take every process, made equally often by each: a model whose weights are spread over them.

Where it fits: `training.sharding` spreads the weights, the trainer asks a sharded model through `Lockstep` while it
rolls out. Why: each forward gathers weights from all processes, and they need different numbers of forwards (picture
sizes, turns), or fail on their own. So before each forward the processes exchange one number: who is through asks
again with its last arguments until all are, and a failure ends the stretch everywhere instead of leaving the others to
wait for the time-out.

Gotchas: the number travels over gloo, on CPUs, so no GPU is waited for. A process that fails within a forward is known
only by the time-out, as the others are in the middle of gathering.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .stopping import interruptible

THROUGH, CALLING, FAILED = 0, 1, 2


class FailedElsewhereError(RuntimeError):
    """Another process has failed, and says how; see `rewards.failures.agree_on_failure`."""


class Lockstep:
    """For stretches in which every process calls one model, each as often as it needs."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self._last: Callable[[], Any] | None = None

    def calling(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model, to be called within a `stretch`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with interruptible():  # between two forwards a run may be stopped, and never within one
                pass
            self._meet(CALLING)
            self._last = lambda: model(*args, **kwargs)
            return self._last()

        return call

    @contextmanager
    def stretch(self) -> Iterator[None]:
        """All processes leave it together.

        Raises:
            FailedElsewhereError: another one raised in it.
        """
        self._last = None
        try:
            yield
        except FailedElsewhereError:
            raise
        except BaseException:
            self._exchange(FAILED)
            raise
        with torch.no_grad():
            while self._meet(THROUGH) == CALLING:
                if self._last is not None:
                    self._last()
        self._last = None

    def _meet(self, own: int) -> int:
        most = self._exchange(own)
        if most == FAILED:
            raise FailedElsewhereError("another process has failed in this rollout")
        return most

    def _exchange(self, own: int) -> int:
        number = torch.tensor(own)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)
