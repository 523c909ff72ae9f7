from contextlib import contextmanager

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig, get_peft_model

from rcgrpo.editors import attention
from rcgrpo.editors.attention import AttentionOptions, AttentionRecorder, Concentration, attention_shares
from tiny_kontext import build_tiny_kontext

TEXT, TOKENS, REFERENCE, BATCH = 6, 8, 8, 3  # image and reference: 2 × 4 tokens
BLOCKS = 4  # 2 double, 2 single


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0))
    return {
        "hidden_states": randn(BATCH, TOKENS + REFERENCE, 16),
        "encoder_hidden_states": randn(BATCH, TEXT, 32, seed=1),
        "pooled_projections": randn(BATCH, 32, seed=2),
        "timestep": torch.tensor([1.0, 0.7, 0.2]),
        "img_ids": torch.cat([grid, grid + torch.tensor([1, 0, 0])]),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def regions():
    """A different region and another part of the text in every row, soft values among them."""
    region = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(3))
    region[0] = (torch.arange(TOKENS) < 3).float()
    text = torch.tensor([[1.0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 3, 0, 1, 0, 0]])
    return region, text


def as_built(transformer):
    return transformer


def fused(transformer):
    transformer.fuse_qkv_projections()
    return transformer


def with_adapter(transformer):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return transformer


def wrapped_by_peft(transformer):
    return get_peft_model(transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def another_backend(transformer):
    transformer.set_attention_backend("_native_math")
    return transformer


def checkpointing(transformer):
    transformer.enable_gradient_checkpointing()
    return transformer.train()


@pytest.fixture
def transformer():
    with attention_backend():  # a model that chooses another one chooses it for the process
        yield build_tiny_kontext().transformer


@contextmanager
def dense_attention(monkeypatch):
    """The attention matrices `[batch, heads, rows, keys]` that the stock processors work with, block by block."""
    matrices, dispatch = [], transformer_flux.dispatch_attention_fn

    def spy(query, key, value, **kwargs):
        scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) / query.shape[-1] ** 0.5
        matrices.append(scores.softmax(-1))
        return dispatch(query, key, value, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "dispatch_attention_fn", spy)
        yield matrices


def dense_map(matrices, text):
    """Attention of the weighted text tokens over image tokens, renormalised in each row and head, averaged."""
    maps = []
    for matrix in matrices:
        rows = matrix[:, :, :TEXT, TEXT : TEXT + TOKENS]
        rows = (rows / rows.sum(-1, keepdim=True)).mean(1)
        maps.append(torch.einsum("btp,bt->bp", rows, (text / text.sum(-1, keepdim=True)).double()))
    return torch.stack(maps).mean(0).float()


def dense_looks(matrices, text):
    """Of each image token's attention on the text, the weighted tokens' share; summing to 1 over the image."""
    maps = []
    for matrix in matrices:
        rows = matrix[:, :, TEXT : TEXT + TOKENS, :TEXT]
        rows = (rows / rows.sum(-1, keepdim=True)).mean(1)
        looks = torch.einsum("bpt,bt->bp", rows, (text / text.sum(-1, keepdim=True)).double())
        maps.append(looks / looks.sum(-1, keepdim=True))
    return torch.stack(maps).mean(0).float()


@pytest.mark.parametrize("blocks", [None, [0], [1, 3]])
def test_image_to_text_equals_the_dense_matrix(transformer, blocks, monkeypatch):
    region, text = regions()
    recorder = AttentionRecorder(transformer, blocks, "image_to_text")
    with torch.no_grad(), dense_attention(monkeypatch) as matrices, recorder.record(region, text, maps=True):
        recorded = transformer(**inputs())[0]
    dense = dense_looks([matrices[block] for block in blocks or range(BLOCKS)], text)
    torch.testing.assert_close(recorder.attention_maps(), dense, rtol=0, atol=1e-6)
    with torch.no_grad(), recorder.record(region, text):
        assert torch.equal(transformer(**inputs())[0], recorded)
    mass = recorder.concentration().mass
    torch.testing.assert_close(mass, (dense * region).sum(-1), rtol=0, atol=1e-6)
    other = AttentionRecorder(transformer, blocks)
    with torch.no_grad(), other.record(region, text):
        transformer(**inputs())
    assert (other.concentration().mass - mass).abs().max() > 1e-3, "the two directions are two readings"


