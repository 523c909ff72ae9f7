"""Settings of a run: `GRPOConfig`'s names where the idea is the same, the paper's where it is not."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from packaging.version import Version
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from ..editors.attention import AttentionOptions
from ..inputs.hints import hinted
from .config_checks import check_config, check_launch, join_launch
from .objective_config import ObjectiveConfig

HAS_ACTIVATION_CHECKPOINTING = Version(transformers.__version__) >= Version("5.23.0")


@hinted
@dataclass
class RCGRPOConfig(ObjectiveConfig, _BaseConfig):
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
    > Parameters that control the logging

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
    regions_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with several regions: labels (0 = keep, 1..K) or a list of K masks. The region "
            "to edit is then their union; rewards still see `mask_column`."
        },
    )
    turns_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with further turns of an edit: a list of mappings with 'instruction', 'mask' and columns "
            "that change. Each starts from the best candidate of the turn before."
        },
    )
    turns_at_once: bool = field(
        default=False,
        metadata={
            "help": "Make one edit of a row and its turns_column: the instructions joined by 'and', and a region for "
            "each mask (region_1 is the row's own), as with regions_column. Columns of the turns stay unread."
        },
    )
    mask_growth: float = field(
        default=0.02,
        metadata={"help": "Grow the region by this share of the picture's short side, as edges move a little."},
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
    num_inference_steps_eval: int | None = field(
        default=None, metadata={"help": "Steps of the ODE in evaluation, as you infer; those of rollouts by default."}
    )
    solver: str | None = field(
        default=None,
        metadata={
            "help": "What rollouts step with: euler, heun (two model calls a step), dpmpp_2m or unipc, all through the "
            "same noise levels; the pipeline's own scheduler by default. The policy is always an Euler step."
        },
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "As the pipeline's argument of this name, and its default by default: distilled for FLUX.1-Kontext "
            "(3.5), real for a base FLUX.2-klein (4), at twice the cost. Other models ignore it."
        },
    )
    true_cfg_scale: float = field(
        default=1.0,
        metadata={"help": "True classifier-free guidance in rollouts and updates; 1 is off, more doubles the cost."},
    )
    negative_prompt: str = field(default="", metadata={"help": "What true_cfg_scale > 1 guides away from."})
    batch_guidance: bool = field(
        default=False,
        metadata={
            "help": "Ask for both halves of real guidance in one forward: quicker where one does not fill the device, "
            "at twice its memory."
        },
    )
    max_sequence_length: int = field(
        default=512, metadata={"help": "Tokens of an instruction, where the text encoder pads them."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` when `model` is a string, e.g. {'torch_dtype': 'bfloat16'}."},
    )
    cache_conditions: bool = field(
        default=False,
        metadata={
            "help": "Encode each instruction and each source once, keep the results on disk (4 MB an instruction with "
            "FLUX), and keep the text encoders off the device except while something new is encoded. Same results."
        },
    )
    conditions_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where; by default rcgrpo/conditions in the Hugging Face home, shared by all runs."},
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates at a time in rollouts. Bounds memory; the default is all of them."}
    )
    train_micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Anchor steps at a time in the update. Bounds memory; the default is all of them."},
    )

    shard_model: bool = field(
        default=False,
        metadata={
            "help": "Spread the transformer, its gradients and the optimizer's state over all processes, block by "
            "block (FSDP2), where one GPU does not hold them; each block is gathered when it is at work."
        },
    )

    # Parameters that control exploration
    num_generations: int = field(default=12, metadata={"help": "Candidates of a group (G), at least 2."})
    num_generations_eval: int = field(default=1, metadata={"help": "Candidates of each edit in evaluation."})
    exploration: str = field(
        default="region",
        metadata={"help": "'region' perturbs by the two strengths below, 'global' everywhere by edit_strength."},
    )
    edit_strength: float = field(default=0.5, metadata={"help": "Perturbation inside the region, in [0, 1]."})
    keep_strength: float = field(
        default=0.0, metadata={"help": "Perturbation outside the region, in [0, 1]; 0 shares the background's noise."}
    )
    region_strengths: list[float] | None = field(
        default=None,
        metadata={"help": "Perturbation inside each region of regions_column or turns_at_once, not one edit_strength."},
    )
    independent_share: float = field(
        default=0.0, metadata={"help": "Share of a group that starts from noise of its own everywhere, in [0, 1]."}
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
    attention_blocks: list[int] | None = field(
        default=None,
        metadata={"help": "Blocks to record, numbered through the double and then the single ones; all by default."},
    )
    attention_steps_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Share of a rollout's steps to record, from and to."}
    )
    attention_words_column: str | None = field(
        default=None,
        metadata={"help": "Column with the words of each instruction to record (a string or a list); all by default."},
    )
    attention_direction: str = field(
        default="text_to_image",
        metadata={"help": "text_to_image: where the instruction looks; image_to_text: what looks at the instruction."},
    )
    max_reward_failures: int = field(
        default=3,
        metadata={
            "help": "Stop, after saving, when a required reward fails on this many batches in a row; say so loudly "
            "when another one does."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward may take before it counts as failed; no limit by default. Remote "
            "rewards and judges have limits of their own."
        },
    )

    # Parameters that control the logging
    num_eval_edits: int | None = field(
        default=None,
        metadata={"help": "Held-out edits that evaluations during training look at, always the same; all by default."},
    )
    stop_on_regression: bool = field(
        default=False,
        metadata={"help": "Stop when the held-out metric is clearly below its best, which is warned of anyway."},
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "With each log, write the latest update's candidates to output_dir/completions: a table, and a "
            "picture of up to eight edits, which wandb, trackio and tensorboard get too. So do evaluations, always of "
            "the same edits. push_to_hub sends the folder as well."
        },
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "With log_completions, draw each instruction once; the table has all."}
    )
    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "With log_completions, a data set on the Hub that gets the folder as it grows."}
    )

    # Changed defaults of the base classes
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Trade compute for memory in the update. On by default."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def __post_init__(self) -> None:
        # TRL takes a boolean too, which a command line says in words.
        spelt = {"true": "group", "false": "none"}
        self.scale_rewards = spelt.get(str(self.scale_rewards).lower(), self.scale_rewards)
        self.solver = None if str(self.solver).lower() == "none" else self.solver
        if self.load_best_model_at_end and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "reward"  # not a loss, which no evaluation has
        check_config(self)
        # transformers reads a newer alias of gradient checkpointing; a value given for either must win.
        if HAS_ACTIVATION_CHECKPOINTING:
            names = ("activation_checkpointing", "gradient_checkpointing")
            given = [value for value in (getattr(self, name) for name in names) if value is not None]
            self.activation_checkpointing = self.gradient_checkpointing = all(given) if given else True
        elif self.gradient_checkpointing is None:
            self.gradient_checkpointing = True
        if getattr(self, "bf16", None) is None and not self.fp16:
            # TRL assumes bf16 everywhere; a laptop's CPU is slower with it and transformers refuses it there.
            self.bf16 = bool(is_torch_bf16_gpu_available()) and not self.use_cpu  # type: ignore[has-type]
        launched = join_launch(self)
        super().__post_init__()
        check_launch(self, launched)

    @property
    def place_model_on_device(self) -> bool:
        """Whether the Trainer moves the whole model; what is sharded goes block by block."""
        return super().place_model_on_device and not self.shard_model

    @property
    def named_regions(self) -> list[str]:
        """The regions with an objective of their own, in the order of their weights."""
        if not self.region_advantages:
            return []
        attention = ["edit"] if self.attention_reward_weight else []
        return list(dict.fromkeys([*(self.reward_regions or []), *attention]))

    @property
    def attention_options(self) -> AttentionOptions:
        """Which part of the attention is recorded."""
        return AttentionOptions(
            self.attention_blocks,
            tuple(self.attention_steps_range),  # type: ignore[arg-type]
            self.attention_words_column,
            self.attention_direction,  # type: ignore[arg-type]
        )

    @property
    def policy_step_indices(self) -> list[int]:
        """The steps of a trajectory that may be trained on."""
        first, last = (round(share * self.num_inference_steps) for share in self.policy_steps_range)
        return list(range(first, last))
