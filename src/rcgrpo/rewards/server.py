"""`rcgrpo rewards serve`: rewards behind HTTP, for `RemoteReward` or anything else that speaks the protocol.

Where it fits: the other end of `remote.py`, which describes the protocol. FastAPI and uvicorn come with
`pip install rcgrpo[serve]` and are imported when a server is made.

What it guards against: it listens on this machine only, unless there is a bearer token; a request's size is bounded
before it is read into memory, a picture's before it is decoded; pictures are PNG and nothing else; nothing is ever
unpickled; waiting requests are bounded, beyond them callers get 429 and `Retry-After`, and one whose caller has hung up
is not scored. It speaks plain HTTP: between machines put it behind a TLS proxy or an SSH tunnel, or the token travels
in the clear.

Gotchas: by default one request is scored at a time, in the order of arrival, so a reward need not be thread-safe and a
GPU is not shared; `concurrency` is for rewards that may be called from several threads at once, and for asynchronous
ones. Requests are read and decoded beside the scoring, and `/health` always answers. A candidate that a reward fails on
is `null` with a reason in `failures`; a mistake in the request is 400.
"""

import asyncio
import hmac
import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Any

from .pictures import from_png
from .registry import Reward
from .scoring import ScoredBatch
from .scoring_queue import ScoringQueue
from .transport import is_loopback

logger = logging.getLogger(__name__)

PICTURES = ("images", "source_images", "masks")
MAX_CANDIDATES = 1024


class _Refused(Exception):
    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.headers = status, dict(headers or {})


def create_app(
    rewards: Sequence[Reward],
    token: str | None = None,
    max_request_bytes: int = 256 << 20,
    max_pixels: int = 64_000_000,
    concurrency: int = 1,
    max_waiting: int = 32,
) -> Any:
    """The FastAPI application.

    Args:
        rewards: what it serves, from `resolve_rewards`.
        token: callers must send it as a bearer token; `None`: anybody who can connect may call.
        max_request_bytes: larger requests are refused with 413.
        max_pixels: of one picture.
        concurrency: requests that are scored at the same time; above 1 every plain reward must be thread-safe.
        max_waiting: requests that wait for their turn besides; further ones are refused with 429.

    Raises:
        ValueError: `concurrency` below 1, or `max_waiting` below 0.
        ModuleNotFoundError: FastAPI is not installed.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}, expected at least 1 request")
    if max_waiting < 0:
        raise ValueError(f"max_waiting: got {max_waiting}, expected 0 or more requests")
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("serving rewards needs FastAPI: pip install 'rcgrpo[serve]'") from error

    by_name = {reward.name: reward for reward in rewards}
    queue = ScoringQueue(concurrency)
    turn = asyncio.Semaphore(concurrency)
    accepted, seconds = 0, 1.0  # requests being read, waiting or scored; how long the latest one was scored

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="rcgrpo rewards", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def check_token(request: Any) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise _Refused(401, "this server wants `Authorization: Bearer <token>`", {"WWW-Authenticate": "Bearer"})

    async def read(request: Any) -> bytes:
        # A page in a browser can post to this machine, but not with this content type unless it is let.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "expected Content-Type: application/json")
        body = bytearray()
        announced = request.headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > max_request_bytes:
            raise _Refused(413, f"the request is larger than {max_request_bytes} bytes; send fewer candidates at once")
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_request_bytes:
                raise _Refused(413, f"the request is larger than {max_request_bytes} bytes")
        return bytes(body)

    async def compute(request: Any) -> dict[str, Any]:
        nonlocal accepted, seconds
        check_token(request)
        if accepted >= concurrency + max_waiting:
            text = f"{accepted} requests are being scored or waiting already"
            raise _Refused(429, text, {"Retry-After": str(math.ceil(seconds / concurrency))})
        accepted += 1
        try:
            body = await read(request)
            reward, batch = await asyncio.to_thread(_batch, body, by_name, max_pixels)
            async with turn:
                if await request.is_disconnected():
                    raise _Refused(499, "the caller hung up")
                began = perf_counter()
                scored = await asyncio.wrap_future(queue.submit([reward], **batch).future)
                seconds = perf_counter() - began
                return _answer(scored)
        except ValueError as error:  # a RewardError as well
            raise _Refused(400, str(error)) from error
        finally:
            accepted -= 1

    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        try:
            check_token(request)
        except _Refused:
            return {"status": "ok"}
        described = {r.name: {"columns": list(r.columns), "range": r.value_range} for r in rewards}
        return {"status": "ok", "rewards": described}

    @app.post("/compute")
    async def compute_route(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await compute(request))
        except _Refused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status, headers=refusal.headers)
        except Exception as error:
            logger.exception("scoring a request failed")
            return JSONResponse({"error": f"scoring failed: {type(error).__name__}"}, 500)

    return app


def _batch(body: bytes, rewards: Mapping[str, Reward], max_pixels: int) -> tuple[Reward, dict[str, Any]]:
    """The reward that a request names and the arguments of `score`.

    Raises:
        ValueError: naming the field, for anything that is not as the protocol says.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"got {type(given).__name__}, expected an object with prompts, images, source_images, masks")
    name = given.get("reward", next(iter(rewards)) if len(rewards) == 1 else None)
    if not isinstance(name, str) or name not in rewards:
        raise ValueError(f"reward: got {name!r}, expected one of {', '.join(rewards)}")
    columns = given.get("columns", {})
    if not isinstance(columns, dict):
        raise ValueError(f"columns: got {type(columns).__name__}, expected an object of lists")
    if clash := set(columns) & {*PICTURES, "prompts", "completions"}:
        raise ValueError(f"columns: got {', '.join(sorted(clash))}, which the request itself holds")
    lists: dict[str, Any] = {key: given.get(key) for key in ("prompts", *PICTURES)}
    prompts = lists["prompts"]
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MAX_CANDIDATES:
        raise ValueError(f"prompts: expected a list of 1 to {MAX_CANDIDATES} instructions")
    for key, values in {**lists, **columns}.items():
        if not isinstance(values, list) or len(values) != len(prompts):
            raise ValueError(f"{key}: expected a list of {len(prompts)} entries, as many as there are prompts")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts: expected strings")
    decoded: dict[str, Any] = {}
    for key in PICTURES:
        mode = "L" if key == "masks" else "RGB"
        decoded[key] = [from_png(text, f"{key}[{i}]", max_pixels).convert(mode) for i, text in enumerate(lists[key])]
    decoded["columns"] = {
        key: [_column_value(value, f"{key}[{i}]", max_pixels) for i, value in enumerate(values)]
        for key, values in columns.items()
    }
    # Rewards may log; here there is nobody to read it.
    context = {"log_extra": _nowhere, "log_metric": _nowhere}
    labels = [str(index) for index in range(len(prompts))]
    return rewards[name], {"prompts": prompts, **decoded, "labels": labels, "context": context}


