"""`trainer.py`: what must hold of an update for any model, checked on a random one of 32 x 32 pixels."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig

import rcgrpo.groups.policies.neighbor
from rcgrpo import RCGRPOConfig, RCGRPOTrainer
from rcgrpo.evaluation.held_out import judge_held_out
from rcgrpo.groups.reward_gradient import follow
from rcgrpo.groups.transitions import gather
from tiny_kontext import build_tiny_kontext
from tiny_training import (
    FLOW_GRPO,
    FOUR,
    LAYERS,
    brightness,
    by_number,
    distance,
    flat_for_removals,
    last,
    make,
    on_two_processes,
    same,
    trained_step_by_step,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 1},
        {"train_micro_batch_size": 3, "rollout_batch_size": 5, "bf16": True},
        {"num_iterations": 2, "attention_reward_weight": 0.1, "beta": 0.1},
        {"num_iterations": 2, "train_micro_batch_size": 3, "bf16": True},
    ],
)
def test_ratio_is_one_exactly_until_the_first_update(tmp_path, data, shape):
    trainer = make(tmp_path, data, epsilon=0.2, **shape)  # or the second update clips every ratio
    trainer.train()
    first, second = last(trainer, "policy/log_ratio_max")
    assert first == 0
    assert (second > 0) == ("num_iterations" in shape)
    assert all(norm > 0 for norm in last(trainer, "grad_norm"))


@pytest.mark.parametrize(("bf16", "attention"), [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_update_takes_an_anchor_where_the_rollout_took_it(tmp_path, data, monkeypatch, bf16, attention):
    """In one batch shape; the trainer's own ratio could not tell, as its old policy is its first forward."""
    seen = []

    def spy(candidates, predicted, *rest, _original=rcgrpo.groups.policies.neighbor.surrogate_log_probs):
        seen.append((candidates, predicted.detach()))
        return _original(candidates, predicted, *rest)

    monkeypatch.setattr(rcgrpo.groups.policies.neighbor, "surrogate_log_probs", spy)
    shape = {"per_device_train_batch_size": 1, "num_anchors": 4, "num_policy_steps": 1}  # 4 candidates, 4 transitions
    trainer = make(tmp_path, data, bf16=bf16, attention_reward_weight=attention, max_steps=1, **shape)
    where = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs: where.extend(inputs.where) or compute_loss(model, inputs)
    trainer.train()
    ((candidates, predicted),) = seen
    assert sorted(anchor for _, anchor, _ in where) == [0, 1, 2, 3]
    for i, (_, anchor, _) in enumerate(where):
        off, apart = ((predicted[i] - candidates[i, other]).norm() for other in (anchor, anchor - 1))
        assert off < 1e-4 * apart  # zero on most CPUs; some round a row by its place in the batch


