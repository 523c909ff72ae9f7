"""`rcgrpo rewards`: the registered rewards and the columns that they read."""

from collections.abc import Sequence

from .parsing import UsageError


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo rewards`: the registered rewards and the columns that they read."""
    if arguments:
        raise UsageError(f"rcgrpo rewards takes no arguments, got {' '.join(arguments)}")
    from ..rewards import available_rewards, resolve_rewards

    for name in available_rewards():
        reward = resolve_rewards(name)[0]
        text = (reward.function.__doc__ or "").strip().splitlines()
        print(f"{name:26} columns: {', '.join(reward.columns) or '-':30} {text[0] if text else ''}")
