from inspect import signature

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from peft import LoraConfig
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from rcgrpo import RegionDecoupledFluxKontextPipeline
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.editors.attention import AttentionOptions
from rcgrpo.groups.rollout import rollout
from rcgrpo.maths.regions import to_tokens
from tiny_kontext import TINY_CALL, build_tiny_kontext, encode_one_by_one, in_own_memory

PROMPTS = ["make it red", "add a small boat"]


def picture(seed, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def mask(row=8, column=8, side=10):
    array = np.zeros((32, 32), dtype=np.uint8)
    array[row : row + side, column : column + side] = 255
    return Image.fromarray(array)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(batch, seed=5):
    return torch.randn(batch, 64, 16, generator=generator(seed))


SOURCES, MASKS = [picture(1), picture(2)], [mask(), mask(16, 4, 12)]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def stock():
    return quiet(build_tiny_kontext())


@pytest.fixture(scope="module")
def pipe(stock):
    return quiet(RegionDecoupledFluxKontextPipeline.from_pipe(stock))


def latents_of(pipeline, *args, **kwargs):
    call = {"output_type": "latent", **TINY_CALL, **kwargs}
    return pipeline(*args, **call).images


def started_from(pipe, *args, **kwargs):
    """The noise that a call starts from, `[images, tokens, channels]`, and the latents that it ends with."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][:, :64]), with_kwargs=True
    )
    try:
        return latents_of(pipe, *args, **kwargs), seen[0]
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------ without a mask: diffusers


def add_lora(pipeline):
    """A LoRA of random weights, so that its scale makes a difference."""
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q", "ff.net.0.proj"]))
    for i, (name, weight) in enumerate(pipeline.transformer.named_parameters()):
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator(i)) * 0.3


def add_ip_adapter(pipeline):
    """An IP adapter of random weights on a random CLIP, as `load_ip_adapter` would leave them."""
    transformer, width = pipeline.transformer, 16

    def weights(*shape):
        return torch.randn(shape, generator=generator(sum(shape)))

    hidden, joint = transformer.inner_dim, transformer.config.joint_attention_dim
    projection = {"proj.weight": weights(4 * joint, width), "proj.bias": weights(4 * joint)}
    projection |= {"norm.weight": weights(joint), "norm.bias": weights(joint)}
    layers = {f"{i}.to_{part}_ip.weight": weights(hidden, joint) for i in range(2) for part in "kv"}
    layers |= {f"{i}.to_{part}_ip.bias": weights(hidden) for i in range(2) for part in "kv"}
    transformer._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": layers})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=width)
        )
    crop = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop)
    pipeline.register_modules(image_encoder=encoder.eval(), feature_extractor=processor)


@pytest.fixture(scope="module")
def with_lora():
    """Stock and ours with guidance and a LoRA."""
    stock = build_tiny_kontext(guidance_embeds=True)
    add_lora(stock)
    return quiet(stock), quiet(RegionDecoupledFluxKontextPipeline.from_pipe(stock))


@pytest.fixture(scope="module")
def with_ip_adapter():
    """Stock and ours with an IP adapter."""
    stock = build_tiny_kontext()
    add_ip_adapter(stock)
    return quiet(stock), quiet(RegionDecoupledFluxKontextPipeline.from_pipe(stock))


def halve(pipeline, step, timestep, tensors):
    return {name: tensor / 2 for name, tensor in tensors.items()}


TEXT, POOLED = torch.randn(1, 48, 32, generator=generator(1)), torch.randn(1, 32, generator=generator(2))
IP_EMBEDS = [torch.randn(1, 1, 16, generator=generator(3))]
CALLS = [
    {},
    {"image": SOURCES, "prompt": PROMPTS},
    {"image": None},
    {"image": torch.rand(1, 3, 32, 32, generator=generator(4))},
    {"image": np.random.default_rng(4).random((1, 32, 32, 3))},
    {"image": torch.randn(1, 4, 16, 16, generator=generator(4))},  # ready latents
    {"prompt_2": "2nd"},
    {"negative_prompt": "blue", "negative_prompt_2": "green", "true_cfg_scale": 2.0},
    {"height": 16, "width": 64},
    {"max_area": 16 * 16, "max_sequence_length": 24},
    {"num_inference_steps": 2},
    {"num_inference_steps": 2, "sigmas": [1.0, 0.7]},
    {"guidance_scale": 9.0},
    {"num_images_per_prompt": 3},
    {"image": SOURCES, "prompt": PROMPTS, "num_images_per_prompt": 2},
    {"image": SOURCES, "prompt": PROMPTS, "generator": [3, 4]},
    {"latents": noise(1)},
    {"prompt": None, "prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED},
    {
        **{"prompt": None, "prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED, "true_cfg_scale": 2.0},
        **{"negative_prompt_embeds": -TEXT, "negative_pooled_prompt_embeds": -POOLED},
    },
    {"output_type": "pil"},
    {"output_type": "np"},
    {"output_type": "pt"},
    {"joint_attention_kwargs": {"scale": 0.3}},
    {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
    {"_auto_resize": True},
]
GUIDED = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
IP_CALLS = [
    {"ip_adapter_image": SOURCES[1]},
    {"ip_adapter_image_embeds": IP_EMBEDS, "num_images_per_prompt": 2},
    {"ip_adapter_image": SOURCES[0], "negative_ip_adapter_image": SOURCES[1], **GUIDED},
    {"ip_adapter_image": SOURCES[0], "negative_ip_adapter_image_embeds": IP_EMBEDS, **GUIDED},
]


def output_of(pipeline, call):
    """What a call returns and its pictures as one array; generators are given by their seeds."""
    call = {"image": SOURCES[0], "prompt": PROMPTS[0], "output_type": "latent", "generator": 0, **TINY_CALL, **call}
    seeds = call.pop("generator")
    generators = [generator(seed) for seed in seeds] if isinstance(seeds, list) else generator(seeds)
    output = pipeline(generator=generators, **call)
    return output, np.stack([np.asarray(image) for image in output.images])


@pytest.fixture
def small_references(monkeypatch):
    """`_auto_resize` chooses among sizes of a megapixel, which is much for these tests."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 48), (40, 40)])


def check_same(pair, call, plain):
    """Both pipelines of a pair return the same bits, which are not those of another call."""
    (expected, pictures), (result, ours) = (output_of(pipeline, call) for pipeline in pair)
    assert type(result) is type(expected) and ours.dtype == pictures.dtype and np.array_equal(ours, pictures)
    assert not np.array_equal(ours, plain), "else an argument that got lost would not be seen"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call) or "plain")