OPTIONS = {
    "flow_grpo": FLOW_GRPO,
    "flow_grpo without region": FLOW_GRPO | {"exploration": "global", "keep_weight": 1.0},
    "flow_grpo in a window": FLOW_GRPO | {"sde_window": 1, "num_policy_steps": 1, "beta": 0.1},
    "nft": {"policy": "nft"},
    "nft without region": {"policy": "nft", "exploration": "global", "keep_weight": 1.0, "train_micro_batch_size": 3},
    "solver": {"solver": "heun"},
    "true CFG": {"true_cfg_scale": 2.0, "negative_prompt": "blurry", "attention_reward_weight": 0.1},
    "hinge": {"keep_hinge_weight": 1.0},
    "batch": {"scale_rewards": "batch", "epsilon_high": 0.5},
    "independent": {"independent_share": 0.5},
    "region advantages": {"region_advantages": True, "reward_regions": ["edit"], "attention_reward_weight": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_meets_its_old_policy_exactly(tmp_path, data, name):
    # A wide clip, as these first updates are large and a group whose every ratio is clipped has no gradient.
    trainer = make(tmp_path, data, **({"num_iterations": 2, "epsilon": 0.2} | OPTIONS[name]))
    start = weights(trainer)
    trainer.train()
    measure = "policy/velocity_change" if name.startswith("nft") else "policy/log_ratio_max"
    first, second = last(trainer, measure)
    assert first == 0 < second
    assert all(0 < norm < float("inf") for norm in last(trainer, "grad_norm"))
    assert not same(weights(trainer), start)
    assert ("keep_hinge" in trainer.state.log_history[0]) == (name == "hinge")


@pytest.mark.parametrize("options", [{}, {"distance_space": "clean", "bf16": True}, FLOW_GRPO, {"solver": "euler"}])
def test_a_rollout_of_other_weights_than_the_updates_shows(tmp_path, data, options):
    """The ratio cannot: it starts from the update's own first forward."""
    found = {}
    for shift in (0.0, 0.05):
        trainer = make(
            tmp_path / str(shift), data, **({"max_steps": 2, "num_iterations": 2, "save_steps": 2} | options)
        )
        make_groups = trainer.make_groups

        def shifted(*given, make_groups=make_groups, trainer=trainer, shift=shift, **named):
            groups = make_groups(*given, **named)
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter += shift
            return groups

        trainer.make_groups = shifted
        trainer.train()
        (found[shift],) = last(trainer, "policy/rollout_mismatch")  # in the first update on a rollout alone
        assert last(trainer, "policy/log_ratio_max")[0] == 0
    assert found[0.0] < (1e-2 if options.get("bf16") else 1e-5) < found[0.05] / 3


@pytest.mark.parametrize("options", [{"solver": "heun"}, {"solver": "dpmpp_2m"}, {"policy": "nft"}])
def test_mismatch_is_not_told_where_rollouts_take_other_steps(tmp_path, data, options):
    trainer = make(tmp_path, data, max_steps=1, **options)
    trainer.train()
    assert not last(trainer, "policy/rollout_mismatch")


@pytest.fixture(scope="module")
def moved(data, tmp_path_factory):
    """A trainer one update after its base, two transitions, and what base and adapter say there."""
    trainer = make(tmp_path_factory.mktemp("moved"), data, by_number, max_steps=1, beta=0.5)
    trainer.train()
    found = gather(trainer._buffer[0], [(0, 0, 0), (1, 1, 1)], trainer.policy, {})
    inputs = (found.latents, found.timestep, found.conditions)
    with torch.no_grad():
        base, now = (trainer.editor.velocity(m, *inputs) for m in (build_tiny_kontext().transformer, trainer.model))
    return trainer, found, base, now


def loss_with(trainer, transitions, **options):
    off = {"beta": 0.0, "beta_keep": 1.0, "keep_hinge_weight": 0.0, "keep_hinge_margin": 0.0}
    for name, value in (off | options).items():
        setattr(trainer.args, name, value)
    return float(trainer.compute_loss(trainer.model, transitions))


def test_the_kl_is_to_the_base_and_stronger_outside(moved):
    """The base is another model's, so an adapter that stayed on for the reference would be found out."""
    trainer, found, base, now = moved
    assert last(trainer, "kl") == [0.0], "exactly, before the first update"
    squared, region = (now - base).square(), found.elements
    assert 0 < region.mean() < found.region.mean() < 1, "finer than tokens"
    inside, outside = ((squared * side).mean() for side in (region, 1 - region))
    assert inside > 1e-8 and outside > 1e-8
    plain = loss_with(trainer, found)
    for beta, beta_keep in ((10.0, 1.0), (10.0, 3.0), (20.0, 0.0)):
        expected = float(beta * (inside + beta_keep * outside))
        assert loss_with(trainer, found, beta=beta, beta_keep=beta_keep) - plain == pytest.approx(expected, rel=1e-3)


def test_the_kl_is_taken_at_any_step_that_a_rewards_gradient_moves(tmp_path, data):
    """By hand: the transitions' ways are three places long, and the drawn ones are not all the first."""
    following = {"reward_gradient_weight": 1.0, "reward_gradient_steps": 3, "num_inference_steps": 3}
    trainer = make(tmp_path, data, bright, max_steps=1, **following)
    trainer.train()
    with torch.no_grad():
        for number, weight in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    found = gather(trainer._buffer[0], [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)], trainer.policy, {})
    steps = [int(3 * torch.rand(1, generator=generator)) for generator in found.generators("kl")]
    assert len(set(steps)) > 1
    with torch.no_grad():
        first = trainer.editor.velocity(trainer.model, found.latents, found.timestep, found.conditions)
        latents, times, now = follow(trainer.editor, trainer.model, found, first, 3).places(found.generators("kl"))
        assert times.tolist() == [float(found.groups[0].schedule.timesteps[step]) for step in steps]
        base = trainer.editor.velocity(build_tiny_kontext().transformer, latents, times, found.conditions)
        squared = (now - base).square()
        still = trainer.editor.velocity(
            build_tiny_kontext().transformer, found.latents, found.timestep, found.conditions
        )
    plain = loss_with(trainer, found)
    assert loss_with(trainer, found, beta=10.0) - plain == pytest.approx(10 * float(squared.mean()), rel=1e-3)
    assert float((first - still).square().mean()) != pytest.approx(float(squared.mean()), rel=0.05)


def test_the_hinge_begins_beyond_its_margin(moved):
    trainer, found, _, now = moved
    clean = found.latents - found.sigma.view(2, 1, 1) * now
    squared, keep = (clean - found.conditions.source).square().mean(-1), 1 - found.region
    margin = float(squared.median())
    plain = loss_with(trainer, found)
    for weight, allowed in ((2.0, 0.0), (2.0, margin), (4.0, margin), (1.0, 1e6)):
        expected = weight * ((squared - allowed).clamp(min=0) * keep).sum(-1) / keep.sum(-1)
        given = loss_with(trainer, found, keep_hinge_weight=weight, keep_hinge_margin=allowed) - plain
        assert given == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-7)
    assert 0 < margin < 1e6