@pytest.mark.parametrize(("order", "read"), [(1, [1, 2]), (2, [2, 3, 4])])
def test_only_the_chosen_steps_are_read(transformer, order, read):
    """Of five forwards: steps 1 and 2 of a first-order solver; of Heun's steps, two forwards each."""
    region, text = regions()
    recorder, calls = AttentionRecorder(transformer), []
    for seed in range(5):
        calls.append({**inputs(), "hidden_states": randn(BATCH, TOKENS + REFERENCE, 16, seed=20 + seed)})
    masses = []
    with torch.no_grad():
        for call in calls:
            with recorder.record(region, text):
                transformer(**call)
            masses.append(recorder.concentration().mass)
        with recorder.record(region, text, steps=range(1, 3), order=order):
            for i, call in enumerate(calls):
                transformer(**call)
                with attention.unrecorded():  # true CFG's other pass is no forward of its own
                    transformer(**calls[i - 1])
    torch.testing.assert_close(recorder.concentration().mass, torch.stack([masses[i] for i in read]).mean(0))


def test_options_choose_steps_by_their_share():
    assert AttentionOptions().reads(8) == range(8)
    assert AttentionOptions(steps_range=(0.5, 1)).reads(8) == range(4, 8)
    assert AttentionOptions(steps_range=(0, 0.3)).reads(3) == range(1)
    assert not AttentionOptions(steps_range=(0.4, 0.45)).reads(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"direction": "text-to-image"},
            "direction: got 'text-to-image', expected one of text_to_image, image_to_text",
        ),
        ({"steps_range": (0.5, 0.2)}, r"steps_range: got \(0.5, 0.2\), expected two shares"),
        ({"steps_range": (0.5,)}, "expected two shares"),
        ({"steps_range": (0, 2)}, "expected two shares"),
    ],
)
def test_options_that_cannot_be_read_are_refused(transformer, options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)
    if "direction" in options:
        with pytest.raises(ValueError, match=message):
            AttentionRecorder(transformer, **options)


@pytest.mark.parametrize("prepare", [as_built, fused, with_adapter, wrapped_by_peft, checkpointing, another_backend])
def test_record_equals_the_dense_matrix_and_leaves_every_bit_of_the_output(transformer, prepare, monkeypatch):
    model = prepare(transformer)
    region, text = regions()
    with torch.no_grad(), dense_attention(monkeypatch) as matrices:
        expected = model(**inputs())[0]
    assert len(matrices) == BLOCKS
    dense = dense_map(matrices, text)

    recorder = AttentionRecorder(transformer)
    with torch.no_grad(), recorder.record(region, text):
        recorded = model(**inputs())[0]
    assert torch.equal(recorded, expected)
    mass = recorder.concentration().mass
    torch.testing.assert_close(mass, (dense * region).sum(-1), rtol=0, atol=1e-6)
    assert mass.std() > 0.01, "rows that agree by chance would prove nothing"

    with torch.no_grad(), recorder.record(region, text, maps=True):
        recorded = model(**inputs())[0]
    assert torch.equal(recorded, expected)
    torch.testing.assert_close(recorder.attention_maps(), dense, rtol=0, atol=1e-6)
    torch.testing.assert_close(recorder.attention_maps().sum(-1), torch.ones(BATCH))
    torch.testing.assert_close(recorder.concentration().mass, mass, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_one_block_alone_double_or_single(transformer, block, monkeypatch):
    region, text = regions()
    recorder = AttentionRecorder(transformer, blocks=[block])
    with torch.no_grad(), dense_attention(monkeypatch) as matrices, recorder.record(region, text):
        transformer(**inputs())
    expected = (dense_map(matrices[block : block + 1], text) * region).sum(-1)
    torch.testing.assert_close(recorder.concentration().mass, expected, rtol=0, atol=1e-6)


def test_the_record_is_the_mean_over_forwards_and_starts_anew(transformer):
    region, text = regions()
    recorder, other = AttentionRecorder(transformer), inputs()
    other["hidden_states"] = randn(BATCH, TOKENS + REFERENCE, 16, seed=9)
    masses = []
    for calls in ([inputs()], [other], [inputs(), other]):
        with torch.no_grad(), recorder.record(region, text):
            for call in calls:
                transformer(**call)
        masses.append(recorder.concentration().mass)
    assert (masses[0] - masses[1]).abs().max() > 1e-4
    torch.testing.assert_close(masses[2], (masses[0] + masses[1]) / 2)


def test_uniform_attention_reads_density_1_and_contrast_a_half(transformer):
    region, text = regions()
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "norm_q" in name or "norm_added_q" in name:
                weight.zero_()
        recorder = AttentionRecorder(transformer)
        with recorder.record(region, text):
            transformer(**inputs())
    result = recorder.concentration()
    torch.testing.assert_close(result.mass, region.mean(-1))
    torch.testing.assert_close(result.density, torch.ones(BATCH))
    torch.testing.assert_close(result.contrast, torch.full((BATCH,), 0.5))


def test_concentration_by_hand():
    region = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    result = Concentration.from_mass(torch.tensor([0.5, 0.0, 1.0]), region)
    assert result.density.tolist() == [2, 0, 1]
    # first row: mean inside .5 / .25 = 2, outside .5 / .75 = 2/3
    assert result.contrast.tolist() == [pytest.approx(0.75), 0, 0.5]
    assert result[1:].mass.tolist() == [0, 1]


def test_shares_by_hand():
    # One head, one feature: logits 0, ln 3 and ln 4 give odds 1 : 3 : 4.
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 3.0, 4.0]).log().view(1, 3, 1, 1)
    values = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [0.5, 1.0]]])
    torch.testing.assert_close(attention_shares(query, key, values), torch.tensor([[[5 / 8, 1.0]]]))


