"""What every editor must pass: one suite, on random models of the real classes. A new editor adds a row to `CASES`."""

import functools
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.models.transformers import transformer_flux, transformer_flux2, transformer_qwenimage
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.data.edits import Edit
from rcgrpo.editors import ConditionCache, Conditions, RegionDecoupledPipeline, open_editor
from rcgrpo.editors.attention import AttentionOptions
from rcgrpo.evaluation.survey import depth_variance
from rcgrpo.groups.rollout import Exploration, make_groups, rollout
from rcgrpo.maths.regions import to_tokens
from tiny_editors import SMALL_QWEN, build_tiny_flux2, build_tiny_klein, build_tiny_qwen
from tiny_kontext import build_tiny_kontext, in_own_memory

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """An editor of a tiny pipeline, whose pictures have `side`² pixels.

    `options` go to the editor; `guided` where each step asks for a negative prompt too; `processors` is where the
    attention of its transformer is dispatched, `blocks` how many it has; `length` of a padded text.
    """

    build: Callable[[], Any]
    processors: Any
    options: dict[str, Any] = field(default_factory=dict)
    guided: bool = False
    blocks: int = 4
    side: int = 64
    length: int = 96

    def picture(self, seed, columns=8, rows=8):
        """Noise, of so many tokens."""
        shape = (rows * self.side // 8, columns * self.side // 8, 3)
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def mask(self, columns=8, rows=8):
        """Of a picture: three rows of four tokens."""
        array = np.zeros((rows, columns), dtype=np.uint8)
        array[1:4, 1:5] = 255
        return Image.fromarray(array.repeat(self.side // 8, 0).repeat(self.side // 8, 1))


TRUE_CFG = {"true_cfg_scale": 2.5, "negative_prompt": "blurry"}
CASES = {
    "kontext": Case(build_tiny_kontext, transformer_flux, side=32),
    "kontext, true cfg": Case(build_tiny_kontext, transformer_flux, TRUE_CFG, True, side=32),
    "klein base": Case(build_tiny_klein, transformer_flux2, {"guidance_scale": 3.0}, True),
    "klein distilled": Case(lambda: build_tiny_klein(is_distilled=True), transformer_flux2),
    "flux.2-dev": Case(build_tiny_flux2, transformer_flux2, {"guidance_scale": 3.0}, length=256),
    "qwen": Case(build_tiny_qwen, transformer_qwenimage, blocks=2),
    "qwen 2511, cfg": Case(lambda: build_tiny_qwen(zero_cond_t=True), transformer_qwenimage, TRUE_CFG, True, 2),
}
STEPS = 3
PROMPTS = ["make it red", "add a small boat"]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=CASES)
def case(request):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_QWEN.items():
            patch.setattr(pipeline_qwenimage_edit_plus, name, value)
        yield CASES[request.param]


@pytest.fixture(scope="module")
def stock(case):
    return shared(case.build)


@pytest.fixture(scope="module")
def pipe(stock):
    return quiet(RegionDecoupledPipeline.from_pipe(stock))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def call_of(case, columns=8, rows=8, **more):
    """The stock call's arguments for the same as the editor does, of a picture of so many tokens."""
    editor = editor_of(case, shared(case.build))
    return editor.call_arguments(rows * case.side // 8, columns * case.side // 8) | more


@functools.cache
def shared(build):
    return quiet(build())


def editor_of(case, pipeline, **more):
    return open_editor(pipeline, case.side, STEPS, max_sequence_length=case.length, **{**case.options, **more})


def stock_latents(pipe, noise, grid):
    """As the stock call takes them."""
    return RegionDecoupledPipeline.from_pipe(pipe)._from_tokens(noise, grid)


def walked(pipeline, *args, **kwargs):
    """The pictures that a call draws, and its packed latents after each step."""
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    return pipeline(*args, callback_on_step_end=keep, **kwargs).images, seen


def pixels(images):
    return [image.tobytes() for image in images]


# ------------------------------------------------------------------------------------------ the stock pipeline


MORE = [{}, {"num_images_per_prompt": 2}, {"rows": 4, "columns": 16}, {"num_inference_steps": 2, "sigmas": [1.0, 0.7]}]


@pytest.mark.parametrize("more", MORE, ids=" ".join)
def test_without_our_arguments_every_bit_is_diffusers_own(case, stock, pipe, more):
    call = call_of(case, **more)
    outputs = [p(case.picture(1), PROMPTS[0], generator=generator(), **call) for p in (stock, pipe)]
    assert type(outputs[0]) is type(outputs[1])
    assert pixels(outputs[0].images) == pixels(outputs[1].images)


def test_the_signature_is_diffusers_own_and_ours(stock, pipe):
    theirs, ours = signature(type(stock).__call__).parameters, signature(type(pipe).__call__).parameters
    assert list(ours.values())[: len(theirs)] == list(theirs.values())
    added = list(ours)[len(theirs) :]
    assert added[:3] == ["mask_image", "edit_strength", "keep_strength"] and "output_attention" in added


@pytest.mark.parametrize(("columns", "rows"), [(8, 8), (12, 8)])
def test_the_seam_reproduces_the_stock_pipeline(case, stock, columns, rows):
    """`encode → schedule → velocity → decode`, step for step, picture for picture."""
    source = case.picture(1, columns, rows)
    editor, (width, height) = editor_of(case, stock), source.size
    editor.resolution = (width * height) ** 0.5
    assert editor.size_for(source) == (height, width)
    grid = editor.grid_for(height, width)
    assert grid == (rows, columns)
    noise = torch.randn(1, grid[0] * grid[1], editor.channels, generator=generator(5))
    call = call_of(case, columns, rows, latents=stock_latents(stock, noise, grid))
    images, steps = walked(stock, source, PROMPTS[0], **call)
    conditions = editor.encode([source], PROMPTS[:1])
    trajectory, attention, maps = rollout(editor, stock.transformer, noise, conditions)
    assert attention is None and maps is None and torch.equal(trajectory[0], noise)
    assert torch.equal(trajectory[1:], torch.stack(steps))
    assert pixels(editor.decode(trajectory[-1], height, width)) == pixels(images)
    others = {"source": ([case.picture(2, columns, rows)], PROMPTS[:1]), "instruction": ([source], PROMPTS[1:])}
    for name, given in others.items():
        other, _, _ = rollout(editor, stock.transformer, noise, editor.encode(*given))
        assert (other[-1] - trajectory[-1]).abs().max() > 1e-3, f"else the {name} would not be seen"


def test_velocities_in_bf16_are_the_stock_ones(case, monkeypatch):
    """The stock loop rounds its latents after each step; asked at its own, the editor answers the same bits."""
    pipe, asked = quiet(case.build().to(torch.bfloat16)), []
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda v, t, latents, **k: asked.append((v, t, latents)) or step(v, t, latents, **k)
    )
    pipe(case.picture(1), PROMPTS[0], generator=generator(), **call_of(case))
    monkeypatch.undo()
    editor = editor_of(case, pipe)
    conditions, schedule = editor.encode([case.picture(1)], PROMPTS[:1]), editor.schedule(case.side, case.side)
    for (expected, _, latents), timestep in zip(asked, schedule.timesteps, strict=True):
        with torch.no_grad():
            velocity = editor.velocity(pipe.transformer, latents.float(), timestep.expand(1), conditions)
        assert velocity.dtype == torch.bfloat16 and torch.equal(velocity, expected)


def test_a_saved_pipeline_opens_by_its_class(case, stock, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == type(stock).__name__
    expected = pixels(stock(case.picture(1), PROMPTS[0], generator=generator(), **call_of(case)).images)
    for opener, kind in ((RegionDecoupledPipeline, type(pipe)), (AutoPipelineForImage2Image, type(stock))):
        opened = in_own_memory(quiet(opener.from_pretrained(tmp_path)))
        assert type(opened) is kind
        assert pixels(opened(case.picture(1), PROMPTS[0], generator=generator(), **call_of(case)).images) == expected


# ------------------------------------------------------------------------------------------ a call with a mask


def started_from(pipe, tokens, *args, **kwargs):
    """What a call returns, and the noise that its candidates start from."""
    seen, rows = {}, []

    def look(module, args, kwargs):
        states = kwargs["hidden_states"][:, :tokens]
        if float(kwargs["timestep"][0]) == 1 and kwargs["encoder_hidden_states"].data_ptr() not in seen:
            seen[kwargs["encoder_hidden_states"].data_ptr()] = kwargs["encoder_hidden_states"]
            rows.append(states)

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        return pipe(*args, **kwargs), rows
    finally:
        handle.remove()


def test_candidates_share_the_stock_noise_outside_the_mask(case, stock, pipe):
    inside = to_tokens(torch.from_numpy(np.array(case.mask()) / 255), (8, 8), "max") == 1
    call = call_of(case, generator=generator())
    output, rows = started_from(
        pipe,
        64,
        case.picture(1),
        PROMPTS[0],
        mask_image=case.mask(),
        num_images_per_prompt=3,
        edit_strength=0.6,
        **call,
    )
    _, base = started_from(stock, 64, case.picture(1), PROMPTS[0], **{**call, "generator": generator()})
    assert len(output.images) == 3 and rows[0].shape[:2] == (3, 64)
    assert (rows[0][:, ~inside] == base[0][:, ~inside]).all()
    assert (rows[0][0, inside] != rows[0][1, inside]).all() and (rows[0][:, inside] != base[0][:, inside]).all()
    difference = rows[0][:, inside] - 0.8 * base[0][:, inside]
    assert difference.std().item() == pytest.approx(0.6, abs=0.1)


def test_each_prompt_keeps_its_own_source_and_mask(case, stock, pipe):
    sources, masks = (
        [case.picture(1), case.picture(2)],
        [case.mask(), case.mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT)],
    )
    call = call_of(case, mask_image=masks, num_images_per_prompt=2)
    generators = [generator(1), generator(2)]
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * 2
    both = pipe(sources, PROMPTS, generator=generators, output_type="pt", **call).images
    assert len(both) == 4
    for i in range(2):
        call = call_of(case, mask_image=masks[i], num_images_per_prompt=2, output_type="pt")
        alone = pipe(sources[i], PROMPTS[i], generator=generator(i + 1), **call).images
        # One generator draws the base and then both differences at once; a list draws one after the other.
        torch.testing.assert_close(both[2 * i], alone[0], rtol=0, atol=1e-4)


def test_no_strength_repeats_the_stock_picture(case, stock, pipe):
    call = call_of(case, generator=generator())
    output = pipe(case.picture(1), PROMPTS[0], mask_image=case.mask(), edit_strength=0.0, output_attention=True, **call)
    call["generator"] = generator()
    assert pixels(output.images) == pixels(stock(case.picture(1), PROMPTS[0], **call).images)
    assert output.attention_maps.shape == (1, 8, 8)
    torch.testing.assert_close(output.attention_maps.sum((1, 2)), torch.ones(1))


# ------------------------------------------------------------------------------------------ attention


@contextmanager
def dense_attention(processors, monkeypatch):
    """The attention matrices `[batch, heads, rows, keys]` that the stock processors work with, block by block."""
    matrices, dispatch = [], processors.dispatch_attention_fn

    def spy(query, key, value, attn_mask=None, **kwargs):
        scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        matrices.append(scores.softmax(-1))
        return dispatch(query, key, value, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(processors, "dispatch_attention_fn", spy)
        yield matrices


def dense_map(matrices, text, direction):
    """Attention of the weighted text tokens over image tokens, or the other way round; mean over heads and blocks."""
    length, share, maps = text.shape[1], (text / text.sum(-1, keepdim=True)).double(), []
    for matrix in matrices:
        if direction == "text_to_image":
            rows = matrix[:, :, :length, length : length + 64]
            maps.append(torch.einsum("btp,bt->bp", (rows / rows.sum(-1, keepdim=True)).mean(1), share))
        else:
            rows = matrix[:, :, length : length + 64, :length]
            looks = torch.einsum("bpt,bt->bp", (rows / rows.sum(-1, keepdim=True)).mean(1), share)
            maps.append(looks / looks.sum(-1, keepdim=True))
    return torch.stack(maps).mean(0).float()


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
@pytest.mark.parametrize("how", ["plain", "fused", "both halves at once", "some blocks"])
def test_attention_equals_the_dense_matrix(case, how, direction, monkeypatch):
    pipe = case.build()
    if how == "fused":
        pipe.transformer.fuse_qkv_projections()
    editor = editor_of(case, pipe, batch_guidance=how == "both halves at once")
    blocks = [case.blocks - 1, 0] if how == "some blocks" else list(range(case.blocks))
    conditions = editor.encode([case.picture(1), case.picture(2)], PROMPTS)
    covered = torch.rand(2, 64, generator=generator(3))
    noise, time = torch.randn(2, 64, editor.channels, generator=generator(4)), torch.tensor([700.0, 200.0])
    with torch.no_grad(), dense_attention(case.processors, monkeypatch) as matrices:
        expected = editor.velocity(pipe.transformer, noise, time, conditions)
    assert len(matrices) == case.blocks * (1 + (case.guided and how != "both halves at once"))
    dense = dense_map([matrices[block][:2] for block in blocks], conditions.text_weights, direction)
    recorder = editor.attention(AttentionOptions(blocks, direction=direction))
    with torch.no_grad(), recorder.record(covered, conditions.text_weights, maps=True):
        recorded = editor.velocity(pipe.transformer, noise, time, conditions)
    assert torch.equal(recorded, expected)
    torch.testing.assert_close(recorder.attention_maps(), dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(recorder.concentration().mass, (dense * covered).sum(-1), rtol=0, atol=1e-5)
    assert (dense[0] - dense[1]).abs().max() > 1e-3, "rows that agree by chance would prove nothing"


def test_a_call_reads_the_attention_of_the_same_rollout(case, pipe):
    """The instruction's own tokens ask, the negative prompt does not, wherever they are tokenized."""
    call = call_of(case, mask_image=case.mask(), num_images_per_prompt=2, output_attention=True, attention_words="red")
    output, rows = started_from(pipe, 64, case.picture(1), PROMPTS[0], generator=generator(), **call)
    editor = editor_of(case, pipe)
    conditions = editor.encode([case.picture(1)], PROMPTS[:1], words=[["red"]]).repeat(2)
    assert 3 <= conditions.text_weights[0].sum() <= 4  # letter by letter, and perhaps the space before
    covered = to_tokens(torch.from_numpy(np.array(case.mask()) / 255), (8, 8), "mean").float().repeat(2, 1)
    _, concentration, maps = rollout(editor, pipe.transformer, rows[0], conditions, covered, maps=True)
    torch.testing.assert_close(output.attention.mass, concentration.mass, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.attention_maps.flatten(1), maps, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------ the editor


def parts_of(conditions):
    tensors = {"weights": conditions.text_weights, "source": conditions.source, "read": conditions.reference_tokens}
    return {**tensors, **conditions.text, **{f"negative {name}": each for name, each in conditions.negative.items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_cache_changes_no_bit(case, tmp_path):
    sources, prompts = [case.picture(1), case.picture(2)], [PROMPTS[0]] * 2
    expected = parts_of(editor_of(case, case.build()).encode(sources, prompts))
    for _ in range(2):
        pipe, calls = case.build(), []
        for part in (pipe.text_encoder, pipe.vae.encoder):
            part.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        editor = editor_of(case, pipe, cache=ConditionCache(tmp_path))
        editor.place(torch.device("cpu"))
        assert same(parts_of(editor.encode(sources, prompts)), expected)
    assert not calls, "the second time everything comes from the disk"


def test_batches_of_several_sizes_and_lengths(case, stock):
    """Each sample's velocity is its own, however long the texts beside it are."""
    editor = editor_of(case, stock)
    prompts = ["red", "a much longer instruction", "boat"]
    together = editor.encode([case.picture(i) for i in range(3)], prompts)
    alone = [editor.encode([case.picture(i)], prompts[i : i + 1]) for i in range(3)]
    assert same(parts_of(Conditions.concatenate(alone)), parts_of(together))
    noise, time = torch.randn(3, 64, editor.channels, generator=generator()), torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad():
        batch = editor.velocity(stock.transformer, noise, time, together)
        for i in range(3):
            single = editor.velocity(stock.transformer, noise[i : i + 1], time[i : i + 1], alone[i])
            torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=2e-5)
    shapes = [(8, 8), (16, 4), (8, 8)]
    edits = [
        Edit(i, f"edit {i}", case.picture(i, *shape), prompts[i], to_mask(case.mask(*shape)), {})
        for i, shape in enumerate(shapes)
    ]
    groups = make_groups(editor, stock.transformer, edits, 2, Exploration(), (0,), "mass", batch_size=3)
    for group, shape in zip(groups, shapes, strict=True):
        height, width = editor.size_for(group.source)
        rows, columns = editor.grid_for(height, width)
        assert (columns, rows) == shape and group.images[0].size == (width, height)
        assert group.trajectory.shape[:2] == (STEPS + 1, 2)
        assert group.region.shape == (rows * columns,) == group.trajectory.shape[2:3]
        assert torch.equal(group.region, to_tokens(to_mask(case.mask(*shape)), (rows, columns), "max"))
        assert group.conditions.source.shape[1] == rows * columns
        assert (group.trajectory[0][:, group.region == 0] == group.trajectory[0][:1, group.region == 0]).all()


def test_depth_is_read_after_every_block(case, stock):
    """Two candidates differ inside the region from the first layer on, and outside no sooner than they attend."""
    editor = editor_of(case, stock)
    edit = Edit(0, "edit", case.picture(1), PROMPTS[0], to_mask(case.mask()), {})
    (group,) = make_groups(editor, stock.transformer, [edit], 2, Exploration(), (0,))
    depth = depth_variance(editor, stock.transformer, group, 0)
    assert depth.inside.shape == depth.outside.shape == (case.blocks + 1,)
    assert (depth.inside > 0).all() and depth.outside[0] == 0 and (depth.outside[1:] > 0).all()
    editor.batch_guidance = True
    at_once = depth_variance(editor, stock.transformer, group, 0)
    torch.testing.assert_close(at_once.inside, depth.inside, rtol=1e-3, atol=1e-6)


def to_mask(image):
    return torch.from_numpy(np.array(image) / 255).float()


def test_both_halves_of_guidance_may_be_one_batch(case, stock):
    apart, at_once = editor_of(case, stock), editor_of(case, stock, batch_guidance=True)
    conditions = apart.encode([case.picture(1), case.picture(2)], PROMPTS)
    assert bool(conditions.negative) == case.guided
    noise, time = torch.randn(2, 64, apart.channels, generator=generator()), torch.tensor([900.0, 100.0])
    calls = []
    handle = stock.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = apart.velocity(stock.transformer, noise, time, conditions)
        found = at_once.velocity(stock.transformer, noise, time, conditions)
    handle.remove()
    assert len(calls) == (3 if case.guided else 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_gradient_checkpointing_changes_no_gradient(case):
    pipe = case.build()
    editor, gradients = editor_of(case, pipe), []
    conditions = editor.encode([case.picture(1)], PROMPTS[:1])
    noise = torch.randn(1, 64, editor.channels, generator=generator())
    for prepare in (lambda: None, pipe.transformer.enable_gradient_checkpointing):
        prepare()
        pipe.transformer.train().zero_grad()
        velocity = editor.velocity(pipe.transformer, noise, torch.tensor([600.0]), conditions)
        velocity.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in pipe.transformer.named_parameters() if p.grad is not None})
    assert same(*gradients) and len(gradients[0]) > 20


# ------------------------------------------------------------------------------------------ training


def blind(prompts, **columns):
    return [float((len(prompt) + i) % 4 % 3) for i, prompt in enumerate(prompts)]


def trainer_of(case, folder, **more):
    pipe = quiet(case.build())
    options: dict[str, Any] = {
        "resolution": case.side,
        "num_inference_steps": STEPS,
        "max_sequence_length": case.length,
    }
    options |= {"num_generations": 2, "num_anchors": 1, "num_policy_steps": 1, "learning_rate": 1.0, "optim": "sgd"}
    options |= {"lr_scheduler_type": "constant", "max_steps": 4, "save_steps": 2, "use_cpu": True, "bf16": False}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    options |= {"gradient_checkpointing": False, "log_completions": False, **case.options, **more}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(open_editor(pipe, 64, 1).lora_targets))
    args = RCGRPOConfig(str(folder), **options)
    return RCGRPOTrainer(pipe, blind, args, compbench_mini("train", 8, case.side), None, lora)


def lora_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_training_resuming_and_what_the_stock_pipeline_draws_of_it(case, tmp_path):
    trainer = trainer_of(case, tmp_path)
    start = lora_of(trainer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "policy/log_ratio_max" in row]
    assert len(logged) == 4 and all(row["policy/log_ratio_max"] == 0 for row in logged)
    assert all(row["grad_norm"] > 0 for row in logged)
    trained = lora_of(trainer)
    changed = [name for name in trained if not torch.equal(trained[name], start[name])]
    assert len(changed) > len(trained) / 3

    resumed = trainer_of(case, tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(lora_of(resumed), trained)

    trainer.save_model(str(tmp_path))
    fresh, call = quiet(case.build()), call_of(case, output_type="np")
    before = fresh(case.picture(1), PROMPTS[0], generator=generator(), **call).images
    fresh.load_lora_weights(str(tmp_path))
    loaded = fresh(case.picture(1), PROMPTS[0], generator=generator(), **call).images
    mine = trainer.pipeline(case.picture(1), PROMPTS[0], generator=generator(), **call).images
    assert np.abs(loaded - mine).max() < 1e-5 and np.abs(loaded - before).max() > 1e-4
