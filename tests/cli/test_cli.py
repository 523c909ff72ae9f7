"""`cli/`: what a user types, what is answered, and the job without arguments in miniature."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import rcgrpo
from checkpoint_files import write_checkpoint
from rcgrpo import RCGRPOConfig
from rcgrpo.cli import COMMANDS, main
from rcgrpo.cli.edit import EditArguments
from rcgrpo.cli.explain import ExplainArguments
from rcgrpo.cli.parsing import UsageError, free_folder, parse
from rcgrpo.cli.train import ScriptArguments
from rcgrpo.rewards import available_rewards

RECIPE = Path(rcgrpo.__file__).parent / "recipes" / "tiny.yaml"
CLASSES = (ScriptArguments, RCGRPOConfig)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RCGRPO_TRACEBACK", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # `train` sets it for the embedded model; a test must not leave it behind


def refused(*arguments):
    """What `rcgrpo` says when it exits."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, str) and "Traceback" not in stop.value.code
    return stop.value.code


def write(text):
    Path("job.yaml").write_text(text)
    return "job.yaml"


def settle(*arguments):
    return parse(CLASSES, [*arguments, "--output_dir", "out", "--use_cpu", "true"], str(RECIPE), "rcgrpo train")


def test_flag_wins_over_yaml_over_default():
    script, config = settle("--config", write("lora_r: 3\nnum_generations: 6\nlearning_rate: 2e-4"), "--lora_r", "5")
    assert (script.lora_r, config.num_generations, config.learning_rate) == (5, 6, 2e-4)
    assert script.lora_alpha == ScriptArguments().lora_alpha and config.num_anchors == 4


def test_yaml_values_are_brought_to_their_fields_types(monkeypatch):
    monkeypatch.setenv("OF_THIS_JOB", "0")
    text = "reward_funcs: compbench_mini\nreward_weights: 2\nlearning_rate: 2e-4\nmax_steps: 100\nrun_name: -7\n"
    text += "scale_rewards: true\nsave_steps: 15\nnum_eval_samples: null\nreport_to: none\nenv: {OF_THIS_JOB: 3}"
    script, config = settle("--config", write(text))
    assert (script.reward_funcs, config.reward_weights, script.num_eval_samples) == (["compbench_mini"], [2], None)
    assert (config.learning_rate, config.max_steps, config.run_name) == (2e-4, 100, "-7")
    assert config.scale_rewards == "group" and isinstance(config.save_steps, int)
    assert os.environ["OF_THIS_JOB"] == "3"


def test_none_takes_back_what_the_file_sets():
    """Where it could be no text: neighbour GRPO from the recipe."""
    flags = ["--region_advantages", "false", "--reward_regions", "none", "--region_advantage_weights=None"]
    script, config = settle(*flags, "--exploration", "global", "--preset", "none", "--solver", "none")
    assert (config.exploration, config.region_advantages, config.solver) == ("global", False, None)
    assert config.reward_regions is None and config.region_advantage_weights is None
    assert script.preset == "none" and script.num_eval_samples is not None
    script, config = settle("--num_eval_samples", "none", "--attention_blocks", "1", "2")
    assert script.num_eval_samples is None and config.attention_blocks == [1, 2]


@pytest.mark.parametrize("several", [["tensorboard", "wandb"], ["tensorboard"]])
def test_a_text_that_may_be_a_list(several):
    """Both ways to name trackers."""
    assert settle("--report_to", *several)[1].report_to == several
    assert settle("--config", write(f"report_to: {several}"), "--lora_r", "5")[1].report_to == several
    assert settle("--report_to", "none")[1].report_to == []
    modules = [f"layer_{i}" for i, _ in enumerate(several)]
    given = settle("--optim", "galore_adamw", "--optim_target_modules", *modules)[1].optim_target_modules
    assert given == (modules if len(modules) > 1 else modules[0])