def brighter_tensors(pictures, **columns):
    return pictures.mean((1, 2, 3))


def bright(images, **columns):
    return brightness(images)


bright.differentiable = brighter_tensors  # type: ignore[attr-defined]


def test_a_rewards_own_gradient_is_followed(tmp_path, data):
    """Along the prediction of the result; with a weight on nothing else the reward of predictions rises."""
    alone = {"reward_gradient_weight": 1.0, "max_steps": 6, "learning_rate": 3.0, "keep_weight": 0.0}
    trainer = make(tmp_path, data, bright, edit_strength=1e-3, per_device_train_batch_size=4, seed=5, **alone)
    trainer.train()
    predicted = last(trainer, "reward_of_prediction")
    assert len(predicted) == 6 and predicted[-1] > predicted[0] + 0.002
    with pytest.raises(ValueError, match=r"reward_gradient_weight: got 1\.0 with \['brightness'\]"):
        make(tmp_path, data, brightness, reward_gradient_weight=1.0)
    with pytest.raises(ValueError, match="reward_gradient_weight: got -1"):
        make(tmp_path, data, bright, reward_gradient_weight=-1.0)


def test_dropped_groups_are_held_to_nothing(moved):
    """Section 8: the anchors to base and source are off where a group teaches nothing."""
    trainer, found, _, _ = moved
    given = {"beta": 10.0, "keep_hinge_weight": 2.0}
    dropped = replace(found, advantages=found.advantages.clone())
    dropped.advantages[1] = 0
    alone = [loss_with(trainer, found, **{name: given[name]}) - loss_with(trainer, found) for name in given]
    left = [loss_with(trainer, dropped, **{name: given[name]}) - loss_with(trainer, dropped) for name in given]
    assert all(0 < less < more for less, more in zip(left, alone, strict=True))
    dropped.advantages.zero_()
    assert loss_with(trainer, dropped, **given) == 0


@pytest.fixture(scope="module", params=[by_number, flat_for_removals])
def reference(request, data, tmp_path_factory):
    """One micro-step of four edits per update, after one update and two, with and without groups that are dropped."""
    trainer = make(tmp_path_factory.mktemp("reference"), data, request.param, **FOUR)
    start, results = weights(trainer), trained_step_by_step(trainer)
    dropped = last(trainer, "frac_reward_zero_std")
    assert any(dropped) == (request.param is flat_for_removals) and min(dropped) < 1
    return request.param, start, results


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_micro_batch_size": 3},
        {"train_micro_batch_size": 5, "rollout_batch_size": 3, "gradient_checkpointing": False},
    ],
)
def test_how_an_update_is_split_does_not_matter(tmp_path, data, reference, shape):
    reward, start, expected = reference
    trainer = make(tmp_path, data, reward, **(FOUR | shape))
    assert same(weights(trainer), start)
    for found, wanted in zip(trained_step_by_step(trainer), expected, strict=True):
        assert distance(found, wanted, start) < 1e-5


