"""What the study compares: every table, every variant, every option's name. To change the study, change this file.

A variant is a set of differences to `common()`, the recipe beside this file with what `SHARED` says otherwise. That
recipe is the study's own, so that the main job can change without starting new cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rcgrpo.maths.regions import CORRUPTIONS

Kind = Literal["train", "groups"]

DATA_KEYS = ("model", "dataset", "num_train_samples", "num_eval_samples")
RUN_KEYS = (*DATA_KEYS, "max_steps", "save_steps", "logging_steps", "num_inference_steps_eval")
"""Keys of the recipe that say where a run's data are, how long it is and how it is evaluated; cells have their own."""


def recipe() -> dict[str, Any]:
    """The recipe's settings that a variant may change: `RCGRPOConfig`'s fields, `reward_funcs`, `lora_*`."""
    text = (Path(__file__).parent / "recipe.yaml").read_text()
    return {key: value for key, value in yaml.safe_load(text).items() if key not in RUN_KEYS}


def common() -> dict[str, Any]:
    """Where every variant starts from: the recipe, and what `SHARED` has instead."""
    return {**recipe(), **SHARED}


@dataclass(frozen=True)
class Variant:
    """One row of a table: differences to `common()`.

    Args:
        name: in tables and plots.
        config: settings that differ from `common()`.
        corruption: kind and severity of a fault in the training masks; rewards see the same fault, evaluation none.
        trained: false for the base model, which is only evaluated.
        against: what it is tested against, where not the table's baseline; the first is the one that is plotted.
        twin: the variant that differs in nothing but the region, to which a plot of two metrics joins it.
        front: the method that it is a point of, where a table compares fronts.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    corruption: tuple[str, float] | None = None
    trained: bool = True
    against: tuple[str, ...] = ()
    twin: str | None = None
    front: str | None = None


@dataclass(frozen=True)
class Table:
    """One table of the study.

    Args:
        title: of its page.
        question: what it answers, one sentence.
        kind: what its cells do: train and measure, or look at groups under three kinds of exploration.
        variants: its rows.
        metrics: columns, name to title.
        lower_is_better: of the metrics.
        baseline: the variant that the others are tested against; by default none.
        baseline_arm: for cells with several arms, the arm that the others are tested against.
        plotted: metrics in the plot.
        plane: two metrics whose changes from the base are drawn against each other, instead of each by itself.
        floors: by metric, the change from the base below which a point of a front is worth nothing; two metrics, of
            which fronts are compared by the area that they dominate.
        curves: curves in the plot, against steps or blocks.
        arms: of cells with several, those that are shown; all by default.
        survey: trained cells also look at whole groups, for diversity and leakage.
        seeds: default number of seeds.
        brief: at most eight of its rows, by `variant: arm` or the variant alone, for the study's first page; the first
            eight by default.
        brief_metrics: their columns; those in the plot by default.
    """

    title: str
    question: str
    kind: Kind
    variants: Sequence[Variant]
    metrics: Mapping[str, str]
    lower_is_better: frozenset[str] = frozenset()
    baseline: str | None = None
    baseline_arm: str | None = None
    plotted: Sequence[str] = ()
    plane: tuple[str, str] | None = None
    floors: Sequence[Mapping[str, float]] = ()
    curves: Sequence[str] = ()
    arms: Sequence[str] | None = None
    survey: bool = False
    seeds: int = 5
    brief: Sequence[str] = ()
    brief_metrics: Sequence[str] = ()


SHARED: dict[str, Any] = {
    "attention_reward_weight": 0.0,
    "region_advantages": False,
    "reward_regions": None,
    "region_advantage_weights": None,
    "reward_funcs": ["compbench_mini", "region_edit"],
    "reward_weights": [1.0, 2.0],
    "keep_weight": 0.3,
    "keep_strength": 0.0,
    "num_inference_steps": 8,
    "num_policy_steps": 4,
}
"""What every variant has instead of the recipe's, so that each part is switched on by itself: the paper's form, and as
many steps of the ODE as evaluation has."""

EDITING = {
    "edit_score": "edit score",
    "lp_t": "LP-T",
    "lp_i": "LP-I",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "reward": "reward",
}
FIRST = ("edit_score", "lp_t", "psnr")
"""What the study's first page shows of an edit."""
ARTEFACTS = {
    "held_out": "held-out reward",
    "edge_density": "edge density",
    "colour_entropy": "colour entropy",
    "diversity_inside": "diversity inside",
    "attention_density": "attention density",
    "attention_mass": "attention mass",
}

