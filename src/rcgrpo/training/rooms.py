"""The rooms that a configuration asks for: how a group spreads, how it is scored, which editor draws it.

Where it fits: the trainer opens each once, at the start; after that only fields of the update are read from the
configuration. The policy has a door of its own, `policies.make_policy`.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch

from ..editors import ConditionCache, open_editor
from ..editors.base import FlowEditor
from ..editors.late_encoders import LateEncoders
from ..groups.rollout import Exploration
from ..groups.scoring import GroupScoring
from ..groups.turns import REGIONS
from ..rewards import Reward, ScoringQueue, resolve_rewards
from .config import RCGRPOConfig


def exploration_of(args: RCGRPOConfig) -> Exploration:
    """How groups spread in training."""
    return Exploration(
        edit_strength=args.edit_strength,
        keep_strength=args.keep_strength,
        antithetic=args.antithetic,
        mask_growth=args.mask_growth,
        kind=args.exploration,  # type: ignore[arg-type]
        independent_share=args.independent_share,
        regions_column=REGIONS if args.turns_at_once else args.regions_column,
        region_strengths=args.region_strengths,
        noise_level=args.sde_noise_level if args.policy == "flow_grpo" else 0.0,
        sde_steps=args.policy_step_indices,
        sde_window=args.sde_window,
    )


def editor_of(pipeline: Any, args: RCGRPOConfig, late: LateEncoders | None = None) -> FlowEditor:
    """The editor of a pipeline, with the run's size, steps and guidance."""
    return open_editor(
        pipeline,
        args.resolution,
        args.num_inference_steps,
        args.guidance_scale,
        args.max_sequence_length,
        args.solver,
        args.true_cfg_scale,
        args.negative_prompt,
        ConditionCache(args.conditions_cache_dir) if args.cache_conditions else None,
        args.batch_guidance,
        late,
    )


def scoring_of(reward_funcs: Callable | str | Sequence[Callable | str], args: RCGRPOConfig) -> GroupScoring:
    """The rewards, the attention's own among them if it weighs something, and how they are compared.

    Raises:
        ValueError: weights or regions of another number than rewards, or two rewards of one name.
    """
    rewards = resolve_rewards(reward_funcs)
    weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError(f"reward_weights: got {len(weights)} weights, expected {len(rewards)}, one for each reward")
    if args.attention_reward_weight:
        rewards += resolve_rewards("attention_concentration")
        weights = [*weights, args.attention_reward_weight]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"reward_funcs: got {names}, expected different names; attention_reward_weight adds its own")
    return GroupScoring(
        rewards,
        torch.tensor(weights, dtype=torch.float32),
        _regions_of(rewards, args),
        args.named_regions,
        args.region_advantage_weights,
        args.multi_objective_aggregation,  # type: ignore[arg-type]
        args.scale_rewards,  # type: ignore[arg-type]
        args.advantage_std_floor,
        args.min_reward_std,
        args.advantage_power,
        ScoringQueue(timeout=args.reward_timeout),
        inf if args.negative_advantage_clip is None else args.negative_advantage_clip,
    )


def _regions_of(rewards: Sequence[Reward], args: RCGRPOConfig) -> list[str]:
    if not args.region_advantages:
        return []
    given, automatic = list(args.reward_regions or []), ["edit"] if args.attention_reward_weight else []
    if len(given) + len(automatic) != len(rewards):
        raise ValueError(
            f"reward_regions: got {len(given)}, expected {len(rewards) - len(automatic)}, a region for each reward"
        )
    return given + automatic
