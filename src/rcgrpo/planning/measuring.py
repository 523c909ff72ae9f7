"""What whole models take, from their own code on one and two blocks of each kind.

Everything is linear in the number of blocks as long as one moment is looked at: the bytes alive while the last block of
a kind is worked on (forward, or again and backward) are a sum over blocks. So peaks are kept apart by the kind of
block at work, each is extended linearly, and the largest is the peak.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.reward_gradient import follow
from ..groups.transitions import Transitions
from ..maths.objective import velocity_kl
from ..training.precision import computes_in_bf16
from .counting import Counter, storages, without_contents
from .known import Parts
from .model import BLOCKS, Shape, add_lora, block_counts, make_conditions, make_editor, size_of, without_meta

Loss = Callable[[Tensor, Transitions], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Costs:
    """What a call takes beyond what lies in memory anyway.

    Args:
        peaks: bytes by the kind of block at work.
        flop: floating-point operations.
        frozen, matrices: numbers of weights of the base: all of them, and those in matrices, which quantisation stores
            in fewer bits.
        trained: number of the LoRA's weights.
        largest: number of weights of the largest matrix.
    """

    peaks: Mapping[str, float]
    flop: float
    frozen: float
    matrices: float
    trained: float
    largest: int

    @property
    def peak(self) -> float:
        """Bytes."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class Update:
    """What the update's memory depends on besides its shape.

    Args:
        lora_r, lora_target_modules, num_generations, gradient_checkpointing: as in the configuration.
        rows: objectives that act on tokens of their own.
        loss: the policy's.
        reference: whether the base is asked too, without a gradient, as with `beta`.
        gradient_steps: model calls of a transition that the rewards' own gradient goes through, which then goes through
            the decoder as well; 0 where it is not followed.
    """

    loss: Loss
    lora_r: int = 32
    lora_target_modules: tuple[str, ...] | None = None
    num_generations: int = 12
    rows: int = 1
    gradient_checkpointing: bool = True
    reference: bool = False
    gradient_steps: int = 0


def whole(
    parts: Parts, measure: Callable[[Mapping[str, int]], Costs], blocks: Mapping[str, int] | None = None
) -> Costs:
    """A measurement extended to all of the transformer's blocks, or to so many."""
    blocks = blocks or block_counts(parts)
    ones = dict.fromkeys(blocks, 1)
    base = measure(ones)
    slopes = [(count - 1, measure(ones | {key: 2})) for key, count in blocks.items() if count > 1]

    def extend(value: Callable[[Costs], float]) -> float:
        return value(base) + sum(more * (value(two) - value(base)) for more, two in slopes)

    return Costs(
        {label: extend(lambda costs, label=label: costs.peaks[label]) for label in base.peaks},  # type: ignore[misc]
        flop=extend(lambda costs: costs.flop),
        frozen=extend(lambda costs: costs.frozen),
        matrices=extend(lambda costs: costs.matrices),
        trained=extend(lambda costs: costs.trained),
        largest=base.largest,
    )