def test_modules_beside_the_user_are_found_after_what_is_installed():
    Path("my_rewards.py").write_text("def tidy(images, **columns):\n    return [1.0] * len(images)\n")
    Path("datasets.py").write_text("raise AssertionError('shadowed')\n")
    code = "from rcgrpo.cli import main; main(['rewards']); import my_rewards, datasets"
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("arguments", [["--config", "job.yaml"], ["--config=job.yaml"]])
def test_both_ways_to_name_a_config_take_the_place_of_the_recipe(arguments):
    write("num_generations: 6")
    script, config = settle(*arguments)
    assert config.num_generations == 6
    assert config.max_steps != yaml.safe_load(RECIPE.read_text())["max_steps"] and script.lora_r == 32


def test_the_embedded_recipe_has_only_known_keys_and_all_of_them_arrive():
    recipe = yaml.safe_load(RECIPE.read_text())
    known = {f.name for cls in CLASSES for f in fields(cls)}
    assert recipe.keys() <= known
    script, config = settle()
    for name, value in recipe.items():
        arrived = getattr(script if hasattr(script, name) else config, name)
        assert arrived == value or (name == "report_to" and arrived in ([], ["none"])), name
    assert config.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_generation", "4"], "rcgrpo train: unknown flag '--num_generation'; .* --num_generations"),
        (["--edit-strenght=1"], "unknown flag '--edit-strenght'; the nearest known one is --edit_strength"),
        (["--config", "missing.yaml"], "--config: got 'missing.yaml', expected a readable YAML file .*No such file"),
        (["--config=missing.yaml"], "--config: got 'missing.yaml', expected a readable YAML file"),
        (["--config"], "--config: got nothing, expected a YAML file"),
        (["--num_generations", "1", "--num_anchors", "1"], "num_generations: got 1, expected at least 2"),
        (["--keep_strength", "2"], r"keep_strength: got 2.0, expected a number in \[0, 1\]"),
        (["--num_generations", "4.5"], "^rcgrpo train: num_generations: got '4.5', expected a whole number$"),
        (["--edit_strength", "much"], "^rcgrpo train: edit_strength: got 'much', expected a number$"),
        (["--policy_steps_range", "0.5"], r"policy_steps_range: got \[0.5\], expected two shares of the trajectory"),
        (["--num_images_per_prompt", "4"], "it is called --num_generations here$"),
        (["--zzz", "4"], "unknown flag '--zzz'; see `rcgrpo train --help`$"),
        (["stray"], "stray"),
    ],
)
def test_typing_errors_are_answered_in_one_line(arguments, said):
    answer = refused("train", "--use_cpu", "true", *arguments)
    assert re.search(said, answer), answer
    assert not list(Path().glob("rcgrpo-output*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_generatoins: 4", "job.yaml: unknown key 'num_generatoins'; the nearest known one is num_generations"),
        ("zzz: 4", "job.yaml: unknown key 'zzz'; see `rcgrpo train --help`"),
        ("num_generations: 4.5", "rcgrpo train: num_generations: got '4.5', expected a whole number"),
        ("num_generations: [4, 5]", "job.yaml: num_generations: got [4, 5], expected one value"),
        ("edit_strength: true", "rcgrpo train: edit_strength: got 'True', expected a number"),
        ("policy_steps_range: 0.5", "rcgrpo train: policy_steps_range: got [0.5], expected two shares"),
        ("reward_weights: [1, heavy]", "rcgrpo train: reward_weights: got 'heavy', expected a number"),
        ("reward_weights: []", "job.yaml: reward_weights: got [], expected one or more values"),
        ("antithetic: 3", "rcgrpo train: --antithetic: Truthy value expected: got 3"),
        ("env: 3", "job.yaml: env: got 3, expected `NAME: value` lines"),
        ("- 1", "job.yaml holds list, expected `key: value` lines"),
        ("a: [", "expected a readable YAML file"),
    ],
)
def test_errors_in_a_config_file(text, said):
    assert said in refused("train", "--config", write(text))


