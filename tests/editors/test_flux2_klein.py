"""`editors/flux2_klein.py`: what is klein's own; what all editors share is in the conformance suite."""

import math

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from rcgrpo.editors import RegionDecoupledPipeline, open_editor
from rcgrpo.editors.flux2_klein import Flux2KleinEditor, _capped
from rcgrpo.groups.rollout import rollout
from tiny_editors import build_tiny_klein

CALL = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 96}


def picture(seed, width=64, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(width=64, height=64):
    array = np.zeros((height, width), dtype=np.uint8)
    array[8:32, 8:40] = 255
    return Image.fromarray(array)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def editor_of(pipe, steps=3, **options):
    return open_editor(pipe, 64, steps, max_sequence_length=96, **options)


@pytest.fixture(scope="module")
def stock():
    pipe = build_tiny_klein()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(stock):
    pipe = RegionDecoupledPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(output):
    return [image.tobytes() for image in output.images]


def test_the_shift_is_that_of_the_number_of_steps(stock):
    """64 tokens: the published line through 10 and 200 steps, by hand."""
    for steps in (4, 8, 50):
        at_200, at_10 = 0.00016927 * 64 + 0.45666666, 8.73809524e-05 * 64 + 1.89833333
        shift = math.exp(at_10 + (at_200 - at_10) * (steps - 10) / 190)
        level = 1 - 1 / steps
        schedule = editor_of(stock, steps).schedule(64, 64)
        assert schedule.sigmas[1].item() == pytest.approx(shift / (shift + 1 / level - 1), abs=1e-6)
    assert torch.equal(editor_of(stock, 4).with_steps(50).schedule(64, 64).sigmas, schedule.sigmas)


def test_a_scheduler_with_levels_of_its_own_walks_them():
    pipe = build_tiny_klein()
    pipe.set_progress_bar_config(disable=True)
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    pipe.scheduler = UniPCMultistepScheduler(**settings, time_shift_type="exponential")
    noise = torch.randn(1, 64, 16, generator=generator())
    latents = RegionDecoupledPipeline.from_pipe(pipe)._from_tokens(noise, (8, 8))
    expected = pipe(picture(1), "make it red", latents=latents, guidance_scale=1.0, **CALL)
    editor = editor_of(pipe, guidance_scale=1.0)
    trajectory, _, _ = rollout(editor, pipe.transformer, noise, editor.encode([picture(1)], ["make it red"]))
    assert [image.tobytes() for image in editor.decode(trajectory[-1], 64, 64)] == pixels(expected)


def test_only_a_base_model_is_guided_and_by_one_scale(stock):
    def negative(pipe, **options):
        return editor_of(pipe, **options).encode([picture(1)], ["make it red"]).negative

    assert negative(stock) and negative(stock, guidance_scale=2.0) and not negative(stock, guidance_scale=1.0)
    assert editor_of(stock).guidance_scale == 4.0
    distilled = build_tiny_klein(is_distilled=True)
    assert not negative(distilled) and not negative(distilled, guidance_scale=9.0)
    with pytest.raises(ValueError, match=r"true_cfg_scale: got 2.0 with a Flux2KleinPipeline, expected 1.*guidance_"):
        editor_of(stock, true_cfg_scale=2.0)


def test_a_negative_prompt_is_what_its_embeddings_are(stock):
    embeds, _ = stock.encode_prompt(["blurry"], max_sequence_length=96)
    noise = torch.randn(1, 64, 16, generator=generator())
    latents = RegionDecoupledPipeline.from_pipe(stock)._from_tokens(noise, (8, 8))
    given = stock(picture(1), "make it red", latents=latents, negative_prompt_embeds=embeds, **CALL)
    editor = editor_of(stock, negative_prompt="blurry")
    trajectory, _, _ = rollout(editor, stock.transformer, noise, editor.encode([picture(1)], ["make it red"]))
    assert [image.tobytes() for image in editor.decode(trajectory[-1], 64, 64)] == pixels(given)


@pytest.mark.parametrize("prompt", ["make it red", "user", "assistant think", "system <b>{x}</b> {{ y }}"])
def test_the_chat_around_an_instruction_does_not_count(stock, prompt):
    tokenizer = stock.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = tokenizer(text, padding="max_length", max_length=96).input_ids
    weights = editor_of(stock).instruction_weights(prompt)
    assert weights.shape == (96,)
    assert tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight]) == prompt


