"""One call of one reward, through `score`: what it may do to its pictures, how long it may take, what it may answer."""

import asyncio
import logging
import math
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from rcgrpo.rewards import RewardError, ScoringQueue, calling, resolve_rewards, score, scoring


def run(*functions, count=3, columns=None, timeout=None, context=None):
    sources = [Image.new("RGB", (8, 8), "blue")] * count  # shared, as a group's candidates share theirs
    masks = [Image.new("L", (8, 8), 255)] * count
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(count)]
    labels = [f"candidate {index}" for index in range(count)]
    given = (["an apple"] * count, images, sources, masks, columns or {}, labels, context)
    return score(resolve_rewards(list(functions)), *given, timeout=timeout)


def failures(scored):
    return [(failure.sample_label, failure.kind) for failure in scored.failures]


# ------------------------------------------------------------------------------------------ pictures


def spoil(images, source_images, masks, edited_image, pair, nested, array, tensor, completions, **columns):
    for picture in (*images, *edited_image):
        picture.thumbnail((2, 2))
        picture.putalpha(0)
    for picture in (*source_images, *masks):
        picture.paste(7, (0, 0, 8, 8))
        ImageDraw.Draw(picture).rectangle((0, 0, 7, 7), fill=9)
    for pictures in pair:
        for picture in pictures:
            picture.putpixel((0, 0), 77)
        pictures.clear()
    for inside in nested:
        inside["deep"][0].paste(3, (0, 0, 8, 8))
        inside["more"] = 1
    for values in (*array, *tensor):
        values[:] = 5
    completions.clear()
    return [1.0] * len(images)


async def spoil_later(**columns):
    await asyncio.sleep(0)
    return spoil(**columns)


def spoil_and_raise(images, **columns):
    scores = spoil(images=images, **columns)
    if len(scores) > 1:
        raise ValueError("tried alone, with fresh pictures")
    return scores


class Spoiler:
    reward_name = "spoiler"

    def __call__(self, **columns):
        return spoil(**columns)


class SpoilingModule(nn.Module):
    reward_name = "module"

    def forward(self, **columns):
        return spoil(**columns)


@pytest.mark.parametrize("reward", [spoil, spoil_later, spoil_and_raise, Spoiler, SpoilingModule()])
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_what_a_reward_does_to_its_arguments_is_seen_by_nobody_else(reward, timeout):
    seen = []
    given = {
        "edited_image": [Image.new("RGB", (8, 8), (50, 0, 0)) for _ in range(3)],
        "pair": [[Image.new("L", (8, 8), 20)] for _ in range(3)],
        "nested": [{"deep": (Image.new("L", (8, 8), 30),)} for _ in range(3)],
        "array": [np.zeros(2) for _ in range(3)],
        "tensor": [torch.zeros(2) for _ in range(3)],
    }

    def look(images, source_images, masks, edited_image, pair, nested, array, tensor, completions, **columns):
        pictures = (images, source_images, masks, edited_image, *zip(*pair, strict=True), completions)
        seen.append([[(p.mode, p.size, p.getpixel((0, 0))) for p in column] for column in pictures])
        seen[-1].append([(n["deep"][0].getpixel((0, 0)), len(n)) for n in nested])
        seen[-1].append([float(values.sum()) for values in (*array, *tensor)])
        return [0.0] * len(images)

    first = resolve_rewards(look)[0]
    again = resolve_rewards(lambda **columns: look(**columns))[0]
    rewards = [first, *resolve_rewards([reward]), again]
    candidates = [("RGB", (8, 8), (index, 0, 0)) for index in range(3)]
    images = [Image.new(mode, size, colour) for mode, size, colour in candidates]
    sources, masks = [Image.new("RGB", (8, 8), "blue")] * 3, [Image.new("L", (8, 8), 255)] * 3
    for _ in range(2):  # the trainer's own pictures, and a later call
        scored = score(rewards, ["x"] * 3, images, sources, masks, given, list("abc"), timeout=timeout)
        assert scored.values[:, 1].tolist() == [1, 1, 1] and not scored.failures
    expected = [
        candidates,
        [("RGB", (8, 8), (0, 0, 255))] * 3,
        [("L", (8, 8), 255)] * 3,
        [("RGB", (8, 8), (50, 0, 0))] * 3,
        [("L", (8, 8), 20)] * 3,
        candidates,
        [(30, 1)] * 3,
        [0.0] * 6,
    ]
    assert len(seen) == 4 and all(look == expected for look in seen)