def test_without_new_arguments_every_bit_is_diffusers_own(with_lora, small_references, call):
    check_same(with_lora, call, output_of(with_lora[0], {})[1] if call else None)


@pytest.mark.parametrize("call", IP_CALLS, ids=" ".join)
def test_ip_adapters_are_diffusers_own(with_ip_adapter, call):
    other = {"ip_adapter_image": SOURCES[0], "num_images_per_prompt": call.get("num_images_per_prompt", 1)}
    check_same(with_ip_adapter, call, output_of(with_ip_adapter[0], other)[1])


def test_every_argument_of_diffusers_is_among_these_calls():
    tried = {"return_dict", "generator"}.union(*CALLS, *IP_CALLS)
    assert set(signature(FluxKontextPipeline.__call__).parameters) - {"self", "image", "prompt"} <= tried


def test_positional_arguments_and_tuples_are_passed_on(stock, pipe):
    results = [
        p(SOURCES[0], PROMPTS[0], "2nd", generator=generator(), return_dict=False, **TINY_CALL) for p in (stock, pipe)
    ]
    assert isinstance(results[1], tuple) and len(results[1]) == len(results[0]) == 1
    assert np.array_equal(*(np.asarray(result[0][0]) for result in results))


def test_the_signature_is_diffusers_own_and_ours(pipe):
    stock, ours = (signature(kind.__call__).parameters for kind in (FluxKontextPipeline, type(pipe)))
    assert [ours[name] for name in stock] == list(stock.values()) and list(ours)[: len(stock)] == list(stock)
    added = ["mask_image", "edit_strength", "keep_strength", "output_attention", "attention_options", "attention_words"]
    assert list(ours)[len(stock) :] == added
    assert list(signature(pipe).parameters) == list(ours)[1:]


