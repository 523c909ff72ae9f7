import asyncio
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from rcgrpo.rewards import EditScoreReward, LocalJudge, LogitScoreReward, RewardError
from rcgrpo.rewards.judge_rewards import DIGITS, expected_score
from rcgrpo.rewards.judges import Question
from rcgrpo.rewards.transport import Fault
from tiny_judge import build_tiny_judge

RED, BLUE = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_judge()


@pytest.fixture
def judge(tiny):
    model, processor = tiny
    return LocalJudge(model, processor=processor, device="cpu", max_new_tokens=8)


def test_logits_are_those_of_the_first_token(judge, tiny):
    model, processor = tiny
    question = Question((RED, BLUE), "how good?")
    (log_probs,) = asyncio.run(judge.log_probs([question], DIGITS))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "how good?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[RED, BLUE], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    ids = processor.tokenizer.convert_tokens_to_ids(list(DIGITS))
    expected = float((logits[ids].softmax(-1) * torch.arange(6)).sum() / 5)
    assert log_probs == pytest.approx(logits.log_softmax(-1)[ids].tolist(), abs=1e-5)
    assert expected_score(log_probs) == pytest.approx(expected, abs=1e-6)
    pictures = dict(source_images=[RED], images=[BLUE])
    scores = asyncio.run(LogitScoreReward(judge, prompt="how good?")(prompts=["unused"], **pictures))
    assert scores == [pytest.approx(expected, abs=1e-6)]
    with pytest.raises(ValueError, match=r"got \['10'\]"):
        asyncio.run(judge.log_probs([question], ["1", "10"]))


def test_answers_depend_on_question_pass_and_seed_alone(judge, tiny):
    one, two = Question((RED,), "a"), Question((RED, BLUE), "bb")
    state = torch.get_rng_state()
    (first,) = asyncio.run(judge.answers([one], 3))
    assert len(set(first)) == 3, "passes are samples"
    assert asyncio.run(judge.answers([two, one], 3))[1] == first
    assert asyncio.run(judge.answers([one], 2))[0] == first[:2]
    other = LocalJudge(tiny[0], processor=tiny[1], device="cpu", max_new_tokens=8, seed=1)
    assert asyncio.run(other.answers([one], 3))[0] != first
    assert asyncio.run(judge.answers([Question((BLUE,), "a")], 3))[0] != first
    assert torch.equal(torch.get_rng_state(), state), "the global generator belongs to the run"


def test_temperature_and_top_p_narrow_what_is_sampled(tiny):
    def said(**options):
        judge = LocalJudge(tiny[0], processor=tiny[1], device="cpu", max_new_tokens=4, **options)
        (answers,) = asyncio.run(judge.answers([Question((RED,), "?")], 6))
        return len(set(answers))

    assert said(temperature=5.0, top_p=1.0, top_k=None) == 6, "all over the vocabulary"
    assert said(temperature=0) == said(top_p=1e-6) == said(temperature=5.0, top_k=1) == 1, "the likeliest token alone"


def test_folder_with_adapter(tiny, tmp_path):
    model, processor = build_tiny_judge()
    model.save_pretrained(tmp_path / "base"), processor.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    question = Question((RED,), "?")

    def ask(judge):
        return asyncio.run(judge.log_probs([question], DIGITS))[0]

    base = ask(LocalJudge(str(tmp_path / "base"), device="cpu"))
    assert base == pytest.approx(ask(LocalJudge(tiny[0], processor=tiny[1], device="cpu")), abs=1e-5)
    lora = ask(LocalJudge(str(tmp_path / "base"), str(tmp_path / "lora"), device="cpu"))
    assert lora == pytest.approx(ask(LocalJudge(adapted, processor=processor, device="cpu")), abs=1e-5)
    assert lora != pytest.approx(base, abs=1e-5)


def test_what_cannot_be_loaded_stops_the_run(tiny, tmp_path):
    model, processor = build_tiny_judge()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): weight for name, weight in load_file(path).items()}, path)
    other = LocalJudge(build_tiny_judge()[0], str(tmp_path), processor=processor, device="cpu")
    with pytest.raises(RewardError, match="missing adapter keys"):
        asyncio.run(other.log_probs([Question((RED,), "?")], DIGITS))
    with pytest.raises(RewardError, match=r"the judge '.*nowhere' cannot be loaded"):
        asyncio.run(LogitScoreReward(LocalJudge(str(tmp_path / "nowhere")))(["x"], [RED], [BLUE]))


