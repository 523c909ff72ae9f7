import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.editors import Conditions, FluxKontextEditor, Schedule
from rcgrpo.editors.attention import AttentionRecorder
from rcgrpo.editors.schedule import SOLVERS, make_solver
from rcgrpo.editors.sizes import fit_size
from rcgrpo.editors.words import find_words
from rcgrpo.groups.rollout import integrate, rollout
from tiny_kontext import TINY_CALL, build_tiny_kontext, encode_one_by_one

PROMPTS = ["make it red", "add a small boat"]


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise(batch, tokens=64, seed=0):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


def editor_of(pipeline, **kwargs):
    return FluxKontextEditor(pipeline, 32, TINY_CALL["num_inference_steps"], max_sequence_length=48, **kwargs)


@pytest.fixture(scope="module")
def pipeline():
    pipe = build_tiny_kontext()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------ the stock pipeline, to the bit


@pytest.mark.parametrize(("width", "height"), [(32, 32), (36, 24), (20, 48)])
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_rollout_reproduces_the_stock_pipeline(width, height, guidance_embeds):
    pipe = encode_one_by_one(build_tiny_kontext(guidance_embeds=guidance_embeds))
    pipe.set_progress_bar_config(disable=True)
    sources, start = [picture(1, width, height), picture(2, width, height)], noise(2, width * height // 16)
    call = {**TINY_CALL, "width": width, "height": height, "max_area": width * height, "guidance_scale": 2.0}
    latents = pipe(sources, PROMPTS, latents=start, output_type="latent", **call).images
    images = pipe(sources, PROMPTS, latents=start, **call).images

    editor = editor_of(pipe, guidance_scale=2.0)
    editor.resolution = (width * height) ** 0.5
    assert editor.size_for(sources[0]) == (height, width)
    trajectory, attention, maps = rollout(editor, pipe.transformer, start, editor.encode(sources, PROMPTS))
    assert attention is None and maps is None
    assert torch.equal(trajectory[0], start)
    assert torch.equal(trajectory[-1], latents)
    for ours, theirs in zip(editor.decode(trajectory[-1], height, width), images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_guidance_reaches_a_distilled_model():
    pipe = build_tiny_kontext(guidance_embeds=True)
    results = []
    for guidance_scale in (1.0, 5.0):
        editor = editor_of(pipe, guidance_scale=guidance_scale)
        conditions = editor.encode([picture(1)], PROMPTS[:1])
        results.append(editor.velocity(pipe.transformer, noise(1), torch.tensor([700.0]), conditions))
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_velocities_in_bf16_are_the_stock_ones_and_latents_stay_fp32():
    pipe = encode_one_by_one(build_tiny_kontext(guidance_embeds=True)).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    start, seen = noise(2).bfloat16(), []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"][:, :64], output[0][:, :64])),
        with_kwargs=True,
    )
    # t/1000 rounds differently before and after the cast for three of eight timesteps, for none of three
    call = {**TINY_CALL, "num_inference_steps": 8}
    images = pipe([picture(1), picture(2)], PROMPTS, latents=start, **call).images
    handle.remove()

    editor = editor_of(pipe)
    editor.num_inference_steps = 8
    conditions = editor.encode([picture(1), picture(2)], PROMPTS)
    for (latents, expected), timestep in zip(seen, editor.schedule(32, 32).timesteps, strict=True):
        with torch.no_grad():
            velocity = editor.velocity(pipe.transformer, latents.float(), timestep.expand(2), conditions)
        assert velocity.dtype == torch.bfloat16
        assert torch.equal(velocity, expected)

    trajectory, _, _ = rollout(editor, pipe.transformer, start, conditions)
    assert trajectory.dtype == torch.float32
    for ours, theirs in zip(editor.decode(trajectory[-1], 32, 32), images, strict=True):
        # the stock loop rounds its latents to bf16 after each step
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 3


def test_a_vae_in_fp32_beside_a_model_in_bf16():
    """Decoding in bf16 is learned as texture, so the VAE may keep its precision."""
    pipe = build_tiny_kontext()
    expected = editor_of(pipe).encode([picture(1)], PROMPTS[:1]).source
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.to(torch.bfloat16)
    editor = editor_of(pipe)
    conditions = editor.encode([picture(1)], PROMPTS[:1])
    assert torch.equal(conditions.source, expected.bfloat16())
    assert conditions.text["prompt_embeds"].dtype == torch.bfloat16
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert len(editor.decode(expected, 32, 32)) == 1 and seen == [torch.float32]


def test_schedule_runs_from_1_to_0_and_is_ready_to_repeat(pipeline):
    editor = editor_of(pipeline)
    schedule = editor.schedule(32, 32)
    assert len(schedule) == 3 and len(schedule.sigmas) == 4
    assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigmas[:-1])
    assert schedule.solver.begin_index == 0 and schedule.solver is not pipeline.scheduler
    # The shift counts the noisy tokens: 64 here, exp(mu) with mu linear through (256, .5) and (4096, 1.15).
    shift = np.exp(0.5 + (64 - 256) * 0.65 / 3840)
    assert schedule.sigmas[1].item() == pytest.approx(shift / (shift + (1 / (2 / 3) - 1)), abs=1e-6)