# ------------------------------------------------------------------------------------ with a mask


def test_positional_arguments_mean_the_same_with_a_mask(pipe):
    call = {"mask_image": MASKS[0], "generator": generator(), "output_type": "latent"}
    result = pipe(SOURCES[0], PROMPTS[0], "sunny", **call, **TINY_CALL).images
    call["generator"] = generator()
    assert torch.equal(result, pipe(SOURCES[0], PROMPTS[0], prompt_2="sunny", **call, **TINY_CALL).images)


def test_groups_start_alike_outside_the_region_and_apart_inside(pipe):
    result, start = started_from(
        pipe, SOURCES, PROMPTS, mask_image=MASKS, num_images_per_prompt=3, edit_strength=0.8, generator=generator()
    )
    assert len(result) == 6
    for p in range(2):
        inside = to_tokens(torch.from_numpy(np.array(MASKS[p]) / 255.0), (8, 8), "max") == 1
        group = start[3 * p : 3 * p + 3]
        assert (group[:, ~inside] == group[:1, ~inside]).all()
        assert (group[1:, inside] != group[:1, inside]).all()
        assert (group[1, inside] != group[2, inside]).all()
    assert (start[0] != start[3]).all(), "prompts have their own base"


@pytest.mark.parametrize("keep_strength", [0.0, 0.3])
def test_the_base_is_the_noise_that_diffusers_would_draw(stock, pipe, keep_strength):
    _, start = started_from(
        pipe, SOURCES, PROMPTS, mask_image=MASKS, generator=generator(), edit_strength=0.6, keep_strength=keep_strength
    )
    _, base = started_from(stock, SOURCES, PROMPTS, generator=generator())
    inside = to_tokens(torch.stack([torch.from_numpy(np.array(m) / 255.0) for m in MASKS]), (8, 8), "max") == 1
    if keep_strength == 0:
        assert torch.equal(start[~inside], base[~inside])
    for part, strength in ((inside, 0.6), (~inside, keep_strength)):
        difference = start[part] - (1 - strength**2) ** 0.5 * base[part]
        assert difference.std().item() == pytest.approx(strength, abs=0.1)


def test_no_strength_repeats_the_stock_picture(stock, pipe):
    call = {"mask_image": MASKS[0], "edit_strength": 0.0, "generator": generator()}
    alone = latents_of(pipe, SOURCES[0], PROMPTS[0], **call)
    assert torch.equal(alone, latents_of(stock, SOURCES[0], PROMPTS[0], generator=generator()))
    images = pipe(SOURCES[0], PROMPTS[0], num_images_per_prompt=3, **call, **TINY_CALL).images
    # A row's place in a batch may change how threads share the work, and with it the last bit: one level of 255.
    pixels = np.stack([np.asarray(image, dtype=int) for image in images])
    assert np.ptp(pixels, axis=0).max() <= 1


