import asyncio
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.rewards import RewardError, RewardFailure, resolve_rewards, score


def run(*functions, count=4, columns=None, context=None):
    """Scores candidates whose column `number` counts up from 0."""
    images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(count)]
    masks = [Image.new("L", (4, 4), 255) for _ in range(count)]
    return score(
        resolve_rewards(list(functions)),
        prompts=["add an apple"] * count,
        images=images,
        source_images=images,
        masks=masks,
        columns={"number": list(range(count)), **(columns or {})},
        labels=[f"candidate {index}" for index in range(count)],
        context=context,
    )


def numbers(number, **columns):
    return [float(value) for value in number]


async def numbers_later(number, **columns):
    await asyncio.sleep(0.01)
    return [10.0 + value for value in number]


def test_plain_and_async_in_the_order_given():
    scored = run(numbers_later, numbers)
    assert scored.names == ("numbers_later", "numbers")
    assert scored.values.dtype == torch.float32 and scored.failures == []
    assert scored.values.tolist() == [[10, 0], [11, 1], [12, 2], [13, 3]]


def test_everything_arrives_by_keyword():
    seen = {}

    def spy(**columns):
        seen.update(columns)
        return [0] * len(columns["images"])

    run(spy, count=2, context={"trainer_state": "state", "attention_density": [1.0, 2.0]})
    assert {"prompts", "images", "source_images", "masks", "number", "completions"} <= seen.keys()
    assert seen["completions"] == seen["images"] and seen["completion_ids"] is None
    assert seen["trainer_state"] == "state" and seen["attention_density"] == [1.0, 2.0]


def test_async_rewards_run_at_the_same_time_and_plain_ones_meanwhile():
    started = threading.Barrier(3, timeout=5)  # broken unless all three are under way at once

    async def first(images, **columns):
        await asyncio.to_thread(started.wait)
        return [1.0] * len(images)

    async def second(images, **columns):
        await asyncio.to_thread(started.wait)
        return [2.0] * len(images)

    def third(images, **columns):
        started.wait()
        return [3.0] * len(images)

    scored = run(first, third, second, count=1)
    assert scored.values.tolist() == [[1, 3, 2]] and scored.failures == []


def test_inside_a_running_event_loop_plain_rewards_stay_in_the_callers_thread():
    threads = []

    def here(images, **columns):
        threads.append(threading.current_thread())
        return [1.0] * len(images)

    async def notebook():
        return run(numbers_later, here, count=2)

    assert asyncio.run(notebook()).values.tolist() == [[10, 1], [11, 1]]
    assert threads == [threading.current_thread()]


def test_plain_reward_may_run_its_own_event_loop():
    def own_loop(number, **columns):
        return asyncio.run(numbers_later(number))

    assert run(own_loop, count=2).values.tolist() == [[10], [11]]


def test_none_is_no_failure_and_what_is_no_number_is_one():
    def mixed(**columns):
        return [None, 0.5, math.nan, -math.inf, "0.5", 1e300, True, np.float32(0.25), torch.tensor(0.125)]

    scored = run(mixed, count=9)
    assert scored.values[:, 0].isnan().tolist() == [True, False, True, True, True, True, False, False, False]
    assert scored.values[[1, 6, 7, 8], 0].tolist() == [0.5, 1, 0.25, 0.125]
    assert [failure.sample_label for failure in scored.failures] == [f"candidate {index}" for index in (2, 3, 4, 5)]
    assert "nan, which is not finite" in scored.failures[0].reason
    assert "'0.5', which is not a number" in scored.failures[2].reason


@pytest.mark.parametrize("returned", [torch.tensor([0.5, 1.0]), np.array([0.5, 1.0]), (0.5, 1.0)])
def test_tensors_arrays_and_tuples_are_lists_too(returned):
    assert run(lambda **columns: returned, count=2).values.tolist() == [[0.5], [1]]


@pytest.mark.parametrize("returned", [[0.5], [0.5] * 3, 0.5, "ab", {0: 1.0, 1: 2.0}, torch.tensor(0.5)])
def test_wrong_length_or_kind_is_a_bug(returned):
    def wrong(**columns):
        return returned

    async def wrong_later(**columns):
        return returned

    for function in (wrong, wrong_later):
        with pytest.raises(RewardError, match=rf"'{function.__name__}' returned .*expected .*2"):
            run(function, count=2)


def test_plain_function_that_returns_a_coroutine_is_a_bug():
    with pytest.raises(RewardError, match="async def"):
        run(lambda **columns: numbers_later(**columns))


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_failing_candidate_is_found_and_alone_pays(kind):
    calls = []

    def picky(number, attention_density, **columns):
        assert len(columns["images"]) == len(columns["prompts"]) == len(attention_density) == len(number)
        calls.append(list(number))
        if 2 in number:
            raise KeyError("no score for 2")
        return [value / 10 for value in number]

    async def picky_later(**columns):
        await asyncio.sleep(0)
        return picky(**columns)

    function = picky if kind == "plain" else picky_later
    scored = run(numbers, function, context={"attention_density": [1.0] * 4})
    assert scored.values[:, 0].tolist() == [0, 1, 2, 3]
    assert scored.values[[0, 1, 3], 1].tolist() == pytest.approx([0.0, 0.1, 0.3])
    assert scored.values[2, 1].isnan()
    assert scored.failures == [RewardFailure(function.__name__, "candidate 2", "raised KeyError: 'no score for 2'")]
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [3]]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_three_failures_in_a_row_give_the_rest_up(kind):
    calls = []

    def down(number, **columns):
        calls.append(list(number))
        if len(number) > 1 or number[0] not in (0, 3):
            raise ConnectionError("server is down")
        return [1.0]

    async def down_later(**columns):
        return down(**columns)

    scored = run(down if kind == "plain" else down_later, count=9)
    assert calls[1:] == [[0], [1], [2], [3], [4], [5], [6]]  # the success of 3 starts the count anew
    assert scored.values[:, 0].isnan().tolist() == [False, True, True, False, True, True, True, True, True]
    assert {failure.reason for failure in scored.failures} == {"raised ConnectionError: server is down"}
    assert len(scored.failures) == 7


def test_single_candidate_is_not_tried_twice():
    calls = []

    def down(**columns):
        calls.append(1)
        raise ConnectionError

    assert len(run(down, count=1).failures) == 1 and len(calls) == 1


def test_logs_are_silent_while_candidates_are_tried_alone():
    logged = []

    def talkative(number, log_extra, **columns):
        log_extra("number", number)
        if 1 in number:
            raise ValueError("one")
        return [0.0] * len(number)

    run(talkative, count=2, context={"log_extra": lambda column, values: logged.append(values)})
    assert logged == [[0, 1]]


def test_a_reward_cannot_spoil_the_others_arguments():
    def greedy(number, **columns):
        scores = [float(value) for value in number]
        number.clear()
        return scores

    assert run(greedy, numbers).values.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_set_up_mistakes_are_raised():
    def needy(caption, **columns):
        return [0.0] * len(caption)

    needy.columns = ("caption",)
    with pytest.raises(RewardError, match=r"'needy' needs the column\(s\) caption.*it has number"):
        run(needy)
    with pytest.raises(RewardError, match="the trainer records it"):
        run("attention_concentration")
    with pytest.raises(ValueError, match="'caption' has 1 entries, expected 4"):
        run(needy, columns={"caption": ["an apple"]})
