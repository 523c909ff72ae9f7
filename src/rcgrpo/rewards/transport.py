"""JSON to servers that may fail: one deadline, bounded retries, fail-over, a circuit breaker, a count of each fault.

Where it fits: `RemoteReward` and the judges behind a server send every request through one `Transport`. Why it exists:
a judge is the part of a run that breaks most often, and retries without an end, or a hang, cost the whole run.

What happens to a request:
- it waits for one of `concurrency` slots, in order; its time counts from when the first request of its *batch* got one
  (`Deadline`), so that a batch which was begun ahead does not pay for the one before it;
- it goes to the server that is ready soonest, taking turns among equals;
- 408, 429, 5xx and connection errors are tried again: at once on another server if there is one, else after an
  exponential back-off with jitter, or after the server's `Retry-After`; never beyond the deadline. Other requests keep
  away from that server for `MAX_RETRY_AFTER` seconds and half of a batch's time at most, so that one which asks for a
  year's peace costs one batch, and is asked again by the next;
- a server that does not answer within `attempt_timeout`, or refuses (any other status), is not asked again for this
  request; another one is;
- `breaker_failures` connection errors, timeouts or 5xx in a row open a server's circuit: it is left alone for
  `breaker_seconds`, then one request may try it. When every circuit is open, requests fail at once.

By hand, as tenacity and stamina repeat one call by itself: here all requests share the servers' state, a batch's time
and what a server asked for, and a retry means another server first.

Gotchas: an answer that is no JSON, or longer than `MAX_ANSWER_BYTES` once it is unpacked, is not asked for again, it
would come out the same. Redirects are not followed, so a token never travels to another host. Jitter comes from a
generator of its own and touches no seed of the run.
"""

import asyncio
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from time import monotonic, time
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

RETRIED = frozenset({408, 429})
MAX_RETRY_AFTER = 60.0
MAX_ANSWER_BYTES = 4 << 20
MAX_ERROR_BYTES = 64 << 10
MAX_DEPTH = 64