def test_every_candidate_is_paired_with_its_own_source_and_prompt(stock, pipe):
    result, start = started_from(
        pipe, SOURCES, PROMPTS, mask_image=MASKS, num_images_per_prompt=2, edit_strength=0.9, latents=noise(2)
    )
    for i in range(4):
        alone = latents_of(stock, SOURCES[i // 2], PROMPTS[i // 2], latents=start[i : i + 1])
        torch.testing.assert_close(result[i : i + 1], alone, rtol=0, atol=1e-5)
    swapped = latents_of(stock, SOURCES[1], PROMPTS[0], latents=start[:1])
    assert (result[:1] - swapped).abs().max() > 1e-3, "else the pairing could not be seen"


@pytest.mark.parametrize("as_text", [str, lambda text: [text, text + "!"]])
def test_second_and_negative_prompts_follow_their_candidates(stock, pipe, as_text):
    second, negative = as_text("sunny"), as_text("blue")
    kwargs = {"prompt_2": second, "negative_prompt": negative, "negative_prompt_2": negative, "true_cfg_scale": 2.0}
    prompts = PROMPTS[: 1 if isinstance(second, str) else 2]
    result, start = started_from(
        pipe,
        SOURCES[: len(prompts)],
        prompts,
        mask_image=MASKS[0],
        num_images_per_prompt=2,
        latents=noise(2)[: len(prompts)],
        **kwargs,
    )
    assert len(result) == 2 * len(prompts)
    for i, text in enumerate(prompts):
        single = {k: v[i] if isinstance(v, list) else v for k, v in kwargs.items()}
        alone = latents_of(stock, SOURCES[i], text, latents=start[2 * i : 2 * i + 1], **single)
        torch.testing.assert_close(result[2 * i : 2 * i + 1], alone, rtol=0, atol=2e-5)


def test_embeddings_instead_of_prompts(pipe):
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=48)
    call = {"mask_image": MASKS, "num_images_per_prompt": 2}
    expected = latents_of(pipe, SOURCES, PROMPTS, generator=generator(), **call)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    torch.testing.assert_close(latents_of(pipe, SOURCES, None, generator=generator(), **given, **call), expected)


@pytest.mark.parametrize("form", ["pil", "list of pil", "tensor", "numpy"])
def test_one_source_and_one_mask_serve_all_prompts(pipe, form):
    array = np.asarray(SOURCES[0], dtype=np.float32)[None] / 255
    image = {
        "pil": SOURCES[0],
        "list of pil": [SOURCES[0]],
        "tensor": torch.from_numpy(array).permute(0, 3, 1, 2),
        "numpy": array,
    }[form]
    masks = [MASKS[0]] if form == "list of pil" else MASKS[0]
    result = latents_of(pipe, image, PROMPTS, mask_image=masks, num_images_per_prompt=2, generator=generator())
    expected = latents_of(
        pipe, [SOURCES[0]] * 2, PROMPTS, mask_image=[MASKS[0]] * 2, num_images_per_prompt=2, generator=generator()
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["tensor", "numpy"])
def test_a_batch_of_sources_as_tensor_or_array(pipe, form):
    array = np.stack([np.asarray(source, dtype=np.float32) / 255 for source in SOURCES])
    image = array if form == "numpy" else torch.from_numpy(array).permute(0, 3, 1, 2)
    call = {"mask_image": MASKS, "num_images_per_prompt": 2}
    result = latents_of(pipe, image, PROMPTS, generator=generator(), **call)
    expected = latents_of(pipe, SOURCES, PROMPTS, generator=generator(), **call)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_a_generator_for_each_candidate_decides_that_one_alone(pipe):
    def drawn(*seeds, group=2, texts=PROMPTS, sources=SOURCES, **more):
        call = {"mask_image": MASKS[: len(texts)], "num_images_per_prompt": group, **more}
        return latents_of(pipe, sources, texts, generator=[generator(seed) for seed in seeds], **call)

    first, second = drawn(1, 2, 3, 4), drawn(1, 5, 3, 4)
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]]) and not torch.equal(first[1], second[1])
    # Of a prompt's own base each candidate can be drawn again by itself.
    one = {"texts": PROMPTS[:1], "sources": SOURCES[:1], "latents": noise(1)}
    together = drawn(1, 2, 3, group=3, **one)
    for i, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(drawn(seed, group=1, **one)[0], together[i])
    with pytest.raises(ValueError, match="generator: got 3, expected one, or one for each of the 2 prompts or 4 cand"):
        drawn(1, 2, 3)


def test_the_generator_decides_everything(pipe):
    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "keep_strength": 0.2}
    first = latents_of(pipe, SOURCES, PROMPTS, generator=generator(1), **call)
    torch.manual_seed(3)
    assert torch.equal(first, latents_of(pipe, SOURCES, PROMPTS, generator=generator(1), **call))
    assert not torch.equal(first, latents_of(pipe, SOURCES, PROMPTS, generator=generator(2), **call))


