"""What names of TRL, transformers, PEFT, diffusers and its training scripts are called here, or why there are none.

One table for flags, keys of a YAML file, and keyword arguments in Python. What is in no table gets the nearest known
name, if one is near.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

Class = TypeVar("Class", bound=type)


class Here(NamedTuple):
    """What something is called here.

    Args:
        names: in order of preference; the first that the asker knows is told.
        note: a word on it.
        otherwise: what is said where none of them is known.
    """

    names: tuple[str, ...]
    note: str = ""
    otherwise: str = ""


_LORA = Here(("lora_r",), otherwise="it is r of the LoraConfig that RCGRPOTrainer takes as `peft_config`")
_MODEL = Here(("model",), otherwise="it is RCGRPOTrainer's `model`")
_DATA = Here(("dataset",), otherwise="rows are RCGRPOTrainer's `train_dataset` and `eval_dataset`")
_CANDIDATES = Here(("num_generations",))
_BATCH = Here(("per_device_train_batch_size", "batch_size", "rollout_batch_size"))
_QUANTISED = Here(
    ("quantization_config", "model_init_kwargs"),
    "e.g. quantization_config: {'quant_backend': 'bitsandbytes_4bit', 'quant_kwargs': {'load_in_4bit': True}}, the "
    "arguments of diffusers' PipelineQuantizationConfig",
)
_LOADING = Here(
    ("model_init_kwargs",),
    "its mapping goes to from_pretrained, e.g. {'torch_dtype': 'bfloat16'}",
    "models are opened in bfloat16, the embedded one in float32",
)
_SIZE = Here(("resolution", "size", "cell"), "pictures keep their proportions, at resolution² pixels")
_TEXT = "there are no generated tokens here: a candidate is a picture"
_VLLM = "candidates are drawn by the trained pipeline itself; rollout_batch_size bounds their memory"
_POLICY = Here(("policy",), "neighbor, flow_grpo or nft")
_SEED = Here(("seed",))
_LATENTS = "inputs of the text encoders and the transformer are made here from the picture and the instruction"
_PEFT = "RCGRPOTrainer trains a LoRA with `peft_config=LoraConfig(...)`, and the whole transformer without one"


def _all(names: str, found: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), found)


HINTS: dict[str, Here | str] = {
    # The model
    **_all("model_name_or_path model_name model_id pretrained_model_name_or_path base_model", _MODEL),
    "torch_dtype": _LOADING._replace(names=("dtype", "model_init_kwargs")),
    **_all("dtype model_revision variant attn_implementation", _LOADING),
    **_all(
        "load_in_4bit load_in_8bit quantization_config bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant",
        _QUANTISED,
    ),
    "mixed_precision": Here(("bf16", "fp16")),
    "trust_remote_code": "models are read by diffusers, which runs no code of theirs",
    "processing_class": "the pipeline brings its tokenizers; leave it out",
    "reward_processing_classes": "a reward loads its own processor; leave it out",
    "tokenizer": "the pipeline brings its tokenizers; leave it out",
    "ref_model": "the reference is the base under the LoRA; beta weighs the distance to it",
    **_all(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        "the reference is the base under the LoRA, and stays; beta weighs the distance to it",
    ),
    "allow_tf32": Here(("tf32",)),
    # The LoRA
    **_all("lora_rank rank r network_dim", _LORA),
    **_all("alpha network_alpha", Here(("lora_alpha",))),
    "lora_layers": Here(("lora_target_modules",)),
    "target_modules": Here(("lora_target_modules",)),
    "use_lora": Here(("use_peft",), otherwise=_PEFT),
    **_all("use_peft lora_r lora_alpha lora_target_modules", _PEFT),
    "lora_dropout": "dropout would make the update see another policy than the rollout",
    **_all(
        "use_dora use_rslora lora_task_type lora_modules_to_save lora_target_parameters",
        "pass `peft_config=LoraConfig(...)` to RCGRPOTrainer, which takes what stock diffusers can load",
    ),
    **_all("lora_path lora_weights adapter adapter_name_or_path lora_scale", Here(("lora", "init_lora"))),
    # Rows
    **_all("dataset_name dataset_path dataset_name_or_path data_dir train_file data", _DATA),
    "dataset_train_split": Here(("train_split", "split", "splits")),
    **_all("dataset_test_split dataset_eval_split test_split", Here(("eval_split", "split", "splits"))),
    "dataset_config": Here(("preset",), "which names columns and masks; of a data set's configurations, name a folder"),
    "dataset_streaming": Here(("streaming",), "training needs rows that can be addressed"),
    "max_train_samples": Here(("num_train_samples", "num_samples")),
    "max_eval_samples": Here(("num_eval_samples", "num_samples")),
    "num_samples": Here(("num_train_samples",)),
    "max_samples": Here(("num_samples", "num_train_samples")),
    "max_prompt_length": Here(("max_sequence_length",)),
    "max_length": Here(("max_sequence_length",)),
    "image": Here(("image_column",), "the name of the rows' column"),
    "images": Here(("image", "image_column")),
    "prompt": Here(("instruction", "prompt_column")),
    "prompt_2": Here(("instruction", "prompt_column"), "both text encoders read it"),
    "instance_prompt": Here(("instruction", "prompt_column")),
    "caption_column": Here(("prompt_column",)),
    "instruction_column": Here(("prompt_column",)),
    "mask_image": Here(("mask", "mask_column")),
    # Rewards
    **_all(
        "reward reward_func rewards reward_fn reward_funcs reward_model reward_model_name_or_path",
        Here(("reward_funcs", "reward"), otherwise="rewards are RCGRPOTrainer's `reward_funcs`"),
    ),
    # The optimizer
    **_all("lr learning_rate_unet", Here(("learning_rate",))),
    **_all("batch_size train_batch_size per_device_batch_size micro_batch_size", _BATCH),
    **_all("eval_batch_size", Here(("per_device_eval_batch_size", "batch_size"))),
    "epochs": Here(("num_train_epochs",)),
    "num_epochs": Here(("num_train_epochs",)),
    **_all("steps max_train_steps num_steps train_steps", Here(("max_steps", "num_inference_steps"))),
    "num_train_epochs": "nothing is trained by this command",
    "checkpointing_steps": Here(("save_steps",)),
    "validation_steps": Here(("eval_steps",)),
    "checkpoints_total_limit": Here(("save_total_limit",)),
    "lr_scheduler": Here(("lr_scheduler_type",)),
    "lr_warmup_steps": Here(("warmup_steps",)),
    "warmup_ratio": Here(("warmup_steps",), "below 1 it is a share of all updates"),
    "optimizer": Here(("optim",), "in Python also the trainer's `optimizers`"),
    "grad_clip": Here(("max_grad_norm",)),
    **_all("ema use_ema ema_rate", Here(("ema_decay",))),
    "early_stopping": Here(("stop_on_regression",)),
    "evaluation_strategy": Here(("eval_strategy",)),
    "no_cuda": Here(("use_cpu",)),
    "overwrite_output_dir": "an earlier run is never overwritten: name another output_dir, or resume_from_checkpoint",
    "resume": Here(("resume_from_checkpoint",)),
    "out": Here(("output_dir", "output")),
    "output": Here(("output_dir",)),
    "output_dir": Here(("output",), "it names a file"),
    "logging_dir": "the variable TENSORBOARD_LOGGING_DIR of the environment",
    "wandb_project": Here(("project",), "or the variable WANDB_PROJECT of the environment"),
    # The objective
    "kl_coef": Here(("beta",)),
    "kl_beta": Here(("beta",)),
    "clip_range": Here(("epsilon",)),
    **_all("loss_type importance_sampling_level", _POLICY),
    **_all("num_ppo_epochs ppo_epochs mu", Here(("num_iterations",))),
    "steps_per_generation": "a rollout is made for each update and used num_iterations times; "
    "gradient_accumulation_steps sets how many edits an update sees",
    "generation_batch_size": "a rollout covers per_device_train_batch_size · gradient_accumulation_steps edits; "
    "rollout_batch_size bounds its memory",
    **_all("delta use_bias_correction_kl off_policy_mask_threshold", "ratios are clipped by epsilon and epsilon_high"),
    **_all("eta noise_level", Here(("sde_noise_level", "edit_strength"))),
    **_all(
        "disable_dropout ds3_gather_for_generation cast_lm_head_to_fp32 router_aux_loss_coef",
        "it is about language models",
    ),
    **_all(
        "max_completion_length max_new_tokens top_p top_k min_p generation_kwargs "
        "repetition_penalty chat_template_kwargs cache_implementation "
        "mask_truncated_completions top_entropy_quantile pad_to_multiple_of "
        "max_tool_calling_iterations tools rollout_func environment_factory",
        _TEXT,
    ),
    **_all(
        "num_completions_to_print log_multimodal",
        Here(("log_completions",), "which writes a table and pictures"),
    ),
    # Drawing
    **_all("num_images_per_prompt num_candidates num_samples_per_prompt group_size num_images", _CANDIDATES),
    "num_edits": Here(("num_samples", "num_eval_samples")),
    "strength": Here(("edit_strength",), "it scales the noise inside the mask; the source itself is not noised"),
    "cfg": Here(("guidance_scale", "true_cfg_scale")),
    "cfg_scale": Here(("guidance_scale", "true_cfg_scale")),
    "guidance": Here(("guidance_scale",)),
    "true_cfg": Here(("true_cfg_scale",), "only `rcgrpo train` has it"),
    "true_cfg_scale": "only `rcgrpo train` has it; guidance_scale is the distilled guidance",
    "negative_prompt": "only `rcgrpo train` has it, with true_cfg_scale above 1",
    "negative_prompt_2": Here(("negative_prompt",), "both text encoders read it"),
    "padding_mask_crop": "the whole picture is edited; mask_growth grows the region, and resolution sets the size",
    "generator": _SEED,
    "random_seed": _SEED,
    **_all("height width size max_area", _SIZE),
    **_all("num_steps_eval num_inference_steps_eval", Here(("num_inference_steps_eval", "num_inference_steps"))),
    "scheduler": Here(("solver", "lr_scheduler_type")),
    **_all(
        "sigmas latents prompt_embeds pooled_prompt_embeds negative_prompt_embeds "
        "image_reference negative_pooled_prompt_embeds joint_attention_kwargs",
        _LATENTS,
    ),
    **_all(
        "ip_adapter_image ip_adapter_image_embeds negative_ip_adapter_image negative_ip_adapter_image_embeds",
        "there are no IP adapters here; a LoRA is",
    ),
    # Callbacks of the Trainer
    **_all(
        "compute_metrics compute_loss_func data_collator model_init preprocess_logits_for_metrics",
        "what is measured are the rewards; one of weight 0 is only logged",
    ),
    "optimizer_cls_and_kwargs": "pass `optimizers=(optimizer, scheduler)`, or set optim",
}
"""Other names: what they are called here, in order of preference, with a word on it; or why there is no such thing."""

FAMILIES = {
    r"(use_)?vllm.*|use_transformers_.*|transformers_continuous_.*": _VLLM,
    r"(sapo|vespo)_.*|entropy_.*|use_adaptive_entropy": "it belongs to another loss; see policy",
}
"""Whole families of names, by pattern."""


def hint(name: str, known: Collection[str], prefix: str = "") -> str | None:
    """A word on a name that is not known.

    Args:
        name: as it was typed, with underscores.
        known: the names that are.
        prefix: before names, such as `--`.

    Returns:
        A clause without a full stop, or None if nothing comes to mind.
    """
    found = HINTS.get(name) or next((text for pattern, text in FAMILIES.items() if re.fullmatch(pattern, name)), "")
    if isinstance(found, Here):
        here = next((other for other in found.names if other in known), None)
        if here is not None:
            return f"it is called {prefix}{here} here" + (f" ({found.note})" if found.note else "")
        found = found.otherwise
    if found:
        return found
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"the nearest known one is {prefix}{nearest[0]}" if nearest else None


def hinted(cls: Class) -> Class:
    """Class decorator: a keyword that `__init__` does not know is a TypeError with a hint.

    Subclasses with an `__init__` of their own are checked where they call this one.
    """
    original = cls.__init__  # type: ignore[misc]
    known = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                said = hint(name, known)
                raise TypeError(
                    f"{name}: got an argument that {cls.__name__} does not have, expected one of its fields"
                    + (f"; {said}" if said else "")
                )
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
