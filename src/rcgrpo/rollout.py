"""Integrate a group's candidates along the deterministic ODE and keep what training will read.

A straight line: noise in, one latent per step out. The solver is the pipeline's own scheduler; the model is called
through `editor.velocity`, the same function that the update uses, so the policy ratio is 1 to the last bit before the
first update. Latents are kept in fp32.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from .attention import AttentionRecorder, Concentration
from .data.edits import Edit
from .editors import Conditions, FluxKontextEditor, Schedule
from .noise import group_deltas, keyed_noise, perturb, region_strength
from .regions import grow, to_tokens


def integrate(
    editor: FluxKontextEditor,
    model: nn.Module,
    noise: Tensor,
    conditions: Conditions,
    schedule: Schedule,
) -> Tensor:
    """Latents at every noise level, fp32 `[steps + 1, batch, tokens, channels]`; the last are the clean ones.

    Args:
        noise: `[batch, tokens, channels]`, N(0, 1).
        conditions: of the same batch.
        schedule: from `editor.schedule`, called just before, because it readies the scheduler.
    """
    # A scheduler counts its steps; a copy starts every integration at the first one.
    scheduler = copy.deepcopy(editor.pipeline.scheduler)
    latents = noise.to(conditions.image_latents.device, torch.float32)
    trajectory = [latents]
    for timestep in schedule.timesteps:
        velocity = editor.velocity(model, latents, timestep.expand(len(latents)), conditions)
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
        trajectory.append(latents)
    return torch.stack(trajectory)


@torch.no_grad()
def rollout(
    editor: FluxKontextEditor,
    model: nn.Module,
    noise: Tensor,
    conditions: Conditions,
    region: Tensor | None = None,
    batch_size: int | None = None,
    maps: bool = False,
) -> tuple[Tensor, Concentration | None, Tensor | None]:
    """Integrate a batch of candidates in micro-batches, recording attention on the way when a region is given.

    Args:
        noise: `[batch, tokens, channels]`.
        conditions: of the same batch, already repeated for groups.
        region: `[batch, tokens]`, the covered share of each token, to record attention concentration on it.
        batch_size: candidates at a time, which bounds memory; all by default.
        maps: also return attention maps over image tokens, `[batch, tokens]`.

    Returns:
        The trajectory `[steps + 1, batch, tokens, channels]`, the attention concentration and the maps, the latter two
        `None` when not asked for.
    """
    recorder = None if region is None else AttentionRecorder(editor.pipeline.transformer)
    trajectories, readings, attention_maps = [], [], []
    for start in range(0, len(noise), batch_size or len(noise)):
        part = slice(start, start + (batch_size or len(noise)))
        # Readied afresh for each micro-batch, as multistep solvers carry state.
        schedule = editor.schedule(conditions.height, conditions.width)
        recording = (
            nullcontext()
            if recorder is None or region is None
            else recorder.record(region[part], conditions.text_weights[part], maps)
        )
        with recording:
            trajectories.append(integrate(editor, model, noise[part], conditions[part], schedule))
        if recorder is not None:
            readings.append(recorder.concentration())
            if maps:
                attention_maps.append(recorder.attention_maps())
    concentration = None
    if readings:
        parts = zip(*((r.mass, r.density, r.contrast) for r in readings), strict=True)
        concentration = Concentration(*(torch.cat(part) for part in parts))
    return torch.cat(trajectories, dim=1), concentration, torch.cat(attention_maps) if attention_maps else None


@dataclass(frozen=True)
class Exploration:
    """How a group spreads: strengths inside and outside the region, mirrored halves, growth of the region's mask."""

    edit_strength: float = 0.5
    keep_strength: float = 0.0
    antithetic: bool = False
    mask_growth: float = 0.0

    def noise(self, region: Tensor, channels: int, size: int, key: tuple[Any, ...]) -> Tensor:
        """Region-decoupled noise of one group, `[group, tokens, channels]`, for a `[tokens]` region."""
        shape = (len(region), channels)
        deltas = group_deltas(shape, size, *key, "delta", antithetic=self.antithetic and size > 1)
        strength = region_strength(region, self.edit_strength, self.keep_strength).unsqueeze(-1)
        return perturb(keyed_noise(shape, *key, "base"), deltas, strength)


