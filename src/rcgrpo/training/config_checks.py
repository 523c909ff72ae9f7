"""What `RCGRPOConfig` refuses before anything is loaded, and which trackers a trainer can report to.

Bounds of single numbers stand in `ranges.RANGES`; here is what a field may be besides, and what goes with what. Each
check is a function over the configuration and `refuse(name, expected)`.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..inputs.ranges import SHARE, check_ranges

if TYPE_CHECKING:
    from .config import RCGRPOConfig

Refuse = Callable[[str, str], NoReturn]

CHOICES: dict[str, tuple[str | None, ...]] = {
    "exploration": ("region", "global"),
    "policy": ("neighbor", "flow_grpo", "nft"),
    "solver": (None, "euler", "heun", "dpmpp_2m", "unipc"),
    "distance_space": ("latents", "clean"),
    "attention_direction": ("text_to_image", "image_to_text"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Mappings that may also be the name of a JSON file."""


def check_config(config: "RCGRPOConfig") -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: naming the field, its value, what was expected and what to do.
    """

    def refuse(name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, expected {expected}")

    check_ranges(config)
    for check in (_choices, _mappings, _group, _steps, _saving, _conditions, _regions, _policy, _rewards):
        check(config, refuse)


def join_launch(config: "RCGRPOConfig") -> int:
    """The processes of a launcher; without a GPU they are CPU processes, as else each would train by itself."""
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched > 1 and not torch.accelerator.is_available():
        config.use_cpu = True
    return launched


def check_launch(config: "RCGRPOConfig", launched: int) -> None:
    """Refuse processes that found no process group.

    Raises:
        ValueError: naming how many there are, and what to do.
    """
    if config.world_size != launched:
        raise ValueError(
            f"WORLD_SIZE: got {launched} processes from the launcher, expected the {config.world_size} of a process "
            f"group, as accelerate finds none for {config.device.type}; pass use_cpu=True, or launch one process"
        )


def check_trackers(config: "RCGRPOConfig") -> None:
    """Refuse trackers of `report_to` that transformers does not know, or that are not installed.

    Raises:
        ValueError: naming the tracker, those that are there, and how to get it.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    here = get_available_reporting_integrations()
    for name in config.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: got {name!r}, expected some of {', '.join(INTEGRATION_TO_CALLBACK)}, or none")
        if name not in {*here, "flyte"}:  # which transformers does not look for
            others = f" or {' or '.join(here)}, which are here," if here else ""
            raise ValueError(
                f"report_to: got {name!r}, which is not installed, expected none{others}; or `pip install {name}`"
            )


# Single fields --------------------------------------------------------------------------------------------------------


def _choices(config: "RCGRPOConfig", refuse: Refuse) -> None:
    for name, allowed in {**_enumerated(type(config)), **CHOICES}.items():
        if getattr(config, name) not in allowed:
            refuse(name, f"one of {', '.join(str(choice).lower() for choice in allowed)}")
    if config.remove_unused_columns:
        refuse("remove_unused_columns", "False: the rewards read the dataset's other columns")


def _enumerated(cls: type) -> dict[str, tuple[Any, ...]]:
    """The values of fields that are an Enum or its text, as transformers has them."""
    enums = {
        name: [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
        for name, hint in get_type_hints(cls).items()
    }
    return {name: tuple(member.value for member in kinds[0]) for name, kinds in enums.items() if kinds}


def _mappings(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """A command line gives them as JSON; some may be the name of a JSON file."""
    for name in config._VALID_DICT_FIELDS:
        text = getattr(config, name)
        if not isinstance(text, str):
            continue
        if not text.startswith("{") and name in FILES:
            if name != "deepspeed" and not Path(text).is_file():  # which may be base64
                refuse(name, "a JSON object such as '{\"split_batches\": true}', or a JSON file that is there")
            continue
        try:
            valid = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name}: got {text!r}, expected a JSON object such as '{{\"a\": 1}}' ({error})"
            ) from error
        if not valid:
            refuse(name, "a JSON object such as '{\"a\": 1}'")


def _are_shares(values: Any, several: int | None = None) -> bool:
    """Whether this is a list of numbers in [0, 1], of this length if one is given."""
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == (several or len(values))
    return listed and all(value in SHARE for value in values)


