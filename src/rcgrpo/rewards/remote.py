"""`RemoteReward`: a reward that lives behind an HTTP server, `rcgrpo rewards serve` or any that speaks its protocol.

Where it fits: heavy judges want their own GPU, machine or environment; the trainer sees one more asynchronous reward.
The protocol is JSON, never pickle, and follows Flow-Factory's reward server: `GET /health`, and `POST /compute` with

    {"prompts": [str], "images": [png], "source_images": [png], "masks": [png], "columns": {name: [value]},
     "reward": name or absent}            png = base64 text; a picture among the columns is {"png": base64}

answered by `{"rewards": [number or null], "failures": {index: reason}}` (`failures` may be absent), or by
`{"error": text}`.

Gotchas: what went wrong is never a number. A request without a usable answer gives `None` for its candidates, an entry
that is NaN, out of range or no number gives `None` for that one; both are reported through `log_failure`, so that the
trainer counts them as failures, and both are counted by kind in `faults`. `null` from the server is "not applicable"
and no failure. A refusal (401, 404, 422, …) before the first good answer is a mistake in the set-up and stops the run.
"""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from .pictures import once_each, to_png
from .registry import RewardError
from .transport import Deadline, Fault, Transport

TOKEN_VARIABLE = "RCGRPO_REWARD_TOKEN"
"""Environment variable that holds the bearer token, for client and server."""

FLOAT32_MAX = 3.4028234663852886e38


class RemoteReward:
    """Scores candidates on a server.

    Args:
        url: the server's address, or several of equal servers: they share the load and stand in for each other.
        name: how logs and errors call the reward; also the metric prefix `rewards/<name>`.
        reward: which of the server's rewards, where it serves several.
        columns: data set columns to send along, such as "caption", "task", "edited_image"; rows must have them.
        value_range: least and greatest possible score; anything outside counts as a fault. `None`: anything finite.
        batch_size: candidates in one request.
        required: whether the run must stop when the reward fails persistently, as it does by default: what a dead
            server leaves to train with is not what was asked for.
        token: bearer token; by default that of the environment variable `RCGRPO_REWARD_TOKEN`.
        options: `timeout` (seconds for a whole batch of candidates, 120 by default), `attempt_timeout`, `retries`,
            `concurrency`, `backoff`, `max_backoff`, `breaker_failures`, `breaker_seconds`: see `Transport`.

    Attributes:
        faults: how often each kind of fault was met; `fault_counts` names them for the log.

    Raises:
        ValueError: an address or a number that cannot work.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        name: str = "remote",
        *,
        reward: str | None = None,
        columns: Sequence[str] = (),
        value_range: tuple[float, float] | None = None,
        batch_size: int = 8,
        required: bool = True,
        token: str | None = None,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if isinstance(columns, str):
            raise ValueError(f"columns: got {columns!r}, expected a sequence such as ({columns!r},)")
        self.transport = Transport(url, token=token or os.environ.get(TOKEN_VARIABLE), **options)
        self.reward_name, self.reward, self.columns = name, reward, tuple(columns)
        self.value_range, self.batch_size, self.required = value_range, batch_size, required

    @property
    def faults(self) -> Counter[str]:
        return self.transport.faults

    async def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        source_images: list[Image.Image],
        masks: list[Image.Image],
        log_failure: Callable[[int, str], None] = lambda index, reason: None,
        **columns: Any,
    ) -> list[float | None]:
        """One score per candidate; see the module's docstring for what `None` means."""
        deadline = self.transport.deadline()
        given: dict[str, list[Any]] = {
            "prompts": prompts,
            "images": images,
            "source_images": source_images,
            "masks": masks,
        }
        bodies = await asyncio.to_thread(self._bodies, given, {name: columns[name] for name in self.columns})
        starts = range(0, len(images), self.batch_size)

        async def one(start: int, body: bytes) -> list[float | None]:
            count = min(self.batch_size, len(images) - start)
            return await self._compute(body, count, deadline, lambda index, reason: log_failure(start + index, reason))

        parts = await asyncio.gather(*(one(start, body) for start, body in zip(starts, bodies, strict=True)))
        return [score for part in parts for score in part]

    def _bodies(self, given: dict[str, list[Any]], columns: dict[str, list[Any]]) -> list[bytes]:
        """The requests. A picture that several candidates share, such as their source, is compressed once."""
        png = once_each(to_png)

        def plain(value: Any) -> Any:
            return {"png": png(value)} if isinstance(value, Image.Image) else value

        pictures = {name: [png(value) for value in given[name]] for name in ("images", "source_images", "masks")}
        lists = {"prompts": given["prompts"], **pictures}
        others = {name: [plain(value) for value in values] for name, values in columns.items()}
        bodies = []
        for start in range(0, len(given["images"]), self.batch_size):
            part = slice(start, start + self.batch_size)
            body: dict[str, Any] = {name: values[part] for name, values in lists.items()}
            body["columns"] = {name: values[part] for name, values in others.items()}
            if self.reward is not None:
                body["reward"] = self.reward
            try:
                bodies.append(json.dumps(body, allow_nan=False).encode())
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"reward {self.reward_name!r}: its columns {', '.join(self.columns)} hold what is neither a "
                    f"picture nor JSON ({error}); leave that column out of `columns`"
                ) from error
        return bodies

    async def _compute(
        self, body: bytes, count: int, deadline: Deadline, log_failure: Callable[[int, str], None]
    ) -> list[float | None]:
        try:
            answer = await self.transport.post("/compute", body, deadline)
            rewards, failures = self._check(answer, count)
        except Fault as fault:
            if fault.refused and not self.transport.answered:
                raise RewardError(f"reward {self.reward_name!r} is refused, check its set-up: {fault}") from fault
            for index in range(count):
                log_failure(index, str(fault))
            return [None] * count
        scores: list[float | None] = []
        for index, value in enumerate(rewards):
            kind = "judge" if str(index) in failures else self._fault_in(value)
            if kind is not None:
                self.faults[kind] += 1
                log_failure(index, str(failures.get(str(index), f"{kind}: the server gave {value!r}"))[:300])
            scores.append(None if kind is not None or value is None else float(value))
        return scores

    def _check(self, answer: Any, count: int) -> tuple[list[Any], dict[str, Any]]:
        if not isinstance(answer, dict):
            fault = Fault("malformed", f"the answer is {type(answer).__name__}, expected an object with `rewards`")
        elif "error" in answer:
            fault = Fault("server_error", str(answer["error"])[:300])
        elif not isinstance(answer.get("rewards"), list):
            fault = Fault("malformed", "the answer has no list `rewards`")
        elif len(answer["rewards"]) != count:
            fault = Fault("wrong_count", f"got {len(answer['rewards'])} scores for {count} candidates")
        else:
            failures = answer.get("failures")
            return answer["rewards"], failures if isinstance(failures, dict) else {}
        self.faults[fault.kind] += 1
        raise fault

    def _fault_in(self, value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "not_a_number"
        if value != value or abs(value) > FLOAT32_MAX:
            return "not_finite"
        low, high = self.value_range or (-math.inf, math.inf)
        return None if low <= value <= high else "out_of_range"
