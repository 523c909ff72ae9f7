"""`guard.py`: an alarm where held-out edits get worse, and a run that ends there."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerControl

from rcgrpo import RCGRPOConfig
from rcgrpo.reporting.learning_curve import Curve
from rcgrpo.training.guard import RegressionGuard, chance_of_fall, regression, watched
from tiny_training import brightness, history, make, same, weights

EDITS = "eval_edits"
pytestmark = pytest.mark.filterwarnings("ignore")


def log_of(*rewards, measure="reward"):
    rows = list(range(len(rewards[0])))
    return [
        {"step": 10 * i, EDITS: {"row": rows, "task": [""] * len(rows), measure: list(values)}}
        for i, values in enumerate(rewards)
    ]


def test_an_alarm_needs_a_clear_fall_from_the_best():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 40)
    better, worse = base + 0.3 + rng.normal(0, 0.1, 40), base + 0.2 + rng.normal(0, 0.1, 40)
    assert regression(Curve.of(log_of(base)), "reward") is None
    assert regression(Curve.of(log_of(base, better)), "reward") is None
    told = regression(Curve.of(log_of(base, better, worse)), "reward")
    assert told is not None and "is clearly below the" in told and "of step 10 (-0.1" in told and "on 40 edits" in told
    # Against the start alone it is a gain, and five edits are too few to say anything.
    assert regression(Curve.of(log_of(base, worse)), "reward") is None
    assert regression(Curve.of(log_of(better[:5], worse[:5] - 9)), "reward") is None
    assert regression(Curve.of(log_of(better[:6], better[:6])), "reward") is None
    # One edit in two without a score.
    some = [None if i % 2 else value for i, value in enumerate(worse.tolist())]
    assert "on 20 edits" in regression(Curve.of(log_of(better, some)), "reward")


def test_the_chance_is_that_of_a_t_test():
    ttest_1samp = pytest.importorskip("scipy.stats").ttest_1samp
    for size, shift in ((6, -2.0), (20, -0.7), (96, -0.4), (96, 0.1)):
        found = np.random.default_rng(size).normal(shift, 1, size)
        assert chance_of_fall(found) == pytest.approx(ttest_1samp(found, 0, alternative="less").pvalue, rel=0.05)
    assert chance_of_fall(np.full(6, -0.5)) == 0 and chance_of_fall(np.full(6, 0.5)) == 1


def test_more_evaluations_ask_for_more():
    """A fall of 2.1 standard errors counts as the second evaluation, not as the fifth, where it is one of ten pairs."""
    fall = np.tile([-1.0, 1.0], 20)
    fall = 2.1 * np.std(fall, ddof=1) / np.sqrt(40) + fall
    base, less = np.zeros(40), -fall
    assert regression(Curve.of(log_of(base, less)), "reward") is not None
    assert regression(Curve.of(log_of(base - 1, base - 1, base - 1, base, less)), "reward") is None


def test_noise_raises_no_more_alarms_than_promised():
    """40 runs of 10 evaluations in which nothing happens: at most 2 alarms are to be expected, 7 would be rare."""
    alarmed = 0
    for seed in range(40):
        base, rng = np.zeros(30), np.random.default_rng(seed)
        evaluations = [base + rng.normal(0, 1, 30) for _ in range(10)]
        logs = [log_of(*evaluations[: i + 1]) for i in range(1, 10)]
        alarmed += any(regression(Curve.of(log), "reward") for log in logs)
    assert alarmed < 7


@pytest.mark.parametrize("stop", [False, True])
def test_the_watched_metric_is_the_one_that_models_are_chosen_by(caplog, stop):
    state = SimpleNamespace(
        log_history=log_of([50.0] * 8, [0.0] * 8, measure="correct"), global_step=10, is_world_process_zero=True
    )
    for metric, alarms in (("eval_correct", 1), ("reward", 0), ("eval_background/psnr", 0)):
        caplog.clear()
        control = TrainerControl()
        args = SimpleNamespace(metric_for_best_model=metric)
        if not alarms:
            state.log_history = log_of([0.5] * 8, [0.5] * 8)
        RegressionGuard(stop).on_evaluate(args, state, control)
        assert len(caplog.records) == alarms and control.should_training_stop == (stop and bool(alarms))
        assert not alarms or "correct 0 is clearly below the 50 of step 0" in caplog.text


def test_one_of_several_held_out_sets_is_watched_by_name(caplog):
    names = {None: ("eval_", "reward"), "correct": ("eval_", "correct"), "eval_faces_psnr": ("eval_faces_", "psnr")}
    names |= {"eval_faces_add/psnr": ("eval_", "reward"), "background/psnr": ("eval_", "reward")}
    assert {name: watched(name) for name in names} == names
    log = [{"step": row["step"], "eval_faces_edits": row[EDITS]} for row in log_of([1.0] * 8, [0.0] * 8)]
    state = SimpleNamespace(log_history=log, global_step=10, is_world_process_zero=True)
    args = SimpleNamespace(metric_for_best_model="eval_faces_reward")
    RegressionGuard().on_evaluate(args, state, TrainerControl())
    state.log_history = [*log, {"step": 10, "eval_rooms_edits": log[0]["eval_faces_edits"]}]  # the other set's turn
    RegressionGuard().on_evaluate(args, state, TrainerControl())
    assert len(caplog.records) == 1 and "reward 0 is clearly below the 1 of step 0" in caplog.text


def turning(images, trainer_state, **columns):
    """Better until the second update, then worse."""
    gain = {0: 0.0, 1: 0.5, 2: 1.0}.get(trainer_state.global_step, -1.0)
    return [b + gain for b in brightness(images)]


WATCHED = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "num_eval_edits": 7, "max_steps": 9}
WATCHED |= {"save_strategy": "steps", "save_steps": 1, "stop_on_regression": True, "load_best_model_at_end": True}


def plain(rows):
    return [{name: row[name] for name in ("input_image", "instruction", "mask")} for row in rows]


def test_a_run_that_turns_ends_with_its_best_weights(tmp_path, data, caplog):
    held_out = plain(data)
    trainer = make(tmp_path, plain(data), turning, held_out, **WATCHED)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 2
    assert "step 3, reward" in caplog.text and "of step 2" in caplog.text and "; stopping" in caplog.text
    curve = Curve.of(trainer.state.log_history)
    assert curve.steps == [0, 1, 2, 3] and len(curve.rows) == 7 and curve.rows != list(range(7))
    assert all(set(row["eval_edits"]["row"]) == set(curve.rows) for row in trainer.state.log_history if EDITS in row)
    gains = [curve.change("reward", 0, i).difference for i in range(4)]
    assert gains == pytest.approx([0, 0.5, 1, -1], abs=0.05)
    logged = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert [row["eval_reward"] for row in logged] == pytest.approx([curve.mean("reward", i) for i in range(4)])

    resumed = make(tmp_path, plain(data), turning, held_out, **WATCHED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, 2) == history(trainer, 2) and Curve.of(resumed.state.log_history) == curve
    assert same(weights(resumed), weights(trainer)) and resumed.state.global_step == 3


def test_more_edits_than_there_are_is_said(tmp_path, data, caplog):
    held_out = plain(data)
    make(tmp_path, plain(data), brightness, held_out, **WATCHED)
    assert "num_eval_edits" not in caplog.text
    make(tmp_path, plain(data), brightness, held_out, **WATCHED | {"num_eval_edits": 999})
    assert f"num_eval_edits: got 999, but eval_dataset has {len(held_out)} rows" in caplog.text


def test_the_default_metric_of_best_weights_is_the_reward(tmp_path):
    options = {"eval_strategy": "steps", "load_best_model_at_end": True, "use_cpu": True}
    assert RCGRPOConfig(str(tmp_path), **options).metric_for_best_model == "reward"
    assert RCGRPOConfig(str(tmp_path), **options).greater_is_better is True
    for name, value in {"num_eval_edits": 3, "stop_on_regression": True}.items():
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected its default, .*, without eval_strategy"):
            RCGRPOConfig(str(tmp_path), use_cpu=True, **{name: value})
