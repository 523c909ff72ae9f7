"""Settings of a run: `GRPOConfig`'s names where the idea is the same, the paper's where it is not."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from packaging.version import Version
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

HAS_ACTIVATION_CHECKPOINTING = Version(transformers.__version__) >= Version("5.23.0")


@dataclass
class RCGRPOConfig(_BaseConfig):
    r"""
    Configuration of [`RCGRPOTrainer`]: everything of `transformers.TrainingArguments`, and the fields below.

    `per_device_train_batch_size` counts *edits* (source, instruction, mask); the trainer makes `num_generations`
    candidates of each. An optimizer step sees `per_device_train_batch_size · gradient_accumulation_steps · processes`
    edits.

    > Parameters that control the data
    > Parameters that control the editor
    > Parameters that control exploration
    > Parameters that control the rewards
    > Parameters that control the objective

    Each field's `help` says what it does; `docs/algorithm.md` says why.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Parameters that control the data
    image_column: str = field(default="input_image", metadata={"help": "Column with the source picture."})
    prompt_column: str = field(default="instruction", metadata={"help": "Column with the instruction."})
    mask_column: str = field(default="mask", metadata={"help": "Column with the region's mask, 255 = edit."})
    check_rows: int = field(
        default=2048,
        metadata={"help": "Rows of each dataset to decode before training, to find a bad one early. 0 checks none."},
    )
    mask_growth: float = field(
        default=0.02,
        metadata={
            "help": "Grow the region by this share of the picture's short side, as Kontext moves edges a little."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep every column for the rewards; must stay false."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the training rows every epoch."})

    # Parameters that control the editor
    resolution: int = field(
        default=512,
        metadata={"help": "Edit at resolution² pixels, keeping the aspect ratio. Use the size you infer at."},
    )
    num_inference_steps: int = field(default=8, metadata={"help": "Steps of the deterministic ODE in rollouts."})
    guidance_scale: float = field(
        default=3.5, metadata={"help": "Distilled guidance; without effect on models that have no guidance embedding."}
    )
    max_sequence_length: int = field(default=512, metadata={"help": "T5 tokens of an instruction, padded."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` when `model` is a string, e.g. {'torch_dtype': 'bfloat16'}."},
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates at a time in rollouts. Bounds memory; the default is all of them."}
    )
    train_micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Anchor steps at a time in the update. Bounds memory; the default is all of them."},
    )

    # Parameters that control exploration
    num_generations: int = field(default=12, metadata={"help": "Candidates of a group (G), at least 2."})
    num_generations_eval: int = field(default=1, metadata={"help": "Candidates of each edit in evaluation."})
    edit_strength: float = field(default=0.5, metadata={"help": "Perturbation inside the region, in [0, 1]."})
    keep_strength: float = field(
        default=0.0, metadata={"help": "Perturbation outside the region, in [0, 1]; 0 shares the background's noise."}
    )
    antithetic: bool = field(
        default=False, metadata={"help": "Mirror the second half of a group's noise; needs an even num_generations."}
    )

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each by default."}
    )
    attention_reward_weight: float = field(
        default=0.0, metadata={"help": "Weight of the attention-concentration reward; 0 leaves it out."}
    )
    log_attention: bool = field(
        default=False, metadata={"help": "Record attention for the log even when no reward uses it."}
    )
    max_reward_failures: int = field(
        default=3,
        metadata={"help": "Stop, after saving, when a required reward fails on this many batches in a row."},
    )

    # Parameters that control the objective
    num_anchors: int = field(default=4, metadata={"help": "Trajectories of a group used as anchors (B)."})
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
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the policy ratio."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the velocity KL to the frozen base."})
    beta_keep: float = field(
        default=1.0, metadata={"help": "How much stronger that KL counts outside the region than inside."}
    )
    advantage_power: float = field(default=0.8, metadata={"help": "p of the quasi-norm; 2 gives back z-scores."})
    advantage_std_floor: float = field(
        default=1e-3, metadata={"help": "Smallest reward spread of a group to divide by."}
    )
    min_reward_std: float = field(
        default=1e-6, metadata={"help": "Drop groups whose rewards spread less than this, and count them."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "sum_then_normalize, or normalize_then_sum (GDPO)."}
    )

    # Changed defaults of the base classes
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Trade compute for memory in the update. On by default."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def __post_init__(self) -> None:
        self._check()
        # transformers reads a newer alias of gradient checkpointing; a value given for either must win.
        if HAS_ACTIVATION_CHECKPOINTING:
            names = ("activation_checkpointing", "gradient_checkpointing")
            given = [value for value in (getattr(self, name) for name in names) if value is not None]
            self.activation_checkpointing = self.gradient_checkpointing = all(given) if given else True
        elif self.gradient_checkpointing is None:
            self.gradient_checkpointing = True
        if getattr(self, "bf16", None) is None and not self.fp16:
            # TRL assumes bf16 everywhere; a laptop's CPU is slower with it and transformers refuses it there.
            self.bf16 = bool(is_torch_bf16_gpu_available()) and not self.use_cpu
        super().__post_init__()

    def _check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ValueError: naming the field, its value, what was expected and what to do.
        """

        def refuse(name: str, expected: str) -> None:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        if self.num_generations < 2:
            refuse("num_generations", "at least 2: a group is compared with itself, so one candidate teaches nothing")
        if self.antithetic and self.num_generations % 2:
            refuse("num_generations", "an even number, because antithetic=True mirrors half of the group")
        if not 1 <= self.num_anchors <= self.num_generations:
            refuse("num_anchors", f"1 to num_generations ({self.num_generations})")
        counts = ("num_generations_eval", "num_inference_steps", "num_policy_steps", "num_iterations", "resolution")
        for name in (*counts, "max_reward_failures"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("rollout_batch_size", "train_micro_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                refuse(name, "at least 1, or none for no bound")
        for name in ("edit_strength", "keep_strength", "mask_growth"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "a number in [0, 1]")
        for name in ("keep_weight", "beta", "beta_keep", "attention_reward_weight", "min_reward_std", "check_rows"):
            if not getattr(self, name) >= 0:  # NaN is neither
                refuse(name, "0 or more")
        for name in ("temperature", "epsilon", "advantage_power", "advantage_std_floor"):
            if not getattr(self, name) > 0:
                refuse(name, "a number above 0")
        choices = {
            "distance_space": ("latents", "clean"),
            "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                refuse(name, f"one of {', '.join(allowed)}")
        if len(self.policy_steps_range) != 2 or not 0 <= self.policy_steps_range[0] < self.policy_steps_range[1] <= 1:
            refuse("policy_steps_range", "two shares of the trajectory in order, such as 0 0.875")
        if self.num_policy_steps > len(self.policy_step_indices):
            refuse(
                "num_policy_steps",
                f"at most the {len(self.policy_step_indices)} steps that policy_steps_range={self.policy_steps_range} "
                f"leaves of num_inference_steps={self.num_inference_steps}",
            )
        if self.num_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.num_iterations:
            refuse("save_steps", f"a multiple of num_iterations ({self.num_iterations}), so that a resume is exact")
        if self.remove_unused_columns:
            refuse("remove_unused_columns", "False: the rewards read the dataset's other columns")

    @property
    def policy_step_indices(self) -> list[int]:
        """The steps of a trajectory that may be trained on."""
        first, last = (round(share * self.num_inference_steps) for share in self.policy_steps_range)
        return list(range(first, last))
