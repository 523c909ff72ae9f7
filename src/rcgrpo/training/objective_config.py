"""The settings of an update's loss; a part of `RCGRPOConfig`, which says the rest."""

from dataclasses import dataclass, field


@dataclass
class ObjectiveConfig:
    """Which policy, which transitions, which anchors; `docs/algorithm.md` has the formulas, section by section."""

    # Parameters that control the objective
    policy: str = field(
        default="neighbor",
        metadata={
            "help": "'neighbor' (RC-GRPO, Neighbor GRPO), 'flow_grpo' (stochastic steps) or 'nft' (DiffusionNFT)."
        },
    )
    num_anchors: int = field(default=4, metadata={"help": "Trajectories of a group used as anchors (B)."})
    sde_noise_level: float = field(
        default=0.7, metadata={"help": "flow_grpo: size of the injected noise (a); the region's strengths scale it."}
    )
    sde_window: int | None = field(
        default=None,
        metadata={
            "help": "flow_grpo: only so many steps in a row are stochastic, drawn for each group within "
            "policy_steps_range (MixGRPO, Flow-GRPO-Fast); all of them by default."
        },
    )
    nft_beta: float = field(
        default=1.0, metadata={"help": "nft: how far the two implicit policies lie from the old one."}
    )
    nft_advantage_clip: float = field(
        default=5.0, metadata={"help": "nft: size of an advantage that counts as entirely good or bad."}
    )
    num_policy_steps: int = field(default=4, metadata={"help": "Steps of an anchor's trajectory to train on (K)."})
    policy_steps_range: list[float] = field(
        default_factory=lambda: [0.0, 0.875],
        metadata={"help": "Share of the trajectory to draw those steps from; '0 1' makes late steps trainable too."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Updates on each rollout (μ)."})
    distance_space: str = field(
        default="latents", metadata={"help": "Compare next 'latents', or 'clean' one-step predictions of the result."}
    )
    keep_weight: float = field(default=0.1, metadata={"help": "Weight of the distance outside the region (λ_keep)."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the surrogate policy (τ)."})
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Clip range of the policy ratio, which matters with num_iterations above 1; by default the "
            "policy's own (see docs/training.md), because ratios of mean distances stay very close to 1."
        },
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Clip range above 1, where it is to differ from epsilon."}
    )
    region_advantages: bool = field(
        default=False,
        metadata={"help": "Each reward acts on the latents of its own region alone (reward_regions), no keep_weight."},
    )
    reward_regions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Region of each reward function: edit, keep, or region_1, region_2, ... of regions_column or "
            "turns_at_once. The attention reward belongs to edit."
        },
    )
    region_advantage_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each region's objective, in the order in which reward_regions first names them."},
    )
    reward_gradient_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the rewards' own gradient, if any, through the pixels of their region."},
    )
    reward_gradient_steps: int = field(
        default=1, metadata={"help": "Model calls it goes through: 1 predicts the result (ReFL), all roll out (DRaFT)."}
    )
    keep_hinge_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of a hinge that holds one-step predictions to the source outside the region."},
    )
    keep_hinge_margin: float = field(
        default=0.0, metadata={"help": "Squared latent error that this hinge allows for free."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the velocity KL to the frozen base."})
    beta_keep: float = field(
        default=1.0, metadata={"help": "How much stronger that KL counts outside the region than inside."}
    )
    advantage_power: float = field(default=0.8, metadata={"help": "p of the quasi-norm; 2 gives back z-scores."})
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Divide rewards by the spread within their 'group', by that of the 'batch' (all edits of an "
            "update, on every process, which are scored before it begins), or by 'none'."
        },
    )
    negative_advantage_clip: float | None = field(
        default=None,
        metadata={"help": "Size of the largest negative advantage; with 0 only better candidates teach."},
    )
    advantage_std_floor: float = field(
        default=1e-6, metadata={"help": "Smallest reward spread to divide by, so that noise is not blown up."}
    )
    min_reward_std: float = field(
        default=1e-6, metadata={"help": "Drop groups whose rewards spread less than this, and count them."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "sum_then_normalize, or normalize_then_sum (GDPO): each reward within its group, then their sum by "
            "its spread over all edits of an update."
        },
    )

    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and hand out an average of the trained weights, over 1 / (1 - ema_decay) updates."},
    )
