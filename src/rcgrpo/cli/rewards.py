"""`rcgrpo rewards`: the registered rewards and what they read; `rcgrpo rewards serve`: rewards over HTTP."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from .parsing import UsageError, parse


@dataclass
class ServeArguments:
    """What to serve, and to whom."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["compbench_mini"],
        metadata={"help": "registered names or dotted paths; with several, a request says which one it wants"},
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to listen on; other than this machine's own, it takes a bearer token"},
    )
    port: int = field(default=8000, metadata={"help": "0 for any free one"})
    token_variable: str = field(
        default="RCGRPO_REWARD_TOKEN", metadata={"help": "environment variable that holds the bearer token"}
    )
    max_request_mb: int = field(default=256, metadata={"help": "larger requests are refused"})
    max_request_mpixels: int = field(
        default=128, metadata={"help": "requests whose pictures have more megapixels together are refused"}
    )
    read_seconds: float = field(
        default=60.0, metadata={"help": "requests that have not come whole by then lose their place"}
    )
    concurrency: int = field(
        default=1,
        metadata={"help": "requests scored at once; above 1 only for rewards that are thread-safe or asynchronous"},
    )
    max_waiting: int = field(
        default=32, metadata={"help": "requests that wait for their turn besides; further ones get 429"}
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo rewards [serve]`."""
    if not arguments:
        show()
    elif arguments[0] in ("-h", "--help"):
        print(
            "usage: rcgrpo rewards [serve ...]\n\nwithout arguments: the registered rewards, their ranges and the "
            "columns that they read\nserve: rewards over HTTP; see `rcgrpo rewards serve --help`"
        )
    elif arguments[0] == "serve":
        serve_rewards(arguments[1:])
    else:
        raise UsageError(f"rcgrpo rewards takes no arguments, got {' '.join(arguments)}; did you mean `serve`?")


def show() -> None:
    """Each registered reward with its range, its columns and the first line of its documentation."""
    from ..rewards import available_rewards, resolve_rewards

    for name in available_rewards():
        reward = resolve_rewards(name)[0]
        function = reward.function
        text = (getattr(function, "__doc__", None) or "").strip().splitlines()
        low_high = "-" if reward.value_range is None else "{:g} to {:g}".format(*reward.value_range)
        columns = ", ".join(reward.columns) or "-"
        print(f"{name:24} {low_high:8} columns: {columns:30} {text[0] if text else ''}")


def serve_rewards(arguments: Sequence[str]) -> None:
    """Serve until interrupted."""
    (given,) = parse([ServeArguments], arguments, None, "rcgrpo rewards serve")
    from ..rewards import resolve_rewards
    from ..rewards.server import serve

    serve(
        resolve_rewards(given.reward_funcs),
        given.host,
        given.port,
        os.environ.get(given.token_variable) or None,
        max_request_bytes=given.max_request_mb << 20,
        max_request_pixels=given.max_request_mpixels << 20,
        read_seconds=given.read_seconds,
        concurrency=given.concurrency,
        max_waiting=given.max_waiting,
    )
