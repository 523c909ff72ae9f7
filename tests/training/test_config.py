"""`config.py`: defaults that work anywhere, and settings that are refused before anything is loaded."""

from dataclasses import MISSING, fields

import pytest
import transformers
from packaging.version import Version
from trl import TrlParser
from trl.trainer.base_config import _BaseConfig

from rcgrpo import RCGRPOConfig
from rcgrpo.training.objective_config import ObjectiveConfig

OWN = RCGRPOConfig.__annotations__.keys() | ObjectiveConfig.__annotations__.keys()
"""Fields that this package defines, without those of `transformers`."""


def test_defaults_work_on_a_machine_without_an_accelerator(tmp_path):
    args = RCGRPOConfig(str(tmp_path), use_cpu=True)
    assert args.bf16 is False and args.fp16 is False
    assert args.gradient_checkpointing is True
    assert args.ddp_find_unused_parameters is False and args.remove_unused_columns is False
    assert args.policy_step_indices == [0, 1, 2, 3, 4, 5, 6]
    assert RCGRPOConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


NAMES = ["gradient_checkpointing"]
if Version(transformers.__version__) >= Version("5.23.0"):
    NAMES.append("activation_checkpointing")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_obeys_under_each_of_its_names(tmp_path, name, value):
    args = RCGRPOConfig(str(tmp_path), use_cpu=True, **{name: value})
    assert [getattr(args, alias) for alias in NAMES] == [value] * len(NAMES)


def test_init_arguments_may_come_from_a_command_line(tmp_path):
    args = RCGRPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs='{"torch_dtype": "bfloat16"}')
    assert args.model_init_kwargs == {"torch_dtype": "bfloat16"}