COSTS = frozenset({"units", "updates", "strength"})
"""Columns that say what was spent or set, which nobody needs tested."""
RATES = frozenset({"reward_per_1000_units", "reward_per_minute"})
"""Columns that are gains over the base already."""

BASE = Variant("base", trained=False)
NEIGHBOR = Variant("Neighbor GRPO", {"exploration": "global", "keep_weight": 1.0})
RC_GRPO = Variant("RC-GRPO", twin=NEIGHBOR.name)
ATTENTION = Variant("RC-GRPO + attention", {"attention_reward_weight": 0.05})

# Nothing pays for the background: what does the region alone do for it?
EDIT_ALONE: dict[str, Any] = {"reward_funcs": ["region_edit"], "reward_weights": [1.0]}
NEIGHBOR_EDIT_ALONE = Variant("Neighbor GRPO, edit reward alone", {**NEIGHBOR.config, **EDIT_ALONE})
RC_EDIT_ALONE = Variant(
    "RC-GRPO, edit reward alone", EDIT_ALONE, against=(NEIGHBOR_EDIT_ALONE.name,), twin=NEIGHBOR_EDIT_ALONE.name
)

# The edit's and the background's reward, each on latents of its own, with equal weights.
REGION_ADVANTAGES = Variant(
    "RC-GRPO, region advantages",
    {
        "reward_funcs": ["region_edit", "background_keep"],
        "reward_weights": [1.0, 1.0],
        "region_advantages": True,
        "reward_regions": ["edit", "keep"],
        "region_advantage_weights": [1.0, 1.0],
    },
    twin="Neighbor GRPO, region advantages",
)
# The same aimed at the background's quality that Neighbor GRPO reaches; found on a seed of its own, 42.
FOR_BACKGROUND = Variant(
    "RC-GRPO, region advantages, background first",
    {**REGION_ADVANTAGES.config, "region_advantage_weights": [1.0, 2.5], "keep_strength": 0.15},
)
# The same rewards on the same tokens, explored without the region: what of the gain is the noise's?
GLOBAL_ADVANTAGES = Variant(
    "Neighbor GRPO, region advantages", {**REGION_ADVANTAGES.config, "exploration": "global", "keep_weight": 1.0}
)

# Rollouts of three steps, so three times the updates of the same compute; evaluation has its own eight. Weights that
# bring each to about the same background, found on a seed of its own, 42; global noise moves it by itself.
FEW_STEPS: dict[str, Any] = {"num_inference_steps": 3, "num_policy_steps": 1}
NEIGHBOR_FEW_STEPS = Variant(
    "Neighbor GRPO, edit first, 3 steps", {**NEIGHBOR.config, **FEW_STEPS, "reward_weights": [1.0, 6.0]}
)
GLOBAL_FEW_STEPS = Variant(
    "Neighbor GRPO, region advantages, 3 steps",
    {**GLOBAL_ADVANTAGES.config, **FEW_STEPS, "region_advantage_weights": [1.0, 0.6]},
    against=(NEIGHBOR_FEW_STEPS.name,),
)
RC_FEW_STEPS = Variant(
    "RC-GRPO, region advantages, 3 steps",
    {**REGION_ADVANTAGES.config, **FEW_STEPS, "region_advantage_weights": [1.0, 1.5], "keep_strength": 0.1},
    against=(NEIGHBOR_FEW_STEPS.name, GLOBAL_FEW_STEPS.name, NEIGHBOR.name),
)
# Aimed at the background that plain Neighbor GRPO with 3 steps reaches over seeds; how far a heavier weight moves it is
# known from seed 42.
RC_FEW_STEPS_FOR_BACKGROUND = Variant(
    "RC-GRPO, region advantages, 3 steps, background first",
    {**RC_FEW_STEPS.config, "region_advantage_weights": [1.0, 2.2]},
    against=(NEIGHBOR_FEW_STEPS.name, NEIGHBOR.name),
)

# The relatives start every candidate from noise of its own, as their papers do; the region's share is in `region`.
FREE: dict[str, Any] = {"exploration": "global", "edit_strength": 1.0, "keep_weight": 1.0, "antithetic": False}
REGION: dict[str, Any] = {"exploration": "region", "edit_strength": 1.0, "antithetic": False}
FLOW: dict[str, Any] = {"policy": "flow_grpo", "policy_steps_range": [0.0, 0.875], "distance_space": "latents"}
NFT: dict[str, Any] = {"policy": "nft", "distance_space": "latents"}