class Fault(Exception):
    """A request that brought no usable answer.

    Args:
        kind: a short name to count by: "connect", "timeout", "deadline", "circuit_open", "http_429", "malformed", …
        detail: what happened, for people.
        refused: the server understood and said no (a 4xx that no retry cures), so the set-up may be wrong.
        pause: seconds after which the server wants to be asked again, if it said so.
    """

    def __init__(self, kind: str, detail: str, refused: bool = False, pause: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.refused, self.pause = kind, refused, pause


class Deadline:
    """A batch's time; the first call of `remaining` begins it, by the batch's first request that gets a slot."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, math.inf

    def remaining(self) -> float:
        """Seconds, at least 0."""
        if self._end == math.inf:
            self._end = monotonic() + self._seconds
        return max(0.0, self._end - monotonic())


@dataclass
class _Server:
    url: str
    failures: int = 0
    open_until: float = 0.0
    ready_at: float = 0.0


class Transport:
    """POSTs JSON to one of several equal servers.

    Args:
        urls: base addresses, `http(s)://host:port[/path]`; the first one is not preferred.
        token: sent as `Authorization: Bearer …`; it is shown nowhere.
        timeout: seconds for a whole batch of requests, from the first one's start, waiting and retries included.
        attempt_timeout: seconds for one attempt; by default `timeout` shared out among the servers.
        retries: attempts after the first one and beyond one for each further server.
        concurrency: requests under way at the same time.
        backoff, max_backoff: seconds before the first retry, doubled each time, and their bound; jitter takes off up to
            a half.
        breaker_failures, breaker_seconds: when a server is left alone, and for how long.

    Attributes:
        faults: how often each kind of fault was met, attempts that a retry made good included.
        answered: whether any server ever gave a good answer.

    Raises:
        ValueError: no URL, one that is not http(s), or a number out of its range.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        timeout: float = 120.0,
        attempt_timeout: float | None = None,
        retries: int = 3,
        concurrency: int = 8,
        backoff: float = 0.5,
        max_backoff: float = 10.0,
        breaker_failures: int = 5,
        breaker_seconds: float = 30.0,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise ValueError("url: got none, expected at least one http(s)://host:port")
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"url: got {url!r}, expected http(s)://host:port")
        for name, value, least in (
            ("timeout", timeout, 0.0),
            ("attempt_timeout", timeout if attempt_timeout is None else attempt_timeout, 0.0),
            ("concurrency", concurrency, 0),
            ("breaker_failures", breaker_failures, 0),
        ):
            if not value > least:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        if retries < 0:
            raise ValueError(f"retries: got {retries}, expected 0 or more")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.timeout = timeout
        self.attempt_timeout = timeout / len(urls) if attempt_timeout is None else attempt_timeout
        self.retries, self.concurrency = retries, concurrency
        self.backoff, self.max_backoff = backoff, max_backoff
        self.breaker_failures, self.breaker_seconds = breaker_failures, breaker_seconds
        self.faults: Counter[str] = Counter()
        self.answered = False
        # Answers are small; packed ones are read all the same (`_read`).
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers["Accept-Encoding"] = "identity"
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._servers = [_Server(url) for url in self.urls]
        self._jitter = random.Random()
        self._turn = 0
        # Connections belong to the event loop that opened them.
        self._sessions: WeakKeyDictionary[Any, tuple[Any, asyncio.Semaphore]] = WeakKeyDictionary()

    def deadline(self) -> Deadline:
        """One for all requests of a batch."""
        return Deadline(self.timeout)

    async def post(self, path: str, body: bytes, deadline: Deadline) -> Any:
        """One request.

        Args:
            path: appended to a server's URL, e.g. "/compute".
            body: JSON.
            deadline: from `deadline()`, once for the whole batch.

        Returns:
            The decoded answer.

        Raises:
            Fault: no usable answer in time; counted in `faults` already.
        """
        client, slots = self._session()
        try:
            async with slots, asyncio.timeout(deadline.remaining()):
                return await self._attempts(client, path, body, deadline)
        except TimeoutError:
            raise self._count(Fault("deadline", f"no answer within the batch's {self.timeout:g} s")) from None

    def look(self, path: str, seconds: float = 10.0) -> Any:
        """GET from the first server that answers, outside of any batch: is anybody there?

        Returns:
            The decoded answer; None of a server that has no such path, which is there all the same.

        Raises:
            Fault: what the last server did instead; it is not counted.
        """
        import httpx2

        faults = []
        for url in self.urls:
            trust = not is_loopback(urlsplit(url).hostname or "")
            try:
                answer = httpx2.get(url + path, headers=self._headers, timeout=seconds, trust_env=trust)
            except httpx2.HTTPError as error:
                faults.append(Fault("connect", f"{url}: {type(error).__name__} {error}".rstrip()))
                continue
            if answer.status_code in (404, 405):
                return None
            if answer.status_code != 200:
                kind = f"http_{answer.status_code}"
                faults.append(Fault(kind, f"{url}{path} answered {answer.status_code}: {_message(answer.content)}"))
                continue
            try:
                return decode_json(answer.content)
            except ValueError as error:
                faults.append(Fault("malformed", f"{url}{path} answered what is no JSON ({error})"))
        raise faults[-1]

    def _session(self) -> tuple[Any, asyncio.Semaphore]:
        import httpx2

        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            # A proxy of the environment has no business between a process and its own machine.
            local = all(is_loopback(urlsplit(url).hostname or "") for url in self.urls)
            # Reading the system's certificates takes a while; without https nobody would look at them.
            secure = any(urlsplit(url).scheme == "https" for url in self.urls)
            client = httpx2.AsyncClient(headers=self._headers, trust_env=not local, timeout=None, verify=secure)
            self._sessions[loop] = (client, asyncio.Semaphore(self.concurrency))
        return self._sessions[loop]

    async def _attempts(self, client: Any, path: str, body: bytes, deadline: Deadline) -> Any:
        given_up: set[int] = set()
        last: Fault | None = None
        too_late = False
        for attempt in range(self.retries + len(self._servers)):
            server = self._choose(given_up)
            if server is None:
                break
            wait = server.ready_at - monotonic()
            if wait > 0:
                if wait >= deadline.remaining():
                    raise self._count(Fault("deadline", f"the next retry would come too late ({last})"))
                await asyncio.sleep(wait)
            try:
                answer = await self._attempt(client, server, path, body)
            except Fault as fault:
                last = fault
                if fault.kind == "malformed":
                    raise
                too_late = fault.pause is not None and fault.pause >= deadline.remaining()
                if fault.kind == "timeout" or fault.refused or too_late:
                    given_up.add(id(server))
                if server.ready_at <= monotonic():
                    pause = min(self.max_backoff, self.backoff * 2**attempt)
                    server.ready_at = monotonic() + pause * self._jitter.uniform(0.5, 1.0)
            else:
                self.answered = True
                return answer
        if too_late:
            raise self._count(Fault("deadline", f"the next retry would come too late ({last})"))
        raise last or self._count(Fault("circuit_open", f"{', '.join(self.urls)} failed too often just now"))

    def _choose(self, given_up: set[int]) -> _Server | None:
        now = monotonic()
        self._turn += 1
        turned = [self._servers[(self._turn + i) % len(self._servers)] for i in range(len(self._servers))]
        usable = [server for server in turned if id(server) not in given_up and server.open_until <= now]
        if not usable:
            return None
        server = min(usable, key=lambda server: max(server.ready_at, now))
        if server.failures >= self.breaker_failures:  # half-open: this request tries it, the others keep away
            server.open_until = now + self.breaker_seconds
        return server

    async def _attempt(self, client: Any, server: _Server, path: str, body: bytes) -> Any:
        import httpx2

        try:
            async with (
                asyncio.timeout(self.attempt_timeout),
                client.stream("POST", server.url + path, content=body) as response,
            ):
                good = 200 <= response.status_code < 300
                content = await _read(response, MAX_ANSWER_BYTES if good else MAX_ERROR_BYTES)
        except TimeoutError:
            raise self._failed(server, Fault("timeout", f"{server.url} took over {self.attempt_timeout:g} s")) from None
        except httpx2.TransportError as error:
            text = f"{server.url}: {type(error).__name__} {error}".rstrip()
            raise self._failed(server, Fault("connect", text)) from error
        status = response.status_code
        if good:
            server.failures, server.open_until = 0, 0.0
            try:
                if content is None:
                    raise ValueError(f"expected at most {MAX_ANSWER_BYTES} bytes, plain or packed by gzip")
                return decode_json(content)
            except ValueError as error:
                raise self._count(Fault("malformed", f"{server.url} answered what is no JSON ({error})")) from error
        detail = f"{server.url}{path} answered {status}: {_message(content)}"
        refused = status < 500 and status not in RETRIED
        pause = None if refused else _retry_after(response.headers.get("retry-after"))
        fault = Fault(f"http_{status}", detail, refused, pause)
        if pause is not None:
            server.ready_at = monotonic() + min(pause, MAX_RETRY_AFTER, self.timeout / 2)
        if status >= 500:
            raise self._failed(server, fault)
        server.failures, server.open_until = 0, 0.0  # it is alive
        raise self._count(fault)

    def _failed(self, server: _Server, fault: Fault) -> Fault:
        server.failures += 1
        if server.failures >= self.breaker_failures:
            server.open_until = monotonic() + self.breaker_seconds
        return self._count(fault)

    def _count(self, fault: Fault) -> Fault:
        self.faults[fault.kind] += 1
        return fault