def test_random_babble_is_a_failure_not_a_number(judge):
    failures = {}
    call = EditScoreReward(judge, passes=2)(["x"], [RED], [BLUE], log_failure=failures.__setitem__)
    assert asyncio.run(call) == [None] and failures[0].startswith("unparsable: the judge said ")


def test_older_names_of_a_loras_layers_are_read(tiny, tmp_path):
    model, processor = build_tiny_judge()
    targets = ["q_proj", "qkv"]  # of the language model and the vision tower
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    question = [Question((RED, BLUE), "?")]
    expected = asyncio.run(LocalJudge(adapted, processor=processor, device="cpu").log_probs(question, DIGITS))
    path = tmp_path / "adapter_model.safetensors"
    older = {
        name.replace("model.language_model.", "model.").replace("model.model.visual.", "model.visual."): weight
        for name, weight in load_file(path).items()
    }
    assert older.keys().isdisjoint(load_file(path)) and len(older) == 4
    save_file(older, path)
    judge = LocalJudge(build_tiny_judge()[0], str(tmp_path), processor=processor, device="cpu")
    assert asyncio.run(judge.log_probs(question, DIGITS))[0] == pytest.approx(expected[0], abs=1e-5)
    assert not any("lora" in name for name, _ in judge._loaded.named_parameters()), "merged"


def test_a_batch_is_halved_until_it_fits_and_one_question_too_large_is_a_fault(judge, monkeypatch):
    threads, sizes = [], []

    def sample(questions, passes):
        threads.append(threading.current_thread())
        sizes.append(len(questions))
        if len(questions) > 2 or any(question.text == "huge" for question in questions):
            raise torch.OutOfMemoryError("CUDA out of memory\ndetails")
        return [[question.text] * passes for question in questions]

    monkeypatch.setattr(judge, "_sample", sample)
    texts = ["a", "huge", "b", "c", "d"]
    answers = asyncio.run(judge.answers([Question((RED,), text) for text in texts], 1))
    assert [answer for answer in answers if not isinstance(answer, Fault)] == [["a"], ["b"], ["c"], ["d"]]
    assert isinstance(answers[1], Fault) and judge.faults == {"out_of_memory": 1} and sizes[:2] == [5, 2]
    assert threading.current_thread() not in threads


def test_batch_size_bounds_the_answers_under_way(tiny, monkeypatch):
    judge = LocalJudge(tiny[0], processor=tiny[1], device="cpu", batch_size=6)
    sizes = []
    monkeypatch.setattr(judge, "_sample", lambda some, passes: sizes.append(len(some)) or [["x"]] * len(some))
    asyncio.run(judge.answers([Question((RED,), "a")] * 5, 3))
    asyncio.run(judge.answers([Question((RED,), "a")] * 2, 7))
    assert sizes == [2, 2, 1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_sleeping_judge_leaves_the_gpu_and_says_the_same():
    question = [Question((RED, BLUE), "?")]
    awake, asleep = (
        LocalJudge(build_tiny_judge()[0], processor=build_tiny_judge()[1], device="cuda", sleep=sleep)
        for sleep in (False, True)
    )
    expected = asyncio.run(awake.log_probs(question, DIGITS))
    for _ in range(2):
        assert asyncio.run(asleep.log_probs(question, DIGITS)) == expected
        assert {weight.device.type for weight in asleep._loaded.parameters()} == {"cpu"}


def test_set_up_mistakes(tiny):
    with pytest.raises(ValueError, match="processor: got None"):
        LocalJudge(tiny[0])
    with pytest.raises(ValueError, match="temperature: got -1"):
        LocalJudge("x", temperature=-1)
    for name in ("top_k", "batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name}: got -1"):
            LocalJudge("x", **{name: -1})
    with pytest.raises(ValueError, match="top_p: got 2"):
        LocalJudge("x", top_p=2)
