import asyncio
import threading
import time
from concurrent.futures import CancelledError

import pytest
from PIL import Image

from fault_server import FaultServer
from rcgrpo.rewards import RemoteReward, RewardError, ScoringQueue, resolve_rewards, score


def batch(first, count=2, context=None):
    """Arguments of `score`; the column `number` counts up from `first`, and prompts say the same."""
    images = [Image.new("RGB", (4, 4))] * count
    numbers = list(range(first, first + count))
    labels = [f"candidate {number}" for number in numbers]
    return ([str(n) for n in numbers], images, images, images, {"number": numbers}, labels, context)


def numbers(number, **columns):
    return [float(value) for value in number]


def test_results_are_those_of_score_in_the_order_asked_for():
    rewards = resolve_rewards(numbers)
    with ScoringQueue() as queue:
        pending = [queue.submit(rewards, *batch(first)) for first in (0, 10, 20)]
        assert [p.result().values.tolist() for p in reversed(pending)] == [[[20], [21]], [[10], [11]], [[0], [1]]]
    assert pending[0].ended <= pending[1].started and pending[1].ended <= pending[2].started
    assert score(rewards, *batch(10)).values.tolist() == pending[1].result().values.tolist()


def test_scoring_overlaps_with_what_the_caller_does_next():
    rolled_out = threading.Event()

    def patient(images, **columns):
        assert rolled_out.wait(5), "the next group was not rolled out meanwhile"
        return [1.0] * len(images)

    with ScoringQueue() as queue:
        pending = queue.submit(resolve_rewards(patient), *batch(0))
        rolled_out.set()  # the rollout of the next group, which a serial scorer would only begin after the first
        assert pending.result().failures == []


def test_overlap_with_a_slow_judge_beats_the_serial_sum():
    def roll_out():
        began = time.perf_counter()
        time.sleep(0.1)
        return began, time.perf_counter()

    with FaultServer() as server:
        server.behave({"do": "compute", "sleep": 0.1})
        rewards = resolve_rewards(RemoteReward(server.url))
        score(rewards, *batch(0))  # connected
        began = time.perf_counter()
        with ScoringQueue() as queue:
            rollouts, pending = [], []
            for first in range(4):
                rollouts.append(roll_out())
                pending.append(queue.submit(rewards, *batch(first)))
            values = [p.result().values[0].item() for p in pending]
        wall = time.perf_counter() - began
    assert values == [0, 1, 2, 3]
    scorings = [(p.started, p.ended) for p in pending]
    for scoring, rollout in zip(scorings, rollouts[1:], strict=False):
        assert scoring[0] < rollout[1] and rollout[0] < scoring[1], "each group is judged while the next is rolled out"
    assert wall < sum(end - start for start, end in rollouts + scorings)


def test_plain_rewards_never_meet_themselves():
    inside = []

    def shy(images, **columns):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.pop()
        return [0.0] * len(images)

    with ScoringQueue() as queue:
        pending = [queue.submit(resolve_rewards(shy), *batch(0)) for _ in range(5)]
        assert all(p.result().failures == [] for p in pending)


def test_the_judge_gets_the_next_batch_while_it_works_on_this_one_and_no_further():
    under_way, order = [0, 0], []

    async def judge(number, **columns):
        under_way[0] += 1
        under_way[1] = max(under_way)
        await asyncio.sleep(0.02)
        under_way[0] -= 1
        return numbers(number)

    def plain(number, **columns):
        order.append(number[0])
        return numbers(number)

    with ScoringQueue() as queue:
        pending = [queue.submit(resolve_rewards([plain, judge]), *batch(first)) for first in range(0, 60, 10)]
        values = [p.result().values.tolist() for p in pending]
    assert values == [[[first, first], [first + 1, first + 1]] for first in range(0, 60, 10)]
    assert under_way == [0, 2] and order == list(range(0, 60, 10))


def test_a_batch_begun_ahead_does_not_pay_for_the_one_before_it():
    with FaultServer() as server:
        server.behave({"do": "compute", "sleep": 0.6})
        reward = RemoteReward(server.url, timeout=1.1, concurrency=1)
        with ScoringQueue() as queue:
            pending = [queue.submit(resolve_rewards(reward), *batch(first)) for first in range(3)]
            assert [p.result().values[0].item() for p in pending] == [0, 1, 2] and not reward.faults


def test_closing_cancels_what_is_waiting_at_the_judge():
    cancelled = threading.Event()

    async def patient(images, **columns):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    release = threading.Event()

    def plain(images, **columns):
        release.wait(10)
        return [0.0] * len(images)

    with ScoringQueue() as queue:
        first = queue.submit(resolve_rewards(plain), *batch(0))
        second = queue.submit(resolve_rewards(patient), *batch(0))
        time.sleep(0.05)
    assert cancelled.wait(10) and second.future.cancelled()
    release.set()
    assert first.result().failures == []


def test_what_score_would_refuse_is_refused_at_once():
    with ScoringQueue() as queue, pytest.raises(ValueError, match="'labels' has 1 entries, expected 2"):
        queue.submit(resolve_rewards(numbers), *batch(0)[:5], ["one"])


def test_logs_are_handed_on_in_the_callers_thread_and_in_the_order_of_the_rewards():
    async def late(number, log_metric, log_extra, **columns):
        log_metric("late", number[0])
        log_extra("numbers", number)
        return [0.0] * len(number)

    def early(number, log_metric, **columns):
        log_metric("early", number[0])
        return [0.0] * len(number)

    seen, threads = [], set()

    def log(*what):
        seen.append(what)
        threads.add(threading.current_thread())

    context = {"log_metric": log, "log_extra": log}
    rewards = resolve_rewards([late, early])
    with ScoringQueue() as queue:
        pending = [queue.submit(rewards, *batch(first, context=context)) for first in (0, 10)]
        pending[1].future.result()
        assert seen == [], "nothing is logged before it is asked for"
        for p in pending:
            p.result()
        pending[0].result()
    expected = [("late", 0), ("numbers", [0, 1]), ("early", 0), ("late", 10), ("numbers", [10, 11]), ("early", 10)]
    assert seen == expected and threads == {threading.current_thread()}
    seen.clear()
    score(rewards, *batch(0, context=context))
    assert seen == expected[:3]


def test_errors_come_out_where_the_result_is_asked_for_and_closing_drops_the_rest():
    release = threading.Event()

    def wrong(number, **columns):
        release.wait(5)
        return []

    queue = ScoringQueue()
    first, second = (queue.submit(resolve_rewards(wrong), *batch(0)) for _ in range(2))
    queue.close()
    release.set()
    with pytest.raises(RewardError, match="returned 0 scores, expected 2"):
        first.result()
    with pytest.raises(CancelledError):
        second.result()
    with pytest.raises(RuntimeError, match="shutdown"):
        queue.submit(resolve_rewards(numbers), *batch(0))
    with pytest.raises(ValueError, match="workers: got 0"):
        ScoringQueue(0)


def test_log_failure_makes_a_none_a_failure():
    def half(images, log_failure, **columns):
        log_failure(1, "the judge was silent")
        log_failure(2, "though it has a score")
        return [None, None, 0.5]

    scored = score(resolve_rewards(half), *batch(0, 3))
    assert scored.values[:2, 0].isnan().all() and scored.values[2, 0] == 0.5
    assert [(f.sample_label, f.reason) for f in scored.failures] == [("candidate 1", "the judge was silent")]