def test_every_field_has_help_and_help_renders(capsys):
    own = [f for f in fields(RCGRPOConfig) if f.name in OWN]
    assert len(own) > 35
    assert not [f.name for f in own if len(f.metadata.get("help", "")) < 10]
    assert not [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    with pytest.raises(SystemExit) as stop:
        TrlParser((RCGRPOConfig,)).parse_args_and_config(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name}" in shown for f in own)


def test_names_of_trl_keep_their_meaning():
    """Users of GRPO find its names here, without its fields for language models."""
    grpo = pytest.importorskip("trl.trainer.grpo_config").GRPOConfig
    shared = {f.name: f for f in fields(grpo)}.keys() & OWN
    assert {"num_generations", "num_iterations", "beta", "epsilon", "reward_weights", "shuffle_dataset"} <= shared
    assert issubclass(RCGRPOConfig, _BaseConfig) and not issubclass(RCGRPOConfig, grpo)


@pytest.mark.parametrize(("share", "steps"), [([0, 1], [0, 1, 2, 3]), ([0.5, 1], [2, 3]), ([0, 0.6], [0, 1])])
def test_policy_steps(tmp_path, share, steps):
    args = RCGRPOConfig(
        str(tmp_path), use_cpu=True, num_inference_steps=4, num_policy_steps=2, policy_steps_range=share
    )
    assert args.policy_step_indices == steps


def test_trl_spellings_of_scale_rewards(tmp_path):
    found = [RCGRPOConfig(str(tmp_path), use_cpu=True, scale_rewards=given).scale_rewards for given in (True, False)]
    assert found == ["group", "none"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_direction": "both"}, "attention_direction: got 'both', expected one of text_to_image, image_to"),
        ({"attention_steps_range": [0.5, 0.2]}, r"attention_steps_range: got \[0.5, 0.2\], expected two shares in"),
        ({"attention_steps_range": [0.4, 0.42]}, "expected two shares in order that hold at least one of 8 steps"),
        (
            {"attention_steps_range": [0.1, 0.4], "num_inference_steps_eval": 1},
            "expected two shares in order that hold at least one of 1 steps",
        ),
        ({"num_generations": 1, "num_anchors": 1}, "num_generations: got 1, expected at least 2: a group is compared"),
        ({"num_generations": 5, "antithetic": True}, "num_generations: got 5, expected an even number.*antithetic"),
        ({"num_anchors": 13}, r"num_anchors: got 13, expected 1 to num_generations \(12\)"),
        ({"num_anchors": 0}, "num_anchors: got 0"),
        ({"num_generations_eval": 0}, "num_generations_eval: got 0, expected at least 1"),
        (
            {"num_inference_steps_eval": 0},
            "num_inference_steps_eval: got 0, expected at least 1 and at most 1000, or none",
        ),
        ({"num_iterations": 0}, "num_iterations: got 0, expected at least 1"),
        ({"rollout_batch_size": 0}, "rollout_batch_size: got 0, expected at least 1, or none"),
        ({"train_micro_batch_size": -1}, "train_micro_batch_size: got -1, expected at least 1, or none"),
        ({"edit_strength": 1.5}, r"edit_strength: got 1.5, expected a number in \[0, 1\]"),
        ({"keep_strength": -0.1}, r"keep_strength: got -0.1, expected a number in \[0, 1\]"),
        ({"mask_growth": float("nan")}, r"mask_growth: got nan, expected a number in \[0, 1\]"),
        ({"keep_weight": -1.0}, "keep_weight: got -1.0, expected 0 or more"),
        ({"beta": float("nan")}, "beta: got nan, expected 0 or more"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"epsilon": float("nan")}, "epsilon: got nan, expected a number above 0, or none"),
        ({"epsilon": 0.0}, "epsilon: got 0.0, expected a number above 0, or none"),
        ({"epsilon": float("inf")}, "epsilon: got inf, expected a number above 0, or none"),
        ({"max_reward_failures": 0}, "max_reward_failures: got 0, expected at least 1"),
        ({"distance_space": "pixels"}, "distance_space: got 'pixels', expected one of latents, clean"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation: got 'sum', expected one of sum_then"),
        ({"policy_steps_range": [0.5, 0.5]}, r"policy_steps_range: got \[0.5, 0.5\], expected two shares"),
        ({"policy_steps_range": [0.5]}, r"policy_steps_range: got \[0.5\], expected two shares"),
        ({"num_policy_steps": 8}, "num_policy_steps: got 8, expected at most the 7 steps.*num_inference_steps=8"),
        ({"num_policy_steps": 1, "policy_steps_range": [0, 0.01]}, "num_policy_steps: got 1, expected at most the 0"),
        ({"num_iterations": 2, "save_steps": 5}, r"save_steps: got 5, expected a multiple of num_iterations \(2\)"),
        ({"exploration": "local"}, "exploration: got 'local', expected one of region, global"),
        ({"policy": "ppo"}, "policy: got 'ppo', expected one of neighbor, flow_grpo, nft"),
        ({"solver": "rk4"}, "solver: got 'rk4', expected one of none, euler, heun, dpmpp_2m, unipc"),
        ({"scale_rewards": "token"}, "scale_rewards: got 'token', expected one of group, batch, none"),
        (
            {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
            "scale_rewards: got 'batch', expected group with normalize_then_sum",
        ),
        ({"independent_share": 1.1}, r"independent_share: got 1.1, expected a number in \[0, 1\]"),
        ({"epsilon_high": 0.0}, "epsilon_high: got 0.0, expected a number above 0, or none"),
        ({"true_cfg_scale": 0.5}, r"true_cfg_scale: got 0.5, expected 1 \(off\) or more"),
        ({"keep_hinge_weight": -1.0}, "keep_hinge_weight: got -1.0, expected 0 or more"),
        ({"nft_beta": 0.0}, "nft_beta: got 0.0, expected a number above 0"),
        ({"region_strengths": [0.5]}, "region_strengths: got .*, expected none without regions_column"),
        ({"turns_at_once": True}, "turns_at_once: got True, expected its default, False, without turns_column"),
        (
            {"turns_at_once": True, "turns_column": "turns", "regions_column": "labels"},
            "turns_at_once: got True, expected False with regions_column",
        ),
        (
            {"region_strengths": [0.5], "regions_column": "labels", "exploration": "global"},
            "region_strengths: got .*, expected none with exploration=global",
        ),
        (
            {"region_strengths": [0.5, 2.0], "regions_column": "labels"},
            r"region_strengths: got .*, expected numbers in \[0, 1\]",
        ),
        (
            {"conditions_cache_dir": "here"},
            "conditions_cache_dir: got 'here', expected none without cache_conditions=True",
        ),
        ({"sde_window": 2}, "sde_window: got 2, expected none with policy=neighbor"),
        ({"edit_strength": 0.0}, "edit_strength: got 0.0, expected more than 0: all candidates"),
        (
            {"edit_strength": 0.0, "keep_strength": 0.5, "exploration": "global"},
            "edit_strength: got 0.0, expected more than 0: all candidates",
        ),
        ({"independent_share": 0.04}, "independent_share: got 0.04, expected 0, or at least 0.083"),
        ({"antithetic": True, "num_generations_eval": 3}, "num_generations_eval: got 3, expected 1 or an even number"),
        (
            {"policy": "nft", "temperature": 2.0},
            "temperature: got 2.0, expected its default, 1.0, without policy=neigh",
        ),
        ({"sde_noise_level": 0.1}, "sde_noise_level: got 0.1, expected its default.*without policy=flow_grpo"),
        ({"nft_beta": 2.0}, "nft_beta: got 2.0, expected its default.*without policy=nft"),
        ({"negative_prompt": "blur"}, "negative_prompt: got 'blur', expected its default.*true_cfg_scale above 1"),
        ({"beta_keep": 3.0}, "beta_keep: got 3.0, expected its default, 1.0, without beta"),
        ({"keep_hinge_margin": 0.1}, "keep_hinge_margin: got 0.1, expected its default.*without keep_hinge_weight"),
        ({"reward_weights": [1.0, float("nan")]}, r"reward_weights: got \[1.0, nan\], expected finite numbers"),
        (
            {"policy": "flow_grpo", "region_advantages": True, "reward_regions": ["edit", "keep"]},
            "keep_strength: got 0.0, expected more than 0 with policy=flow_grpo and a reward on keep",
        ),
        (
            {"sde_window": 3, "policy": "flow_grpo"},
            r"sde_window: got 3, expected num_policy_steps \(4\) to the 7 steps",
        ),
        ({"policy": "flow_grpo", "solver": "heun"}, "solver: got 'heun', expected euler with policy=flow_grpo"),
        (
            {"policy": "flow_grpo", "policy_steps_range": [0, 1]},
            "policy_steps_range: got .*, expected a range without the last step with policy=flow_grpo",
        ),
        (
            {"policy": "flow_grpo", "edit_strength": 0.0},
            "edit_strength: got 0.0, expected more than 0: all cand",
        ),
        ({"reward_regions": ["edit"]}, "reward_regions: got .*, expected none without region_advantages=True"),
        ({"region_advantages": True}, "reward_regions: got None, expected edit or keep for each reward"),
        (
            {"region_advantages": True, "reward_regions": ["region_1"]},
            "reward_regions: got .*, expected edit or keep for each reward",
        ),
        (
            {"region_advantages": True, "reward_regions": ["region_0"], "regions_column": "labels"},
            "reward_regions: got .*, expected edit or keep, or region_1, region_2, ... for each reward",
        ),
        (
            {"region_advantages": True, "reward_regions": ["edit", "keep"], "region_advantage_weights": [1.0]},
            "region_advantage_weights: got .*, expected 2 numbers of 0 or more, not all 0, for edit, keep",
        ),
        (
            {"region_advantages": True, "reward_regions": ["edit", "keep"], "region_advantage_weights": [0.0, 0.0]},
            r"region_advantage_weights: got \[0.0, 0.0\], expected 2 numbers of 0 or more, not all 0, for edit, keep",
        ),
        ({"reward_weights": [0.0, 0.0]}, r"reward_weights: got \[0.0, 0.0\], expected at least one other than 0"),
        (
            {
                "policy": "flow_grpo",
                "regions_column": "labels",
                "region_strengths": [0.5, 0.0],
                "region_advantages": True,
                "reward_regions": ["region_2"],
            },
            r"region_strengths: got \[0.5, 0.0\], expected more than 0 for region_2 with policy=flow_grpo",
        ),
        ({"max_sequence_length": 0}, "max_sequence_length: got 0, expected at least 1"),
        ({"temperature": float("inf")}, "temperature: got inf, expected a number above 0"),
        ({"beta": float("inf")}, "beta: got inf, expected 0 or more"),
        ({"remove_unused_columns": True}, "remove_unused_columns: got True, expected False: the rewards read"),
    ],
)
def test_refused_with_field_value_and_expectation(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        RCGRPOConfig(str(tmp_path), use_cpu=True, **given)
