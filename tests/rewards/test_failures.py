import math
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from fault_server import FaultServer
from rcgrpo.rewards import (
    FailureWatch,
    RequiredRewardError,
    agree_on_failure,
    fault_counts,
    resolve_rewards,
    score,
)


def numbers(number, **columns):
    return [float(value) for value in number]


def broken(**columns):
    raise ConnectionError("server is down")


def absent(images, **columns):
    return [None] * len(images)


def watched(patience, **functions):
    """A watch over one required reward, and a way to feed it a batch of another function under its name."""
    rewards = resolve_rewards([numbers, broken])
    rewards = [rewards[0], type(rewards[1])("judge", broken, required=True)]
    watch = FailureWatch(rewards, patience)

    def feed(function):
        function_rewards = [rewards[0], type(rewards[1])("judge", function, required=True)]
        images = [Image.new("RGB", (4, 4))] * 2
        labels = ["train row 17, candidate 0", "train row 17, candidate 1"]
        watch.update(score(function_rewards, ["x"] * 2, images, images, images, {"number": [0, 1]}, labels))

    return watch, feed


def test_watch_stops_after_patience_silent_batches():
    watch, feed = watched(patience=3)
    feed(broken)
    feed(absent)  # neither counts nor resets
    feed(broken)
    with pytest.raises(RequiredRewardError) as caught:
        feed(broken)
    for part in ("'judge'", "3 batches", "train row 17, candidate 1", "server is down", "`required` to False"):
        assert part in str(caught.value)
    assert watch.counts == {"numbers": 0, "judge": 6}


def test_watch_starts_anew_after_a_score_and_ignores_what_does_not_apply():
    def half(images, **columns):
        return [math.nan, 0.5]

    watch, feed = watched(patience=2)
    for function in (broken, half, broken, numbers, broken, absent, absent, half):
        feed(function)
    assert watch.counts["judge"] == 2 + 1 + 2 + 2 + 1


def test_the_error_comes_with_the_rewards_own():
    _, feed = watched(patience=1)
    with pytest.raises(RequiredRewardError) as caught:
        feed(broken)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_watch_is_loud_about_what_is_not_required(caplog):
    rewards = resolve_rewards([broken, absent])
    watch = FailureWatch(rewards, patience=2)
    image = [Image.new("RGB", (4, 4))]
    for number in range(1, 6):
        caplog.clear()
        watch.update(score(rewards, ["x"], image, image, image, {}, ["only"]))
        loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(loud) == (number % 2 == 0)
        assert all(f"'broken' failed on every candidate of {number} batches" in text for text in loud)
        assert watch.silent == {"broken": number, "absent": 0}
    assert watch.counts == {"broken": 5, "absent": 0}
    rewards = [type(rewards[0])("broken", numbers), rewards[1]]
    watch.update(score(rewards, ["x"], image, image, image, {"number": [1]}, ["only"]))
    assert watch.silent["broken"] == 0 and watch.counts["broken"] == 5


def test_watch_is_loud_about_batches_without_any_score(caplog):
    watch = FailureWatch(resolve_rewards(absent), patience=2)
    for scored in (False, True, False, False, False, False):
        watch.update_scores(scored)
    loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert watch.unscored == 4 and [n for n in (2, 4) for text in loud if f"of {n} batches" in text] == [2, 4]
    assert len(loud) == 2


def test_patience_has_to_be_a_number_of_batches():
    rewards = resolve_rewards(broken)
    with pytest.raises(ValueError, match="patience: got 0"):
        FailureWatch(rewards, patience=0)


def test_fault_counts_of_who_counts():
    def counting(**columns):
        return []

    counting.faults = {"timeout": 3, "http_500": 1}
    counted = {"rewards/counting/faults/timeout": 3, "rewards/counting/faults/http_500": 1}
    assert fault_counts(resolve_rewards([absent, counting])) == counted


SCRIPT = """
    import os, sys
    from accelerate import Accelerator
    from rcgrpo.rewards import RequiredRewardError, failing_together, is_agreed
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    with failing_together(accelerator):
        pass
    for kind in (RequiredRewardError, KeyError, FloatingPointError):
        try:
            with failing_together(accelerator):
                if rank == 1:
                    raise kind("judge is silent")
        except (RuntimeError, FloatingPointError) as error:
            print(type(error).__name__, error, is_agreed(error), sep="|", flush=True)
    accelerator.end_training()
"""


def test_every_process_raises_what_one_of_them_met(monkeypatch):
    with FaultServer() as server:  # a free port
        port = server.port
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = ["RequiredRewardError|process 1: judge is silent", "RuntimeError|process 1: KeyError: 'judge is silent'"]
    told.append("FloatingPointError|process 1: judge is silent")
    for (out, errors), process in zip(outputs, processes, strict=True):
        assert process.returncode == 0, errors
        assert out.splitlines() == [f"{line}|True" for line in told]


def test_a_single_process_raises_its_own_error():
    class Alone:
        num_processes = 1

    agree_on_failure(Alone(), None)
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        agree_on_failure(Alone(), error)
    assert caught.value is error
