"""`rcgrpo plan`: what a run of `rcgrpo train` will take, before anything but configurations is downloaded."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .parsing import TINY, UsageError, given, one_of, parse
from .train import ScriptArguments, fill_in, fold_in

if TYPE_CHECKING:
    from ..planning.plan import Run
    from ..training.config import RCGRPOConfig


@dataclass
class PlanArguments:
    """What `rcgrpo plan` takes besides the flags of `rcgrpo train`."""

    gpu: str | None = field(
        default=None,
        metadata={"help": "24gb, 48gb, 80gb or 141gb; by default the one that is here, else the smallest that fits."},
    )
    peak_share: float = field(
        default=0.4, metadata={"help": "Share of the GPU's peak FLOP a second that is reached; an assumption."}
    )
    judge_gb: float | None = field(
        default=None,
        metadata={
            "help": "Gigabytes of a judge on the same GPU, 0 on a server; by default counted, where rewards load it by "
            "name."
        },
    )
    json: bool = field(default=False, metadata={"help": "Print values as JSON."})


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo plan`: peak memory by phase, FLOP and seconds of an update, hours of the run, what to lower."""
    from ..planning.cards import CARDS, card_here
    from ..planning.judging import judging_of
    from ..planning.model import read_parts
    from ..planning.plan import Planner
    from ..planning.table import as_text, as_values
    from ..rewards import resolve_rewards
    from ..rewards.judges import URL_VARIABLE
    from ..tiny import WEIGHTS
    from ..training.config import RCGRPOConfig

    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", "unused"]
    script, config, args = parse((ScriptArguments, RCGRPOConfig, PlanArguments), arguments, None, "rcgrpo plan")
    one_of(args, "gpu", tuple(CARDS))
    fold_in(script, config)
    if not script.use_peft:
        raise UsageError("--use_peft: got false, expected true: training the whole transformer is not counted")
    named = given(arguments)
    if script.model == TINY:
        fill_in(config, named)
    parts = read_parts(str(WEIGHTS) if script.model == TINY else script.model)
    wanted = run_of(script, config, args.judge_gb or 0.0, "bf16" not in named)
    uncounted = []
    if args.judge_gb is None and not script.judge_on_server and not os.environ.get(URL_VARIABLE):
        at_once = config.per_device_train_batch_size * config.num_generations
        judges, unknown = judging_of(resolve_rewards(list(script.reward_funcs)), at_once, config.resolution)
        wanted = replace(wanted, judges=tuple(judges))
        uncounted = [f"the judge of {name} (--judge_gb)" for name in unknown]
    planner = Planner(parts)
    card = CARDS[args.gpu] if args.gpu else card_here()
    plan = planner.plan(wanted, card, args.peak_share)
    if card is None:
        sizes = (planner.plan(wanted, each, args.peak_share) for each in CARDS.values())
        plan = next((each for each in sizes if each.fits), planner.plan(wanted, CARDS["141gb"], args.peak_share))
    ways, smaller = planner.advice(plan, args.peak_share)
    if args.json:
        values = as_values(plan, args.peak_share)
        values |= {"to_fit": ways, "fits_then": smaller.fits, "not_counted": uncounted}
        json.dump(values, sys.stdout, indent=1)
        print()
        return
    print(as_text(plan, args.peak_share))
    if ways:
        then = f"{smaller.peak.bytes / 1e9:.1f} GB" + ("" if smaller.fits else ", still too much")
        print(f"To fit: {'; '.join(ways)} ({then})")
    for part in uncounted:
        print(f"Not counted: {part}")