MAIN = Table(
    "The algorithm beside its relatives",
    "Does the region constraint help at equal compute, and against whom?",
    "train",
    [
        BASE,
        NEIGHBOR,
        RC_GRPO,
        ATTENTION,
        NEIGHBOR_EDIT_ALONE,
        RC_EDIT_ALONE,
        REGION_ADVANTAGES,
        FOR_BACKGROUND,
        GLOBAL_ADVANTAGES,
        NEIGHBOR_FEW_STEPS,
        GLOBAL_FEW_STEPS,
        RC_FEW_STEPS,
        RC_FEW_STEPS_FOR_BACKGROUND,
        Variant("Flow-GRPO", {**FLOW, **FREE}),
        Variant("Flow-GRPO + region", {**FLOW, **REGION}, against=("Flow-GRPO",), twin="Flow-GRPO"),
        Variant("DiffusionNFT", {**NFT, **FREE}),
        Variant("DiffusionNFT + region", {**NFT, **REGION}, against=("DiffusionNFT",), twin="DiffusionNFT"),
    ],
    {
        **EDITING,
        "reward_per_1000_units": "reward gain per 1,000 units",
        "reward_per_minute": "reward gain per CPU minute",
        "units": "compute (units)",
    },
    baseline=NEIGHBOR.name,
    plane=("psnr", "edit_score"),
    brief=(
        *(NEIGHBOR.name, RC_GRPO.name, "Flow-GRPO", "DiffusionNFT", NEIGHBOR_FEW_STEPS.name, GLOBAL_FEW_STEPS.name),
        *(RC_FEW_STEPS.name, RC_FEW_STEPS_FOR_BACKGROUND.name),
    ),
    brief_metrics=FIRST,
)

STRENGTHS = (0.3, 0.5, 0.7, 1.0)
VARIANCE = Table(
    "Reward variance within groups, at equal diversity inside",
    "Does region noise reduce the variance that teaches nothing, or only the diversity?",
    "groups",
    [Variant(f"strength {s:g}", {"edit_strength": s, "antithetic": False}) for s in STRENGTHS],
    {
        "strength": "strength used",
        "latent_var_inside": "latent variance inside",
        "latent_var_outside": "latent variance outside",
        "reward_var": "reward variance",
        "split_edit": "reward variance: edit",
        "split_keep": "reward variance: keep",
        "edit_spearman": "Spearman edit",
        "keep_spearman": "Spearman keep",
        "gradient_snr": "gradient SNR",
        "gradient_snr_unbiased": "gradient SNR², unbiased",
    },
    lower_is_better=frozenset({"latent_var_outside", "keep_spearman", "split_keep"}),
    baseline_arm="global, matched",
    plotted=("split_keep", "edit_spearman", "keep_spearman", "gradient_snr"),
    brief=tuple(f"strength {s:g}: {arm}" for s in STRENGTHS for arm in ("region", "global, matched")),
)

LEAKAGE = Table(
    "Leakage through the ODE",
    "How much of the region's noise reaches the background, by step and by model depth?",
    "groups",
    [Variant(f"strength {s:g}", {"edit_strength": s, "antithetic": False}) for s in STRENGTHS],
    {
        "latent_var_inside": "latent variance inside, σ = 0",
        "latent_var_outside": "latent variance outside, σ = 0",
        "leakage": "leakage",
    },
    lower_is_better=frozenset({"latent_var_outside", "leakage"}),
    baseline_arm="global",
    arms=("region", "global"),
    curves=("outside_by_step", "leakage_by_step", "leakage_by_block_first", "leakage_by_block_middle"),
)

MASKS = Table(
    "Imperfect masks",
    "Where does the region constraint's benefit end as the training masks get worse?",
    "train",
    [
        BASE,
        NEIGHBOR,
        NEIGHBOR_FEW_STEPS,
        Variant(RC_FEW_STEPS.name, RC_FEW_STEPS.config, against=(NEIGHBOR.name, NEIGHBOR_FEW_STEPS.name)),
        *(
            Variant(
                f"{kind} {severity:g}",
                RC_FEW_STEPS.config,
                corruption=(kind, severity),
                against=(RC_FEW_STEPS.name, NEIGHBOR.name, NEIGHBOR_FEW_STEPS.name),
            )
            for kind in CORRUPTIONS
            for severity in (0.5, 1.0)
        ),
    ],
    EDITING,
    baseline=RC_FEW_STEPS.name,
    plotted=("edit_score", "psnr"),
    brief=(
        *(RC_FEW_STEPS.name, "box 1", "holes 1", "shrink 0.5", "missing 0.5", "grow 1", "blob_noise 1"),
        "wrong_object 1",
    ),
    brief_metrics=FIRST,
)

