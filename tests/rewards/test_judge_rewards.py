import asyncio
import json
import math
from collections import Counter
from hashlib import sha256
from importlib.resources import files

import pytest
from PIL import Image

from fault_server import FaultServer
from rcgrpo.rewards import (
    EDIT_PROMPTS,
    EDITSCORE_PROMPTS,
    SPATIAL_PROMPTS,
    EditPrompts,
    EditScoreReward,
    LocalJudge,
    LogitScoreReward,
    RemoteReward,
    RewardError,
    ServerJudge,
    SpatialRewardReward,
    UnifiedRewardEditReward,
    fault_counts,
    resolve_rewards,
    score,
)
from rcgrpo.rewards.judge_rewards import DIGITS
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


# ------------------------------------------------------------------------------------------ behind a server


def test_edit_score_asks_both_pictures_and_the_edited_one(server, judge):
    assert column(run(EditScoreReward(judge, passes=3))) == [round(math.sqrt(6.4 * 3.6) / 10, 4)] * 2
    requests = server.log()
    assert len(requests) == 4 and {request["path"] for request in requests} == {"/v1/chat/completions"}
    for request in requests:
        sent, shown = request["body"], pictures(request)
        assert (sent["model"], sent["n"], sent["seed"]) == ("judge-7b", 3, 42)
        assert (sent["temperature"], sent["top_p"], sent["top_k"]) == (0.7, 0.9, 20), "EditScore's own"
        schema = sent["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["score"]["items"]["maximum"] == 25
        assert shown[-1].getpixel((0, 0))[1:] == (9, 9), "the edited picture comes last"
        if len(shown) == 2:
            assert shown[0].getpixel((0, 0)) == (255, 255, 255) and "make it red" in text(request)
        else:
            assert text(request) == EDITSCORE_PROMPTS.quality
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


def listing(*models, owner="vllm"):
    return {"do": "body", "body": json.dumps({"data": [{"id": name, "owned_by": owner} for name in models]})}


def test_a_judge_that_is_not_there_is_known_before_anything_is_asked(server, judge):
    for there in (listing("base", "judge-7b"), listing("other", owner="llamacpp"), {"do": "status", "status": 404}):
        server.behave(there)
        EditScoreReward(judge).check()
        assert [request["path"] for request in server.log()] == ["/v1/models"]
    two = ServerJudge(["http://127.0.0.1:9/v1", server.url + "/v1"], "judge-7b", **FAST)
    server.behave(listing("judge-7b"))
    two.check()
    for how, said in [
        (
            listing("base", "lora"),
            r"judge: got the name 'judge-7b', expected one that .* serves \(base, lora\); set RCGRPO",
        ),
        (
            {"do": "status", "status": 401},
            "judge: got no answer from .*, expected a judge there.*http_401.*as you wish",
        ),
        ({"do": "body", "body": "<html>"}, "judge: got no answer from .*malformed"),
        ({"do": "reset"}, "judge: got no answer from .*connect"),
    ]:
        server.behave(how)
        with pytest.raises(RewardError, match=said) as told:
            EditScoreReward(judge).check()
        assert "\n" not in str(told.value)
    assert not judge.faults


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


def test_prompts_that_were_trained_on_are_word_for_word():
    """The digests of what `EditScore` of the package editscore 0.2 asks, put together by its own code."""
    said = [sha256(text.encode()).hexdigest()[:16] for text in (EDITSCORE_PROMPTS.semantics, EDITSCORE_PROMPTS.quality)]
    assert said == ["2fbb018b0e448b2d", "8249deba103d112d"]
    assert "<instruction>" in EDITSCORE_PROMPTS.semantics and "<instruction>" not in EDITSCORE_PROMPTS.quality
    folder = files("rcgrpo") / "rewards" / "editscore"
    assert "Apache License" in (folder / "LICENSE").read_text() and EDIT_PROMPTS != EDITSCORE_PROMPTS


def test_spatial_reward_asks_for_regions_first_and_weighs_as_its_authors_do(server, monkeypatch):
    monkeypatch.setenv("RCGRPO_JUDGE_URL", f"{server.url}/v1")
    region = {"id": 0, "label": "roof", "bbox_2d": [0, 0, 500, 250]}
    answer = json.dumps({"edit_region": [region], "reasoning": "<|bbox_0|> fine", "score": [25, 10]})
    server.behave({"do": "chat", "two": answer, "one": said(20, 15)})
    (named,) = resolve_rewards("spatial_reward")
    reward = named.function
    assert isinstance(reward, SpatialRewardReward)
    # SC = 10 * (0.6 * 25 + 0.4 * 10) / 25 = 7.6, PQ = 10 * 17.5 / 25 = 7
    assert column(run(reward, 1)) == [round(7.6**0.8 * 7**0.2 / 10, 4)]
    asked = {len(pictures(request)): request["body"] for request in server.log()}
    assert {(body["model"], body["n"], body["temperature"]) for body in asked.values()} == {
        ("SpatialReward/SpatialReward-8B", 1, 0.0)
    }
    schema = asked[2]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["edit_region", "reasoning", "score"], "in this order"
    assert "make it red" in text({"body": asked[2]}) and '"bbox_2d": [x1, y1, x2, y2]' in SPATIAL_PROMPTS.semantics
    assert "edit_region" not in asked[1]["response_format"]["json_schema"]["schema"]["properties"]


def test_servers_of_the_environment_share_the_work_and_one_that_fails_leaves_it_to_the_other(server, monkeypatch):
    with FaultServer() as second:
        monkeypatch.setenv("RCGRPO_JUDGE_URL", f"{server.url}/v1,{second.url}/v1")
        both = {"do": "chat", "two": said(25, 25), "one": said(16, 25)}
        for fault in (None, {"do": "status", "status": 503}, {"do": "reset"}):
            server.behave(both)
            second.behave(fault or both)
            reward = EditScoreReward(passes=1)
            reward.judge.transport.backoff = 0.01
            assert column(run(reward, 6)) == [0.8] * 6
            asked = [len(server.log()), len(second.log())]
            if fault is None:
                assert asked == [6, 6], "taking turns"
            else:
                assert asked[0] == 12 and asked[1] >= 1 and reward.faults.total() == asked[1]


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
    names = ["editscore", "unified_reward_edit", "spatial_reward", "edit_r1"]
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
    named = [
        "editscore",
        "unified_reward_edit",
        "spatial_reward",
        "edit_r1",
        RemoteReward("http://127.0.0.1:9"),
        "background_ssim",
    ]
    assert [reward.required for reward in resolve_rewards(named)] == [True] * 5 + [False]
    optional = [RemoteReward("http://127.0.0.1:9", required=False), LogitScoreReward(required=False)]
    assert not any(reward.required for reward in resolve_rewards(optional))
