"""Rewards that fail in every way that was met, and whether a failed candidate ever teaches.

Where it fits: `endurance.py`. What befalls a candidate follows from its pixels, so that the trainer may ask for it
together with others, alone, or twice. Local ones raise, hang, or return what is no score; behind HTTP a server answers
with errors, garbage, half an answer, nothing, or scores that are none.
"""

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kills
from peft import LoraConfig
from PIL import Image

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.rewards import RemoteReward
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.model import load_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fault_server import FaultServer

SCORES: dict[str, Any] = {
    "nan": float("nan"),
    "inf": float("inf"),
    "beyond fp32": -1e39,
    "text": "good",
    "list": [0.5, 0.5],
    "dictionary": {"score": 1.0},
}
"""What is returned in a score's place."""
RAISED: dict[str, Exception] = {
    "ValueError": ValueError("no"),
    "OSError": OSError("the judge is gone"),
    "MemoryError": MemoryError(),
    "KeyError": KeyError("score"),
    "AssertionError": AssertionError(),
}
TIMEOUT_S = 1.0
"""Of a hanging reward, and of a hanging server's answer."""
ANSWERS: dict[str, dict[str, Any]] = {
    "http 500": {"do": "status", "status": 500},
    "http 429": {"do": "status", "status": 429, "headers": {"Retry-After": "0"}},
    "http 503": {"do": "status", "status": 503},
    "garbage": {"do": "body", "body": "<html>busy</html>"},
    "no object": {"do": "body", "body": "[0.5]"},
    "no scores": {"do": "body", "body": "{}"},
    "wrong count": {"do": "body", "body": '{"rewards": [0.5, 0.5]}'},
    "said": {"do": "body", "body": '{"error": "out of memory"}'},
    "its own failure": {"do": "body", "body": '{"rewards": [null], "failures": {"0": "no answer"}}'},
    "nan": {"do": "body", "body": '{"rewards": [NaN]}'},
    "infinity": {"do": "body", "body": '{"rewards": [-Infinity]}'},
    "text": {"do": "body", "body": '{"rewards": ["good"]}'},
    "out of range": {"do": "body", "body": '{"rewards": [7]}'},
    "truncated": {"do": "truncate"},
    "reset": {"do": "reset"},
    "hang": {"do": "hang"},
}
SHARE = 0.4
"""Of candidates that meet a fault."""
GROUP = 12
GIVE_UP_AFTER = 3


def fate(image: Image.Image, kinds: Sequence[str]) -> str | None:
    """The fault that a picture meets, if any."""
    drawn = random.Random(hashlib.sha256(image.tobytes()).digest())
    return drawn.choice(kinds) if drawn.random() < SHARE else None


def same(image: Image.Image, source: Image.Image) -> bool:
    return image.tobytes() == source.tobytes()


class Watched(RCGRPOTrainer):
    """Remembers of each candidate whether it had a score, its advantage, and its picture."""

    def _log_groups(self, groups: Any) -> None:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[Image.Image, float, float]] = []
        for group in groups:
            rewards, advantages = group.rewards[:, 0].tolist(), group.advantages.tolist()
            self.seen += list(zip(group.images, rewards, advantages, strict=True))
        super()._log_groups(groups)


def train(folder: Path, reward: Any, steps: int, **options: Any) -> Watched:
    """A run of one group an update."""
    options |= kills.SMALL | {
        "num_generations": GROUP,
        "max_steps": steps,
        "save_strategy": "no",
        "logging_steps": 1000,
    }
    options |= {"max_reward_failures": 1000}
    rows = [dict(row) for row in compbench_mini("train", 64)]
    pipeline = load_pipeline(str(WEIGHTS), None)
    config = RCGRPOConfig(str(folder), **options)
    trainer = Watched(pipeline, reward, config, rows, peft_config=LoraConfig(**kills.LORA))
    if hasattr(trainer, "seen"):
        trainer.seen.clear()
    trainer.train()
    return trainer


