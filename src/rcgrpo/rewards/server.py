"""`rcgrpo rewards serve`: rewards behind HTTP, for `RemoteReward` or anything else that speaks the protocol.

Where it fits: the other end of `remote.py`, which describes the protocol. FastAPI and uvicorn come with
`pip install rcgrpo[serve]` and are imported when a server is made.

What it guards against: it listens on this machine only, unless there is a bearer token; a request's size is bounded
before it is read into memory and the time that reading takes, its values before they are parsed, the pixels of a
picture and of all its pictures before any is decoded; pictures are PNG and nothing else; nothing is ever unpickled;
waiting requests are bounded, beyond them callers get 429 and `Retry-After`, and one whose caller has hung up is not
scored. Of those that wait one is decoded ahead, the others stay packed. It speaks plain HTTP: between machines put it
behind a TLS proxy or an SSH tunnel, or the token travels in the clear.

Gotchas: by default one request is scored at a time, in the order of arrival, so a reward need not be thread-safe and a
GPU is not shared; `concurrency` is for rewards that may be called from several threads at once, and for asynchronous
ones. Requests are read and decoded beside the scoring, and `/health` always answers. A candidate that a reward fails on
is `null` with a reason in `failures`; a mistake in the request is 400.
"""

import asyncio
import hmac
import itertools
import logging
import math
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Any

from ..inputs.extras import require
from .pictures import from_png, png_size
from .registry import Reward
from .scoring import ScoredBatch
from .scoring_queue import ScoringQueue
from .transport import decode_json, is_loopback

logger = logging.getLogger(__name__)

PICTURES = ("images", "source_images", "masks")
HANG_UP = {"Connection": "close"}  # what is still to come of the request is not read
MAX_CANDIDATES = 1024
MAX_VALUES = 4_000_000  # of a request's JSON: `[{},{},…` takes 25 times its own size in memory


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
    max_request_pixels: int = 128 << 20,
    read_seconds: float = 60.0,
) -> Any:
    """The FastAPI application.

    Args:
        rewards: what it serves, from `resolve_rewards`.
        token: callers must send it as a bearer token; `None`: anybody who can connect may call.
        max_request_bytes: larger requests are refused with 413.
        max_pixels: of one picture; 400 beyond.
        concurrency: requests that are scored at the same time; above 1 every plain reward must be thread-safe.
        max_waiting: requests that wait for their turn besides; further ones are refused with 429.
        max_request_pixels: of all pictures of a request together, about 3 bytes each in memory; 413 beyond. So many
            pixels are held for each request that is scored, and for one more.
        read_seconds: a request's body must have come whole by then, or it loses its place; 408.

    Raises:
        ValueError: a number that is out of its range.
        ModuleNotFoundError: the extra `serve` is missing.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: got {concurrency}, expected at least 1 request")
    if max_waiting < 0:
        raise ValueError(f"max_waiting: got {max_waiting}, expected 0 or more requests")
    if not 0 < read_seconds < math.inf:
        raise ValueError(f"read_seconds: got {read_seconds}, expected a number above 0")
    require("serve", "serving rewards")
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    by_name = {reward.name: reward for reward in rewards}
    queue = ScoringQueue(concurrency)
    turn, room = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency + 1)
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
            raise _Refused(413, f"the request is larger than {max_request_bytes} bytes; send fewer at once", HANG_UP)
        try:
            async with asyncio.timeout(read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_request_bytes:
                        raise _Refused(413, f"the request is larger than {max_request_bytes} bytes", HANG_UP)
        except ClientDisconnect:
            raise _Refused(499, "the caller hung up") from None
        except TimeoutError:
            text = f"got {len(body)} bytes of the request within {read_seconds:g} s, expected all of it"
            raise _Refused(408, text, HANG_UP) from None
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
            async with room:
                reward, batch = await asyncio.to_thread(_batch, body, by_name, max_pixels, max_request_pixels)
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


def _batch(
    body: bytes, rewards: Mapping[str, Reward], max_pixels: int, max_request_pixels: int
) -> tuple[Reward, dict[str, Any]]:
    """The reward that a request names and the arguments of `score`.

    Raises:
        ValueError: naming the field, for anything that is not as the protocol says.
        _Refused: more values, or pixels of all pictures together, than a request may have.
    """
    if sum(body.count(character) for character in b",[{") > MAX_VALUES:
        raise _Refused(413, f"the request has more than {MAX_VALUES} values; send fewer candidates at once")
    try:
        given = decode_json(body)
    except ValueError as error:
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
    pictures = {key: [(value, f"{key}[{i}]") for i, value in enumerate(lists[key])] for key in PICTURES}
    attached = [(v["png"], f"{key}[{i}]") for key, vs in columns.items() for i, v in enumerate(vs) if _is_picture(v)]
    total = sum(math.prod(png_size(text, where)) for text, where in itertools.chain(*pictures.values(), attached))
    if total > max_request_pixels:
        text = f"the request's pictures have {total} pixels, expected {max_request_pixels} at most; send fewer at once"
        raise _Refused(413, text)
    decoded: dict[str, Any] = {}
    for key, members in pictures.items():
        mode = "L" if key == "masks" else "RGB"
        decoded[key] = [from_png(text, where, max_pixels).convert(mode) for text, where in members]
    decoded["columns"] = {
        key: [from_png(v["png"], f"{key}[{i}]", max_pixels) if _is_picture(v) else v for i, v in enumerate(values)]
        for key, values in columns.items()
    }
    # Rewards may log; here there is nobody to read it.
    context = {"log_extra": _nowhere, "log_metric": _nowhere}
    labels = [str(index) for index in range(len(prompts))]
    return rewards[name], {"prompts": prompts, **decoded, "labels": labels, "context": context}


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"png"}


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
        limits: `max_request_bytes`, `max_pixels`, … of `create_app`.

    Raises:
        ValueError: an address that others can reach, without a token; a limit that cannot be.
        ModuleNotFoundError: the extra `serve` is missing.
        OSError: the address is taken.
    """
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host: got {host!r}, which other machines can reach, without a token; set one, or listen on 127.0.0.1"
        )
    app = create_app(rewards, token, **limits)
    import uvicorn

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
