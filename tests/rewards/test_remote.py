import asyncio
import math
import random
import time
import tracemalloc

import pytest
import torch
from PIL import Image

from fault_server import FaultServer
from rcgrpo.rewards import RemoteReward, RewardError, fault_counts, resolve_rewards, score, transport
from rcgrpo.rewards.pictures import from_png
from rcgrpo.rewards.transport import _retry_after, is_loopback

FAST = {"timeout": 4.0, "attempt_timeout": 1.0, "retries": 2, "backoff": 0.01, "max_backoff": 0.02}
OK, HANG, RESET = {"do": "compute"}, {"do": "hang"}, {"do": "reset"}


def body(text, **how):
    return {"do": "body", "body": text, **how}


def status(number, **headers):
    return {
        "do": "status",
        "status": number,
        "headers": {key.replace("_", "-"): value for key, value in headers.items()},
    }


@pytest.fixture(scope="module")
def process():
    with FaultServer() as server:
        yield server


@pytest.fixture
def server(process):
    process.behave(OK)
    return process


def run(reward, prompts=("0.25", "0.5", "0.75"), **columns):
    """Scores through the same door as the trainer."""
    count = len(prompts)
    images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(count)]
    source, mask = Image.new("RGB", (4, 4), "white"), Image.new("L", (4, 4), 255)
    labels = [f"candidate {index}" for index in range(count)]
    rewards = resolve_rewards([reward])
    return score(rewards, list(prompts), images, [source] * count, [mask] * count, columns, labels)


def column(scored):
    return [None if math.isnan(value) else round(value, 4) for value in scored.values[:, 0].tolist()]


def reasons(scored):
    return {failure.sample_label: failure.reason for failure in scored.failures}


# What a fault does: (what the server does, options) -> (scores, faults, requests)
GOOD, NOTHING = [0.25, 0.5, 0.75], [None] * 3
MATRIX = {
    "good": ([OK], {}, GOOD, {}, 1),
    "slow but in time": ([{**OK, "sleep": 0.05}], {}, GOOD, {}, 1),
    "hangs": ([HANG], {"attempt_timeout": 0.2}, NOTHING, {"timeout": 1}, 1),
    "too late for the batch": ([{**OK, "sleep": 5}], {"timeout": 0.2}, NOTHING, {"deadline": 1}, 1),
    "429, then good": ([status(429, Retry_After="0.05"), OK], {}, GOOD, {"http_429": 1}, 2),
    "429 with a pause beyond the deadline": (
        [status(429, Retry_After="60"), OK],
        {},
        NOTHING,
        {"http_429": 1, "deadline": 1},
        1,
    ),
    "408, 503, then good": ([status(408), status(503), OK], {}, GOOD, {"http_408": 1, "http_503": 1}, 3),
    "500 for ever": ([status(500)], {}, NOTHING, {"http_500": 3}, 3),
    "no retries": ([status(500), OK], {"retries": 0}, NOTHING, {"http_500": 1}, 1),
    "connection reset, then good": ([RESET, OK], {}, GOOD, {"connect": 1}, 2),
    "connection reset for ever": ([RESET], {}, NOTHING, {"connect": 3}, 3),
    "half an answer, then good": ([{"do": "truncate"}, OK], {}, GOOD, {"connect": 1}, 2),
    "truncated JSON": ([body('{"rewards": [0.25, 0.'), OK], {}, NOTHING, {"malformed": 1}, 1),
    "nested JSON": ([body("[" * 100_000)], {}, NOTHING, {"malformed": 1}, 1),
    "nested JSON beside good scores": (
        [body('{"rewards": [0.25, 0.5, 0.75], "failures": {"9": ' + "[" * 200 + "]" * 200 + "}}")],
        {},
        NOTHING,
        {"malformed": 1},
        1,
    ),
    "nested JSON in a refusal": (
        [body('{"error": ' + "[" * 5000 + "]" * 5000 + "}", status=500), OK],
        {},
        GOOD,
        {"http_500": 1},
        2,
    ),
    "packed": ([body('{"rewards": [0.25, 0.5, 0.75]}', packing="gzip")], {}, GOOD, {}, 1),
    "packed in another way": ([body('{"rewards": [0.25, 0.5, 0.75]}', packing="deflate")], {}, GOOD, {}, 1),
    "packed in a way that was not asked for": (
        [body('{"rewards": [0.25, 0.5, 0.75]}', packing="br")],
        {},
        NOTHING,
        {"malformed": 1},
        1,
    ),
    "large": ([body('{"rewards": [0.25, 0.5, 0.75]}', blanks=5 << 20)], {}, NOTHING, {"malformed": 1}, 1),
    "large once it is unpacked": (
        [body('{"rewards": [0.25, 0.5, 0.75]}', blanks=5 << 20, packing="gzip")],
        {},
        NOTHING,
        {"malformed": 1},
        1,
    ),
    "a large refusal": ([body("no", blanks=5 << 20, packing="gzip", status=503), OK], {}, GOOD, {"http_503": 1}, 2),
    "no object": ([body("[0.25, 0.5, 0.75]")], {}, NOTHING, {"malformed": 1}, 1),
    "no list": ([body('{"rewards": 0.5}')], {}, NOTHING, {"malformed": 1}, 1),
    "an error with 200": ([body('{"error": "no memory"}')], {}, NOTHING, {"server_error": 1}, 1),
    "too few": ([body('{"rewards": [0.25, 0.5]}')], {}, NOTHING, {"wrong_count": 1}, 1),
    "too many": ([body('{"rewards": [0.25, 0.5, 0.75, 1]}')], {}, NOTHING, {"wrong_count": 1}, 1),
    "NaN": ([body('{"rewards": [0.25, NaN, 0.75]}')], {}, [0.25, None, 0.75], {"not_finite": 1}, 1),
    "too large for fp32": ([body('{"rewards": [0.25, -1e300, 1e999]}')], {}, [0.25, None, None], {"not_finite": 2}, 1),
    "an endless integer": ([body(f'{{"rewards": [1, 0, {10**400}]}}')], {}, [1, 0, None], {"not_finite": 1}, 1),
    "out of range": (
        [body('{"rewards": [0.25, -0.1, 7]}')],
        {"value_range": (0, 1)},
        [0.25, None, None],
        {"out_of_range": 2},
        1,
    ),
    "no numbers": ([body('{"rewards": ["0.25", true, 0.75]}')], {}, [None, None, 0.75], {"not_a_number": 2}, 1),
    "the judge failed on one": (
        [body('{"rewards": [0.25, null, 0.75], "failures": {"1": "raised KeyError: 1"}}')],
        {},
        [0.25, None, 0.75],
        {"judge": 1},
        1,
    ),
}


