"""Twenty steps against a judge that breaks in every way, on a real socket: the run ends, and no number is made up.

The server's own log says which request it answered how; what the trainer keeps is compared with that, candidate by
candidate, and so are the counts in the log.
"""

import json
import math
import random
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fault_server import FaultServer
from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.rewards import RemoteReward
from rcgrpo.rewards.pictures import to_png
from tiny_kontext import build_tiny_kontext

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, WINDOW, STEPS = 4, 2, 20  # candidates of a group, groups of a step (each its own request), steps
BREAKER, RETRIES = 10, 1
ATTEMPTS = RETRIES + 2  # one more for each of the two servers

FAULTS = {
    "slow": {"sleep": 0.1},
    "429": {"do": "status", "status": 429, "headers": {"Retry-After": "0.02"}},
    "500": {"do": "status", "status": 500},
    "reset": {"do": "reset"},
    "half": {"do": "truncate"},
    "hang": {"do": "hang"},
    "truncated JSON": {"do": "body", "body": '{"rewards": [0.25, 0.'},
    "too few": {"rewards": [0.25, 0.5, 0.75]},
    "too many": {"rewards": [0.25, 0.5, 0.75, 1, 0]},
    "NaN": {"rewards": [0.25, math.nan, 0.75, -math.inf]},
    "out of range": {"rewards": [7, 0.25, -0.1, 0.125]},
    "all but one": {"rewards": [math.nan, 2, 0.375, math.inf]},
    "no number": {"rewards": ["0.25", 0.5, True, 0.75]},
}
# Before each step; afterwards, and when the list is used up, the server is well.
PLAN = [
    [],
    ["slow"],
    ["429"],
    ["500"],
    ["reset"],
    ["half"],
    ["truncated JSON"],
    ["too few", "too many"],
    ["NaN"],
    ["out of range", "NaN"],
    ["hang"],
    [],
    ["dead"],
    [],
    ["500"] * ATTEMPTS,
    ["429", "reset", "truncated JSON", "half", "NaN"],
    ["all but one", "no number"],
    ["hang", "500", "slow"],
    ["slow", "500", "out of range"],
    [],
]
KINDS = {"429": "http_429", "500": "http_500", "reset": "connect", "half": "connect", "hang": "timeout"}
KINDS |= {"truncated JSON": "malformed", "too few": "wrong_count", "too many": "wrong_count"}


def faults_in(name, rewards):
    """What the client has to count for one answer, by the definition of the faults and not by its code."""
    if name in KINDS:
        return Counter([KINDS[name]])
    found = Counter()
    for value in rewards:
        if not isinstance(value, float | int) or isinstance(value, bool):
            found["not_a_number"] += 1
        elif not math.isfinite(value):
            found["not_finite"] += 1
        elif not 0 <= value <= 1:
            found["out_of_range"] += 1
    return found


def usable(name, rewards):
    """The scores that may enter training, `None` for the others."""
    if name in KINDS:
        return [None] * SIZE
    numbers = [isinstance(value, float | int) and not isinstance(value, bool) for value in rewards]
    return [value if number and 0 <= value <= 1 else None for value, number in zip(rewards, numbers, strict=True)]