def is_loopback(host: str) -> bool:
    """Whether a host name or address never leaves this machine; names other than "localhost" are not looked up."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def decode_json(text: str | bytes) -> Any:
    """JSON from another process, nested no deeper than `MAX_DEPTH`, so that whatever walks it later survives.

    Raises:
        ValueError: anything else.
    """
    try:
        decoded = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [decoded]
    for _ in range(MAX_DEPTH + 1):
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        if not inner:
            return decoded
        level = [value for values in inner for value in values]
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


async def _read(response: Any, limit: int) -> bytes | None:
    """The body, unpacked, or `None` if that is longer than `limit` or packed in a way that was not asked for.

    The limit is checked before anything is unpacked, as a kilobyte of gzip may hold a megabyte.
    """
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("identity", "gzip", "x-gzip", "deflate"):
        return None
    unpack = None if packed == "identity" else zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # gzip's header or zlib's
    body = bytearray()
    async for chunk in response.aiter_raw():
        try:
            body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
        except zlib.error:
            return None
        if len(body) > limit:
            return None
    return bytes(body)


def _message(content: bytes | None) -> str:
    """What an error's answer says, for people."""
    if content is None:
        return "more than can be shown"
    try:
        decoded = decode_json(content)
    except ValueError:
        decoded = None
    text = decoded["error"] if isinstance(decoded, dict) and "error" in decoded else content.decode(errors="replace")
    return " ".join(str(text).split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds, at least 0, from a `Retry-After` header, which holds seconds or a date; `None` for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, TypeError, OverflowError):  # no date, or none that this machine's clock can show
            return None
    return max(0.0, seconds) if seconds == seconds else None