def test_a_list_of_one_generator_serves_all_prompts(pipe):
    call = {"mask_image": MASKS, "edit_strength": 0.0}
    result = latents_of(pipe, SOURCES, PROMPTS, generator=[generator(1)], **call)
    assert torch.equal(result, latents_of(pipe, SOURCES, PROMPTS, generator=generator(1), **call))


def test_one_generator_for_each_prompt_makes_prompts_independent(pipe):
    call = {"num_images_per_prompt": 2, "edit_strength": 0.9}
    generators = [generator(1), generator(2)]
    both = latents_of(pipe, SOURCES, PROMPTS, mask_image=MASKS, generator=generators, **call)
    for i in range(2):
        alone = latents_of(pipe, SOURCES[i], PROMPTS[i], mask_image=MASKS[i], generator=[generator(i + 1)], **call)
        torch.testing.assert_close(both[2 * i : 2 * i + 2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "masks",
    [
        np.stack([np.asarray(m) for m in MASKS]),
        torch.stack([torch.from_numpy(np.array(m))[None] for m in MASKS]),
        [np.asarray(MASKS[0], dtype=bool), np.asarray(MASKS[1])[..., None] / 255],
    ],
    ids=["array", "tensor with channel", "mixed list"],
)
def test_masks_may_come_as_a_batch(pipe, masks):
    result = latents_of(pipe, SOURCES, PROMPTS, mask_image=masks, generator=generator())
    assert torch.equal(result, latents_of(pipe, SOURCES, PROMPTS, mask_image=MASKS, generator=generator()))


def test_the_base_is_that_of_diffusers_in_half_precision():
    stock = quiet(build_tiny_kontext().to(torch.bfloat16))
    pipe = quiet(RegionDecoupledFluxKontextPipeline.from_pipe(stock, dtype=torch.bfloat16))
    assert pipe.transformer is stock.transformer and stock.dtype == torch.bfloat16
    result = latents_of(
        pipe,
        SOURCES[0],
        PROMPTS[0],
        mask_image=MASKS[0],
        edit_strength=0.0,
        generator=generator(),
        output_type="latent",
    )
    expected = latents_of(stock, SOURCES[0], PROMPTS[0], generator=generator())
    assert result.dtype == torch.bfloat16 and torch.equal(result, expected)


def test_without_text_encoders_embeddings_are_enough(stock, pipe):
    embeds, pooled, _ = stock.encode_prompt(PROMPTS, None, max_sequence_length=48)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    bare = quiet(RegionDecoupledFluxKontextPipeline(**{**stock.components, **parts}))
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "mask_image": MASKS, "output_attention": True}
    result = bare(SOURCES, output_type="latent", generator=generator(), **given, **TINY_CALL)
    expected = latents_of(pipe, SOURCES, PROMPTS, mask_image=MASKS, generator=generator())
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-5)
    assert (result.attention.mass > 0).all()


def test_callbacks_see_every_candidate_at_every_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, *tensors["latents"].shape))
        pipeline._interrupt = step == 1
        return {}

    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "callback_on_step_end": callback}
    latents_of(pipe, SOURCES, PROMPTS, **call)
    assert seen == [(0, 4, 64, 16), (1, 4, 64, 16)]