def test_candidates_that_share_a_source_do_not_see_what_is_drawn_on_anothers():
    def beside(images, source_images, completions, **columns):
        assert all(a is b for a, b in zip(images, completions, strict=True)), "one copy for both names"
        scores = []
        for image, source in zip(images, source_images, strict=True):
            scores.append(float(source.getpixel((0, 0))[0]))
            source.paste(image.point(lambda value: 200))
        return scores

    assert run(beside).values[:, 0].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------ time


async def hang(**columns):
    await asyncio.sleep(60)


async def hang_and_hold_on(**columns):
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(60)


async def hang_without_awaiting(**columns):
    time.sleep(3)


def steady(images, **columns):
    return [1.0] * len(images)


async def steady_later(images, **columns):
    await asyncio.sleep(0.01)
    return [2.0] * len(images)


@pytest.mark.parametrize("hanging", [hang, hang_and_hold_on])
def test_an_asynchronous_reward_that_hangs_fails_and_takes_nobody_along(hanging):
    began = time.perf_counter()
    scored = run(steady, hanging, steady_later, timeout=0.2)
    assert time.perf_counter() - began < 5
    assert scored.values[:, [0, 2]].tolist() == [[1, 2]] * 3
    assert failures(scored) == [(f"candidate {i}", "timeout") for i in range(3)]
    assert "took over 0.2 s" in scored.failures[0].reason


def test_an_asynchronous_reward_that_blocks_the_loop_is_left_behind_with_it():
    with ScoringQueue(timeout=0.3) as queue:
        images = [Image.new("RGB", (4, 4))] * 2
        batch = (["x"] * 2, images, images, images, {}, ["a", "b"])
        blocked = queue.submit(resolve_rewards([hang_without_awaiting, steady]), *batch).result()
        fresh = queue.submit(resolve_rewards(steady_later), *batch).result()
    assert failures(blocked) == [("a", "timeout"), ("b", "timeout")] and blocked.values[:, 1].tolist() == [1, 1]
    assert "does not `await`" in blocked.failures[0].reason
    assert fresh.values.tolist() == [[2], [2]] and not fresh.failures


def test_a_plain_reward_that_hangs_is_not_called_again_until_it_is_back():
    release, calls = threading.Event(), []

    def hanging(images, **columns):
        calls.append(len(images))
        release.wait(20)
        return [3.0] * len(images)

    began = time.perf_counter()
    first, second = (run(hanging, steady, timeout=0.2) for _ in range(2))
    assert time.perf_counter() - began < 5 and calls == [3]
    for scored, text in ((first, "took over 0.2 s"), (second, "still busy with an earlier call")):
        assert failures(scored) == [(f"candidate {i}", "timeout") for i in range(3)] and text in str(scored.failures)
        assert scored.values[:, 1].tolist() == [1, 1, 1]
    release.set()
    calling._left_behind[id(hanging)].join(10)
    assert run(hanging, timeout=0.2).values.tolist() == [[3], [3], [3]] and calls == [3, 3]