@pytest.mark.parametrize("case", MATRIX)
def test_every_fault_is_none_or_made_good_and_counted(server, case):
    behaviours, options, scores, faults, requests = MATRIX[case]
    server.behave(*behaviours)
    reward = RemoteReward(server.url, "judge", **{**FAST, **options})
    began = time.monotonic()
    scored = run(reward)
    assert time.monotonic() - began < 4.5
    assert column(scored) == scores
    assert {f"candidate {i}" for i, value in enumerate(scores) if value is None} == reasons(scored).keys()
    assert fault_counts(resolve_rewards(reward)) == {f"rewards/judge/faults/{kind}": n for kind, n in faults.items()}
    assert len(server.log()) == requests


def test_null_is_not_applicable_and_no_fault(server):
    server.behave(body('{"rewards": [0.25, null, 0.75]}'))
    reward = RemoteReward(server.url, **FAST)
    scored = run(reward)
    assert column(scored) == [0.25, None, 0.75] and scored.failures == [] and not reward.faults


def test_reasons_name_what_happened(server):
    server.behave(status(500))
    (text,) = set(reasons(run(RemoteReward(server.url, **FAST))).values())
    assert "http_500" in text and server.url in text and "as you wish" in text


def test_what_is_sent(server, monkeypatch):
    monkeypatch.setenv("RCGRPO_REWARD_TOKEN", "secret")
    reward = RemoteReward(server.url + "/", reward="half", columns=("caption", "edited_image"), **FAST)
    assert "secret" not in repr(vars(reward))
    target = Image.new("RGB", (3, 2), (7, 8, 9))
    run(reward, ("0.25", "0.5"), caption=["an apple", None], edited_image=[target, None], unsent=[1, 2])
    (request,) = server.log()
    sent = request["body"]
    assert (request["path"], request["token"]) == ("/compute", "Bearer secret")
    assert sent.keys() == {"prompts", "images", "source_images", "masks", "columns", "reward"}
    assert sent["prompts"] == ["0.25", "0.5"] and sent["reward"] == "half"
    assert sent["columns"]["caption"] == ["an apple", None] and sent["columns"]["edited_image"][1] is None
    assert from_png(sent["columns"]["edited_image"][0]["png"], "target").tobytes() == target.tobytes()
    assert [from_png(text, "image").getpixel((0, 0)) for text in sent["images"]] == [(0, 0, 0), (1, 0, 0)]
    assert from_png(sent["masks"][0], "mask").mode == "L"


