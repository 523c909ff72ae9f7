"""What the trainer refuses at its start, one small function each, in the order in which it can be known.

Where it fits: `config_checks` has refused what a configuration alone tells; here it meets rewards, LoRA, editor,
optimizer and machine. What rows can do is `rows`' business.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ..data.edits import Edit, EditRows
from ..editors.attention import AttentionOptions, Concentration
from ..editors.base import FlowEditor
from ..groups.rollout import Group
from ..rewards import ATTENTION_REWARDS, PendingScores, Reward, RewardError
from .config import RCGRPOConfig
from .hub import check_lora_config

logger = logging.getLogger(__name__)


def check_lora(peft_config: PeftConfig | None) -> None:
    """Refuse a LoRA that diffusers does not load, or that draws at random."""
    if peft_config is None:
        return
    check_lora_config(peft_config)
    if peft_config.lora_dropout:
        raise ValueError(
            f"peft_config.lora_dropout: got {peft_config.lora_dropout}, expected 0: dropout makes the update see "
            "another policy than the rollout"
        )


def check_reference(args: RCGRPOConfig, has_lora: bool) -> None:
    """Refuse a KL without a model to compare with."""
    if args.beta and not has_lora:
        raise ValueError(f"beta: got {args.beta} without peft_config, expected LoRA, whose base is the reference")


def check_attention(args: RCGRPOConfig, editor: FlowEditor, recorded: bool) -> None:
    """Refuse blocks that are not there, and a choice of attention where none is recorded."""
    if recorded:
        editor.attention(args.attention_options)
    elif args.attention_options != AttentionOptions():
        raise ValueError(
            f"attention_blocks, attention_...: got {args.attention_options}, expected the defaults, as nothing "
            f"is recorded without log_attention=True or one of the rewards {', '.join(ATTENTION_REWARDS)}"
        )


def check_optimizer(trained: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer of other weights, with which nothing would be trained."""
    if optimizer is not None:
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not any(id(weight) in held for weight in trained.parameters() if weight.requires_grad):
            raise ValueError(
                "optimizers: got an optimizer of none of the weights that are trained, expected one of the LoRA's "
                "own, which are there beforehand only where a run goes on with peft_config=None; or set optim and "
                "optim_args in the configuration"
            )


def check_engine(accelerator: Any, args: RCGRPOConfig, goes_on: bool, held_out: Sequence[EditRows | None]) -> None:
    """Refuse engines that split the model or its work otherwise than process by process, or than `shard_model` does.

    Args:
        goes_on: a LoRA that was there before is trained on.
        held_out: sets of rows for evaluations.
    """
    if args.n_gpu > 1:
        raise ValueError("Several GPUs in one process: got DataParallel, expected one GPU; use `accelerate launch`")
    for name in ("fsdp", "deepspeed"):
        if getattr(accelerator.state, f"{name}_plugin", None) is not None:
            raise ValueError(
                f"{name}: got an engine that knows nothing of rollouts, expected shard_model=True, which spreads "
                "weights, gradients and optimizer state as FSDP2 and ZeRO-3 do; start with `accelerate launch "
                "--multi_gpu`"
            )
    if not args.shard_model:
        return
    processes = accelerator.num_processes
    if processes == 1:
        raise ValueError("shard_model: got True on one process, expected several; use `accelerate launch --multi_gpu`")
    if args.beta and goes_on:
        raise ValueError(
            f"shard_model: got True with beta={args.beta} and a LoRA that goes on being trained, expected one or the "
            "other, as its start would have to be kept whole; fuse it into the base, or set beta to 0"
        )
    fewest = min((len(rows) for rows in held_out if rows is not None), default=processes)
    if fewest < processes:
        raise ValueError(
            f"shard_model: got {fewest} rows in eval_dataset, expected one for each of {processes} processes, "
            "as every forward takes all of them"
        )


def check_gradient(args: RCGRPOConfig, rewards: Sequence[Reward]) -> None:
    """Refuse to follow the gradient of rewards that have none."""
    if args.reward_gradient_weight and not any(reward.differentiable for reward in rewards):
        raise ValueError(
            f"reward_gradient_weight: got {args.reward_gradient_weight} with {[r.name for r in rewards]}, "
            "expected a reward that has a gradient, such as region_margin; see docs/rewards.md"
        )


def check_enough(rows: EditRows, cycle: int) -> None:
    """Refuse fewer rows than one update's edits."""
    if len(rows) < cycle:
        raise ValueError(
            f"train_dataset: got {len(rows)} rows, expected at least one update's {cycle} edits "
            "(per_device_train_batch_size · gradient_accumulation_steps · processes); lower one of these"
        )


def probe_rewards(
    rewards: Sequence[Reward],
    edit: Edit,
    editor: FlowEditor,
    with_attention: bool,
    submit: Callable[[list[Group], list[str]], PendingScores],
) -> None:
    """Call each reward once on unedited sources, so that what is wrong with it is known before hours are spent.

    None is as good an answer as any: an unedited source may be none of a reward's business. NaN is only a warning, as
    it may come of a change of nothing at all.

    Args:
        edit: whose source is shown.
        with_attention: whether the rewards may ask for what was recorded of it.
        submit: begins to score groups, whose candidates have these labels.

    Raises:
        RewardError: a reward returned a wrong number of scores, or failed on all of them, with what it raised.
        ModuleNotFoundError: a reward needs a package that is not installed.
    """
    group = _unedited(edit, editor, with_attention)
    labels = [f"start-up probe {i} ({edit.label}, unedited)" for i in range(2)]
    scored = submit([group, group], labels).result()
    for reward in rewards:
        failed = [failure for failure in scored.failures if failure.reward == reward.name]
        if len(failed) == len(labels) and all(failure.kind != "not_finite" for failure in failed):
            if isinstance(failed[-1].error, ModuleNotFoundError):  # which says what to install
                raise failed[-1].error
            raise RewardError(
                f"reward {reward.name!r} failed on every candidate of the start-up probe, {edit.label} "
                f"unedited: it {failed[-1].reason}. Training with it would teach nothing; repair it (or the "
                "server behind it), or leave it out of reward_funcs"
            ) from failed[-1].error
        for failure in failed:
            logger.warning(
                "reward %r failed on %s (%s); training goes on, candidates that it fails on are left out",
                failure.reward,
                failure.sample_label,
                failure.reason,
            )


def _unedited(edit: Edit, editor: FlowEditor, with_attention: bool) -> Group:
    """A group of one candidate, the source itself, that no model has seen."""
    height, width = editor.size_for(edit.source)
    image, one, unused = edit.source.resize((width, height)), torch.ones(1), None
    attention = Concentration(one, one, one) if with_attention else None
    return Group(edit, unused, unused, one, one, [image], attention, None)  # type: ignore[arg-type]
