"""`gradient_noise.py`: the trainer's own gradient, by region and by kind of layer."""

import json
import math

import pytest
import torch

from rcgrpo.evaluation.gradient_noise import (
    Measured,
    _group_gradients,
    layer_kind,
    measure_gradients,
    write_gradients,
)
from rcgrpo.groups.transitions import choose, gather
from rcgrpo.maths.gradient_noise import gram_of, interval, noise_of
from tiny_training import brightness, make

pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = {"keep_strength": 0.4, "keep_weight": 0.5, "keep_hinge_weight": 0.3, "beta": 0.1}


WAYS = {**BOTH, "reward_gradient_weight": 1.0, "reward_gradient_steps": 3, "num_inference_steps": 3}


def bright(images, **columns):
    return brightness(images)


bright.differentiable = lambda pictures, **columns: pictures.mean((1, 2, 3))  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [BOTH, {**BOTH, "policy": "nft"}, {**BOTH, "train_micro_batch_size": 1}, WAYS])
def test_parts_add_up_to_the_gradient_of_training(tmp_path, data, options):
    trainer, key = make(tmp_path, data, bright, **options), ("gradient", 1)
    edit, args = trainer.train_dataset.edit(3), trainer.args
    with torch.no_grad():  # a LoRA that has moved, so that both its halves have gradients and beta pulls
        for number, weight in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    (edits, keeps, later), seconds = _group_gradients(trainer, edit, key)
    groups = trainer.make_groups([edit], args.num_generations, key)
    trainer.score_groups(groups)
    where = choose(groups, trainer.policy, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
    trainer.model.train()
    trainer.compute_loss(trainer.model, gather(groups, where, trainer.policy, {})).backward()
    wanted = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    scale = max(float(grad.abs().max()) for grad in wanted)
    assert scale > 0 and seconds > 0
    for *parts, whole in zip(edits, keeps, later, wanted, strict=True):
        assert torch.allclose(sum(parts), whole, atol=1e-4 * scale)
    sizes = [max(float(part.abs().max()) for part in parts) / scale for parts in (edits, keeps, later)]
    assert min(sizes[:2]) > 1e-2 and (sizes[2] > 1e-2) == (options is WAYS)


def test_an_objective_of_the_region_alone_has_no_gradient_elsewhere(tmp_path, data):
    trainer = make(tmp_path, data, keep_weight=0.0, mask_growth=0.0)
    measured = measure_gradients(trainer, [trainer.train_dataset.edit(i) for i in range(3)], 2)
    assert not measured.grams["keep tokens"].any()
    assert torch.equal(measured.grams["edit tokens"], measured.grams["all"])
    whole = measured.grams["all"]
    assert whole.shape == (3, 2, 3, 2) and noise_of(whole).within > 0
    kinds = [gram for name, gram in measured.grams.items() if name not in ("all", "edit tokens", "keep tokens")]
    assert len(kinds) > 3 and torch.allclose(sum(kinds), whole, rtol=1e-4)
    assert not trainer._metrics["train"] and all(p.grad is None for p in trainer.model.parameters())


def test_kinds_of_layers_have_no_numbers():
    start = "base_model.model."
    names = {
        start + "transformer_blocks.0.attn.to_q.lora_A.default.weight": "transformer_blocks.attn.to_q",
        start + "transformer_blocks.11.ff.net.0.proj.lora_B.default.weight": "transformer_blocks.ff.net.0.proj",
        start + "single_transformer_blocks.3.proj_out.lora_magnitude_vector.default.weight": (
            "single_transformer_blocks.proj_out"
        ),
        "single_transformer_blocks.3.proj_mlp.bias": "single_transformer_blocks.proj_mlp",
        "x_embedder.weight": "x_embedder",
    }
    assert {name: layer_kind(name) for name in names} == names


def test_the_report(tmp_path):
    """|mean|² 3, variance 3 (2 within), of one kind of layer out of two; the other has no gradient."""
    found = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[3.0, 1.0], [3.0, -1.0]]], dtype=torch.float64)
    grams = {"all": gram_of(found), "to_q": gram_of(found), "to_v": gram_of(0 * found)}
    text = write_gradients(tmp_path, Measured(grams, 0.5), {"num_draws": 2})
    assert text == (tmp_path / "gradient.md").read_text() and "0.50 s a group" in text
    report = json.loads((tmp_path / "gradient.json").read_text())
    whole, same, none = report["parts"]
    assert (whole["snr"], whole["groups"], whole["seconds"], whole["variance_share"]) == (1, 1, 0.5, 1)
    assert whole["within_share"] == pytest.approx(2 / 3) and str(same) == str({**whole, "part": "to_q"})
    assert (none["snr"], none["groups"], none["variance_share"]) == (0, float("inf"), 0)
    assert [cell.strip() for cell in text.splitlines()[2].split("|")][1:6] == ["all", "1", "–", "1", "–"]
    assert all(math.isnan(end) for name in ("snr_95", "groups_95") for end in whole[name]), "two edits are one pair"


def test_six_edits_have_an_interval(tmp_path):
    found = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[3.0, 1.0], [3.0, -1.0]]], dtype=torch.float64).repeat(3, 1, 1)
    text = write_gradients(tmp_path, Measured({"all": gram_of(found)}, 0.5), {})
    (whole,) = json.loads((tmp_path / "gradient.json").read_text())["parts"]
    low, high = interval(gram_of(found))
    assert whole["snr_95"] == [low, high] and whole["groups_95"] == [1 / high, 1 / low] and 0 < low < high
    assert [cell.strip() for cell in text.splitlines()[2].split("|")][3] == f"[{low:.2g}, {high:.2g}]"