def test_chunks_keep_the_order_and_one_bad_chunk_costs_only_itself(server):
    server.behave({**OK, "sleep": 0.1}, body('{"rewards": []}'), OK)
    reward = RemoteReward(server.url, batch_size=2, concurrency=1, **FAST)
    prompts = [str(number / 10) for number in range(6)]
    scored = run(reward, prompts)
    # Which chunk the second request holds is up to the event loop: its scores are missing, the others in place.
    sent = [request["body"]["prompts"] for request in server.log()]
    assert sorted(prompt for part in sent for prompt in part) == prompts and len(sent) == 3
    assert column(scored) == [None if prompt in sent[1] else float(prompt) for prompt in prompts]


def test_concurrency_is_bounded(server):
    server.behave({**OK, "sleep": 0.05})
    reward = RemoteReward(server.url, batch_size=1, concurrency=2, **FAST)
    assert column(run(reward, ["0.1"] * 6)) == [0.1] * 6
    began = sorted(request["began"] for request in server.log())
    assert all(began[i + 2] - began[i] > 0.045 for i in range(4))  # the third waits for one of the first two


def test_deadline_is_the_batchs_and_not_each_requests(server):
    server.behave({**OK, "sleep": 0.2})
    reward = RemoteReward(server.url, batch_size=1, concurrency=1, **{**FAST, "timeout": 0.5})
    began = time.monotonic()
    scored = run(reward, ["0.1"] * 8)
    assert time.monotonic() - began < 1.2, "eight requests of 0.2 s would take 1.6 s"
    done = [value for value in column(scored) if value is not None]
    assert 1 <= len(done) <= 2 and reward.faults["deadline"] == 8 - len(done)


def test_dead_server_is_stood_in_for(server):
    with FaultServer() as other:
        dead = other.url
    reward = RemoteReward([dead, server.url], batch_size=1, **FAST)
    assert column(run(reward)) == GOOD
    assert reward.faults["connect"] >= 1 and set(reward.faults) == {"connect"}


def test_hanging_server_is_stood_in_for(server):
    with FaultServer() as other:
        other.behave(HANG)
        reward = RemoteReward([other.url, server.url], batch_size=1, concurrency=3, **{**FAST, "attempt_timeout": 0.4})
        assert column(run(reward)) == GOOD
    assert reward.faults["timeout"] >= 1 and set(reward.faults) == {"timeout"}


def test_two_good_servers_share_the_load(server):
    with FaultServer() as other:
        reward = RemoteReward([other.url, server.url], batch_size=1, concurrency=1, **FAST)
        assert column(run(reward, ["0.5"] * 4)) == [0.5] * 4
        assert len(other.log()) == len(server.log()) == 2


def test_circuit_opens_lets_one_through_after_a_while_and_closes():
    with FaultServer() as server:
        options = {**FAST, "retries": 0, "breaker_failures": 2, "breaker_seconds": 0.6, "concurrency": 1}
        reward = RemoteReward(server.url, batch_size=1, **options)
        assert column(run(reward)) == GOOD
        server.stop()
        began = time.monotonic()
        assert column(run(reward, ["0.5"] * 20)) == [None] * 20
        assert time.monotonic() - began < 0.6, "an open circuit fails at once"
        assert reward.faults == {"connect": 2, "circuit_open": 18}
        server.start()
        time.sleep(0.65)
        assert column(run(reward)) == GOOD, "it came back"
        assert reward.faults == {"connect": 2, "circuit_open": 18}
        server.stop()
        run(reward)
        server.start()
        server.behave(status(500))
        time.sleep(0.65)
        before = reward.faults["circuit_open"]
        assert column(run(reward)) == NOTHING and len(server.log()) == 1, "half-open: a single request tries"
        assert reward.faults["circuit_open"] == before + 2


def test_an_answer_is_never_unpacked_beyond_the_bound(server):
    server.behave(body("{}", blanks=64 << 20, packing="gzip"))
    reward = RemoteReward(server.url, timeout=60)
    tracemalloc.start()
    scored = run(reward)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert column(scored) == NOTHING and reward.faults == {"malformed": 1} and peak < 16 << 20


FAR = ["1e9", "Fri, 31 Dec 9999 23:59:59 GMT"]
NO_PAUSE = ["-1e9", "nan", "soon", "", "Mon, 01 Jan 0001 00:00:00 -0000", "Mon, 99 Foo 2020 99:99:99"]