ATTENTION_SWEEP = Table(
    "The attention reward",
    "What does the attention reward do to concentration, diversity, artefacts and the background?",
    "train",
    [
        BASE,
        REGION_ADVANTAGES,
        *(
            Variant(f"weight {w:g}", {**REGION_ADVANTAGES.config, "attention_reward_weight": w})
            for w in (0.02, 0.05, 0.2, 1.0)
        ),
        Variant(
            "attention alone",
            {**REGION_ADVANTAGES.config, "attention_reward_weight": 1.0, "reward_weights": [0.0, 0.0]},
        ),
    ],
    {**EDITING, **ARTEFACTS},
    baseline=REGION_ADVANTAGES.name,
    survey=True,
    plotted=("attention_density", "diversity_inside", "held_out", "psnr"),
    brief_metrics=(*FIRST, "attention_density", "held_out"),
)

SWEEPS: dict[str, Sequence[Any]] = {
    "keep_strength": (0.1, 0.3),
    "edit_strength": (0.3, 0.7, 1.0),
    "mask_growth": (0.05, 0.125),
    "region_advantage_weights": ([1.0, 0.5], [1.0, 2.0]),
    "scale_rewards": ("batch", "none"),
    "keep_hinge_weight": (0.15,),
    "num_generations": (6, 24),
    "num_anchors": (2, 8),
    "num_policy_steps": (1, 2),
    "policy_steps_range": ([0.0, 1.0], [0.5, 1.0]),
    "num_inference_steps": (3, 4, 12),
    "solver": ("heun", "dpmpp_2m", "unipc"),
}
"""Around region advantages, one at a time; with four steps, all early ones there are teach."""
FITTING = {("num_inference_steps", "4"): {"num_policy_steps": 2}, ("num_inference_steps", "3"): {"num_policy_steps": 1}}
RATE = recipe()["learning_rate"]
TRAVEL = [
    Variant("learning_rate × √3", {**REGION_ADVANTAGES.config, "learning_rate": RATE * 3**0.5}),
    Variant("learning_rate × 3", {**REGION_ADVANTAGES.config, "learning_rate": RATE * 3}),
    Variant(
        "num_inference_steps 3, learning_rate / 3",
        {**REGION_ADVANTAGES.config, **FEW_STEPS, "learning_rate": RATE / 3},
        against=("num_inference_steps 3",),
    ),
]
"""Do short rollouts win, or does Adam travel further in more updates? By √3 where noise drives it, by 3 if signal."""

SETTINGS = Table(
    "One setting at a time",
    "Which settings matter at equal compute?",
    "train",
    [
        BASE,
        REGION_ADVANTAGES,
        *(
            Variant(
                f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}",
                {**REGION_ADVANTAGES.config, name: value, **FITTING.get((name, str(value)), {})},
            )
            for name, values in SWEEPS.items()
            for value in values
            if value != common().get(name)
        ),
        *TRAVEL,
    ],
    {**EDITING, "updates": "updates"},
    baseline=REGION_ADVANTAGES.name,
    plotted=("edit_score", "psnr"),
    brief=(
        *(REGION_ADVANTAGES.name, "num_inference_steps 3", "num_generations 6", "keep_strength 0.3"),
        *("edit_strength 0.3", *(variant.name for variant in TRAVEL)),
    ),
    brief_metrics=FIRST,
)