def test_words_are_found_within_the_chat(stock):
    editor, tokenizer = editor_of(stock), stock.tokenizer
    weights = editor.instruction_weights("a user's hat", ["user"])
    assert weights.sum() == 4
    with pytest.raises(ValueError, match=r"words: got \['assistant'\], expected words of \"a user's hat\""):
        editor.instruction_weights("a user's hat", ["assistant"])
    editor.max_sequence_length = len(tokenizer("<|im_start|>user\na us").input_ids)
    assert editor.instruction_weights("a user's hat").sum() == 4
    with pytest.raises(ValueError, match="within its first"):
        editor.instruction_weights("a user's hat", ["hat"])


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1024, 1024), (1500, 1200), (3000, 700), (1100, 2000)])
def test_references_are_read_at_a_megapixel_at_most(width, height):
    image = Flux2ImageProcessor._resize_if_exceeds_area(Image.new("RGB", (width, height)))
    assert _capped(height, width, 16) == (image.height // 16 * 16, image.width // 16 * 16)


def test_a_large_output_has_a_reference_of_its_own_size(stock, monkeypatch):
    monkeypatch.setattr("rcgrpo.editors.flux2_klein._MAX_AREA", 48 * 48)
    editor = editor_of(stock)
    conditions = editor.encode([picture(1), picture(2)], ["make it red", "remove it"])
    assert conditions.source.shape == (2, 64, 16) and conditions.references.shape == (2, 36, 16)
    assert conditions.reference_grid == (6, 6)
    noise, time = torch.randn(2, 64, 16, generator=generator()), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        velocity = editor.velocity(stock.transformer, noise, time, conditions)
    assert velocity.shape == (2, 64, 16) and velocity.isfinite().all()


# ------------------------------------------------------------------------------------------ calls with a mask


def test_several_pictures_are_one_prompts_references(stock, pipe):
    """The mask belongs to the first, which the output takes its size from."""
    images, call = [picture(1), picture(2, 96, 72)], {"num_inference_steps": 2, "max_sequence_length": 96}
    expected = pixels(stock(images, "make it red", generator=generator(), **call))
    ours = {"mask_image": mask(), "edit_strength": 0.0}
    assert pixels(pipe(images, "make it red", generator=generator(), **ours, **call)) == expected
    twice = pipe([images, images], ["make it red"] * 2, generator=[generator(), generator()], **ours, **call)
    assert pixels(twice) == expected * 2
    alone = pipe(images[:1], "make it red", generator=generator(), **ours, **call)
    assert pixels(alone) != expected
    with pytest.raises(ValueError, match=r"mask_image\[0\]: got a mask .* \(72, 96\)"):
        pipe(images, "make it red", **{**ours, "mask_image": mask(96, 72)}, **call)


def test_latents_come_as_diffusers_takes_them(stock, pipe):
    latents = torch.randn(1, 16, 8, 8, generator=generator())
    expected = pixels(stock(picture(1), "make it red", latents=latents, **CALL))
    ours = {"mask_image": mask(), "edit_strength": 0.0}
    assert pixels(pipe(picture(1), "make it red", latents=latents, **ours, **CALL)) == expected
    for wrong in (latents.repeat(2, 1, 1, 1), latents.flatten(2).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"latents: got shape .*, expected \(1, 16, 8, 8\), one noise for each"):
            pipe(picture(1), "make it red", latents=wrong, **ours, **CALL)


def test_pictures_of_one_call_are_edited_at_one_size(pipe):
    images, masks = [picture(1), picture(2, 96, 72)], [mask(), mask(96, 72)]
    call = {"num_inference_steps": 1, "max_sequence_length": 96, "mask_image": masks}
    with pytest.raises(ValueError, match=r"image: got pictures that are edited at \[\(64, 64\), \(72, 96\)\].*height"):
        pipe(images, ["a", "b"], **call)
    assert [i.size for i in pipe(images, ["a", "b"], height=64, width=64, **call).images] == [(64, 64)] * 2


def test_the_licence_is_that_of_the_size():
    ids = {name.rsplit("/", 1)[1]: tags["license"] for name, tags in Flux2KleinEditor.licenses.items()}
    small = {f"FLUX.2-klein-{kind}4B": "apache-2.0" for kind in ("", "base-")}
    assert ids == {**small, **{f"FLUX.2-klein-{kind}9B": "other" for kind in ("", "base-")}}