def run_of(script: ScriptArguments, config: "RCGRPOConfig", judge_gb: float, on_bf16: bool) -> "Run":
    """What of the settings memory and time depend on.

    Args:
        judge_gb: gigabytes of a judge on the same GPU.
        on_bf16: nobody said whether to train in bf16, so it is as on a GPU that can.

    Raises:
        UsageError: a dtype or a quantisation whose size is not known.
    """
    from ..groups.policies import make_policy
    from ..planning.measuring import Update
    from ..planning.model import Shape
    from ..planning.plan import Run

    kwargs: Any = config.model_init_kwargs or {}
    steps = config.num_inference_steps
    anchors = min(config.num_anchors, config.num_generations)
    transitions = anchors * min(config.num_policy_steps, len(config.policy_step_indices))
    at_once = config.per_device_train_batch_size
    edits = at_once * config.gradient_accumulation_steps
    updates = config.max_steps if config.max_steps > 0 else None
    if updates is None and script.num_train_samples:
        updates = int(script.num_train_samples // edits * config.num_iterations * config.num_train_epochs)
    targets = script.lora_target_modules
    return Run(
        Shape(
            config.resolution,
            guidance_scale=config.guidance_scale,
            true_cfg_scale=config.true_cfg_scale,
            batch_guidance=config.batch_guidance,
            max_sequence_length=config.max_sequence_length,
            dtype=_dtype(kwargs, "transformer"),
            text_dtype=_dtype(kwargs, "text_encoder"),
            vae_dtype=_dtype(kwargs, "vae"),
            autocast=bool(config.bf16 or config.fp16 or on_bf16),
        ),
        Update(
            make_policy(config, config.named_regions).loss,
            script.lora_r,
            None if targets is None else tuple(targets),
            config.num_generations if config.policy == "neighbor" else 1,
            max(1, len(config.named_regions)),
            bool(config.gradient_checkpointing),
            config.beta > 0,
            min(config.reward_gradient_steps, steps - config.policy_step_indices[0])
            * bool(config.reward_gradient_weight),
        ),
        edits=edits,
        candidates=config.num_generations,
        stages=steps if config.solver in (None, "euler", "dpmpp_2m", "unipc") else 2 * steps - 1,
        transitions=transitions,
        rollout_batch_size=min(config.rollout_batch_size or 10**9, at_once * config.num_generations),
        train_micro_batch_size=min(config.train_micro_batch_size or 10**9, at_once * transitions),
        num_iterations=config.num_iterations,
        cache_conditions=config.cache_conditions,
        quantised=_quantised(kwargs),
        judge=judge_gb * 1e9,
        averaged=config.ema_decay is not None,
        updates=updates,
        held_out=_held_out(script, config, updates),
        held_out_stages=config.num_inference_steps_eval or steps,
    )


def _held_out(script: ScriptArguments, config: "RCGRPOConfig", updates: int | None) -> int:
    """Pictures of held-out edits: the report before and after, and evaluations on the way; 0 where rows are unknown."""
    if script.num_eval_samples is None or script.eval_split == "":
        return 0
    looks = 0
    if str(getattr(config.eval_strategy, "value", config.eval_strategy)) == "steps" and updates and config.eval_steps:
        every = config.eval_steps if config.eval_steps >= 1 else config.eval_steps * updates
        looks = int(updates // every) + bool(config.eval_on_start)
    edits = min(config.num_eval_edits or script.num_eval_samples, script.num_eval_samples)
    return 2 * script.num_eval_samples + looks * edits * config.num_generations_eval


def _dtype(kwargs: Mapping[str, Any], part: str) -> Any:
    """Of a part of the pipeline; diffusers' own is fp32."""
    import torch

    value = kwargs.get("torch_dtype", kwargs.get("dtype", "float32"))
    if isinstance(value, Mapping):
        value = value.get(part, value.get("default", "float32"))
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"model_init_kwargs: got dtype {value!r}, expected the name of a dtype, such as bfloat16")
    return dtype


def _quantised(kwargs: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    from ..planning.plan import BYTES

    asked = kwargs.get("quantization_config")
    if not asked:
        return ()
    backend = asked.get("quant_backend") if isinstance(asked, Mapping) else asked
    if backend not in BYTES:
        raise UsageError(
            f"model_init_kwargs: got a quantization_config with {backend!r}, expected quant_backend to be one of "
            f"{', '.join(BYTES)}, whose sizes are known; leave it out to plan for the unquantised model"
        )
    parts = asked.get("components_to_quantize") or ["transformer", "text_encoder", "text_encoder_2"]
    return tuple((part, backend) for part in ([parts] if isinstance(parts, str) else parts))
