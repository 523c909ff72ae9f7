"""`saving.py`: what a run leaves on disk draws what was trained, goes on bit by bit, and is never spoiled."""

import socket

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import TrainerCallback

from rcgrpo.rewards import RequiredRewardError
from rcgrpo.training.checkpoints import newest_whole
from tiny_kontext import build_tiny_kontext, in_own_memory
from tiny_training import StopAt, brightness, draw, history, last, make, on_two_processes, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("rows", "stop", "total", "options"),
    [
        (12, 2, 4, {}),  # within an epoch
        (4, 3, 5, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),  # epochs of two updates
        (4, 4, 6, {"num_iterations": 2}),  # at an epoch's end
    ],
)
def test_resume_is_bit_exact(tmp_path, data, rows, stop, total, options):
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": total, **adam, **options}
    whole = make(tmp_path, data.select(range(rows)), **options)
    whole.train()
    resumed = make(tmp_path, data.select(range(rows)), **(options | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert history(resumed)[stop:] == history(whole)[stop:] and len(history(whole)) == total
    assert same(weights(resumed), weights(whole))


def test_stock_pipeline_draws_what_was_trained(tmp_path, data, monkeypatch):
    """Also the trap that only users step into: without CI set, TRL reports to its server in `__init__`."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_):
        raise AssertionError("a training run must not open connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    base = build_tiny_kontext()
    trainer = make(tmp_path, data, pipe=build_tiny_kontext(), save_strategy="steps", save_steps=1)
    assert trainer.args.gradient_checkpointing and trainer.pipeline.transformer.is_gradient_checkpointing is False
    trainer.train()
    assert trainer.pipeline.transformer.is_gradient_checkpointing
    trainer.save_model()
    trained, plain = draw(trainer.pipeline), draw(base)
    assert not np.array_equal(trained, plain)
    with trainer.model.disable_adapter():
        assert np.array_equal(draw(trainer.pipeline), plain)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        stock = build_tiny_kontext()
        stock.load_lora_weights(str(folder))
        assert np.array_equal(draw(stock), trained)
    assert "library_name: diffusers" in (tmp_path / "checkpoint-1" / "README.md").read_text()


def test_a_scripts_card_has_its_curves_and_every_held_out_set(tmp_path, data, held_out):
    """And callbacks are given what they get in TRL, for each set."""
    given = {}

    class Listen(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            given.update(kwargs)

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            given.setdefault("metrics", []).append(metrics)

    sets = {"near": held_out, "far": held_out.select([0])}
    options = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    trainer = make(tmp_path, data, eval_dataset=sets, callbacks=[Listen()], **options)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    found = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    near, far = given["metrics"]
    assert found["near_reward"] == near["eval_near_reward"] and found["far_reward"] == far["eval_far_reward"]
    assert "![Reward curves](reward_curves.png)" in card.text and (tmp_path / "reward_curves.png").is_file()
    assert "| `lora_r` | 4 |" in card.text and "`debug`" not in card.text
    assert given["model"] is trainer.model and len(given["train_dataloader"]) > 0
    assert {"optimizer", "lr_scheduler", "processing_class", "eval_dataloader"} <= set(given)


def test_full_fine_tuning_saves_resumes_and_keeps_the_best(tmp_path, data, held_out):
    def best_after_one(images, trainer_state, **columns):
        return [b + 9 * (trainer_state.global_step == 1) for b in brightness(images)]

    options = {"peft": None, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, data, **options)
    whole.train()
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    resumed = make(tmp_path, data, **(options | {"eval_strategy": "no", "load_best_model_at_end": False}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(resumed), weights(whole)) and len(weights(whole)) > 50
    stock = FluxKontextPipeline(**build_tiny_kontext().components)
    stock.transformer = type(stock.transformer).from_pretrained(tmp_path / "checkpoint-2" / "transformer")
    assert np.array_equal(draw(in_own_memory(stock)), draw(whole.pipeline))

    best = make(tmp_path / "best", data, best_after_one, held_out, metric_for_best_model="eval_reward", **options)
    best.train()
    saved = load_file(next((tmp_path / "best" / "checkpoint-1" / "transformer").glob("*.safetensors")))
    assert same(weights(best), saved)


class Flaky:
    """Works at start-up and for the first updates, then fails with `error`."""

    required, reward_name = True, "flaky"

    def __init__(self, error, works):
        self.error, self.works = error, works

    def __call__(self, images, trainer_state, **columns):
        if trainer_state.global_step >= self.works:
            raise self.error
        return brightness(images)


@pytest.mark.parametrize(
    ("error", "raised", "saved"),
    [(OSError("gone"), RequiredRewardError, 3), (KeyboardInterrupt(), KeyboardInterrupt, 2)],
)
def test_what_was_trained_survives_a_stop_and_goes_on_bit_by_bit(tmp_path, data, error, raised, saved):
    """The reward breaks after two updates; batches without a score do not count as failures until patience ends."""
    options = {"max_steps": 5, "max_reward_failures": 2}
    trainer = make(tmp_path, data, Flaky(error, 2), **options)
    with pytest.raises(raised):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert (tmp_path / f"checkpoint-{saved}" / "pytorch_lora_weights.safetensors").exists()
    stopped = weights(trainer)
    resumed = make(tmp_path, data, Flaky(error, 9), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5 and not same(weights(resumed), stopped)
    if saved == 2:
        whole = make(tmp_path / "whole", data, Flaky(error, 9), **options)
        whole.train()
        assert same(weights(resumed), weights(whole))


@torch.no_grad()
def poison(model):
    [p for p in model.parameters() if p.requires_grad][3].view(-1)[1] = float("nan")


@pytest.mark.parametrize("regular", [True, False])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path, data, caplog, regular):
    """Whether the next save is due before the loss shows it, or the run stops at a loss of NaN."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    trainer = make(tmp_path, data, callbacks=[StopAt(4 if regular else 3, poison)], **options)
    expected = r"lora_\w+.*: got NaN.*after step 4.*lower learning_rate" if regular else "loss: got nan at step 3"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert any("no checkpoint is written" in record.getMessage() for record in caplog.records)
    resumed = make(tmp_path, data, **(options | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert all(w.isfinite().all() for w in weights(resumed).values())


def test_a_loss_of_nan_does_not_cost_good_weights(tmp_path, data):
    trainer = make(tmp_path, data)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *given: compute_loss(*given) * (float("nan") if trainer.state.global_step else 1)
    with pytest.raises(FloatingPointError, match="loss: got nan at step 1"):
        trainer.train()
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("where", ["_load_from_checkpoint", "_load_optimizer_and_scheduler", "make_groups"])
def test_a_stop_while_resuming_leaves_the_checkpoint_alone(tmp_path, data, monkeypatch, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    trainer = make(tmp_path, data, save_strategy="steps", save_steps=1, optim="adamw_torch")
    trainer.train()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    for resumed in (trainer, make(tmp_path, data, max_steps=3, optim="adamw_torch")):
        monkeypatch.setattr(resumed, where, stop)
        with pytest.raises(KeyboardInterrupt):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_in_the_middle_of_a_cycle_is_sound(tmp_path, data, caplog, stop):
    options = {"num_iterations": 2, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, data, callbacks=[StopAt(stop)], **options, **saving).train()
    resumed = make(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=True)
    ratios = last(resumed, "policy/log_ratio_max")  # the update after the resume meets a new rollout
    logged = [step for step in range(6) if step != stop - 1]
    assert [ratio > 0 for ratio in ratios] == [step % 2 == 1 and step != stop for step in logged]
    told = [r.getMessage() for r in caplog.records if "in the middle of a cycle" in r.getMessage()]
    assert len(told) == 2  # as it was written and as it was resumed from
    which = {1: "no earlier checkpoint is at the end", 3: "checkpoint-2 is at the end of a whole cycle"}[stop]
    assert all(f"checkpoint-{stop} is" in m and "not bit-exact" in m and which in m for m in told)


def test_best_adapter_is_loaded_at_the_end(tmp_path, data, held_out):
    def best_after_one(images, trainer_state, **columns):
        return [b + 9 * (trainer_state.global_step == 1) for b in brightness(images)]

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    trainer = make(tmp_path, data, best_after_one, held_out, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert same({name.replace(".default", ""): w for name, w in weights(trainer).items()}, saved)


FAILING_WORKER = """
import sys
from pathlib import Path
import tiny_training as t
from rcgrpo import compbench_mini
folder, rows = Path(sys.argv[1]), list(compbench_mini("train", 12, 32))
options = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "shuffle_dataset": False, "max_steps": 4}
options |= {"train_micro_batch_size": 1, "check_rows": 1}

def run(name, data, change=lambda trainer: None):
    trainer = t.make(folder / name, data, **options)
    if trainer.args.process_index == 1:
        change(trainer)
    try:
        trainer.train()
    except Exception as error:
        (folder / f"{name}{trainer.args.process_index}").write_text(f"{type(error).__name__}: {error}")
        if name == "alone":
            raise

def poison(trainer):
    compute_loss, calls = trainer.compute_loss, []
    def spoiled(*given):
        calls.append(given)
        return compute_loss(*given) * float("nan" if len(calls) == 6 else 1)
    trainer.compute_loss = spoiled

def stop(model):
    raise LookupError("only here")

run("picture", rows[:5] + [{**rows[5], "input_image": b"not a picture"}] + rows[6:])
run("loss", rows, poison)
run("alone", rows, lambda trainer: trainer.add_callback(t.StopAt(1, stop)))
"""


def test_what_one_process_meets_stops_both(tmp_path):
    """A broken picture and a loss of NaN on the second are agreed on, after a checkpoint; else both end without one."""
    status, errors = on_two_processes(tmp_path, FAILING_WORKER)
    assert status != 0 and "LookupError: only here" in errors
    assert (tmp_path / "alone1").read_text() == "LookupError: only here"
    wanted = {"picture": "RuntimeError: process 1: ValueError: train row 5, column 'input_image': got 13 bytes"}
    wanted |= {"loss": "FloatingPointError: process 1: loss: got nan at step 1 on train row 3"}
    for name, message in wanted.items():
        told = [(tmp_path / f"{name}{rank}").read_text() for rank in (0, 1)]
        assert told[0] == told[1] and told[0].startswith(message)
    found = sorted(str(folder.relative_to(tmp_path)) for folder in tmp_path.glob("*/checkpoint-*"))
    assert found == ["loss/checkpoint-1", "picture/checkpoint-2"]
