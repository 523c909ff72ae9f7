"""`rewards/generation.py`: the numbers of asking one by one with `generate`, with shared parts read once."""

import pytest
import torch
from PIL import Image
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rcgrpo.rewards.generation import CHECK, Sampling, draw, read_prompts, write_answers
from tiny_judge import build_tiny_judge

SOURCES = [Image.new("RGB", (56, 28), "white"), Image.new("RGB", (28, 28), "black")]
EDITED = [Image.new("RGB", (56, 56), color) for color in ("red", "green", "blue")]
TOLERANCE = 1e-5
"""Between a prompt in a padded batch with a shared part and the same prompt alone, of log-probabilities in fp32."""


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_judge(layers=2)


def prompts():
    """Three candidates of one source, one of another, two pictures alone, texts of several lengths."""
    pairs = [(SOURCES[0], image) for image in EDITED] + [(SOURCES[1], EDITED[0])]
    return [*((pair, "how good is it?") for pair in pairs), ((EDITED[1],), "real?"), ((EDITED[2],), "is it real?!")]


def batch_of(processor, asked):
    turns = [
        [{"role": "user", "content": [*({"type": "image", "image": i} for i in shown), {"type": "text", "text": text}]}]
        for shown, text in asked
    ]
    return processor.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def digests(asked):
    return [[image.tobytes() for image in shown] for shown, _ in asked]


@torch.inference_mode()
def test_a_batch_reads_as_its_prompts_alone_and_what_they_share_once(tiny):
    model, processor = tiny
    asked, tokens, pixels = prompts(), [], []
    alone = [model(**batch_of(processor, [one])).logits[0, -1] for one in asked]
    hooks = [
        model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
        ),
        model.model.visual.register_forward_pre_hook(
            lambda _, args, kwargs: pixels.append(len(args[0])), with_kwargs=True
        ),
    ]
    read = read_prompts(model, batch_of(processor, asked), digests(asked))
    for hook in hooks:
        hook.remove()
    expected = torch.stack(alone).log_softmax(-1)
    torch.testing.assert_close(read.logits.log_softmax(-1), expected, atol=TOLERANCE, rtol=0)
    assert [rows for rows, _ in tokens] == [3, 6], "two sources and the empty beginning of single pictures; six prompts"
    assert pixels == [8 + 4, 6 * 16], "patches of 14 pixels: each source once, then each prompt's last picture"
    assert read.cache.get_seq_length() == sum(length for _, length in tokens) == read.mask.shape[1]


@torch.inference_mode()
def test_greedy_answers_are_those_of_generate(tiny):
    model, processor = tiny
    asked, length = prompts()[1:5], CHECK + 3
    stop = model.generation_config.eos_token_id
    read = read_prompts(model, batch_of(processor, asked), digests(asked))
    tokens, ended = write_answers(model, read, torch.zeros(len(asked), 1, length), Sampling(0.0), [stop])
    for row, one in zip(tokens[:, 0], asked, strict=True):
        inputs = batch_of(processor, [one])
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=length)
        assert row.tolist() == whole[0, inputs["input_ids"].shape[1] :].tolist()
    assert not ended.any()


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_beside_each_other_are_those_written_alone(tiny, attention):
    model, processor = tiny
    asked, length = prompts()[3:5], CHECK + 3
    uniform = torch.rand(len(asked), 3, length, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation(attention)

    def written(some, numbers):
        read = read_prompts(model, batch_of(processor, some), digests(some))
        return write_answers(model, read, numbers, Sampling(5.0, 1.0, None), [10**6])[0]

    together = written(asked, uniform)
    for i, one in enumerate(asked):
        for j in range(3):
            assert written([one], uniform[i : i + 1, j : j + 1])[0, 0].tolist() == together[i, j].tolist()
    assert len({tuple(answer) for answers in together.tolist() for answer in answers}) == 6
    model.set_attn_implementation("sdpa")


@torch.inference_mode()
def test_prompts_whose_answers_have_ended_leave_and_the_others_do_not_notice(tiny):
    model, processor = tiny
    asked, length = prompts(), 4 * CHECK
    uniform = torch.rand(len(asked), 2, length, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(5.0, 1.0, None)

    def written(ends):
        sizes = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
        )
        read = read_prompts(model, batch_of(processor, asked), digests(asked))
        tokens, ended = write_answers(model, read, uniform, sampling, ends)
        hook.remove()
        return tokens, ended, sizes[2:]

    free, _, sizes = written([10**6])
    assert set(sizes) == {6} and len(sizes) == length - 1 and free.shape == (6, 2, length)
    ends = list(range(40))  # of 264 tokens, so that answers end soon
    tokens, ended, sizes = written(ends)
    assert sizes[: CHECK - 1] == [6] * (CHECK - 1) and sizes[-1] < 6
    for row, (full, cut) in enumerate(zip(free.view(12, -1).tolist(), tokens.view(12, -1).tolist(), strict=True)):
        stop = next((i for i, token in enumerate(full) if token in ends), None)
        assert bool(ended.flatten()[row]) == (stop is not None)
        kept = len(cut) if stop is None else stop + 1
        assert cut[:kept] == full[:kept] and set(cut[kept:]) <= {0}
    assert written(range(264))[0].shape == (6, 2, CHECK), "all of them have ended"


def test_a_token_is_drawn_from_what_transformers_leaves():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    left = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(8)(None, TemperatureLogitsWarper(0.7)(None, logits)))
    expected = left.softmax(-1)[0]
    uniform = (torch.arange(4000) + 0.5) / 4000
    drawn = draw(logits.expand(4000, -1), uniform, Sampling(0.7, 0.8, 8))
    assert (drawn.bincount(minlength=50) / 4000 - expected).abs().max() < 3e-4 and (expected > 0).sum() < 8
    assert draw(logits, torch.zeros(1), Sampling(0.0)) == draw(logits, torch.zeros(1), Sampling()) == logits.argmax()
    edge = draw(logits, torch.tensor([1 - 2**-24]), Sampling(0.7, 0.8, 8))
    assert expected[edge] > 0, "rounding never draws what was cut away"
    everything = draw(logits.expand(4000, -1), uniform, Sampling(1.0, 1.0, None))
    assert (everything.bincount(minlength=50) / 4000 - logits[0].softmax(-1)).abs().max() < 3e-4