def test_an_ip_adapter_reaches_every_candidate(with_ip_adapter):
    stock, pipe = with_ip_adapter
    adapter = {"ip_adapter_image": SOURCES[1]}
    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "latents": noise(2), **adapter}
    result, start = started_from(pipe, SOURCES, PROMPTS, **call)
    for i in range(4):
        alone = latents_of(stock, SOURCES[i // 2], PROMPTS[i // 2], latents=start[i : i + 1], **adapter)
        torch.testing.assert_close(result[i : i + 1], alone, rtol=0, atol=1e-4)
    measured = pipe(SOURCES, PROMPTS, output_attention=True, **call, **TINY_CALL).attention
    assert ((measured.mass > 0) & (measured.mass < 1)).all()


@pytest.mark.parametrize("how", ["by model", "by layer"])
def test_offloading_changes_nothing(pipe, how):
    offloaded = quiet(RegionDecoupledFluxKontextPipeline.from_pipe(build_tiny_kontext()))
    if how == "by model":
        offloaded.enable_model_cpu_offload(device="cpu")
    else:  # `enable_sequential_cpu_offload` without an accelerator
        cpu_offload(offloaded.transformer, torch.device("cpu"))
        assert offloaded.transformer.device.type == "meta"
    call = {"mask_image": MASKS[0], "num_images_per_prompt": 2, "output_attention": True, "output_type": "latent"}
    for _ in range(2):
        expected, result = (
            p(SOURCES[0], PROMPTS[0], generator=generator(), **call, **TINY_CALL) for p in (pipe, offloaded)
        )
        assert torch.equal(result.images, expected.images)
        assert torch.equal(result.attention_maps, expected.attention_maps)


# ------------------------------------------------------------------------------------ attention


def test_attention_is_measured_on_a_compiled_transformer(pipe):
    def compile_nothing(graph, inputs):
        raise AssertionError("compiled code would not be heard")

    compiled = quiet(RegionDecoupledFluxKontextPipeline.from_pipe(build_tiny_kontext()))
    compiled.transformer.compile(backend=compile_nothing)
    call = {"mask_image": MASKS[0], "output_attention": True, **TINY_CALL}
    expected, result = (p(SOURCES[0], PROMPTS[0], generator=generator(), **call) for p in (pipe, compiled))
    assert torch.equal(result.attention_maps, expected.attention_maps)


def test_attention_is_that_of_the_instruction_that_t5_reads(pipe, monkeypatch):
    read, weights = [], FluxKontextEditor.instruction_weights
    monkeypatch.setattr(
        FluxKontextEditor,
        "instruction_weights",
        lambda editor, text, *a: read.append(text) or weights(editor, text, *a),
    )
    call = {"mask_image": MASKS[0], "num_images_per_prompt": 2, "output_attention": True, **TINY_CALL}
    pipe(SOURCES[0], PROMPTS[0], **call)
    pipe(SOURCES[0], PROMPTS[0], prompt_2="sunny", **call)
    assert read == [PROMPTS[0]] * 2 + ["sunny"] * 2


def test_attention_of_some_words_blocks_and_steps(pipe):
    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "output_attention": True, **TINY_CALL}
    prompts = ["a red hat", "no hat"]

    def maps(**options):
        return pipe(SOURCES, prompts, generator=generator(), **call, **options).attention_maps

    whole = maps()
    seen = [maps(attention_options=AttentionOptions(blocks=[block])) for block in range(4)]
    torch.testing.assert_close(torch.stack(seen).mean(0), whole)
    seen = [maps(attention_options=AttentionOptions(steps_range=(i / 3, (i + 1) / 3))) for i in range(3)]
    torch.testing.assert_close(torch.stack(seen).mean(0), whole)
    assert not torch.allclose(seen[0], seen[2], atol=1e-4)
    # all words of each prompt are all of its tokens
    torch.testing.assert_close(maps(attention_words=[["red", "a", "hat"], ["no hat"]]), whole)
    alone = pipe(SOURCES[0], prompts[0], attention_words="hat", **{**call, "mask_image": MASKS[0]})
    torch.testing.assert_close(alone.attention_maps.sum((1, 2)), torch.ones(2))
    # sigmas say how many steps there are, whatever holds them
    early, sigmas = AttentionOptions(steps_range=(0, 0.5)), [1.0, 0.5]
    given = [maps(sigmas=values, attention_options=early) for values in (sigmas, np.array(sigmas))]
    assert torch.equal(*given) and not torch.equal(given[0], maps(sigmas=sigmas))
    back = maps(attention_options=AttentionOptions(direction="image_to_text"), attention_words=[["hat"], ["hat"]])
    torch.testing.assert_close(back.sum((1, 2)), torch.ones(4))
    assert not torch.allclose(back, whole, atol=1e-3)


def test_attention_is_that_of_the_same_rollout():
    pipe = encode_one_by_one(quiet(RegionDecoupledFluxKontextPipeline.from_pipe(build_tiny_kontext())))
    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "output_attention": True, "output_type": "latent"}
    output = pipe(SOURCES, PROMPTS, latents=noise(2), generator=generator(), **call, **TINY_CALL)
    _, start = started_from(pipe, SOURCES, PROMPTS, latents=noise(2), generator=generator(), **call)

    editor = FluxKontextEditor(pipe, 32, TINY_CALL["num_inference_steps"], max_sequence_length=48)
    covered = to_tokens(torch.stack([torch.from_numpy(np.array(m)) / 255 for m in MASKS]), (8, 8), "mean")
    covered = covered.repeat_interleave(2, dim=0)
    conditions = editor.encode(SOURCES, PROMPTS).repeat(2)
    trajectory, concentration, _ = rollout(editor, pipe.transformer, start, conditions, covered)
    assert torch.equal(output.images, trajectory[-1])
    for name in ("mass", "density", "contrast"):
        torch.testing.assert_close(getattr(output.attention, name), getattr(concentration, name), rtol=0, atol=1e-6)
    assert output.attention_maps.shape == (4, 8, 8)
    torch.testing.assert_close(output.attention_maps.sum((1, 2)), torch.ones(4))
    torch.testing.assert_close((output.attention_maps.flatten(1) * covered).sum(-1), output.attention.mass)

    for i in range(4):  # and of each candidate alone
        alone = pipe(
            SOURCES[i // 2],
            PROMPTS[i // 2],
            latents=start[i : i + 1],
            **{**call, "mask_image": MASKS[i // 2], "num_images_per_prompt": 1, "edit_strength": 0.0},
            **TINY_CALL,
        )
        torch.testing.assert_close(alone.attention.mass[0], output.attention.mass[i], rtol=0, atol=1e-6)


def test_attention_is_that_of_the_instruction_alone_under_guidance(pipe):
    """At the first step both calls ask the same of the model, so they read the same."""
    call = {"mask_image": MASKS[0], "output_attention": True, **TINY_CALL, "latents": noise(1), "edit_strength": 0.0}
    options = AttentionOptions(steps_range=(0, 1 / 3))
    guided, alone = (
        pipe(SOURCES[0], PROMPTS[0], attention_options=options, **call, **guidance).attention_maps
        for guidance in ({"true_cfg_scale": 3.0, "negative_prompt": "a blue boat"}, {})
    )
    assert torch.equal(guided, alone)


def test_measuring_attention_changes_no_picture(pipe):
    call = {"mask_image": MASKS, "num_images_per_prompt": 2, "return_dict": False, **TINY_CALL}
    images, attention, maps = pipe(SOURCES, PROMPTS, generator=generator(), **call)
    assert attention is None and maps is None
    measured, attention, maps = pipe(SOURCES, PROMPTS, generator=generator(), output_attention=True, **call)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in measured]
    assert ((attention.mass > 0) & (attention.mass < 1)).all()
    assert ((attention.contrast > 0) & (attention.contrast < 1)).all()
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_attention": True}, "output_attention: got True without mask_image"),
        ({"mask_image": Image.new("L", (32, 32))}, r"mask_image\[0\]: got an empty mask"),
        ({"mask_image": Image.new("L", (16, 32), 255)}, r"mask_image\[0\]: got a mask .* \(32, 16\), .* \(32, 32\)"),
        ({"mask_image": MASKS}, "mask_image: got 2, expected one, or one for each of the 1 prompts"),
        ({"mask_image": MASKS[0], "image": SOURCES}, "image: got 2, expected one, or one for each of the 1 prompts"),
        ({"mask_image": MASKS[0], "image": None}, "image: got None, expected the source picture"),
        ({"mask_image": MASKS[0], "image": torch.rand(1, 3, 16, 32)}, r"\(32, 32\), expected .* \(16, 32\)"),
        ({"mask_image": MASKS[0], "image": np.ones((1, 16, 32, 3))}, r"\(32, 32\), expected .* \(16, 32\)"),
        ({"mask_image": np.zeros((2, 2, 32, 32))}, "mask_image: got 2, expected one"),
        ({"mask_image": np.zeros((3, 32, 32, 2))}, "mask_image: got 3, expected one"),
        ({"mask_image": np.full((32, 32), 1.5)}, r"mask_image\[0\]: got values in \[1.5, 1.5\], expected \[0, 1\]"),
        ({"mask_image": MASKS[0], "prompt": None}, "prompt: got neither prompt nor prompt_embeds"),
        ({"mask_image": MASKS[0], "generator": [generator()] * 2}, "generator: got 2, expected one, or one for each"),
        (
            {"mask_image": MASKS[0], "latents": noise(2), "num_images_per_prompt": 2},
            r"latents: got shape \(2, 64, 16\), expected \(1, 64, 16\), one noise for each prompt",
        ),
        ({"mask_image": MASKS[0], "edit_strength": 1.5}, "edit_strength: got 1.5, expected a strength in"),
        ({"mask_image": MASKS[0], "keep_strength": -0.5}, "keep_strength: got -0.5"),
        ({"mask_image": MASKS[0], "attention_words": "hat"}, "expected output_attention=True"),
        (
            {"mask_image": MASKS[0], "output_attention": True, "attention_words": [["a"], ["b"]]},
            r"attention_words: got \[\['a'\], \['b'\]\], expected words of each of the 1 prompts",
        ),
        *(
            (
                {"mask_image": MASKS[0], "output_attention": True, "attention_words": words},
                r"attention_words: got .*, expected words of each prompt",
            )
            for words in ([], "", [[]])
        ),
        (
            {
                "mask_image": MASKS[0],
                "output_attention": True,
                "attention_options": AttentionOptions((0,), (0.4, 0.45)),
            },
            r"attention_options.steps_range: got \(0.4, 0.45\), expected shares that hold at least one of the 3 steps",
        ),
        (
            {"mask_image": MASKS[0], "output_attention": True, "attention_options": AttentionOptions(words_column="w")},
            "attention_options.words_column: got 'w', expected none.*as attention_words",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_their_name(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": SOURCES[0], "prompt": PROMPTS[0], **TINY_CALL, **kwargs})


def test_words_need_a_prompt_that_they_are_of(pipe):
    embeds = {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED}
    call = {"mask_image": MASKS[0], "output_attention": True, "attention_words": "hat", **embeds, **TINY_CALL}
    with pytest.raises(ValueError, match=r"attention_words: got \[\['hat'\]\] with prompt_embeds alone"):
        pipe(SOURCES[0], **call)


def test_an_argument_that_nobody_knows_is_refused(pipe):
    for call in ({}, {"mask_image": MASKS[0]}):
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            pipe(SOURCES[0], PROMPTS[0], colour="red", **call, **TINY_CALL)


# ------------------------------------------------------------------------------------ saving and loading


def test_a_saved_pipeline_opens_everywhere_and_paints_the_same(stock, pipe, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    pipe.save_pretrained(tmp_path / "ours")
    expected = latents_of(stock, SOURCES[0], PROMPTS[0], generator=generator())
    for opener, folder, kind in [
        (RegionDecoupledFluxKontextPipeline, "stock", RegionDecoupledFluxKontextPipeline),
        (RegionDecoupledFluxKontextPipeline, "ours", RegionDecoupledFluxKontextPipeline),
        (FluxKontextPipeline, "ours", FluxKontextPipeline),
        (DiffusionPipeline, "ours", FluxKontextPipeline),
    ]:
        opened = in_own_memory(quiet(opener.from_pretrained(tmp_path / folder)))
        assert type(opened) is kind
        assert torch.equal(latents_of(opened, SOURCES[0], PROMPTS[0], generator=generator()), expected)


def test_from_pipe_shares_the_weights(stock, pipe):
    assert pipe.transformer is stock.transformer and pipe.vae is stock.vae
