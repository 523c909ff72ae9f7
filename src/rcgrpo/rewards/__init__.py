"""Rewards: the callable interface, the registry, the built-in ones, and what calls them.

Where it fits: between the data and the trainer; nothing in here knows the pipeline. Importing it registers the built-in
rewards and stays light: timm, torchmetrics and the embedded data are imported by the first call that needs them.
"""

from .builtin import (
    attention_concentration,
    background_keep,
    background_psnr,
    background_ssim,
    compbench_mini,
    region_edit,
)
from .region_scorer import RegionScorer, get_region_scorer
from .registry import Reward, RewardError, RewardFunction, available_rewards, register_reward, resolve_rewards
from .scoring import FailureWatch, RequiredRewardError, RewardFailure, ScoredBatch, score

__all__ = [
    "FailureWatch",
    "RegionScorer",
    "RequiredRewardError",
    "Reward",
    "RewardError",
    "RewardFailure",
    "RewardFunction",
    "ScoredBatch",
    "attention_concentration",
    "available_rewards",
    "background_keep",
    "background_psnr",
    "background_ssim",
    "compbench_mini",
    "get_region_scorer",
    "region_edit",
    "register_reward",
    "resolve_rewards",
    "score",
]
