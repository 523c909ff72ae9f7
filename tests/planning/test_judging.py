"""`judging.py`: what a judge in this process takes, against one that really answers."""

import pytest
import torch
from PIL import Image

from rcgrpo.planning import judging
from rcgrpo.planning.counting import Counter, storages
from rcgrpo.planning.judging import Judging, judge_weights, judging_of, measure_judge
from rcgrpo.planning.known import JUDGES
from rcgrpo.rewards import EditScoreReward, LocalJudge, resolve_rewards
from rcgrpo.rewards.judges import Question
from tiny_judge import build_tiny_judge


def test_judges_of_rewards_by_name(monkeypatch):
    monkeypatch.delenv("RCGRPO_JUDGE_URL", raising=False)
    (whole,), unknown = judging_of(resolve_rewards(["editscore", "background_ssim"]), 12, 640)
    assert (whole.model, whole.questions, whole.passes, whole.length) == ("Qwen/Qwen3-VL-8B-Instruct", 24, 4, 512)
    assert not unknown and 800 + 1524 / 4 < whole.tokens < 1300  # two pictures of 400 tokens, EditScore's words
    assert judge_weights(whole) == pytest.approx(17.53e9, rel=1e-3)
    (first,), _ = judging_of(resolve_rewards("edit_r1"), 200, 640)
    assert (first.questions, first.passes, first.length) == (128, 0, 0)  # a batch of the judge's, nothing written
    assert judging_of(resolve_rewards(EditScoreReward(LocalJudge("mine"))), 12, 640) == ([], ["editscore"])


@pytest.mark.parametrize(("passes", "length"), [(4, 100), (0, 0)])
def test_a_small_judge_takes_what_is_planned(monkeypatch, passes, length):
    """Within a tenth of the bytes that it allocates while it reads pictures and writes all that it may."""
    model, processor = build_tiny_judge(width=64, layers=4)
    model.generation_config.eos_token_id = 999  # which it never says
    judge = LocalJudge(model, processor=processor, device="cpu", max_new_tokens=max(1, length))
    picture = Image.linear_gradient("L").resize((56, 56)).convert("RGB")
    questions = [Question((picture, picture.rotate(90 * i)), "How good is it? " * 20) for i in range(6)]
    with torch.inference_mode(), judge._awake():
        tokens = judge._prompts(questions)[0].mask.shape[1]
        with Counter(storages(model)) as counter:
            judge._sample(questions, passes) if passes else judge._first_token(questions, "012345")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    text = {key: getattr(model.config.text_config, key) for key in (*sizes, "num_hidden_layers")}
    monkeypatch.setitem(JUDGES, "small", {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": {}})
    planned = measure_judge(Judging("small", len(questions), passes, tokens, length), torch.float32)
    assert planned == pytest.approx(max(counter.peaks.values()), rel=0.1)
    assert judging.CLASSES["qwen2_5_vl"][0] == type(model).__name__