# ------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 1024, (1024, 1024)),
        (512, 512, (1024, 1024)),
        (768, 1024, (880, 1168)),  # sqrt(2^20 · 3/4) = 886.8, sqrt(2^20 · 4/3) = 1182.4
        (1024, 768, (1168, 880)),
    ],
)
def test_size_keeps_the_aspect_ratio_at_the_area(height, width, expected):
    assert fit_size(height, width, 1024**2, 16) == expected


def test_size_and_grid_of_a_picture(pipeline):
    editor = editor_of(pipeline)
    assert editor.multiple == 4 and editor.channels == 16
    assert editor.size_for(picture(0, width=300, height=100)) == (16, 52)  # 18.5 and 55.4, floored to 4
    assert editor.grid_for(16, 52) == (4, 13)


def test_a_resolution_below_one_token_is_refused(pipeline):
    with pytest.raises(ValueError, match="resolution: got 3, expected at least 4 pixels"):
        FluxKontextEditor(pipeline, 3, 2)


def test_pictures_of_different_sizes_are_refused_together(pipeline):
    with pytest.raises(
        ValueError, match=r"images: got pictures edited at \[\(24, 36\), \(32, 32\)\], expected one size"
    ):
        editor_of(pipeline).encode([picture(1), picture(2, width=48, height=32)], PROMPTS)


def test_pictures_of_different_size_and_one_aspect_ratio_go_together(pipeline):
    conditions = editor_of(pipeline).encode([picture(1), picture(2, width=80, height=80)], PROMPTS)
    assert (conditions.height, conditions.width) == (32, 32)
    assert conditions.source.shape == (2, 64, 16)


# ------------------------------------------------------------------------------------ conditions


def test_samples_are_encoded_independently_of_their_batch(pipeline):
    editor = editor_of(pipeline)
    both = editor.encode([picture(1), picture(2)], PROMPTS)
    for i in range(2):
        alone = editor.encode([picture(i + 1)], PROMPTS[i : i + 1])
        assert both.text.keys() == alone.text.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
        assert all(torch.equal(both[i : i + 1].text[name], tensor) for name, tensor in alone.text.items())
        assert torch.equal(both.text_weights[i : i + 1], alone.text_weights)
        assert torch.equal(both.source[i : i + 1], alone.source)


def conditions_of(values):
    values = torch.tensor(values, dtype=torch.float32)
    return Conditions({"prompt_embeds": values.view(-1, 1, 1)}, values.view(-1, 1), values.view(-1, 1, 1), 32, 16)