def test_shares_are_the_fused_kernels():
    query, key, values = randn(2, 3, 4, 8), randn(2, 5, 4, 8, seed=1), randn(2, 5, 2, seed=2)
    heads = [values.unsqueeze(1).expand(-1, 4, -1, -1), query.transpose(1, 2), key.transpose(1, 2)]
    fused = torch.nn.functional.scaled_dot_product_attention(heads[1], heads[2], heads[0]).mean(1)
    torch.testing.assert_close(attention_shares(query, key, values), fused)


def test_rotation_is_that_of_diffusers():
    states, angles = randn(2, 5, 3, 8), randn(5, 4, seed=1).repeat_interleave(2, dim=1)
    expected = apply_rotary_emb(states, (angles.cos(), angles.sin()), sequence_dim=1)
    turned = attention.rotate(states, torch.polar(torch.ones(5, 4), angles[:, ::2]))
    torch.testing.assert_close(turned, expected)
    assert attention.rotate(states.bfloat16(), torch.ones(5, 4, dtype=torch.cfloat)).dtype == torch.bfloat16


def test_an_instruction_without_tokens_of_its_own_has_no_attention(transformer):
    region, text = regions()
    text[1] = 0
    recorder = AttentionRecorder(transformer)
    for weights, mass in ((text, None), (torch.zeros_like(text), 0)):
        with torch.no_grad(), recorder.record(region, weights):
            transformer(**inputs())
        read = recorder.concentration().mass
        assert read[1] == 0 and (read[0] > 0 if mass is None else not read.any())


def test_nothing_is_recorded_under_grad_and_each_block_once_without(transformer, monkeypatch):
    transformer.enable_gradient_checkpointing()
    transformer.train()
    calls = []
    monkeypatch.setattr(attention, "attention_shares", lambda *args: calls.append(0) or attention_shares(*args))
    recorder = AttentionRecorder(transformer)
    with recorder.record(*regions()):
        transformer(**inputs())[0].sum().backward()
        assert not calls
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            recorder.concentration()
        with torch.no_grad():
            transformer(**inputs())
        assert len(calls) == BLOCKS
        before = recorder.concentration().mass
        transformer(**inputs())[0].sum().backward()
    assert len(calls) == BLOCKS
    assert torch.equal(recorder.concentration().mass, before)


def test_gradients_are_the_same_while_recording(transformer):
    def gradient():
        transformer.zero_grad()
        transformer(**inputs())[0].square().sum().backward()
        return transformer.x_embedder.weight.grad.clone()

    expected = gradient()
    with AttentionRecorder(transformer).record(*regions()):
        assert torch.equal(gradient(), expected)


def test_hooks_are_gone_afterwards_even_after_an_error(transformer):
    def hooks():
        return sum(len(module._forward_hooks) for module in transformer.modules())

    with pytest.raises(KeyError), AttentionRecorder(transformer).record(*regions()):
        assert hooks() > 0
        raise KeyError
    assert hooks() == 0


@pytest.mark.parametrize("blocks", [[], [BLOCKS], [-1]])
def test_block_numbers_are_checked(transformer, blocks):
    with pytest.raises(ValueError, match=r"blocks: got \[.*\], expected block numbers in 0..3"):
        AttentionRecorder(transformer, blocks)


def test_maps_must_be_asked_for(transformer):
    recorder = AttentionRecorder(transformer)
    with torch.no_grad(), recorder.record(*regions()):
        transformer(**inputs())
    with pytest.raises(RuntimeError, match="maps=True"):
        recorder.attention_maps()
