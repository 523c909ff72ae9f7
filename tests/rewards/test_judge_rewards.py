import asyncio
import json
import math
from collections import Counter

import pytest
from PIL import Image

from fault_server import FaultServer
from rcgrpo.rewards import (
    EDIT_PROMPTS,
    EditPrompts,
    EditScoreReward,
    LocalJudge,
    LogitScoreReward,
    RemoteReward,
    RewardError,
    ServerJudge,
    UnifiedRewardEditReward,
    fault_counts,
    resolve_rewards,
    score,
)
from rcgrpo.rewards.judge_rewards import DIGITS, edit_score, expected_score, parse_scores
from rcgrpo.rewards.pictures import from_png

FAST = {"timeout": 4.0, "attempt_timeout": 1.0, "retries": 1, "backoff": 0.01}


def said(*numbers):
    return json.dumps({"reasoning": "because", "score": list(numbers)})


@pytest.fixture(scope="module")
def process():
    with FaultServer() as server:
        yield server


@pytest.fixture
def server(process):
    process.behave({"do": "chat", "two": said(25, 16), "one": said(9, 25)})
    return process


@pytest.fixture
def judge(server):
    return ServerJudge(server.url + "/v1", "judge-7b", **FAST)


def run(reward, count=2, masks=None):
    images = [Image.new("RGB", (80, 64), (index, 9, 9)) for index in range(count)]
    sources = [Image.new("RGB", (80, 64), "white")] * count
    masks = masks or [Image.new("L", (80, 64), 255)] * count
    labels = [f"candidate {index}" for index in range(count)]
    return score(resolve_rewards([reward]), ["make it red"] * count, images, sources, masks, {}, labels)


def column(scored):
    return [None if math.isnan(value) else round(value, 4) for value in scored.values[:, 0].tolist()]


def pictures(request):
    content = request["body"]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [from_png(url.removeprefix("data:image/png;base64,"), "url") for url in urls]


def text(request):
    return request["body"]["messages"][0]["content"][-1]["text"]


# ------------------------------------------------------------------------------------------ the numbers


def test_edit_score_by_hand():
    assert edit_score([25, 16], [9, 25]) == pytest.approx(math.sqrt(6.4 * 3.6) / 10)
    assert edit_score([25, 25], [25, 25]) == 1 and edit_score([0, 25], [25, 25]) == 0


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (said(3, 25), [3, 25]),
        ('```json\n{"reasoning": "a\nb", "score": [0, 12.5]}\n```', [0, 12.5]),
        ('Let me see {not json} {"score": [1, 1]} ... finally {"score": [20, 21], "reasoning": "{"}', [20, 21]),
        ('{"a": {"score": [1, 2]}}', None),
        ("", None),
        ("25, 25", None),
        ('{"reasoning": "cut off", "score": [2', None),
        ('{"score": [20]}', [20]),
        ('{"score": []}', None),
        ('{"score": [20, 20, 20]}', None),
        ('{"score": 20}', [20]),
        ('{"score": ["20", 20.5]}', [20, 20.5]),
        ('{"score": "7"}', [7]),
        ('{"score": ["good", 20]}', None),
        ('{"score": ["20/25", 20]}', None),
        ('{"score": ["nan", 20]}', None),
        ('{"score": [[20], 20]}', None),
        ('{"score": [%s, 20]}' % ("9" * 400), None),
        ("[20, 21]", [20, 21]),
        ("```json\n[20, 21.5]\n```", [20, 21.5]),
        ("Scores: [3, 4].", [3, 4]),
        ('["3", 4]', [3, 4]),
        ("[3, 4] or [5, 6]", None),
        ("[26, 4]", None),
        ("[" * 3000, None),
        (" 17\n", [17]),
        ("26", None),
        ("I'm sorry, but I can't assist with that request.", None),
        ("the score: 5", None),
        ('{"reasoning": "a sign that says "OPEN" now", "score": [20, 21]}', [20, 21]),
        ('{"reasoning": "it is "odd", "score": 3 at most", "score": [20, 21]}', [20, 21]),
        ('{"score": [20, 21], "reasoning": "a "quoted" word"}', [20, 21]),
        ('{"reasoning": "braces {} and "quotes"", "score": [2, 3]}', [2, 3]),
        ('{"reasoning": "a "b" c", "score": ["2", "3"]}', [2, 3]),
        ('{"reasoning": "a "b" c", "score": 12}', [12]),
        ('{"reasoning": "a "b" c", "score": [2, 3, 4]}', None),
        ('{"reasoning": "a "b" c", "score": [26, 3]}', None),
        ('{"reasoning": "a "b" c", "score": [-1, 3]}', None),
        ('{"reasoning": "a "b" c", "score": [2,', None),
        ('{"reasoning": "a "b" c"}', None),
        ("{reasoning: because, score: [2, 3]}", [2, 3]),
        ("{'reasoning': 'because', 'score': [2, 3]}", [2, 3]),
        ("{“reasoning”: “because”, “score”: [2, 3]}", [2, 3]),
        ('||V^=^V||\n{"reasoning": "x", "score": [2, 3]}\n||V^=^V||', [2, 3]),
        ('{"score": [true, 20]}', None),
        ('{"score": [null, 20]}', None),
        ('{"score": [26, 20]}', None),
        ('{"score": [-1, 20]}', None),
        ('{"score": [NaN, 20]}', None),
        ('{"score": [Infinity, 20]}', None),
        ("{" * 3000, None),
    ],
)
def test_parse_scores(answer, scores):
    assert parse_scores(answer) == scores