@dataclass
class Group:
    """One edit with its candidates, from rollout to update.

    `trajectory` fp32 `[steps + 1, group, tokens, channels]`; `region` `[tokens]` in {0, 1} or soft; `conditions` of one
    sample; `attention` per candidate; `rewards` `[group, rewards]`, `scores` and `advantages` `[group]`.
    """

    edit: Edit
    conditions: Conditions
    schedule: Schedule
    region: Tensor
    trajectory: Tensor
    images: list[Image.Image]
    attention: Concentration | None
    attention_maps: Tensor | None
    rewards: Tensor | None = None
    scores: Tensor | None = None
    advantages: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.conditions.height, self.conditions.width

    @property
    def source(self) -> Image.Image:
        """The source at the candidates' size."""
        return self.edit.source.resize(self.images[0].size, Image.Resampling.BICUBIC)

    @property
    def mask(self) -> Image.Image:
        """The edit's own mask (not grown) at the candidates' size, 255 = edit."""
        mask = Image.fromarray((self.edit.mask * 255).byte().numpy())
        return mask.resize(self.images[0].size, Image.Resampling.NEAREST)


def make_groups(
    editor: FluxKontextEditor,
    model: nn.Module,
    edits: Sequence[Edit],
    num_generations: int,
    exploration: Exploration,
    key: tuple[Any, ...],
    attention: Literal["none", "mass", "maps"] = "none",
    batch_size: int | None = None,
) -> list[Group]:
    """Roll out a group of candidates for each edit.

    Args:
        edits: at any sizes; those of one size are integrated together.
        num_generations: candidates of each.
        key: what the noise is drawn from, besides the edit's row.
        attention: what to record of it: nothing, its mass on the region, or whole maps for pictures.
        batch_size: candidates at a time, which bounds memory; all of one size by default.
    """
    groups: list[Group | None] = [None] * len(edits)
    sizes = [editor.size_for(edit.source) for edit in edits]
    for size in dict.fromkeys(sizes):
        chosen = [i for i, other in enumerate(sizes) if other == size]
        members = [edits[i] for i in chosen]
        grid = editor.grid_for(*size)
        grown = [grow(edit.mask, round(exploration.mask_growth * min(edit.mask.shape))) for edit in members]
        regions = torch.stack([to_tokens(mask, grid, "max") for mask in grown])
        covered = torch.stack([to_tokens(mask, grid, "mean") for mask in grown]).repeat_interleave(num_generations, 0)
        conditions = editor.encode([edit.source for edit in members], [edit.prompt for edit in members])
        noise = [
            exploration.noise(region, editor.channels, num_generations, (*key, edit.row))
            for edit, region in zip(members, regions, strict=True)
        ]
        trajectory, concentration, maps = rollout(
            editor,
            model,
            torch.cat(noise),
            conditions.repeat(num_generations),
            None if attention == "none" else covered,
            batch_size,
            attention == "maps",
        )
        schedule = editor.schedule(*size)
        parts = trajectory[-1].split(batch_size or trajectory.shape[1])
        images = [image for part in parts for image in editor.decode(part, *size)]
        for j, i in enumerate(chosen):
            part = slice(j * num_generations, (j + 1) * num_generations)
            groups[i] = Group(
                edit=edits[i],
                conditions=conditions[j : j + 1],
                schedule=schedule,
                region=regions[j],
                trajectory=trajectory[:, part],
                images=images[part],
                attention=None if concentration is None else concentration[part],
                attention_maps=None if maps is None else maps[part].unflatten(-1, grid),
            )
    return [group for group in groups if group is not None]