@pytest.mark.parametrize("header", FAR)
def test_a_server_that_wants_peace_for_ever_costs_one_batch(server, header):
    server.behave(status(429, Retry_After=header), OK)
    reward = RemoteReward(server.url, **{**FAST, "timeout": 2.0})
    assert column(run(reward)) == NOTHING and reward.faults == {"http_429": 1, "deadline": 1}
    assert column(run(reward)) == GOOD
    first, second = (request["began"] for request in server.log())
    assert 0.9 < second - first < 2  # it was left alone for half of a batch's time


@pytest.mark.parametrize("header", NO_PAUSE)
def test_a_pause_that_is_none_is_a_back_off(server, header):
    server.behave(status(503, Retry_After=header), OK)
    reward = RemoteReward(server.url, **FAST)
    assert column(run(reward)) == GOOD and reward.faults == {"http_503": 1}


def test_a_long_pause_is_cut_for_the_next_batch(server, monkeypatch):
    monkeypatch.setattr(transport, "MAX_RETRY_AFTER", 0.3)
    server.behave(status(429, Retry_After="100"), OK)
    reward = RemoteReward(server.url, **{**FAST, "timeout": 100.0})
    assert column(run(reward)) == NOTHING and column(run(reward)) == GOOD
    first, second = (request["began"] for request in server.log())
    assert 0.28 < second - first < 20


def test_busy_server_is_not_cut_off(server):
    server.behave(*[status(429)] * 6, OK)
    reward = RemoteReward(server.url, **{**FAST, "retries": 6, "breaker_failures": 2})
    assert column(run(reward)) == GOOD and reward.faults == {"http_429": 6}


@pytest.mark.parametrize("number", [400, 401, 404, 422])
def test_refusal_before_the_first_answer_is_a_mistake_and_later_a_fault(server, number):
    server.behave(status(number))
    with pytest.raises(RewardError, match=rf"'judge' is refused, check its set-up: http_{number}.*as you wish"):
        run(RemoteReward(server.url, "judge", **FAST))
    assert len(server.log()) == 1, "a refusal is not asked for again"
    server.behave(OK, status(number))
    reward = RemoteReward(server.url, "judge", **FAST)
    assert column(run(reward)) == GOOD
    assert column(run(reward)) == NOTHING and reward.faults == {f"http_{number}": 1}


def test_redirect_is_not_followed(server):
    with FaultServer() as other:
        server.behave(status(307, Location=other.url + "/compute"))
        with pytest.raises(RewardError, match="http_307"):
            run(RemoteReward(server.url, token="secret", **FAST))
        assert other.log() == []


def test_jitter_leaves_the_runs_seeds_alone(server):
    random.seed(3), torch.manual_seed(3)
    expected = random.random(), torch.rand(1)
    random.seed(3), torch.manual_seed(3)
    server.behave(status(500), OK)
    run(RemoteReward(server.url, **FAST))
    assert (random.random(), torch.rand(1)) == expected


def test_a_reward_works_on_one_event_loop_after_another(server):
    reward = RemoteReward(server.url, **FAST)
    pictures = [Image.new("RGB", (4, 4))]
    for _ in range(2):
        call = reward(prompts=["0.5"], images=pictures, source_images=pictures, masks=pictures)
        assert asyncio.run(call) == [0.5]
    assert column(run(reward)) == GOOD


def test_set_up_mistakes():
    for url in ("127.0.0.1:8000", "ftp://host", []):
        with pytest.raises(ValueError, match=r"expected .*http\(s\)"):
            RemoteReward(url)
    for option in ("timeout", "attempt_timeout", "concurrency", "breaker_failures"):
        with pytest.raises(ValueError, match=f"{option}: got 0"):
            RemoteReward("http://host", **{option: 0})
    with pytest.raises(ValueError, match="batch_size: got 0"):
        RemoteReward("http://host", batch_size=0)
    with pytest.raises(ValueError, match=r"\('caption',\)"):
        RemoteReward("http://host", columns="caption")
    with pytest.raises(RewardError, match="columns thing hold"):
        run(RemoteReward("http://127.0.0.1:9", columns=("thing",), **FAST), ["0.5"], thing=[object()])
    with pytest.raises(RewardError, match=r"needs the column\(s\) caption"):
        run(RemoteReward("http://127.0.0.1:9", columns=("caption",), **FAST))


def test_retry_after_and_loopback():
    assert (
        _retry_after("1.5") == 1.5 and _retry_after("-3") == 0 and _retry_after("inf") == _retry_after("9" * 400) > 1e9
    )
    assert _retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9 and _retry_after("Mon, 99 Foo 2020 99:99:99") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after(None) is None and _retry_after("soon") is None and _retry_after("nan") is None
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "example.org")))