def test_instruction_weights_leave_out_padding_and_the_end(pipeline):
    editor = editor_of(pipeline)
    editor.max_sequence_length = 10
    # the tokenizer spells: one mark at the start of each word, one token a letter
    assert editor.instruction_weights("red").tolist() == [1] * 4 + [0] * 6
    assert editor.instruction_weights("a boat").tolist() == [1] * 7 + [0] * 3
    # cut off, the instruction still ends in the end-of-sequence token
    editor.max_sequence_length = 4
    assert editor.instruction_weights("a boat").tolist() == [1, 1, 1, 0]


def test_given_words_are_found_by_where_their_tokens_stand(pipeline):
    editor, prompts = editor_of(pipeline), ["a hat, a red hat", "that Hat hath"]
    editor.max_sequence_length = 20
    weights = [editor.instruction_weights(prompt, ["hat"]) for prompt in prompts]
    spelt = [pipeline.tokenizer_2.convert_ids_to_tokens(pipeline.tokenizer_2(p).input_ids) for p in prompts]
    chosen = ["".join(t for t, w in zip(s, row, strict=False) if w) for s, row in zip(spelt, weights, strict=True)]
    # whole words, wherever they stand and however they are written; the mark at a word's start may be either's
    assert [text.replace("▁", "") for text in chosen] == ["hathat", "Hat"]
    both = editor.instruction_weights(prompts[0], ["red", "a hat"])
    assert both.sum() == editor.instruction_weights(prompts[0], ["red"]).sum() + 6
    assert find_words("C++ (or c++)", ["c++"]) == [(0, 3), (8, 11)]
    with pytest.raises(ValueError, match=r"words: got \['boat'\], expected words of 'a hat, a red hat' within"):
        editor.instruction_weights(prompts[0], ["boat"])
    editor.max_sequence_length = 4
    with pytest.raises(ValueError, match="within its first 4 tokens"):  # cut off
        editor.instruction_weights(prompts[0], ["red"])


def test_given_words_need_a_tokenizer_that_knows_where_they_stand(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.tokenizer_2), "is_fast", False)
    editor = editor_of(pipeline)
    assert editor.instruction_weights("a hat").sum() == 6
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        editor.instruction_weights("a hat", ["hat"])


