"""`run_log.py`: what a run says of itself, in numbers and in pictures."""

from importlib.util import find_spec

import datasets
import numpy as np
import pytest

import rcgrpo.training.run_log
from rcgrpo.evaluation.held_out import judge_held_out
from rcgrpo.training import completions, run_log
from tiny_training import (
    brightness,
    history,
    last,
    make,
    redness,
    rolled_out,
    same,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("epsilon", "times"), [(1e-12, 1), (10.0, 0)])
def test_a_clip_that_takes_nearly_all_is_told_once(tmp_path, data, caplog, monkeypatch, epsilon, times):
    # Steps against the gradient, small enough, move nearly every ratio where its advantage wants it.
    monkeypatch.setattr(rcgrpo.training.run_log, "NEARLY_ALL", 0.4)
    trainer = make(tmp_path, data, epsilon=epsilon, num_iterations=2, max_steps=6, learning_rate=0.1)
    trainer.train()
    assert caplog.text.count("epsilon: the clip took away the gradient of") == times
    shares = last(trainer, "clip_ratio/later_mean")
    assert len(shares) == 3 and all((share > 0.4) == bool(times) for share in shares)


def test_the_log_tells_regions_apart(tmp_path, data):
    def rising(images, **columns):
        return [float(i % 4) for i in range(len(images))]

    def flat(images, **columns):
        return [0.25] * len(images)

    options = {"region_advantages": True, "advantage_power": 2.0, "reward_weights": [2.0, 1.0, 1.0]}
    regions = ["edit", "keep", "keep"]
    flatter = lambda images, **columns: [0.5] * len(images)  # noqa: E731
    trainer = make(tmp_path, data, [rising, flat, flatter], reward_regions=regions, max_steps=1, **options)
    trainer.train()
    row = {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("regions/")}
    spread = np.std([0.0, 2.0, 4.0, 6.0])
    assert row.pop("regions/edit/reward_std") == pytest.approx(spread, rel=1e-4)
    assert row.pop("regions/edit/advantage_std") == pytest.approx(1, rel=1e-4)
    assert row == {
        "regions/edit/reward": 3.0,
        "regions/edit/frac_reward_zero_std": 0.0,
        "regions/keep/reward": 0.75,
        "regions/keep/reward_std": 0.0,
        "regions/keep/frac_reward_zero_std": 1.0,
        "regions/keep/advantage_std": 0.0,
    }


def test_the_log_follows_the_latents_step_by_step(tmp_path, data):
    """And one edit's numbers are those of its group."""
    trainer = make(tmp_path, data, max_steps=1, per_device_train_batch_size=1)
    trainer.train()
    ((group,),) = trainer._buffer
    row, variances = trainer.state.log_history[0], group.trajectory.var(1).mean(-1)
    for side, tokens in (("inside", group.region > 0), ("outside", group.region == 0)):
        names = [name for name in row if name.startswith(f"diagnostics/latent_var_{side}/")]
        assert names == [f"diagnostics/latent_var_{side}/step_{step}" for step in (1, 2, 3)]
        assert [row[name] for name in names] == pytest.approx(variances[1:, tokens].mean(-1).tolist(), rel=1e-5)
        assert row[names[-1]] == pytest.approx(row[f"diagnostics/latent_var_{side}"], rel=1e-5)


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(tmp_path, data, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make(tmp_path, data, report_to="tensorboard", max_steps=1).train()
    assert list((tmp_path / "board").rglob("events*"))


def test_rewards_can_log(tmp_path, data):
    def telling(images, log_extra, log_metric, trainer_state, **columns):
        log_extra("step", [trainer_state.global_step] * len(images))
        log_metric("my/metric", 2.0 + trainer_state.global_step)
        return brightness(images)

    trainer = make(tmp_path, data, telling)
    assert trainer.extra_columns == {}
    trainer.train()
    assert last(trainer, "my/metric") == [2.0, 3.0]
    assert trainer.extra_columns == {"step": [1] * 8}


def test_candidates_of_updates_and_evaluations_are_kept_for_people(tmp_path, data, held_out):
    def telling(images, log_extra, **columns):
        log_extra("half", [score / 2 for score in brightness(images)])
        return brightness(images)

    runs = {}
    for kept in (False, True):
        shape = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "gradient_accumulation_steps": 2}
        shape |= {"per_device_train_batch_size": 1, "logging_steps": 2, "log_completions": kept}
        runs[kept] = make(tmp_path / str(kept), data, [telling, redness], held_out, **shape)
        runs[kept].train()
    assert same(weights(runs[True]), weights(runs[False])) and history(runs[True]) == history(runs[False])
    assert not (tmp_path / "False" / "completions").exists()
    folder = tmp_path / "True" / "completions"
    names = ("completions_00002", "completions_00003", "eval_completions_00002", "eval_completions_00003")
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("parquet", "jpg")
    }
    table = datasets.Dataset.from_parquet(str(folder / "completions_00002.parquet")).to_pandas()
    assert len(table) == 2 * 4 and table["edit"].nunique() == 2  # of the second update alone
    assert np.allclose(table["reward"], table["rewards/telling"] + table["rewards/redness"])
    assert np.allclose(table["half"], table["rewards/telling"] / 2)
    assert np.allclose(table.groupby("edit")["advantage"].mean(), 0, atol=1e-4)
    evaluated = datasets.Dataset.from_parquet(str(folder / "eval_completions_00002.parquet")).to_pandas()
    assert list(evaluated["edit"]) == [f"eval row {i}" for i in range(3)]
    assert evaluated["reward"].mean() == pytest.approx(last(runs[True], "eval_reward")[0])


def test_a_report_beforehand_leaves_no_trace_in_the_run(tmp_path, data, held_out):
    def logging(images, log_metric, **columns):
        log_metric("brightest", max(brightness(images)))
        return brightness(images)

    logs = []
    for reported in (False, True):
        trainer = make(tmp_path, data, logging, held_out, max_steps=1)
        if reported:
            judged = judge_held_out(trainer, trainer.eval_dataset, "before", batch_size=2)
            assert [one.row for one in judged] == [0, 1, 2] and all("attention" in one.pictures for one in judged)
            assert {"reward", "edit score", "background PSNR (dB)"} <= judged[0].scores.keys()
        trainer.train()
        logs.append(history(trainer))
    assert logs[0] == logs[1] and "brightest" in logs[0][0]


def test_an_instruction_is_drawn_once_if_asked_and_the_folder_goes_to_the_hub(tmp_path, data, monkeypatch):
    asked = []
    monkeypatch.setattr(run_log, "create_repo", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr(run_log, "CommitScheduler", lambda **named: asked.append(named))
    rows = [{**data[0], "instruction": text} for text in ("one", "two", "one", "one")]
    options = {"log_completions": True, "log_unique_prompts": True, "hub_private_repo": True, "max_steps": 1}
    options |= {"log_completions_hub_repo": "me/candidates", "per_device_train_batch_size": 4}
    trainer = make(tmp_path, rows, **options)
    groups, names = rolled_out(trainer, data, 4), []
    trainer.scoring.compare(groups)

    def noted(group, *given):
        names.append((group.edit.prompt, given[-1]))
        return completions.record(group, *given)

    monkeypatch.setattr(run_log, "record", noted)
    trainer.model.train()
    trainer._record_completions(groups)
    assert names == [("one", True), ("two", True), ("one", False), ("one", False)]
    (repository, options), scheduler = asked
    assert repository == ("me/candidates",) and options == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert scheduler["folder_path"] == tmp_path / "completions" and scheduler["repo_id"] == "me/candidates"