class Misfortune(TrainerCallback):
    """Breaks the server before each step and asks it afterwards what it did.

    Attributes:
        told: `(pictures, name, rewards)` of each request that the server answered, in order.
        dead: requests that were due while there was no server.
    """

    def __init__(self, server):
        self.server, self.random, self.told, self.dead = server, random.Random(0), [], 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = []
        if PLAN[state.global_step] == ["dead"]:
            self.server.stop()
            return
        for name in [*PLAN[state.global_step], *["good"] * WINDOW]:
            how = dict(FAULTS.get(name, {}))
            rewards = how.pop("rewards", None) or [self.random.randrange(1, 1000) / 1000 for _ in range(SIZE)]
            self.now.append((name, rewards, {"do": "body", "body": json.dumps({"rewards": rewards}), **how}))
        self.server.behave(*(how for _, _, how in self.now))

    def on_step_end(self, args, state, control, **kwargs):
        if not self.now:
            self.dead += WINDOW
            self.server.start()
            return
        requests = self.server.log()
        assert WINDOW <= len(requests) <= len(self.now)
        for request, (name, rewards, _) in zip(requests, self.now, strict=False):
            self.told.append((tuple(request["body"]["images"]), name, rewards))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The trainer after training, the groups that it trained on, and the server's tale."""
    with FaultServer() as gone:
        pass
    with FaultServer() as server:
        server.behave({"do": "body", "body": '{"rewards": [0.5, 0.5]}'})  # the probe at start-up
        reward = RemoteReward(
            [gone.url, server.url],
            "judge",
            value_range=(0, 1),
            required=True,
            timeout=6.0,
            attempt_timeout=1.0,
            retries=RETRIES,
            concurrency=1,  # the plan tells which request of which step is answered how
            backoff=0.01,
            max_backoff=0.02,
            breaker_failures=BREAKER,
            breaker_seconds=600.0,
        )
        args = RCGRPOConfig(
            str(tmp_path_factory.mktemp("run")),
            resolution=32,
            max_sequence_length=16,
            num_inference_steps=2,
            num_policy_steps=1,
            policy_steps_range=[0, 1],
            num_generations=SIZE,
            num_anchors=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=WINDOW,
            max_steps=STEPS,
            max_reward_failures=1000,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        pipe = build_tiny_kontext()
        pipe.set_progress_bar_config(disable=True)
        misfortune = Misfortune(server)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
        data = compbench_mini("train", 12, 32)
        trainer = RCGRPOTrainer(pipe, reward, args, data, peft_config=lora, callbacks=[misfortune])
        groups, finish = [], trainer._finish

        def watch(*arguments):
            finished = finish(*arguments)
            groups.extend(finished)
            return finished

        trainer._finish = watch
        trainer.train()
    return trainer, groups, misfortune


def rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_run_ends_and_its_numbers_are_finite(run):
    trainer, groups, misfortune = run
    assert trainer.state.global_step == STEPS == len(PLAN) == len(rows(trainer))
    assert len(groups) == STEPS * WINDOW
    assert {name for _, name, _ in misfortune.told} == {*FAULTS, "good"}, "some fault was never committed"
    for row in rows(trainer):
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert any(row["grad_norm"] > 0 for row in rows(trainer))


def test_every_score_is_one_that_the_server_gave_in_range_to_that_candidate(run):
    _, groups, misfortune = run
    last = {pictures: (name, rewards) for pictures, name, rewards in misfortune.told}  # later attempts replace earlier
    told = [last.get(tuple(map(to_png, group.images))) for group in groups]
    assert sum(answer is None for answer in told) == misfortune.dead == WINDOW
    scored = 0
    for group, answer in zip(groups, told, strict=True):
        expected = usable(*answer) if answer else [None] * SIZE
        given = [None if value != value else value for value in group.rewards[:, 0].tolist()]
        assert given == pytest.approx(expected)
        missing = torch.tensor([value is None for value in expected])
        assert group.scores.isnan().tolist() == missing.tolist()
        assert group.advantages.isfinite().all() and not group.advantages[missing].any()
        if (~missing).sum() < 2:
            assert not group.advantages.any()
            continue
        scored += 1
        kept, scores = group.advantages[~missing], group.scores[~missing]
        assert kept.any() and kept.argsort().tolist() == scores.argsort().tolist()
        assert abs(kept.sum()) < 1e-4, "the candidates without a score shifted the mean"
    assert scored > STEPS


def test_the_log_counts_every_fault_that_was_committed(run):
    trainer, _, misfortune = run
    expected = sum((faults_in(name, rewards) for _, name, rewards in misfortune.told), Counter())
    expected["connect"] += misfortune.dead * ATTEMPTS  # while the server was dead, nobody could tell but us
    expected["connect"] += BREAKER  # the second address, until its circuit opened
    last = rows(trainer)[-1]
    prefix = "rewards/judge/faults/"
    assert {name.removeprefix(prefix): n for name, n in last.items() if name.startswith(prefix)} == expected
    failed = sum(row["rewards/failures"] for row in rows(trainer)) * WINDOW  # the log holds means over a window
    missing = sum(int(group.rewards.isnan().sum()) for group in run[1])
    assert failed == missing == trainer.failures.counts["judge"] > 0