def test_gradient_checkpointing_can_be_off(tmp_path, data):
    trainer = make(tmp_path, data, gradient_checkpointing=False, max_steps=1)
    trainer.train()
    assert not trainer.pipeline.transformer.is_gradient_checkpointing


@pytest.mark.parametrize("as_folder", [True, False])
def test_half_precision_base_stays_so(tmp_path, data, as_folder):
    """A Kontext of 24 GB must not silently become one of 48."""
    pipe = build_tiny_kontext()
    options = {"max_steps": 1}
    if as_folder:
        pipe.save_pretrained(tmp_path / "base")
        options["model_init_kwargs"] = json.dumps({"torch_dtype": "bfloat16"})
    else:
        pipe = pipe.to(torch.bfloat16)
    small = {"resolution": 32, "max_sequence_length": 16, "num_inference_steps": 3, "num_policy_steps": 2}
    args = RCGRPOConfig(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **small, **options)
    model = str(tmp_path / "base") if as_folder else pipe
    trainer = RCGRPOTrainer(model, brightness, args, data, None, LoraConfig(target_modules=LAYERS))
    base = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in [*base, *trainer.pipeline.vae.parameters()]} == {torch.bfloat16}
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0 and last(trainer, "policy/log_ratio_max") == [0.0]


def test_non_finite_loss_stops_at_once(tmp_path, data):
    trainer = make(tmp_path, data)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss: got nan at step 0 on train row \d.*lower learning_rate"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


WORKER = """
import sys
from pathlib import Path
import torch
import tiny_training as t
from rcgrpo import compbench_mini
from rcgrpo.evaluation.held_out import judge_held_out
folder, data = Path(sys.argv[1]), compbench_mini("train", 12, 32)
options = {**t.FOUR, "per_device_train_batch_size": 2, "train_micro_batch_size": 3}
options |= {"cache_conditions": True, "conditions_cache_dir": str(folder / "conditions"), "log_completions": True}
trainer = t.make(folder, data, t.flat_for_removals, compbench_mini("test", 3, 32), **options)
before = judge_held_out(trainer, trainer.eval_dataset, "before")
trainer.train()
after = judge_held_out(trainer, trainer.eval_dataset, "after")
judged = [[(one.row, one.scores, list(one.pictures)) for one in some] for some in (before, after)]
torch.save((t.weights(trainer), t.history(trainer), judged), folder / f"rank{trainer.args.process_index}.pt")
trainer.close()
"""


@pytest.mark.parametrize("reference", [flat_for_removals], indirect=True)
def test_two_processes_train_and_judge_what_one_does(tmp_path, reference, data, held_out):
    """With groups that one rank drops and the other has not, so that ranks differ in micro-batches."""
    status, errors = on_two_processes(tmp_path, WORKER)
    assert status == 0, errors[-3000:]
    (first, log, judged), (second, _, of_second) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    assert judged == of_second and judged[0] != judged[1]
    alone = make(tmp_path / "alone", data, flat_for_removals, held_out, **FOUR)
    for one, (row, scores, pictures) in zip(judge_held_out(alone, alone.eval_dataset, ""), judged[0], strict=True):
        assert (one.row, list(one.pictures), list(one.scores)) == (row, pictures, list(scores))
        measured = [[v or 0.0 for name, v in s.items() if name != "reward"] for s in (one.scores, scores)]
        assert measured[0] == pytest.approx(measured[1], rel=1e-3)  # this reward is a place in the batch
    _, start, (_, single) = reference
    assert distance(first, single, start) < 1e-5
    assert len(log) == 2 and 0 < log[0]["reward"] < 1
    cached = list(tmp_path.glob("conditions/image-*/*.safetensors"))
    assert len(cached) == 2 * 4 + 3  # of two updates, and the held-out edits
    for row in log:
        kept = str(tmp_path / "completions" / f"completions_{row['step']:05d}.parquet")
        table = datasets.Dataset.from_parquet(kept).to_pandas()
        assert table["edit"].nunique() == 4 and table["reward"].mean() == pytest.approx(row["reward"])