def measure_velocity(parts: Parts, shape: Shape, update: Update, train: bool, blocks: Mapping[str, int]) -> Costs:
    """A velocity of a model of so many blocks with its LoRA, in a rollout; or, if `train`, an update's micro-batch."""
    editor = make_editor(parts, blocks, shape)
    base = editor.pipeline.transformer
    frozen = sum(weight.numel() for weight in base.parameters())
    matrices = [layer.weight.numel() for layer in base.modules() if isinstance(layer, nn.Linear)]
    model = add_lora(editor, update.lora_r, update.lora_target_modules)
    model.train(train)
    autocast = shape.autocast and not computes_in_bf16(model)
    if train and update.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    with without_contents():
        without_meta(model, editor.pipeline.vae)
        conditions = make_conditions(editor, shape)
        latents = torch.zeros(*conditions.source.shape)
        time = torch.full([shape.batch], 500.0)
        transitions = _transitions(latents, time, conditions, update) if train else None
        given = [latents, time, conditions.source, *conditions.text.values(), *conditions.negative.values()]
        given += [] if conditions.references is None else [conditions.references]
        if transitions is not None:
            given += [value for value in vars(transitions).values() if isinstance(value, Tensor)]
        counter = Counter([*storages(model, editor.pipeline.vae), *given])
        moment, calls = [""], count()
        for key, name in BLOCKS.items():
            for block in getattr(base, name, ()) if key in blocks else ():
                block.register_forward_pre_hook(partial(_enter, counter, moment, name))

        def asked(**arguments: Any) -> Any:  # as accelerate wraps a model
            moment[0] = f"call {next(calls)}"
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                return model(**arguments)

        with counter, torch.set_grad_enabled(train):
            velocity = editor.velocity(asked, latents, time, conditions)  # type: ignore[arg-type]
            if transitions is not None:
                loss, _ = update.loss(velocity, transitions)
                if update.gradient_steps:
                    way = follow(editor, asked, transitions, velocity, update.gradient_steps)  # type: ignore[arg-type]
                    counter.label = "decode"
                    loss = loss - editor.decode_tensor(way.clean, *size_of(editor)).mean((1, 2, 3))
                if update.reference:
                    with torch.no_grad(), model.disable_adapter():
                        still = editor.velocity(asked, latents, time, conditions)  # type: ignore[arg-type]
                    loss = loss + velocity_kl(velocity, still, torch.ones_like(latents))
                moment[0] = "backward"
                loss.mean().backward()
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return Costs(counter.peaks, counter.flop, frozen, sum(matrices), trained, max(matrices))


def _enter(counter: Counter, moment: list[str], name: str, *_: Any) -> None:
    counter.label = f"{moment[0]}, {name}"


def _transitions(latents: Tensor, time: Tensor, conditions: Any, update: Update) -> Transitions:
    batch, tokens, _ = latents.shape
    several = latents.unsqueeze(1).repeat(1, update.num_generations, 1, 1)
    scalar, flat, steps = torch.zeros(batch), torch.zeros(batch, tokens), update.gradient_steps
    schedule = SimpleNamespace(sigmas=torch.zeros(steps + 1), timesteps=torch.zeros(steps))
    return Transitions(
        latents=latents,
        timestep=time,
        sigma=scalar,
        next_sigma=scalar.clone(),
        candidates=several,
        advantages=torch.ones(batch, update.rows, update.num_generations),
        weights=torch.ones(batch, update.rows, tokens),
        std=flat,
        noise=torch.zeros_like(latents),
        next_latents=torch.zeros_like(latents),
        region=flat.clone(),
        conditions=conditions,
        old=None,
        where=[(0, 0, 0)] * batch,
        groups=[SimpleNamespace(schedule=schedule)],  # type: ignore[list-item]
    )


def measure_vae(parts: Parts, shape: Shape, decode: bool) -> Costs:
    """Decoding a batch by the editor's own code, or encoding a source; `frozen` are the VAE's weights."""
    editor = make_editor(parts, dict.fromkeys(block_counts(parts), 1), shape)
    vae = editor.pipeline.vae
    with without_contents():
        without_meta(vae)
        size = size_of(editor)
        conditions = make_conditions(editor, shape)
        pixels = torch.zeros(1, 3, *editor.reference_size(*size), dtype=shape.vae_dtype)
        pixels = pixels.unsqueeze(2) if editor.sees_pictures else pixels
        counter = Counter([*storages(vae), conditions.source, pixels])
        with counter, torch.no_grad():
            if decode:
                editor.decode_tensor(conditions.source, *size)
            else:
                vae.encode(pixels)
        weights = sum(weight.numel() for weight in vae.parameters())
        return Costs(counter.peaks, counter.flop, weights, 0, 0, 0)