def test_a_timeout_that_is_kept_changes_nothing():
    def picky(number, **columns):
        if 1 in number:
            raise TimeoutError("its own, not the call's")
        return [float(n) for n in number]

    scored = run(picky, steady_later, columns={"number": [0, 1, 2]}, timeout=20.0)
    assert scored.values[[0, 2], 0].tolist() == [0, 2] and scored.values[:, 1].tolist() == [2, 2, 2]
    assert failures(scored) == [("candidate 1", "raised")]
    assert isinstance(scored.failures[0].error, TimeoutError)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_log_says_what_is_being_waited_for(monkeypatch, caplog, asynchronous):
    monkeypatch.setattr(scoring, "SLOW", 0.05)

    def slow(images, **columns):
        time.sleep(0.3)
        return [1.0] * len(images)

    async def slow_later(images, **columns):
        await asyncio.sleep(0.3)
        return [1.0] * len(images)

    reward = slow_later if asynchronous else slow
    with caplog.at_level(logging.WARNING):
        assert not run(reward).failures
        assert run(steady).values.tolist() == [[1]] * 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"waiting for reward '{reward.__name__}' after 0.05 s" in message and "candidate 0" in message
    assert "reward_timeout" in message


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("how", ["plain", "async", "own task"])
def test_a_cancellation_that_nobody_asked_for_is_a_failure(how, timeout):
    def cancelled(number, **columns):
        if 1 in number:
            raise asyncio.CancelledError
        return [float(n) for n in number]

    async def cancelled_later(number, **columns):
        if how == "own task" and 1 in number:
            asyncio.current_task().cancel()
        await asyncio.sleep(0)
        return cancelled(number)

    reward = cancelled if how == "plain" else cancelled_later
    scored = run(reward, steady, steady_later, columns={"number": [0, 1, 2]}, timeout=timeout)
    assert scored.values[[0, 2], 0].tolist() == [0, 2] and scored.values[1, 0].isnan()
    assert scored.values[:, 1:].tolist() == [[1, 2]] * 3
    assert failures(scored) == [("candidate 1", "raised")] and "CancelledError" in scored.failures[0].reason


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_run(error, asynchronous, timeout):
    def stop(**columns):
        raise error

    async def stop_later(**columns):
        await asyncio.sleep(0)
        raise error

    with pytest.raises(error):
        run(stop_later if asynchronous else stop, timeout=timeout)
    assert run(steady_later).values.tolist() == [[2]] * 3, "later calls find the loop alive"


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "value",
    [
        *(True, 1, 1.0, Decimal("1.0"), Fraction(1), np.True_, np.float16(1), np.float64(1), np.int8(1), np.uint8(1)),
        *(np.longdouble(1), np.array(1.0), np.array([1]), np.array([[True]]), torch.tensor(1), torch.tensor([1.0])),
        *(torch.tensor(True), torch.tensor([[1.0]]), torch.tensor(1.0, dtype=torch.bfloat16), [1.0], (1,), [[1]]),
        *(torch.ones(1, requires_grad=True), [np.array([1.0])], [torch.tensor(True)], np.array([Decimal(1)])),
    ],
)
def test_whatever_holds_one_number_is_one(value):
    scored = run(lambda images, **columns: [value] * len(images))
    assert scored.values.tolist() == [[1]] * 3 and not scored.failures


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([True, True, True]),
        np.array([True, True, True]),
        torch.ones(3, 1),
        torch.ones(3, dtype=torch.bfloat16),
        np.ones((3, 1, 1), dtype=np.float16),
        [True] * 3,
        (np.True_,) * 3,
    ],
)
def test_whole_answers_of_every_kind_are_lists_of_numbers(values):
    scored = run(lambda **columns: values)
    assert scored.values.tolist() == [[1]] * 3 and not scored.failures


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *(("1", "not_a_number"), (b"1", "not_a_number"), (1 + 0j, "not_a_number"), ({"score": 1}, "not_a_number")),
        *(([1, 2], "not_a_number"), ([], "not_a_number"), (np.ones(2), "not_a_number"), (np.str_("1"), "not_a_number")),
        *((torch.ones(2), "not_a_number"), (torch.ones(0), "not_a_number"), (["1"], "not_a_number")),
        *((math.nan, "not_finite"), (-math.inf, "not_finite"), (1e300, "not_finite"), (10**400, "not_finite")),
        *((Decimal("NaN"), "not_finite"), (Decimal("sNaN"), "not_finite"), (Fraction(10**400), "not_finite")),
        *((torch.tensor(math.nan), "not_finite"), ([math.inf], "not_finite"), (np.float16("nan"), "not_finite")),
    ],
)
def test_what_is_no_finite_number_is_a_failure(value, kind):
    scored = run(lambda images, **columns: [value] * len(images))
    assert scored.values.isnan().all() and failures(scored) == [(f"candidate {i}", kind) for i in range(3)]


def test_nothing_stays_nothing_whatever_it_is_wrapped_in():
    scored = run(lambda **columns: [None, [None], np.array(None)])
    assert scored.values.isnan().all() and not scored.failures


def test_the_largest_numbers_of_fp32_are_scores():
    scored = run(lambda **columns: [3e38, -3e38, 1e30])
    assert scored.values[:, 0].tolist() == pytest.approx([3e38, -3e38, 1e30]) and not scored.failures


def test_a_single_number_for_all_is_still_a_bug():
    for answer in (torch.tensor(0.5), np.float64(0.5), 0.5):
        with pytest.raises(RewardError, match="expected a list of 3"):
            run(lambda answer=answer, **columns: answer)


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["images", "completions", "completion_ids", "prompts", "masks", "source_images", "log_failure"]
)
def test_a_column_cannot_replace_an_argument(name):
    with pytest.raises(ValueError, match=f"got a column '{name}'.*rename the column"):
        run(steady, columns={name: ["from the data set"] * 3})


def test_a_column_cannot_replace_what_the_context_brings():
    for name, value in (("log_extra", print), ("attention_mass", [1.0] * 3)):
        with pytest.raises(ValueError, match=f"got a column '{name}'"):
            run(steady, columns={name: [0.0] * 3}, context={name: value})
        assert not run(steady, columns={name: [0.0] * 3}).failures, "nothing of that name is there to be replaced"
