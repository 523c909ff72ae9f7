"""`rcgrpo diagnose --gradient`: how noisy a configuration's gradient is, before anything is trained on it.

Several edits are rolled out, each from several draws of noise, and each group's gradient is taken as the trainer would,
at the model as it is. What comes of it is in inner products (`maths.gradient_noise`): of the whole gradient, of what
comes through the region's tokens and through the others, and of each kind of layer.

Gotchas: a policy's loss reaches the parameters through the model's velocity alone, so its gradient there, cut to a
region's tokens, gives that region's part. A reward's gradient through several steps comes by the calls behind as well
(`later calls`). The parts add up exactly. All gradients are kept on the CPU until the end: edits × draws × trained
parameters × 12 bytes.
"""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.edits import Edit
from ..groups.transitions import choose, gather, micro_batches
from ..maths.gradient_noise import gram_of, interval, noise_of
from ..reporting.files import write_atomically
from ..reporting.statistics import FEWEST_PAIRS, pad_table

if TYPE_CHECKING:
    from ..training.trainer import RCGRPOTrainer

WHOLE, PARTS = "all", ("edit tokens", "keep tokens", "later calls")


@dataclass(frozen=True)
class Measured:
    """Inner products of each part, `[edits, draws, edits, draws]`, and the seconds that a group took in training."""

    grams: dict[str, Tensor]
    seconds: float


def measure_gradients(trainer: "RCGRPOTrainer", edits: Sequence[Edit], draws: int) -> Measured:
    """Gradients of a group of each edit from each draw, with the trainer's settings and its model as it is.

    Args:
        edits: at least two.
        draws: groups of each edit, at least two.
    """
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # mixed precision, as in training
    if trainer.args.gradient_checkpointing:
        trainer.pipeline.transformer.enable_gradient_checkpointing()
    names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    parts, spent = [], 0.0
    with tqdm(total=len(edits) * draws, desc="groups", disable=trainer.args.disable_tqdm) as progress:
        for edit in edits:
            for draw in range(draws):
                found, seconds = _group_gradients(trainer, edit, ("gradient", trainer.args.seed, draw))
                parts.append([torch.cat([g.flatten() for g in each]).cpu() for each in found])
                sizes = [g.numel() for g in found[0]]
                spent += seconds
                progress.update()
    trainer.forget_metrics()
    of_part = [torch.stack(rows).unflatten(0, (len(edits), draws)) for rows in zip(*parts, strict=True)]
    if trainer.args.reward_gradient_steps == 1:
        of_part.pop()  # nothing
    whole = sum(of_part[1:], of_part[0])
    grams = {WHOLE: gram_of(whole)} | {name: gram_of(found) for name, found in zip(PARTS, of_part, strict=False)}
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, values in zip(names, whole.split(sizes, -1), strict=True):
        kinds[layer_kind(name)].append(gram_of(values))
    grams |= {kind: torch.stack(found).sum(0) for kind, found in kinds.items()}
    return Measured(grams, spent / len(parts))


def layer_kind(name: str) -> str:
    """What a parameter's layer is called in every block: its name without numbers of blocks and without LoRA's parts.

    `base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight` is of `transformer_blocks.attn.to_q`.
    """
    name = re.sub(r"^base_model\.model\.|\.lora_\w+(\.\w+)*$|\.(weight|bias)$", "", name)
    return re.sub(r"^(\w*blocks)\.\d+\.", r"\1.", name)


def _group_gradients(trainer: "RCGRPOTrainer", edit: Edit, key: tuple[Any, ...]) -> tuple[list[list[Tensor]], float]:
    """Gradients by parameter of each of `PARTS`, and seconds without what telling them apart takes."""
    args, clock = trainer.args, time.perf_counter if torch.cuda.is_available() else time.process_time
    parameters = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    found = [[torch.zeros_like(weight, dtype=torch.float32) for weight in parameters] for _ in PARTS]
    began, apart = clock(), 0.0
    trainer.model.train()
    groups = trainer.make_groups([edit], args.num_generations, key)
    trainer.score_groups(groups)
    steps = args.policy_step_indices
    chosen = choose(groups, trainer.policy, args.num_anchors, args.num_policy_steps, steps, key)
    for where in micro_batches(groups, chosen, args.train_micro_batch_size):
        inputs = gather(groups, where, trainer.policy, {})
        with trainer.compute_loss_context_manager():
            velocity = trainer.editor.velocity(trainer.model, inputs.latents, inputs.timestep, inputs.conditions)
            loss = trainer.loss_of(trainer.model, velocity, inputs) * len(where)
        loss = loss / (args.num_anchors * args.num_policy_steps)
        _add(found[2], torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        second = clock()
        (pull,) = torch.autograd.grad(loss, velocity, retain_graph=True)
        for total, tokens in zip(found, (inputs.region, 1 - inputs.region), strict=False):
            cut = pull * tokens.unsqueeze(-1).to(pull)
            part = _add(total, torch.autograd.grad(velocity, parameters, cut, retain_graph=True, allow_unused=True))
            _add(found[2], [None if grad is None else -grad for grad in part])
        apart += clock() - second
    return found, clock() - began - apart


def _add(totals: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Add gradients, none of which is 0, to their totals; the gradients are handed on."""
    for total, grad in zip(totals, grads, strict=True):
        if grad is not None:
            total += grad
    return grads


def write_gradients(folder: Path, measured: Measured, settings: Mapping[str, Any]) -> str:
    """Write `gradient.json` and `gradient.md`; the text of the second is returned.

    Fewer than `FEWEST_PAIRS` edits have no intervals, NaN in the JSON: two edits are one pair, however often drawn.

    Args:
        settings: what was measured, for the JSON.
    """
    whole, rows = noise_of(measured.grams[WHOLE]), []
    for part, gram in measured.grams.items():
        noise, enough = noise_of(gram), len(gram) >= FEWEST_PAIRS
        low, high = interval(gram) if enough else (math.nan, math.nan)
        rows.append(
            {
                "part": part,
                "snr": noise.signal / noise.variance if noise.variance else 0.0,
                "snr_95": [low, high],
                "groups": noise.groups,
                "groups_95": [math.inf if end <= 0 else 1 / end for end in (high, low)],
                "seconds": noise.groups * measured.seconds,
                "within_share": noise.within / noise.variance if noise.variance else 0.0,
                "variance_share": noise.variance / whole.variance if whole.variance else 0.0,
                **noise._asdict(),
            }
        )
    found = {"seconds_per_group": measured.seconds, "parts": rows, "settings": dict(settings)}
    with write_atomically(folder / "gradient.json") as path:
        path.write_text(json.dumps(found, indent=1, default=str))
    head = ["gradient through", "signal / variance", "95 % interval", "groups", "95 % interval"]
    head += ["seconds", "of it within edits", "share of variance"]
    lines = [
        [
            row["part"],
            f"{row['snr']:.2g}",
            _range(row["snr_95"], "{:.2g}".format),
            _count(row["groups"]),
            _range(row["groups_95"], _count),
            _count(row["seconds"]),
            f"{row['within_share']:.0%}",
            f"{row['variance_share']:.0%}",
        ]
        for row in rows
    ]
    text = f"{pad_table([head, *lines])}\n\n{measured.seconds:.2f} s a group\n"
    with write_atomically(folder / "gradient.md") as path:
        path.write_text(text)
    return text


def _range(ends: Sequence[float], shown: Callable[[float], str]) -> str:
    return "–" if math.isnan(ends[0]) else f"[{shown(ends[0])}, {shown(ends[1])}]"


def _count(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.3g}" if value < 100 else f"{value:.0f}"