def _column_value(value: Any, where: str, max_pixels: int) -> Any:
    is_picture = isinstance(value, dict) and set(value) == {"png"}
    return from_png(value["png"], where, max_pixels) if is_picture else value


def _nowhere(*arguments: Any) -> None:
    pass


def _answer(scored: ScoredBatch) -> dict[str, Any]:
    rewards = [None if math.isnan(value) else value for value in scored.values[:, 0].tolist()]
    return {"rewards": rewards, "failures": {failure.sample_label: failure.reason for failure in scored.failures}}


def serve(
    rewards: Sequence[Reward],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    shutdown_seconds: int = 30,
    **limits: Any,
) -> None:
    """Serve until SIGINT or SIGTERM; then no more are taken, and accepted requests have `shutdown_seconds` to finish.

    Prints the address on stdout once it listens. A call of a reward cannot be broken off: one that takes longer than
    that loses its caller, and the process ends when it returns.

    Args:
        rewards: from `resolve_rewards`.
        host: the address to listen on.
        port: 0 for any free one.
        token: see `create_app`.
        limits: `max_request_bytes`, `max_pixels`, `concurrency`, `max_waiting` of `create_app`.

    Raises:
        ValueError: an address that others can reach, without a token; a limit that cannot be.
        ModuleNotFoundError: FastAPI or uvicorn is not installed.
        OSError: the address is taken.
    """
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host: got {host!r}, which other machines can reach, without a token; set one, or listen on 127.0.0.1"
        )
    app = create_app(rewards, token, **limits)
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("serving rewards needs uvicorn: pip install 'rcgrpo[serve]'") from error

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        listener.listen(128)
        print(f"serving {', '.join(reward.name for reward in rewards)} on {address}", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=shutdown_seconds)
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything is closed
            uvicorn.Server(config).run(sockets=[listener])
