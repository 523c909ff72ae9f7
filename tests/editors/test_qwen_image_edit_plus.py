"""`editors/qwen_image_edit_plus.py`: what is Qwen's own; what all editors share is in the conformance suite."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from rcgrpo.editors import ConditionCache, RegionDecoupledPipeline, open_editor
from rcgrpo.editors.qwen_image_edit_plus import QwenImageEditPlusEditor
from tiny_editors import SMALL_QWEN, build_tiny_qwen

CALL = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def small_references():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_QWEN.items():
            patch.setattr(pipeline_qwenimage_edit_plus, name, value)
        yield


def picture(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(width=64, height=64):
    array = np.zeros((height, width), dtype=np.uint8)
    array[8:32, 8:40] = 255
    return Image.fromarray(array)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def editor_of(pipe, resolution=64, **options):
    return open_editor(pipe, resolution, 2, **options)


@pytest.fixture(scope="module")
def stock():
    pipe = build_tiny_qwen()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(stock):
    pipe = RegionDecoupledPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_the_encoder_makes_is_kept_for_instruction_and_picture_together(tmp_path):
    pipe, calls = build_tiny_qwen(), {"text": 0, "image": 0}
    pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.update(text=calls["text"] + 1))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: calls.update(image=calls["image"] + 1))
    editor = editor_of(pipe, cache=ConditionCache(tmp_path), true_cfg_scale=2.0, negative_prompt=" ")

    def asked(image, prompt, **options):
        calls.update(text=0, image=0)
        editor.encode([image], [prompt], **options)
        return calls["text"], calls["image"]

    assert asked(picture(1), "red") == (2, 2)  # the negative prompt sees the picture too; the source has two sizes
    assert asked(picture(1), "red") == (0, 0)
    assert asked(picture(1), "blue") == (1, 0)
    assert asked(picture(2), "red") == (2, 2)
    assert asked(picture(3), "red", cache_images=False) == (2, 2)
    assert asked(picture(3), "red") == (2, 2), "nothing of a picture that nobody brings again was kept"
    pipe.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert asked(picture(1), "red") == (2, 0)


def test_an_instruction_and_a_picture_that_come_twice_are_read_once(stock):
    calls, image = [], picture(1)
    handle = stock.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    editor_of(stock).encode([image, image, picture(2)], ["red"] * 3)
    handle.remove()
    assert len(calls) == 2


def test_guidance_keeps_each_tokens_norm(stock):
    editor = editor_of(stock, true_cfg_scale=3.0)
    positive, negative = torch.randn(2, 2, 5, 16, generator=generator()).unbind(0)
    guided = editor._guide(positive, negative)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    combined = negative + 3 * (positive - negative)
    cosine = torch.nn.functional.cosine_similarity(guided, combined, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(2, 5))
    torch.testing.assert_close(editor._guide(positive, positive), positive)


def test_sizes_are_the_stock_pipelines(stock):
    editor = editor_of(stock, resolution=1024)
    for width, height in ((64, 64), (1200, 800), (700, 1000), (3000, 1000)):
        expected = pipeline_qwenimage_edit_plus.calculate_dimensions(1024 * 1024, width / height)
        assert editor.size_for(Image.new("RGB", (width, height))) == expected[::-1]


def test_the_source_is_read_at_its_own_size_and_kept_at_the_outputs(stock, monkeypatch):
    conditions = editor_of(stock).encode([picture(1)], ["red"])
    assert conditions.source.shape == (1, 64, 16) and conditions.reference_tokens.shape == (1, 144, 16)
    assert conditions.reference_grid == (12, 12)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    same = editor_of(stock).encode([picture(1)], ["red"])
    assert same.references is None and same.reference_grid is None
    assert torch.equal(same.source, conditions.source)


@pytest.mark.parametrize("prompt", ["make it red", "user", "<b> {x} Picture 1: "])
def test_neither_template_nor_picture_counts(stock, prompt):
    editor = editor_of(stock)
    weights = editor.instruction_weights(prompt)
    assert weights.sum() == len(prompt)
    conditions = editor.encode([picture(1)], [prompt])
    assert conditions.text_weights.sum() == len(prompt)
    # what follows the instruction: its end, and the assistant's turn, letter by letter
    after = len(stock.processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    assert conditions.text_weights.shape == conditions.text["prompt_embeds"].shape[:2]
    assert (conditions.text_weights[0, -after - len(prompt) : -after] == 1).all()
    assert conditions.text["prompt_embeds_mask"].all()


def test_padding_gets_no_attention(stock):
    """What stands where a short text is padded changes nothing."""
    editor = editor_of(stock)
    conditions = editor.encode([picture(1), picture(2)], ["red", "a much longer instruction"])
    mask = conditions.text["prompt_embeds_mask"]
    assert not mask[0].all() and mask[1].all()
    noise, time = torch.randn(2, 64, 16, generator=generator()), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        expected = editor.velocity(stock.transformer, noise, time, conditions)
        conditions.text["prompt_embeds"][~mask] = 7.0
        torch.testing.assert_close(editor.velocity(stock.transformer, noise, time, conditions), expected)


def test_several_pictures_are_one_prompts_references(stock, pipe):
    """The mask belongs to the last, which the output takes its size from; the words are found behind all of them."""
    images = [picture(2, 96, 64), picture(1)]
    expected = stock(images, "make it red", generator=generator(), **CALL).images
    ours = {"mask_image": mask(), "edit_strength": 0.0, "output_attention": True, "attention_words": "red"}
    found = pipe(images, "make it red", generator=generator(), **ours, **CALL)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected]
    alone = pipe(images[1], "make it red", generator=generator(), **ours, **CALL)
    assert alone.images[0].tobytes() != expected[0].tobytes()
    whole = pipe(images, "make it red", generator=generator(), **{**ours, "attention_words": "make it red"}, **CALL)
    assert not torch.equal(whole.attention_maps, found.attention_maps)
    with pytest.raises(ValueError, match=r"mask_image\[0\]: got a mask .* \(64, 64\)"):
        pipe(images, "make it red", **{**ours, "mask_image": mask(96, 64)}, **CALL)


def test_embeddings_instead_of_prompts(stock, pipe):
    seen = stock.image_processor.resize(picture(1), 64, 64)
    embeds, given = stock.encode_prompt(["make it red"], [seen])
    assert given is None
    ours = {"mask_image": mask(), "num_images_per_prompt": 2, "output_attention": True}
    expected = pipe(picture(1), "make it red", generator=generator(), **ours, **CALL)
    found = pipe(picture(1), prompt_embeds=embeds, generator=generator(), **ours, **CALL)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected.images]
    assert not torch.equal(found.attention_maps, expected.attention_maps)  # all tokens ask, for want of a prompt


def test_both_dates_are_free():
    assert {tags["license"] for tags in QwenImageEditPlusEditor.licenses.values()} == {"apache-2.0"}