def local(number: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """About so many faults of a Python callable: their kinds, and what was wrong."""
    kinds = [*SCORES, *RAISED, "None", "hang"]

    def failing(images: Sequence[Image.Image], source_images: Sequence[Image.Image], **columns: Any) -> list[Any]:
        fates = [fate(image, kinds) for image in images]
        if all(map(same, images, source_images)):  # the start-up probe, which a dead reward would not pass
            fates = [None] * len(images)
        if len(images) == GROUP and fates[0] == "hang":
            time.sleep(1.1 * TIMEOUT_S)  # back before the next call, as a reward that still hangs is not called
        for kind in fates:
            if kind in RAISED:
                raise RAISED[kind]
        scores = zip(fates, kills.brightness(images), strict=True)
        return [SCORES.get(str(kind), None if kind == "None" else score) for kind, score in scores]

    trainer = train(folder / "local", failing, _steps(number), reward_timeout=TIMEOUT_S)
    fates, given_up = [], []
    for start in range(0, len(trainer.seen), GROUP):
        found = [fate(image, kinds) for image, *_ in trainer.seen[start : start + GROUP]]
        given_up += [True] * GROUP if found[0] == "hang" else _given_up(found)
        fates += [None if kind == "hang" else kind for kind in found]  # only a call for a whole group hangs
    expected = sum(kind not in (None, "None") or gone for kind, gone in zip(fates, given_up, strict=True))
    counted = trainer.failures.counts["failing"]
    yield from _verdicts(trainer, fates, given_up, None if counted == expected else f"{counted} of {expected} counted")


def _given_up(fates: Sequence[str | None]) -> list[bool]:
    """Whether a candidate of a batch has no score because three before it raised, each alone."""
    in_a_row, gone = 0, []
    for kind in fates:
        gone.append(in_a_row >= GIVE_UP_AFTER)
        if not gone[-1]:
            in_a_row = in_a_row + 1 if kind in RAISED else 0
    return gone


def remote(number: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """About so many faults of a server: their kinds, and what was wrong."""
    steps, drawn = _steps(number), random.Random(0)
    fates = [drawn.choice(list(ANSWERS)) if drawn.random() < SHARE else None for _ in range(steps * GROUP)]
    with FaultServer() as server:
        good = [{"do": "body", "body": json.dumps({"rewards": [round(drawn.random(), 3)]})} for _ in fates]
        answers = [good[i] if kind is None else ANSWERS[kind] for i, kind in enumerate(fates)]
        server.behave(*good[:2], *answers)  # two are asked for at start-up
        # One request a candidate, in order and each once, so that the server's answers are the candidates' fates.
        once = {"batch_size": 1, "concurrency": 1, "retries": 0, "breaker_failures": 10**6}
        limits = {"value_range": (0, 1), "timeout": 600.0, "attempt_timeout": TIMEOUT_S}
        reward = RemoteReward(server.url, "remote", **once, **limits)
        trainer = train(folder / "remote", reward, steps)
    bad = sum(kind is not None for kind in fates)
    counted, by_kind = trainer.failures.counts["remote"], sum(reward.faults.values())
    right = len(trainer.seen) == len(fates) and counted == by_kind == bad
    told = None if right else f"{counted} counted, {dict(reward.faults)} by kind, expected {bad}"
    yield from _verdicts(trainer, fates, [False] * len(fates), told)


def _steps(number: int) -> int:
    """Updates that bring at least so many."""
    return math.ceil(1.2 * number / (GROUP * SHARE))


def _verdicts(
    trainer: Watched, fates: Sequence[str | None], given_up: Sequence[bool], told: str | None
) -> Iterator[tuple[str, str | None]]:
    steps = trainer.state.global_step
    if steps != trainer.args.max_steps:
        told = f"{steps} of {trainer.args.max_steps} steps were taken"
    name = trainer.rewards[0].name
    for kind, gone, (_, reward, advantage) in zip(fates, given_up, trainer.seen, strict=False):
        if kind is None and not gone:
            if reward != reward:
                told = "a good candidate has no score"
            continue
        wrong = f"{name}: {kind} had reward {reward}, advantage {advantage}" if reward == reward or advantage else None
        if kind != "None" or gone or wrong:  # which is no fault
            yield "remote" if name == "remote" else "local", wrong
    if told:
        yield f"{name} run", f"{name}: {told}"