def test_velocity_depends_on_source_and_instruction(pipeline):
    editor = editor_of(pipeline)
    conditions = editor.encode([picture(1), picture(2), picture(1)], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    with torch.no_grad():
        velocity = editor.velocity(
            pipeline.transformer, noise(1).expand(3, -1, -1), torch.full((3,), 500.0), conditions
        )
    assert velocity.shape == (3, 64, 16)
    assert (velocity[0] - velocity[1]).abs().max() > 1e-3
    assert (velocity[0] - velocity[2]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ solvers


class LinearFlow:
    """An editor of a flow that can be solved by hand: data N(0, .25), so x_σ = x_1 √(variance(σ) / variance(1))."""

    def __init__(self, solver, steps):
        line = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
        sigmas = 2 * line / (1 + line)  # shifted as the pipeline's are
        order = 2 if solver == "heun" else 1
        self.schedule = Schedule(sigmas, 1000 * sigmas[:-1], order, make_solver(solver, sigmas))
        self.asked = []

    def velocity(self, model, latents, timestep, conditions):
        sigma = timestep.view(-1, 1, 1) / 1000
        self.asked.append(float(sigma[0]))
        return (sigma - (1 - sigma) * 0.25) / ((1 - sigma) ** 2 * 0.25 + sigma**2) * latents


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_converge_on_a_known_flow_at_their_order(solver):
    conditions, errors = conditions_of([1.0]), {}
    for steps in (8, 16, 32):
        flow = LinearFlow(solver, steps)
        trajectory = integrate(flow, None, torch.ones(1, 1, 1), conditions, flow.schedule)
        assert len(trajectory) == steps + 1
        assert len(flow.asked) == (2 * steps - 1 if solver == "heun" else steps)
        sigmas = flow.schedule.sigmas
        exact = ((1 - sigmas) ** 2 * 0.25 + sigmas**2).sqrt()
        errors[steps] = float((trajectory.flatten() - exact).abs().max())
    order = np.log2(errors[8] / errors[32]) / 2
    assert (0.8 < order < 1.2) if solver == "euler" else (order > 1.4)
    assert errors[16] == pytest.approx(0.064, abs=1e-3) if solver == "euler" else errors[16] < 0.02


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_walk_the_same_levels_and_start_afresh(pipeline, solver):
    plain, editor = editor_of(pipeline), editor_of(pipeline, solver=solver)
    assert torch.equal(editor.schedule(32, 32).sigmas, plain.schedule(32, 32).sigmas)
    assert torch.equal(editor.schedule(32, 32).timesteps, plain.schedule(32, 32).timesteps)
    conditions = editor.encode([picture(1), picture(2)], PROMPTS)
    expected, *_ = rollout(plain, pipeline.transformer, noise(2), conditions)
    whole, *_ = rollout(editor, pipeline.transformer, noise(2), conditions)
    parts, *_ = rollout(editor, pipeline.transformer, noise(2), conditions, batch_size=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert whole.shape == expected.shape and torch.equal(whole[0], expected[0])
    difference = (whole[-1] - expected[-1]).abs().max()
    assert difference == 0 if solver == "euler" else 1e-4 < difference < 3


def test_a_solver_needs_noise_levels_to_take_over():
    from diffusers import UniPCMultistepScheduler

    pipe = build_tiny_kontext()
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"solver: got 'heun' with a pipeline whose scheduler is UniPC.*leave solver"):
        editor_of(pipe, solver="heun")


# ------------------------------------------------------------------------------------ true CFG


def test_true_cfg_reproduces_the_stock_pipeline():
    pipe = encode_one_by_one(build_tiny_kontext())
    pipe.set_progress_bar_config(disable=True)
    sources, start = [picture(1), picture(2)], noise(2)
    call = {**TINY_CALL, "true_cfg_scale": 2.5, "negative_prompt": ["blurry", "blurry"], "output_type": "latent"}
    latents = pipe(sources, PROMPTS, latents=start, **call).images
    editor = editor_of(pipe, true_cfg_scale=2.5, negative_prompt="blurry")
    trajectory, *_ = rollout(editor, pipe.transformer, start, editor.encode(sources, PROMPTS))
    assert torch.equal(trajectory[-1], latents)
    plain = editor_of(pipe)
    unguided, *_ = rollout(plain, pipe.transformer, start, plain.encode(sources, PROMPTS))
    assert (unguided[-1] - latents).abs().max() > 1e-2


def test_the_negative_pass_leaves_no_trace_in_the_attention_record(pipeline):
    readings = []
    for scale in (1.0, 3.0):
        editor = editor_of(pipeline, true_cfg_scale=scale, negative_prompt="blurry")
        conditions = editor.encode([picture(1)], PROMPTS[:1])
        recorder = AttentionRecorder(pipeline.transformer)
        region = torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), recorder.record(region, conditions.text_weights):
            editor.velocity(pipeline.transformer, noise(1), torch.tensor([700.0]), conditions)
        readings.append(recorder.concentration())
    assert torch.equal(readings[0].mass, readings[1].mass)


def test_decoded_tensors_are_the_pictures_and_have_a_gradient():
    editor = editor_of(build_tiny_kontext())
    latents = torch.randn(2, 64, editor.channels, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    tensors = editor.decode_tensor(latents, 32, 32)
    assert tensors.shape == (2, 3, 32, 32) and float(tensors.min()) >= 0 and float(tensors.max()) <= 1
    for tensor, image in zip(tensors.detach(), editor.decode(latents, 32, 32), strict=True):
        assert np.abs(255 * tensor.permute(1, 2, 0).numpy() - np.asarray(image, float)).max() <= 0.5 + 1e-3
    tensors.sum().backward()
    assert latents.grad is not None and bool(latents.grad.abs().sum((1, 2)).gt(0).all())
