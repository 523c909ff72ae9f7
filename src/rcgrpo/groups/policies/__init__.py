"""What an update does with a rollout: RC-GRPO's surrogate policy and two relatives, behind one small interface.

One algorithm a file; `base` says what the trainer asks of each, `ratio` what those with probabilities share. The next
policy is one more file here and a line in `make_policy`.
"""

from collections.abc import Sequence
from typing import Protocol

from .base import Metrics, Policy, region_mask
from .flow_grpo import FlowGRPOPolicy
from .neighbor import NeighborPolicy
from .nft import NFTPolicy
from .ratio import CLIPPED_AGAIN, RatioPolicy

__all__ = [
    "CLIPPED_AGAIN",
    "FlowGRPOPolicy",
    "Metrics",
    "NFTPolicy",
    "NeighborPolicy",
    "Policy",
    "PolicySettings",
    "RatioPolicy",
    "make_policy",
    "region_mask",
]


class PolicySettings(Protocol):
    """What policies are told; `RCGRPOConfig` has these fields, and says what they mean."""

    policy: str
    keep_weight: float
    region_advantage_weights: list[float] | None
    temperature: float
    distance_space: str
    epsilon: float | None
    epsilon_high: float | None
    nft_beta: float
    nft_advantage_clip: float


def make_policy(args: PolicySettings, regions: Sequence[str] = ()) -> Policy:
    """The policy that a configuration asks for.

    Args:
        regions: with region advantages, the names of the regions that have a reward.
    """
    importance = args.region_advantage_weights or [1.0] * max(1, len(regions))
    shared = (args.keep_weight, tuple(regions), tuple(importance))
    if args.policy == "nft":
        return NFTPolicy(*shared, args.nft_beta, args.nft_advantage_clip)
    clip = (args.epsilon, args.epsilon_high)
    if args.policy == "flow_grpo":
        return FlowGRPOPolicy(*shared, *clip)
    return NeighborPolicy(*shared, *clip, args.temperature, args.distance_space)  # type: ignore[arg-type]
