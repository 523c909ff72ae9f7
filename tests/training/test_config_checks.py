"""`config_checks.py`: inherited settings that would train nonsense, mappings, trackers, and other tools' names."""

import dataclasses
import pickle
from math import inf, nan

import pytest
from transformers import HfArgumentParser, TrainingArguments

from rcgrpo import RCGRPOConfig
from rcgrpo.training.config_checks import check_trackers


def config(tmp_path, **given):
    return RCGRPOConfig(str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("learning_rate", [nan, inf, -1e-4, "1e-4", None], "0 or more"),
        ("weight_decay", [nan, -0.1], "0 or more"),
        ("adam_beta1", [1, nan, -0.1], "a number in [0, 1)"),
        ("adam_beta2", [1.0, inf], "a number in [0, 1)"),
        ("adam_epsilon", [0, nan], "a number above 0"),
        ("max_grad_norm", [-1, nan], "0 or more"),
        ("warmup_steps", [-1, nan], "0 or more"),
        ("gradient_accumulation_steps", [0, -1, 1.5, True], "at least 1"),
        ("per_device_train_batch_size", [0, -8], "at least 1"),
        ("num_train_epochs", [0, nan, -1], "a number above 0"),
        ("max_steps", [0, -2, 3.0], "at least 1, or -1 to count num_train_epochs instead"),
        ("save_steps", [0, -1, nan, 2.5], "a whole number of updates, or a share of them below 1"),
        ("logging_steps", [0, nan], "a whole number of updates, or a share of them below 1"),
        ("seed", [-1, 2**32, 0.5], "0 to 4294967295"),
        ("dataloader_num_workers", [-1], "0 or more"),
        ("guidance_scale", [nan, inf, -1], "0 or more"),
        ("true_cfg_scale", [nan, inf, 0.5], "1 (off) or more"),
        ("resolution", [3, 0, -64, 10**6], "16 to 8192 pixels"),
        ("num_inference_steps", [0, 1001], "at least 1 and at most 1000"),
        ("lr_scheduler_type", ["zigzag"], "one of linear, cosine"),
        ("optim", ["sgdd"], "one of adamw_torch"),
        ("save_strategy", ["sometimes"], "one of no, steps, epoch, best"),
        ("log_completions_hub_repo", ["me/x"], "nothing without log_completions=True"),
        ("policy_steps_range", [0.5, "0 1", [0.0, nan], [0.0, "1"]], "two shares of the trajectory in order"),
    ],
)
def test_what_would_train_nonsense_is_refused_in_python_too(tmp_path, name, values, expected):
    for value in values:
        with pytest.raises(ValueError) as refused:
            config(tmp_path, **{name: value})
        assert str(refused.value).startswith(f"{name}: got {value!r}, expected ") and expected in str(refused.value)


def test_a_data_set_for_completions_has_a_name_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"^log_completions_hub_repo: got 'a b', expected the name of a data set"):
        config(tmp_path, log_completions=True, log_completions_hub_repo="a b")


def test_what_is_meant_is_taken(tmp_path):
    args = config(
        tmp_path,
        learning_rate=0,
        max_steps=-1,
        save_steps=0.5,
        logging_steps=10.0,
        warmup_steps=0.1,
        max_grad_norm=0,
        lr_scheduler_type="cosine",
        save_total_limit=None,
    )
    assert (args.learning_rate, args.max_steps, args.save_steps, args.warmup_steps) == (0, -1, 0.5, 0.1)
    again = dataclasses.replace(args, seed=7)
    assert again.seed == 7 and again.lr_scheduler_type == args.lr_scheduler_type


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("model_init_kwargs", "{bad", r"expected a JSON object such as '\{\"a\": 1\}' \(Expecting property name"),
        ("model_init_kwargs", "[1]", "expected a JSON object"),
        ("model_init_kwargs", "bfloat16", "expected a JSON object"),
        ("lr_scheduler_kwargs", "{'num_cycles': 1}", "expected a JSON object"),
        ("gradient_checkpointing_kwargs", "{" * 5000, "expected a JSON object"),
        ("accelerator_config", "gone.json", "expected a JSON object .*, or a JSON file that is there"),
    ],
)
def test_mappings_that_are_none(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=rf"(?s)^{name}: got .*{said}"):
        config(tmp_path, **{name: text})


def test_mappings_as_json_and_as_a_file(tmp_path):
    (tmp_path / "accelerate.json").write_text('{"split_batches": false}')
    args = config(
        tmp_path,
        accelerator_config=str(tmp_path / "accelerate.json"),
        lr_scheduler_kwargs='{"num_cycles": 2}',
        model_init_kwargs={"torch_dtype": "bfloat16"},
    )
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.model_init_kwargs == {"torch_dtype": "bfloat16"}


def test_trackers_that_are_not_here_are_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    module = "transformers.integrations.get_available_reporting_integrations"
    monkeypatch.setattr(module, lambda: ["tensorboard"])
    check_trackers(config(tmp_path, report_to="none"))
    check_trackers(config(tmp_path, report_to=["tensorboard"]))
    expected = "report_to: got 'wandb', which is not installed, expected none or tensorboard, .* `pip install wandb`"
    with pytest.raises(ValueError, match=expected):
        check_trackers(config(tmp_path, report_to=["tensorboard", "wandb"]))
    with pytest.raises(ValueError, match=r"report_to: got 'paper', expected some of .*tensorboard"):
        check_trackers(config(tmp_path, report_to="paper"))


def test_the_trainer_looks_for_trackers_first(tmp_path, monkeypatch):
    from rcgrpo import RCGRPOTrainer

    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match="report_to: got 'wandb'"):
        RCGRPOTrainer("no/model", "no_reward", config(tmp_path, report_to="wandb"))


def test_the_configuration_stays_a_dataclass_of_its_base(tmp_path):
    args = config(tmp_path, num_generations=6)
    assert dataclasses.asdict(args)["num_generations"] == 6
    assert pickle.loads(pickle.dumps(args)).num_generations == 6
    assert isinstance(args, TrainingArguments)
    (parsed,) = HfArgumentParser((RCGRPOConfig,)).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--num_generations", "6"]
    )
    assert parsed.num_generations == 6

    @dataclasses.dataclass
    class Mine(RCGRPOConfig):
        own: int = 3

    assert Mine(str(tmp_path), use_cpu=True, own=4).own == 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "its default, 1, without reward_gradient_weight above 0"),
        ({"reward_gradient_weight": 1.0, "shard_model": True}, "1 with shard_model"),
    ],
)
def test_the_rewards_gradient_goes_through_steps_only_where_it_can(tmp_path, given, expected):
    with pytest.raises(ValueError, match="reward_gradient_steps: got 3, expected") as refused:
        config(tmp_path, reward_gradient_steps=3, **given)
    assert expected in str(refused.value)
    assert config(tmp_path, reward_gradient_steps=3, reward_gradient_weight=1.0).reward_gradient_steps == 3