# The relatives at their best: every method with rollouts as short as it can use, an advantage for each region, and all
# candidates where it learns from them; the neighbour policy's four anchors already hold its whole gradient.
AT_BEST: dict[str, dict[str, Any]] = {
    "RC-GRPO": {**REGION_ADVANTAGES.config, **FEW_STEPS, "keep_strength": 0.05},
    "Neighbor GRPO": {**GLOBAL_ADVANTAGES.config, **FEW_STEPS, "edit_strength": 0.3},
    # Its own recipe: noise .9, 6 steps, all of them and all candidates teach, Adam's small epsilon.
    "Flow-GRPO": {
        **REGION_ADVANTAGES.config,
        **FREE,
        **FLOW,
        "sde_noise_level": 0.9,
        "num_inference_steps": 6,
        "num_policy_steps": 5,
        "policy_steps_range": [0.0, 0.8],
        "num_anchors": 12,
        "adam_epsilon": 1e-12,
    },
    "DiffusionNFT": {
        **REGION_ADVANTAGES.config,
        **FREE,
        **NFT,
        **FEW_STEPS,
        "policy_steps_range": [0.0, 1.0],
        "num_anchors": 12,
    },
}
RATES_TRIED: dict[str, Sequence[float]] = {
    "RC-GRPO": (1e-3, 2e-3),
    "Neighbor GRPO": (1e-3, 2e-3),
    "Flow-GRPO": (2e-3, 6e-3),
    "DiffusionNFT": (1e-3, 3e-3),
}
"""Higher for methods whose updates cost more, as the same compute pays for fewer of them."""
UNTRAINED = {"correct": "correct (%)", "closeness": "closeness"}
"""What no reward reads."""
JUDGED_APART = {**UNTRAINED, "edit_score": "edit score", "lp_t": "LP-T", "psnr": "PSNR (dB)"}


def at_rate(name: str, rate: float, named: str = "", **changes: Any) -> Variant:
    """A method as in `AT_BEST`, at a learning rate, with what differs otherwise and what to call that."""
    title = ", ".join(part for part in (name, named, f"rate {rate:g}") if part)
    return Variant(title, {**AT_BEST[name], **changes, "learning_rate": rate}, front=name)


METHOD_RATES = Table(
    "Learning rates, a method at a time",
    "Which learning rate and which share of its candidates does each method want?",
    "train",
    [
        BASE,
        *(at_rate(name, rate) for name, rates in RATES_TRIED.items() for rate in rates),
        at_rate(
            *("Flow-GRPO", 2e-3),
            named="3 steps",
            num_inference_steps=3,
            num_policy_steps=2,
            policy_steps_range=[0.0, 0.6],
        ),
        at_rate("DiffusionNFT", 2e-3, named="12 × 2", num_policy_steps=2),
    ],
    {**JUDGED_APART, "updates": "updates"},
    baseline="RC-GRPO, rate 0.001",
    plotted=("edit_score", "psnr"),
    brief_metrics=("correct", "edit_score", "psnr"),
    seeds=1,
)

BEST_RATES = {"RC-GRPO": 2e-3, "Neighbor GRPO": 2e-3, "Flow-GRPO": 6e-3, "DiffusionNFT": 1e-3}
"""Of `METHOD_RATES`, by the edit score. Neighbor GRPO's best there, at a weight of 1, is far behind at lighter ones."""
WEIGHTS_TRIED = (0.1, 0.3, 1.0)
"""Of the background's advantages, the edit's being 1: what moves a method along its front."""


def weighted(name: str, weight: float, rate: float | None = None) -> Variant:
    """A method as in `AT_BEST` with a weight of the background's advantages; a point of its front at its best rate."""
    config = {**AT_BEST[name], "region_advantage_weights": [1.0, weight]}
    if rate is None:
        return Variant(f"{name}, {weight:g}", {**config, "learning_rate": BEST_RATES[name]}, front=name)
    return Variant(f"{name}, {weight:g}, rate {rate:g}", {**config, "learning_rate": rate})


FRONTS = Table(
    "Fronts of the methods at their best",
    "Whose trade between edit and background lies further out, on edits that no choice has seen?",
    "train",
    [
        BASE,
        *(weighted(name, weight) for name in AT_BEST for weight in WEIGHTS_TRIED),
        *(weighted("Neighbor GRPO", weight, 1e-3) for weight in (0.1, 1.0)),
    ],
    {**JUDGED_APART, "updates": "updates"},
    baseline="RC-GRPO, 1",
    plane=("psnr", "edit_score"),
    floors=({"edit_score": -0.01, "psnr": -1.0}, {"correct": -5.0, "psnr": -1.0}),
    brief=tuple(f"{name}, {weight:g}" for name in AT_BEST for weight in (0.1, 1.0)),
    brief_metrics=("correct", "edit_score", "closeness", "psnr"),
    seeds=2,
)

TABLES: dict[str, Table] = {
    "a": MAIN,
    "b": VARIANCE,
    "c": LEAKAGE,
    "d": MASKS,
    "e": ATTENTION_SWEEP,
    "f": SETTINGS,
    "g": METHOD_RATES,
    "h": FRONTS,
}
