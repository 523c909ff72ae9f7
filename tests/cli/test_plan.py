"""`cli/plan.py`: what is printed, what recipes say of it, and what is refused."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from benchmarks.plan_headers import COMMAND, planned

from rcgrpo.cli import main
from rcgrpo.cli.parsing import parse
from rcgrpo.cli.plan import run_of
from rcgrpo.cli.train import ScriptArguments
from rcgrpo.planning.cards import CARDS, Card
from rcgrpo.planning.model import read_parts
from rcgrpo.planning.plan import Planner
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.config import RCGRPOConfig

RECIPES = Path(str(files("rcgrpo") / "recipes"))
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
SIZES = [path.stem for path in RECIPES.glob("*.yaml") if "gb" in path.stem]


def said(*arguments):
    with redirect_stdout(io.StringIO()) as printed:
        main(["plan", *arguments])
    return printed.getvalue()


def refused(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    return str(stop.value.code)


def tiny(**changes):
    flags = ["--config", str(RECIPES / "tiny-groups.yaml"), "--output_dir", "out"]
    flags += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    script, config = parse((ScriptArguments, RCGRPOConfig), flags, None, "rcgrpo train")
    return run_of(script, config, 0.0, False)


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_fits_its_gpu_by_its_header_and_the_page_says_so(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    command, block = COMMAND.search(text).groups()
    assert command == f"plan --config {recipe}.yaml --gpu {recipe.split('-')[-1].split('x')[-1]}"
    spare, phase = re.search(r"fits, ([\d.]+) GB to spare; the peak is in (\w+)", block).groups()
    peak, cached = re.search(r"an update +([\d.]+)", block)[1], re.search(r"is loaded: ([\d.]+) GB", block)[1]
    assert f"\n| `{recipe}` | {peak}, in {phase} | {spare} | {cached} |" in PAGE.read_text()
    assert float(spare) > 0.1 * int(re.search(r", (\d+) GB,", block)[1])


@pytest.mark.parametrize("recipe", SIZES)
def test_a_header_is_what_the_command_prints(recipe, monkeypatch):
    monkeypatch.delenv("RCGRPO_JUDGE_URL", raising=False)
    path = RECIPES / f"{recipe}.yaml"
    command, block = COMMAND.search(path.read_text()).groups()
    assert planned(path, command).splitlines() == [line.removeprefix("#     ") for line in block.splitlines()]


def test_values_as_json_add_up():
    given = ("--config", str(RECIPES / "tiny-groups.yaml"), "--output_dir", "out", "--json", "true", "--gpu")
    small, large = (json.loads(said(*given, size)) for size in ("24gb", "141gb"))
    assert [phase["phase"] for phase in small["phases"]] == ["encode", "rollout", "decode", "update"]
    assert (
        small["peak_gb"] == max(phase["gb"] for phase in small["phases"]) < 1
        and small["fits"]
        and not small["not_counted"]
    )
    assert small["images_per_update"] == 72 and small["updates"] == 90
    assert small["hours"] == pytest.approx(90 * sum(phase["seconds"] for phase in small["phases"]) / 3600)
    assert small["seconds_per_update"] / large["seconds_per_update"] == pytest.approx(989 / 165)
    assert 1e6 < small["parameters"] < 1e8 and small["to_fit"] == []


def test_a_judge_in_this_process_is_counted_and_one_that_nobody_knows_is_named(monkeypatch):
    monkeypatch.delenv("RCGRPO_JUDGE_URL", raising=False)
    given = ("--config", str(RECIPES / "tiny-groups.yaml"), "--output_dir", "out", "--gpu", "24gb", "--reward_funcs")
    own, judged = (json.loads(said(*given, name, "--json", "true")) for name in ("region_edit", "edit_r1"))
    assert judged["resident_gb"]["judge"] == pytest.approx(16.58, abs=0.01) and own["resident_gb"]["judge"] == 0
    extra = [after["gb"] - before["gb"] - 16.58 for before, after in zip(own["phases"], judged["phases"], strict=True)]
    assert extra[0] == pytest.approx(0, abs=0.01) == extra[3] and 0.1 < extra[1] == pytest.approx(extra[2])
    assert judged["to_fit"] == [] and not judged["not_counted"]
    assert json.loads(said(*given, "edit_r1", "--json", "true", "--judge_gb", "3"))["resident_gb"]["judge"] == 3
    monkeypatch.setenv("RCGRPO_JUDGE_URL", "http://judge:8000/v1")
    assert json.loads(said(*given, "edit_r1", "--json", "true")) == own
    monkeypatch.delenv("RCGRPO_JUDGE_URL")
    assert said(*given, "spatial_reward").splitlines()[-1] == "Not counted: the judge of spatial_reward (--judge_gb)"


def test_held_out_pictures_and_a_filled_cache_are_told():
    given = ("--config", str(RECIPES / "tiny-groups.yaml"), "--output_dir", "out", "--gpu", "24gb")
    given += ("--eval_strategy", "steps", "--eval_steps", "30", "--eval_on_start", "true", "--num_eval_edits", "10")
    lines = said(*given, "--cache_conditions", "true").splitlines()
    assert "held-out edits: 808 pictures of 8 steps in all, 0.0 hours on one GPU" in lines  # 2 × 384, 4 × 10
    assert re.fullmatch(r"after `rcgrpo cache` no text encoder is loaded: 0\.\d GB, the peak in \w+", lines[-1])
    plan = Planner(read_parts(str(WEIGHTS))).plan(replace(tiny(), cache_conditions=True, rollout_batch_size=1))
    resident = sum(plan.weights.values()) - plan.weights["text encoders"]
    assert plan.peak_when_cached.bytes == max(phase.bytes for phase in plan.phases[1:]) > resident


def test_advice_is_what_makes_it_fit():
    planner, run = Planner(read_parts(str(WEIGHTS))), replace(tiny(), rollout_batch_size=72, train_micro_batch_size=1)
    full = planner.plan(run)
    assert full.fits and full.seconds is None and full.peak.name == "rollout"
    ways, smaller = planner.advice(planner.plan(run, Card("a little too small", full.peak.bytes - 1, 1e12)))
    assert ways == ["rollout_batch_size: 36"] and smaller.fits and smaller.run.rollout_batch_size == 36
    least = replace(smaller.run, rollout_batch_size=1, cache_conditions=True, judge=1e9)
    ways, still = planner.advice(planner.plan(least, Card("none", 1e6, 1e12)))
    assert "the judge on a server, at RCGRPO_JUDGE_URL" in ways and not still.fits and still.run.judge == 0


def test_settings_arrive():
    assert tiny(solver="heun").stages == 5 and tiny().stages == 3
    assert (
        tiny().update.reference
        and not tiny(beta=0.0, beta_keep=1.0).update.reference
        and tiny(num_anchors=2).transitions == 2
    )
    assert tiny(ema_decay=0.9).averaged and not tiny().averaged and tiny().update.gradient_steps == 0
    assert tiny(reward_gradient_weight=1.0, reward_gradient_steps=2).update.gradient_steps == 2
    assert (tiny(train_micro_batch_size=5).train_micro_batch_size, tiny().train_micro_batch_size) == (5, 24)
    assert tiny(max_steps=-1, num_train_epochs=3).updates == 1024 // 6 * 3
    assert tiny(lora_r=4).update.lora_r == 4 and tiny().update.rows == 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gpu", "40gb"], f"--gpu: got '40gb', expected one of {', '.join(CARDS)}"),
        (["--peak_share", "0"], "--peak_share: got 0.0, expected a number in (0, 1]"),
        (["--judge_gb", "-1"], "--judge_gb: got -1.0, expected 0 or more"),
        (["--gpuu", "24gb"], "unknown flag '--gpuu'"),
        (["--model_init_kwargs", '{"torch_dtype": "bf17"}'], "model_init_kwargs: got dtype 'bf17'"),
        (["--model_init_kwargs", '{"quantization_config": {"quant_backend": "gguf"}}'], "got a quantization_config"),
        (["--model", "nowhere/at-all"], "model: got 'nowhere/at-all'"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(flags, text, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(*flags)
    assert text in message and "\n" not in message
