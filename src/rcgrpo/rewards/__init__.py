"""Rewards: the callable interface, the registry, the built-in ones, and what calls them.

Where it fits: between the data and the trainer; nothing in here knows the pipeline. Importing it registers the built-in
rewards and stays light: timm, torchmetrics, transformers, the HTTP client and the embedded data are imported by the
first call that needs them. The server is in `rcgrpo.rewards.server`.
"""

from .builtin import (
    ATTENTION_REWARDS,
    attention_concentration,
    attention_contrast,
    attention_mass,
    background_keep,
    background_psnr,
    background_ssim,
    compbench_mini,
    region_edit,
)
from .clip import ClipDirectionReward, ClipImageReward, ClipTextReward
from .failures import (
    FailureWatch,
    RequiredRewardError,
    agree_on_failure,
    agreed,
    failing_together,
    fault_counts,
    is_agreed,
)
from .judge_rewards import (
    EDIT_PROMPTS,
    EDITSCORE_PROMPTS,
    SPATIAL_PROMPTS,
    EditPrompts,
    EditScoreReward,
    LogitScoreReward,
    SpatialRewardReward,
    UnifiedRewardEditReward,
)
from .judges import ServerJudge
from .local_judge import LocalJudge
from .preservation import BackgroundDINO, BackgroundLPIPS, background_l1
from .region_margin import region_margin
from .region_scorer import RegionScorer, get_region_scorer, get_second_scorer
from .registry import (
    Reward,
    RewardError,
    RewardFunction,
    available_rewards,
    refuse_columns,
    register_reward,
    resolve_rewards,
)
from .remote import RemoteReward
from .scoring import RewardFailure, ScoredBatch, score
from .scoring_queue import PendingScores, ScoringQueue

__all__ = [
    "ATTENTION_REWARDS",
    "EDITSCORE_PROMPTS",
    "EDIT_PROMPTS",
    "SPATIAL_PROMPTS",
    "BackgroundDINO",
    "BackgroundLPIPS",
    "ClipDirectionReward",
    "ClipImageReward",
    "ClipTextReward",
    "EditPrompts",
    "EditScoreReward",
    "FailureWatch",
    "LocalJudge",
    "LogitScoreReward",
    "PendingScores",
    "RegionScorer",
    "RemoteReward",
    "RequiredRewardError",
    "Reward",
    "RewardError",
    "RewardFailure",
    "RewardFunction",
    "ScoredBatch",
    "ScoringQueue",
    "ServerJudge",
    "SpatialRewardReward",
    "UnifiedRewardEditReward",
    "agree_on_failure",
    "agreed",
    "attention_concentration",
    "attention_contrast",
    "attention_mass",
    "available_rewards",
    "background_keep",
    "background_l1",
    "background_psnr",
    "background_ssim",
    "compbench_mini",
    "failing_together",
    "fault_counts",
    "get_region_scorer",
    "get_second_scorer",
    "is_agreed",
    "refuse_columns",
    "region_edit",
    "region_margin",
    "register_reward",
    "resolve_rewards",
    "score",
]
