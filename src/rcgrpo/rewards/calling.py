"""One call of one reward: with pictures of its own, within its time, and what its answer means.

Where it fits: `scoring.py` decides which candidates a call is for and what becomes of one that fails. Why it exists: a
reward is somebody else's code. It may draw on what it is shown, hang, be cancelled or answer with any kind of number,
and none of that may reach the next reward, the trainer's pictures or the advantages.

Gotchas: Python cannot stop a thread. A plain reward that runs out of time is left behind in one of its own, and its
calls fail at once until it comes back. `KeyboardInterrupt` and `SystemExit` pass through; everything else is a failure.
"""

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .registry import Reward, RewardError

FailureKind = Literal["raised", "timeout", "reported", "not_a_number", "not_finite"]
"""Why there is no score: the call raised, or took too long, or said so by `log_failure`; or the value is of no use."""


@dataclass(frozen=True)
class Failed:
    """The outcome of a candidate that a reward failed on; `error` is the exception behind it, where there is one."""

    reason: str
    kind: FailureKind = "raised"
    error: BaseException | None = None


Outcome = float | Failed | None
"""A finite score, a failure, or `None` for not applicable."""


class TookTooLong(Exception):
    """A call ran out of time."""


async def call(
    reward: Reward, per_candidate: Mapping[str, list[Any]], shared: Mapping[str, Any], timeout: float | None = None
) -> list[Outcome]:
    """Call a reward once; a plain one never waits for the event loop.

    Args:
        reward: whatever `resolve_rewards` made of it.
        per_candidate: arguments with one entry per candidate, among them `images`; the reward gets copies.
        shared: other arguments, as they are.
        timeout: seconds that the call may take; `None`: as long as it likes.

    Returns:
        One outcome per candidate.

    Raises:
        RewardError: a mistake that no other candidate could cure.
        TookTooLong: the time is over.
        Exception: whatever the reward raised; a `CancelledError` of its own as a `RuntimeError`.
    """
    count, reasons = len(per_candidate["images"]), dict[int, str]()
    arguments = {**own_copies(per_candidate, count), **shared, "log_failure": reasons.__setitem__}
    work = partial(reward.function, **arguments)
    try:
        returned = await _awaited(work(), timeout) if reward.is_async else _called(work, reward.function, timeout)
    except _CancelledByItself as error:
        raise RuntimeError("CancelledError: what the reward was waiting for was cancelled") from error.__cause__
    if inspect.iscoroutine(returned):
        returned.close()
        raise RewardError(f"reward {reward.name!r} returned a coroutine; define it with `async def` itself")
    if not isinstance(returned, Sequence) and callable(getattr(returned, "tolist", None)):
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
        kind = type(returned).__name__
        raise RewardError(f"reward {reward.name!r} returned {kind}, expected a list of {count} numbers or None")
    if len(returned) != count:
        raise RewardError(
            f"reward {reward.name!r} returned {len(returned)} scores, expected {count}, one per image; use None where "
            "it does not apply"
        )
    outcomes = [outcome(value) for value in returned]
    return [
        Failed(str(reasons[i]), "reported") if found is None and i in reasons else found
        for i, found in enumerate(outcomes)
    ]


# Arguments ------------------------------------------------------------------------------------------------------------


def own_copies(per_candidate: Mapping[str, list[Any]], count: int) -> dict[str, list[Any]]:
    """The arguments of one call, in which a reward may draw and cut as it likes.

    Pictures, arrays and tensors are copied, also within lists and dictionaries. A picture that comes under two names
    for one candidate, as `images` and `completions` do, is copied once.

    Args:
        per_candidate: lists with one entry per candidate.
        count: of candidates.
    """
    seen: list[dict[int, Any]] = [{} for _ in range(count)]
    return {name: [_own(*pair) for pair in zip(values, seen, strict=True)] for name, values in per_candidate.items()}


def _own(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, Image.Image | np.ndarray | Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.clone() if isinstance(value, Tensor) else value.copy()
        return seen[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_own(part, seen) for part in value)
    return {key: _own(part, seen) for key, part in value.items()} if type(value) is dict else value


# Time -----------------------------------------------------------------------------------------------------------------


class _CancelledByItself(Exception):
    """A `CancelledError` that nobody here has asked for."""


_left_behind: dict[int, threading.Thread] = {}
"""Threads of plain rewards that ran out of time, by the function's `id`, which stays taken while they run."""


def _called(work: Callable[[], Any], function: Callable[..., Any], timeout: float | None) -> Any:
    """A plain reward's answer: in this thread, or in one of its own that can be left behind."""
    if timeout is None:
        return _uncancelled(work)
    earlier = _left_behind.get(id(function))
    if earlier is not None and earlier.is_alive():
        raise TookTooLong(f"is still busy with an earlier call, which took over {timeout:g} s")
    answer: Future[Any] = Future()
    # A new thread starts on the first GPU, whichever one this process was given.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            with nullcontext() if device is None else torch.cuda.device(device):
                answer.set_result(_uncancelled(work))
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, name="rcgrpo-reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if not answer.done():
        _left_behind[id(function)] = thread
        raise TookTooLong(f"took over {timeout:g} s")
    return answer.result()


def _uncancelled(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except asyncio.CancelledError as error:
        raise _CancelledByItself from error


async def _awaited(coroutine: Awaitable[Any], timeout: float | None) -> Any:
    """An asynchronous reward's answer, from a task of its own, whose cancellation is not mistaken for this one's."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task}, timeout=timeout)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda left: left.cancelled() or left.exception())  # or it would complain later
    if not task.done():
        raise TookTooLong(f"took over {timeout:g} s")
    try:
        return task.result()
    except asyncio.CancelledError as error:
        raise _CancelledByItself from error


# Answers --------------------------------------------------------------------------------------------------------------


def outcome(value: Any) -> Outcome:
    """What one returned value means.

    Numbers are those of Python and numpy, booleans and decimals too, and arrays, tensors and lists that hold one. What
    fp32 cannot hold is a failure.
    """
    number = value
    while isinstance(number, list | tuple) and len(number) == 1:
        number = number[0]
    if callable(getattr(number, "item", None)) and not isinstance(number, numbers.Real):
        with suppress(TypeError, ValueError, RuntimeError):  # of more than one element
            number = number.item()
    if number is None:
        return None
    if not isinstance(number, numbers.Real | Decimal):
        return Failed(f"returned {value!r}, which is not a number", "not_a_number")
    try:
        found = float(number)
    except (OverflowError, ValueError):
        found = math.nan
    if not abs(found) <= torch.finfo(torch.float32).max:
        return Failed(f"returned {value!r}, which is not finite in fp32", "not_finite")
    return found