# What goes with what --------------------------------------------------------------------------------------------------


def _group(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """Candidates of a group, and that they differ."""
    if config.num_generations < 2:
        refuse("num_generations", "at least 2: a group is compared with itself, so one candidate teaches nothing")
    if config.antithetic and config.num_generations % 2:
        refuse("num_generations", "an even number, because antithetic=True mirrors half of the group")
    if config.antithetic and config.num_generations_eval > 1 and config.num_generations_eval % 2:
        refuse("num_generations_eval", "1 or an even number, because antithetic=True mirrors half of the group")
    if config.num_anchors > config.num_generations:
        refuse("num_anchors", f"1 to num_generations ({config.num_generations})")
    if config.turns_at_once and config.regions_column is not None:
        refuse("turns_at_once", "False with regions_column: each turn's mask is a region then; unset one of them")
    if config.region_strengths is not None:
        if not _several_regions(config):
            refuse("region_strengths", "none without regions_column or turns_at_once, which say where regions are")
        if config.exploration == "global":
            refuse("region_strengths", "none with exploration=global, which has one strength")
        if not config.region_strengths or not _are_shares(config.region_strengths):
            refuse("region_strengths", "numbers in [0, 1], one for each region")
    strengths = [config.edit_strength]
    if config.exploration == "region":
        strengths = [*(config.region_strengths or strengths), config.keep_strength]
    if not any(strengths) and not config.independent_share:
        refuse("edit_strength", "more than 0: all candidates of a group would be the same")
    drawn = config.num_generations // 2 if config.antithetic else config.num_generations
    if config.independent_share and not round(config.independent_share * drawn):
        refuse("independent_share", f"0, or at least {1 / drawn:.2g}, the share of one of {drawn} draws")


def _steps(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """Which steps of a rollout are trained on and recorded."""
    shares = config.policy_steps_range
    if not _are_shares(shares, 2) or not shares[0] < shares[1]:
        refuse("policy_steps_range", "two shares of the trajectory in order, such as 0 0.875")
    if config.num_policy_steps > len(config.policy_step_indices):
        refuse(
            "num_policy_steps",
            f"at most the {len(config.policy_step_indices)} steps that policy_steps_range={shares} "
            f"leaves of num_inference_steps={config.num_inference_steps}",
        )
    shares = config.attention_steps_range
    for steps in (config.num_inference_steps, config.num_inference_steps_eval or config.num_inference_steps):
        if not _are_shares(shares, 2) or shares[0] > shares[1] or not config.attention_options.reads(steps):
            refuse("attention_steps_range", f"two shares in order that hold at least one of {steps} steps")


def _saving(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """A checkpoint does not hold what is kept between the updates of one rollout."""
    updates = config.num_iterations
    if updates > 1 and config.save_strategy == "steps" and config.save_steps % updates:
        refuse("save_steps", f"a multiple of num_iterations ({updates}), so that a resume is exact")
    if updates > 1 and config.save_strategy == "best" and (config.eval_steps or 1) % updates:
        refuse("eval_steps", f"a multiple of num_iterations ({updates}) with save_strategy=best")
    for name in ("log_unique_prompts", "log_completions_hub_repo"):
        if getattr(config, name) and not config.log_completions:
            refuse(name, "nothing without log_completions=True, which writes what it is about")
    if config.log_completions_hub_repo is not None:
        try:
            validate_repo_id(config.log_completions_hub_repo)
        except HFValidationError:
            refuse("log_completions_hub_repo", "the name of a data set on the Hub, `owner/name`")


def _conditions(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """Fields that mean nothing unless something else is set: what that is, and whether it is."""
    neighbor, nft = (("policy=" + name, config.policy == name) for name in ("neighbor", "nft"))
    evaluated = ("eval_strategy", str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no")
    conditions = {
        "distance_space": neighbor,
        "temperature": neighbor,
        "sde_noise_level": ("policy=flow_grpo", config.policy == "flow_grpo"),
        "nft_beta": nft,
        "nft_advantage_clip": nft,
        "negative_prompt": ("true_cfg_scale above 1", config.true_cfg_scale > 1),
        "beta_keep": ("beta", config.beta > 0),
        "keep_hinge_margin": ("keep_hinge_weight", config.keep_hinge_weight > 0),
        "num_eval_edits": evaluated,
        "reward_gradient_steps": ("reward_gradient_weight above 0", config.reward_gradient_weight > 0),
        "stop_on_regression": evaluated,
        "turns_at_once": ("turns_column", config.turns_column is not None),
    }
    defaults = {field.name: field.default for field in fields(config)}
    for name, (condition, holds) in conditions.items():
        if not holds and getattr(config, name) != defaults[name]:
            refuse(name, f"its default, {defaults[name]!r}, without {condition}")
    if config.ema_decay is not None and config.shard_model:
        refuse("ema_decay", "none with shard_model, whose weights no process has as a whole")
    if config.reward_gradient_steps > 1 and config.shard_model:
        refuse("reward_gradient_steps", "1 with shard_model, whose processes must ask the model equally often")
    if config.conditions_cache_dir is not None and not config.cache_conditions:
        refuse("conditions_cache_dir", "none without cache_conditions=True, which fills it")


def _policy(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """Stochastic steps, which only one policy has."""
    if config.policy == "flow_grpo":
        if config.solver not in (None, "euler"):
            refuse("solver", "euler with policy=flow_grpo, whose stochastic steps take the solver's place")
        if config.num_inference_steps - 1 in config.policy_step_indices:
            refuse("policy_steps_range", "a range without the last step with policy=flow_grpo: noise would stay")
        if "keep" in config.named_regions and config.exploration == "region" and not config.keep_strength:
            refuse(
                "keep_strength",
                "more than 0 with policy=flow_grpo and a reward on keep: steps without noise have no density",
            )
        for number, strength in enumerate(config.region_strengths or [], start=1):
            if not strength and f"region_{number}" in config.named_regions:
                refuse(
                    "region_strengths",
                    f"more than 0 for region_{number} with policy=flow_grpo and a reward there: steps without "
                    "noise have no density",
                )
    if config.sde_window is not None:
        if config.policy != "flow_grpo":
            refuse("sde_window", f"none with policy={config.policy}, which has no stochastic steps")
        if not config.num_policy_steps <= config.sde_window <= len(config.policy_step_indices):
            refuse(
                "sde_window",
                f"num_policy_steps ({config.num_policy_steps}) to the {len(config.policy_step_indices)} steps that "
                "policy_steps_range allows",
            )


def _rewards(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """How rewards are weighed."""
    if config.reward_weights is not None:
        if not all(map(isfinite, config.reward_weights)):
            refuse("reward_weights", "finite numbers")
        if not any(config.reward_weights) and not config.attention_reward_weight:
            refuse("reward_weights", "at least one other than 0: rewards of weight 0 are only logged")
    if config.scale_rewards != "group" and config.multi_objective_aggregation != "sum_then_normalize":
        refuse("scale_rewards", "group with normalize_then_sum, which has normalised each reward before")


def _regions(config: "RCGRPOConfig", refuse: Refuse) -> None:
    """Which reward acts where."""
    for name in ("reward_regions", "region_advantage_weights"):
        if getattr(config, name) is not None and not config.region_advantages:
            refuse(name, "none without region_advantages=True")
    if not config.region_advantages:
        return
    several = _several_regions(config)
    pattern = r"edit|keep|region_[1-9]\d*" if several else r"edit|keep"
    if not config.reward_regions or any(not re.fullmatch(pattern, name) for name in config.reward_regions):
        others = ", or region_1, region_2, ..." if several else ""
        refuse("reward_regions", f"edit or keep{others} for each reward, because region_advantages=True")
    named, weights = config.named_regions, config.region_advantage_weights
    if weights is not None and (
        len(weights) != len(named) or any(not 0 <= weight < inf for weight in weights) or not any(weights)
    ):
        refuse("region_advantage_weights", f"{len(named)} numbers of 0 or more, not all 0, for {', '.join(named)}")


def _several_regions(config: "RCGRPOConfig") -> bool:
    return config.turns_at_once or config.regions_column is not None