def test_earlier_results_are_not_overwritten():
    write_checkpoint(Path("out"), 5)
    answer = refused("train", "--output_dir", "out", "--use_cpu", "true")
    assert "--output_dir: out holds checkpoint-5 of an earlier run" in answer and "--resume_from_checkpoint" in answer
    assert free_folder("out") == "out-2"
    Path("out-2").mkdir()
    assert (free_folder("out"), free_folder("new")) == ("out-3", "new")


@pytest.mark.parametrize(
    ("command", "cls"),
    [("train", ScriptArguments), ("train", RCGRPOConfig), ("edit", EditArguments), ("explain", ExplainArguments)],
)
def test_help_names_every_flag(command, cls, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert not stop.value.code and shown.startswith(f"usage: rcgrpo {command}")
    assert [f.name for f in fields(cls) if f.init and f"--{f.name}" not in shown] == []
    assert all(f.metadata["help"] for f in fields(cls) if f.name in cls.__annotations__)


def test_rewards_lists_the_registry(capsys):
    for flag in ("-h", "--help"):
        main(["rewards", flag])
        assert capsys.readouterr().out.startswith("usage: rcgrpo rewards [serve ...]\n")
    assert "--port: got 99999999, expected 0 to 65535" in refused("rewards", "serve", "--port", "99999999")
    main(["rewards"])
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("region_edit ")).split()[1:4] == ["0", "to", "1"]
    assert [line.split()[0] for line in lines] == available_rewards() and "compbench_mini" in available_rewards()
    assert "rcgrpo rewards takes no arguments, got now" in refused("rewards", "now")


def test_a_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("RCGRPO_TRACEBACK", "1")
    with pytest.raises(UsageError, match="unknown flag"):
        main(["train", "--wrong", "1"])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["trian"], r"got 'trian', expected one of train, plan, evaluate, .*; did you mean train\?$"),
        (["zzz"], "got 'zzz', expected one of .*; see `rcgrpo --help`$"),
        ([], "got no command, expected one of"),
        (["--seed", "1"], "got '--seed', expected one of"),
    ],
)
def test_unknown_command(typed, said):
    assert re.match(f"rcgrpo: {said}", refused(*typed))


def test_help_and_version_need_no_command(capsys):
    main(["--help"])
    assert re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"{rcgrpo.__version__}\n"


# ------------------------------------------------------------------------------------------ the whole job

TINY_JOB = "--max_steps 1 --num_train_samples 16 --num_eval_samples 6 --per_device_train_batch_size 2 "
TINY_JOB += "--num_generations 4 --use_cpu true --output_dir run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step of the embedded job."""
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RCGRPO_TRACEBACK", "1")
        main(["train", *TINY_JOB.split()])
    return folder / "run"


def test_train_leaves_everything_that_it_announces(run):
    for name in ("pytorch_lora_weights.safetensors", "README.md", "metrics.md", "reward_curves.png"):
        assert (run / name).stat().st_size > 100
    assert (run / "samples" / "contact_sheet.png").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() >= {"held_out", "per_sample", "settings"}
    before, after = metrics["per_sample"]["before"], metrics["per_sample"]["after"]
    assert len(before["reward"]) == len(after["reward"]) == 6 and before.keys() == after.keys()
    assert "library_name: diffusers" in (run / "README.md").read_text()


def test_edit_with_the_trained_lora(run, capsys):
    from PIL import Image

    from rcgrpo.data.mini import render

    row = render("test", 0, 64)
    row["input_image"].save("source.png")
    row["mask"].save("mask.png")
    call = ["edit", "--image", "source.png", "--instruction", row["instruction"], "--lora", str(run)]
    main([*call, "--mask", "mask.png", "--num_generations", "2", "--output", "two.png"])
    assert Image.open("two.png").size == (128, 64) and "two.png (2 candidates)" in capsys.readouterr().out
    main([*call, "--output", "one.png"])
    assert Image.open("one.png").size == (64, 64)
    assert "--image: got" in refused("edit", "--image", "none.png", "--instruction", "remove the apple")
    assert "--num_generations: got 0" in refused(*call, "--num_candidates", "0")  # its earlier name