def test_expected_score_by_hand():
    assert expected_score([0.0] * 6) == pytest.approx(0.5)
    assert expected_score([-math.inf] * 5 + [-3.0]) == 1 and expected_score([7.0] + [-math.inf] * 5) == 0
    # weights 1, e, e^2, … : the softmax does not care for a shift
    weights = [math.exp(k) for k in range(6)]
    by_hand = sum(k * w for k, w in enumerate(weights)) / sum(weights) / 5
    assert expected_score([0, 1, 2, 3, 4, 5]) == pytest.approx(by_hand)
    assert expected_score([1000, 1001, 1002, 1003, 1004, 1005]) == pytest.approx(by_hand)
    assert expected_score([-math.inf] * 6) is None and expected_score([math.nan] + [0.0] * 5) is None


# ------------------------------------------------------------------------------------------ behind a server


def test_edit_score_asks_both_pictures_and_the_edited_one(server, judge):
    assert column(run(EditScoreReward(judge, passes=3))) == [round(math.sqrt(6.4 * 3.6) / 10, 4)] * 2
    requests = server.log()
    assert len(requests) == 4 and {request["path"] for request in requests} == {"/v1/chat/completions"}
    for request in requests:
        sent, shown = request["body"], pictures(request)
        assert (sent["model"], sent["n"], sent["seed"], sent["temperature"]) == ("judge-7b", 3, 42, 0.7)
        schema = sent["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["score"]["items"]["maximum"] == 25
        assert shown[-1].getpixel((0, 0))[1:] == (9, 9), "the edited picture comes last"
        if len(shown) == 2:
            assert shown[0].getpixel((0, 0)) == (255, 255, 255) and "make it red" in text(request)
        else:
            assert text(request) == EDIT_PROMPTS.quality
    assert sorted(len(pictures(request)) for request in requests) == [1, 1, 2, 2]


def test_passes_are_averaged_and_unparsable_ones_left_out(server, judge):
    server.behave({"do": "chat", "two": [said(25, 25), "no", said(0, 25)], "one": [said(25, 25)] * 3})
    assert column(run(EditScoreReward(judge, passes=3), 1)) == [0.5]
    server.behave({"do": "chat", "two": [said(25, 25), said(25, 25)], "one": ["no", said(16, 25)]})
    assert column(run(EditScoreReward(judge, passes=2), 1)) == [0.8]


def test_a_server_that_ignores_n_is_asked_again_with_other_seeds(server, judge):
    server.behave({"do": "chat", "two": [said(25, 25)], "one": [said(16, 25)]})
    assert column(run(EditScoreReward(judge, passes=3), 1)) == [0.8]
    asked = sorted((len(pictures(r)), r["body"]["n"], r["body"]["seed"]) for r in server.log())
    assert asked == [(shown, n, seed) for shown in (1, 2) for n, seed in ((1, 44), (2, 43), (3, 42))]
    one = {"do": "chat", "two": [said(25, 25)], "one": [said(25, 25)]}
    server.behave(one, one, {"do": "status", "status": 500})
    reward = EditScoreReward(judge, passes=2)
    assert column(run(reward, 1)) == [1.0] and reward.faults["http_500"] > 0, "what was answered counts"


def test_answers_that_reached_max_tokens_are_counted(server, judge):
    choice = {"message": {"content": '{"reasoning": "  '}, "finish_reason": "length"}
    refusal = {"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}
    server.behave({"do": "body", "body": json.dumps({"choices": [choice, refusal]})})
    reward = EditScoreReward(judge, passes=2)
    assert column(run(reward, 1)) == [None]
    assert reward.faults == Counter(cut_off=2, unparsable=1)


def test_unparsable_is_none_and_a_failure_never_a_number(server, judge):
    server.behave({"do": "chat", "two": said(25, 25), "one": "I would say 25 out of 25!"})
    reward = EditScoreReward(judge)
    scored = run(reward)
    assert column(scored) == [None, None]
    assert len(scored.failures) == 2 and "unparsable: the judge said 'I would say" in scored.failures[0].reason
    assert fault_counts(resolve_rewards(reward)) == {"rewards/editscore/faults/unparsable": 2}


def test_transport_faults_reach_the_failures(server, judge):
    server.behave({"do": "status", "status": 500})
    reward = EditScoreReward(judge)
    scored = run(reward, 1)
    assert column(scored) == [None] and "http_500" in scored.failures[0].reason
    assert reward.faults == Counter(http_500=4)
    server.behave({"do": "body", "body": '{"choices": [{}]}'})
    scored = run(reward, 1)
    assert column(scored) == [None] and "malformed" in scored.failures[0].reason
    assert run(EditScoreReward(ServerJudge(server.url, "x", **{**FAST, "timeout": 0.001})), 1).failures


def test_wrong_key_stops_the_run(server, judge):
    server.behave({"do": "status", "status": 401})
    with pytest.raises(RewardError, match="'judge-7b' is refused"):
        run(EditScoreReward(judge))


@pytest.mark.parametrize(("status", "hint"), [(400, "structured=False"), (404, "GET <URL>/models")])
def test_refusals_say_what_to_try(server, judge, status, hint):
    server.behave({"do": "status", "status": status})
    with pytest.raises(RewardError, match=hint):
        run(EditScoreReward(judge))


def test_own_prompts_key_and_fields(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-1")
    extra = {"top_k": 5, "max_tokens": None, "max_completion_tokens": 300}
    judge = ServerJudge(server.url, "m", structured=False, key_variable="MY_KEY", extra_body=extra, **FAST)
    reward = EditScoreReward(judge, prompts=EditPrompts('<instruction>? {"score": [a, b]}', "quality"))
    assert column(run(reward, 1)) == [round(math.sqrt(6.4 * 3.6) / 10, 4)]
    # A refused judge's other requests may still arrive from the test before.
    requests = [request for request in server.log() if request["body"]["model"] == "m"]
    assert {text(request) for request in requests} == {'make it red? {"score": [a, b]}', "quality"}
    for request in requests:
        assert request["token"] == "Bearer sk-1" and request["body"]["top_k"] == 5
        assert request["body"]["max_completion_tokens"] == 300
        assert not {"response_format", "max_tokens"} & request["body"].keys()


def test_crop_shows_the_region_of_both_pictures(server, judge):
    mask = Image.new("L", (80, 64), 0)
    mask.paste(255, (0, 4, 60, 64))
    nowhere = Image.new("L", (80, 64), 0)
    scored = run(EditScoreReward(judge, crop_margin=0.1), 2, [mask, nowhere])
    assert column(scored)[1] is None and scored.failures == [], "no region: not applicable, and nothing is asked"
    assert {picture.size for request in server.log() for picture in pictures(request)} == {(66, 64)}
    assert len(server.log()) == 2
    with pytest.raises(RewardError, match="crop_margin is set, but there are no masks"):
        asyncio.run(EditScoreReward(judge, crop_margin=0.0)([""], [nowhere], [nowhere]))


def test_logit_reward_reads_the_first_tokens_log_probabilities(server, judge):
    likely = {"5": math.log(0.5), "4": math.log(0.25), "the": -1.5, " 0": -0.1}
    server.behave({"do": "chat", "two": "5", "top_logprobs": likely})
    reward = LogitScoreReward(judge)
    assert column(run(reward)) == [round((5 * 2 / 3 + 4 / 3) / 5, 4)] * 2
    (sent, _) = (request["body"] for request in server.log())
    assert (sent["max_tokens"], sent["logprobs"], sent["top_logprobs"]) == (1, True, 20)
    assert "response_format" not in sent and "make it red" in text(server.log()[0])
    server.behave({"do": "chat", "two": "Sure", "top_logprobs": {"Sure": -0.1}})
    scored = run(reward, 1)
    assert column(scored) == [None] and "no digit" in scored.failures[0].reason and reward.faults["unparsable"] == 1
    server.behave({"do": "chat", "two": "5"})
    assert column(run(reward, 1)) == [None] and reward.faults["malformed"] == 1, "a server without logprobs"


def test_names_columns_ranges_and_the_server_of_the_environment(server, monkeypatch):
    names = ["editscore", "unified_reward_edit", "edit_r1"]
    monkeypatch.delenv("RCGRPO_JUDGE_URL", raising=False)
    for reward in resolve_rewards(names):
        assert reward.name in names and reward.columns == () and reward.value_range == (0, 1) and reward.is_async
        assert isinstance(reward.function.judge, LocalJudge), "nothing is loaded by asking for it"
    monkeypatch.setenv("RCGRPO_JUDGE_URL", f"{server.url}/v1, {server.url}/v1")
    monkeypatch.setenv("RCGRPO_JUDGE_MODEL", "mine")
    assert column(run(UnifiedRewardEditReward(passes=1), 1)) == [round(math.sqrt(6.4 * 3.6) / 10, 4)]
    assert server.log()[0]["body"]["model"] == "mine"
    assert len(EditScoreReward().judge.transport.urls) == 2
    twice = resolve_rewards(
        [EditScoreReward(name="whole"), EditScoreReward(crop_margin=0.2, name="crop", required=False)]
    )
    assert [(reward.name, reward.required) for reward in twice] == [("whole", True), ("crop", False)]
    for wrong in ({"passes": 0}, {"crop_margin": -1.0}):
        with pytest.raises(ValueError, match="got"):
            EditScoreReward(**wrong)
    assert tuple("012345") == DIGITS


def test_judges_and_remote_rewards_are_required_unless_told_otherwise():
    named = ["editscore", "unified_reward_edit", "edit_r1", RemoteReward("http://127.0.0.1:9"), "background_ssim"]
    assert [reward.required for reward in resolve_rewards(named)] == [True, True, True, True, False]
    optional = [RemoteReward("http://127.0.0.1:9", required=False), LogitScoreReward(required=False)]
    assert not any(reward.required for reward in resolve_rewards(optional))
