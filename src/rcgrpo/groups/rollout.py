"""Integrate a group's candidates along the ODE (or, for Flow-GRPO, an SDE) and keep what training will read.

A straight line: noise in, one latent per step out. The solver is one of diffusers' schedulers; the model is called
through `editor.velocity`, the same function that the update uses, so the policy ratio is 1 to the last bit before the
first update. Latents are kept in fp32.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.edits import Edit
from ..editors import Conditions, Editor, Schedule
from ..editors.attention import AttentionOptions, Concentration
from ..editors.words import find_words
from ..maths.labels import split_regions
from ..maths.noise import (
    group_deltas,
    independent_members,
    keyed_generator,
    keyed_noise,
    perturb,
    region_strength,
    regions_strength,
)
from ..maths.objective import sde_std, sde_step
from ..maths.regions import grow, to_elements, to_tokens


@dataclass(frozen=True)
class Kicks:
    """Noise that Flow-GRPO injects on the way.

    `noise` `[steps, batch, tokens, channels]`, N(0, 1); `strength` `[steps, batch, tokens]` in [0, 1], 0 in steps that
    stay deterministic; `noise_level` is Flow-GRPO's a.
    """

    noise: Tensor
    strength: Tensor
    noise_level: float

    def __getitem__(self, part: slice) -> "Kicks":
        return Kicks(self.noise[:, part], self.strength[:, part], self.noise_level)

    @classmethod
    def concatenate(cls, parts: Sequence["Kicks"]) -> "Kicks":
        """One batch of several."""
        noise, strength = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("noise", "strength"))
        return cls(noise, strength, parts[0].noise_level)


def kick_std(schedule: Schedule, step: int, strength: Tensor, noise_level: float) -> Tensor:
    """Diffusion coefficient `s · a √(σ / (1 - σ))` of one step (algorithm section 9), shaped as the strength."""
    sigmas = schedule.sigmas
    return strength.to(sigmas.device) * sde_std(sigmas[step], sigmas[1], noise_level)


def kick_key(key: tuple[Any, ...], step: int) -> tuple[Any, ...]:
    """What a step's injected noise is drawn from, besides the number of the candidate."""
    return (*key, "kick", step)


def integrate(
    editor: Editor,
    model: nn.Module,
    noise: Tensor,
    conditions: Conditions,
    schedule: Schedule,
    kicks: Kicks | None = None,
) -> Tensor:
    """Latents at every noise level, fp32 `[steps + 1, batch, tokens, channels]`; the last are the clean ones.

    Args:
        noise: `[batch, tokens, channels]`, N(0, 1).
        conditions: of the same batch.
        schedule: from `editor.schedule` at their size.
        kicks: noise of the same batch to inject, which takes the solver's place; only with a first-order solver.
    """
    # A solver counts its steps and remembers the last; a copy starts every integration afresh.
    solver = copy.deepcopy(schedule.solver)
    latents = noise.to(conditions.device, torch.float32)
    trajectory = [latents]
    for stage, timestep in enumerate(schedule.stages):
        velocity = editor.velocity(model, latents, timestep.expand(len(latents)), conditions)
        if kicks is None:
            latents = solver.step(velocity.float(), solver.timesteps[stage], latents, return_dict=False)[0]
        else:
            std = kick_std(schedule, stage, kicks.strength[stage], kicks.noise_level).to(latents.device)
            sigma, next_sigma = schedule.sigmas[stage : stage + 2].to(latents.device)
            mean, spread = sde_step(latents, velocity, sigma, next_sigma, std)
            latents = mean + spread * kicks.noise[stage].to(latents.device)
        if schedule.completes(stage):
            trajectory.append(latents)
    return torch.stack(trajectory)


@torch.no_grad()
def rollout(
    editor: Editor,
    model: nn.Module,
    noise: Tensor,
    conditions: Conditions,
    region: Tensor | None = None,
    batch_size: int | None = None,
    maps: bool = False,
    kicks: Kicks | None = None,
    options: AttentionOptions | None = None,
) -> tuple[Tensor, Concentration | None, Tensor | None]:
    """Integrate a batch of candidates in micro-batches, recording attention on the way when a region is given.

    Args:
        noise: `[batch, tokens, channels]`.
        conditions: of the same batch, already repeated for groups.
        region: `[batch, tokens]`, the covered share of each token, to record attention concentration on it.
        batch_size: candidates at a time, which bounds memory; all by default.
        maps: also return attention maps over image tokens, `[batch, tokens]`.
        kicks: noise to inject on the way, of the same batch.
        options: which part of the attention to record; all of it by default. The words are the conditions' to choose.

    Returns:
        The trajectory `[steps + 1, batch, tokens, channels]`, the attention concentration and the maps, the latter two
        `None` when not asked for.
    """
    options = options or AttentionOptions()
    recorder = None
    if region is not None:
        recorder = editor.attention(options)
        read = options.reads(editor.num_inference_steps)
    schedule = editor.schedule(conditions.height, conditions.width)
    trajectories, readings, attention_maps = [], [], []
    for start in range(0, len(noise), batch_size or len(noise)):
        part = slice(start, start + (batch_size or len(noise)))
        recording = (
            nullcontext()
            if recorder is None or region is None
            else recorder.record(region[part], conditions.text_weights[part], maps, read, schedule.order)
        )
        with recording:
            injected = None if kicks is None else kicks[part]
            trajectories.append(integrate(editor, model, noise[part], conditions[part], schedule, injected))
        if recorder is not None:
            readings.append(recorder.concentration())
            if maps:
                attention_maps.append(recorder.attention_maps())
    concentration = Concentration.concatenate(readings) if readings else None
    return torch.cat(trajectories, dim=1), concentration, torch.cat(attention_maps) if attention_maps else None


@dataclass(frozen=True)
class Exploration:
    """How a group spreads.

    Args:
        edit_strength, keep_strength: of the perturbation inside and outside the region, in [0, 1].
        antithetic: mirror the second half of the group's noise.
        mask_growth: share of the short side by which regions are grown.
        kind: `"global"` perturbs everywhere by `edit_strength`, as Neighbor GRPO does.
        independent_share: share of the candidates with noise of their own everywhere.
        regions_column: the edits' column with several regions, see `labels.split_regions`.
        region_strengths: strength of each of them; `edit_strength` for all by default.
        noise_level: Flow-GRPO's a; above 0 the steps in `sde_steps` are stochastic.
        sde_steps: which steps may be stochastic.
        sde_window: so many of them in a row, drawn for each group; all by default.
    """

    edit_strength: float = 0.5
    keep_strength: float = 0.0
    antithetic: bool = False
    mask_growth: float = 0.0
    kind: Literal["region", "global"] = "region"
    independent_share: float = 0.0
    regions_column: str | None = None
    region_strengths: Sequence[float] | None = None
    noise_level: float = 0.0
    sde_steps: Sequence[int] = ()
    sde_window: int | None = None

    def masks(self, edit: Edit) -> Tensor:
        """The edit's grown regions, `[regions, height, width]`; raises what `regions` raises."""
        return grow(self.regions(edit), round(self.mask_growth * min(edit.mask.shape)))

    def regions(self, edit: Edit) -> Tensor:
        """The edit's regions as its row holds them, `[regions, height, width]`.

        Raises:
            ValueError: without the column that holds several, or with more regions than strengths.
        """
        masks = edit.mask.unsqueeze(0)
        if self.regions_column is not None:
            where = f"{edit.label}, column {self.regions_column!r}"
            if edit.columns.get(self.regions_column) is None:
                raise ValueError(f"{where}: got nothing, expected labels or masks; fill it in or unset regions_column")
            masks = split_regions(edit.columns[self.regions_column], tuple(edit.mask.shape), where)  # type: ignore[arg-type]
            if self.region_strengths is not None and len(masks) > len(self.region_strengths):
                raise ValueError(
                    f"region_strengths: got {len(self.region_strengths)} of them, expected {len(masks)} for {where}"
                )
        return masks

    def strength(self, regions: Tensor, size: int) -> Tensor:
        """Elementwise strength of a group, `[group, tokens]`, for regions `[tokens]` or `[regions, tokens]`."""
        several = torch.atleast_2d(regions)
        if self.kind == "global":
            shared = region_strength(torch.ones(several.shape[-1]), self.edit_strength, self.keep_strength)
        elif self.region_strengths is None:
            shared = region_strength(several.amax(0), self.edit_strength, self.keep_strength)
        else:
            shared = regions_strength(several, self.region_strengths[: len(several)], self.keep_strength)
        alone = independent_members(size, self.independent_share, self.antithetic and size > 1)
        # An evaluation's single candidate is never one of them: it is drawn as training draws.
        return torch.where(alone.unsqueeze(1) & (size > 1), 1.0, shared)

    def noise(self, regions: Tensor, channels: int, size: int, key: tuple[Any, ...]) -> Tensor:
        """Region-decoupled noise of one group, `[group, tokens, channels]`, for regions as in `strength`."""
        shape = (regions.shape[-1], channels)
        deltas = group_deltas(shape, size, *key, "delta", antithetic=self.antithetic and size > 1)
        return perturb(keyed_noise(shape, *key, "base"), deltas, self.strength(regions, size).unsqueeze(-1))

    def kicks(self, regions: Tensor, channels: int, size: int, steps: int, key: tuple[Any, ...]) -> Kicks | None:
        """What Flow-GRPO injects into one group, each candidate's from its own key; None for deterministic policies."""
        if not self.noise_level:
            return None
        chosen = list(self.sde_steps)
        if self.sde_window is not None:
            starts = len(chosen) - self.sde_window + 1
            start = int(torch.randint(starts, (), generator=keyed_generator(*key, "window")))
            chosen = chosen[start : start + self.sde_window]
        noise = torch.zeros(steps, size, regions.shape[-1], channels)
        strength = torch.zeros(steps, size, regions.shape[-1])
        for step in chosen:
            noise[step] = group_deltas((regions.shape[-1], channels), size, *kick_key(key, step))
            strength[step] = self.strength(regions, size)
        return Kicks(noise, strength, self.noise_level)


@dataclass
class Group:
    """One edit with its candidates, from rollout to update.

    `trajectory` fp32 `[steps + 1, group, tokens, channels]`; `region` `[tokens]` in {0, 1} or soft, the union of
    `regions` `[regions, tokens]`; `conditions` of one sample; `attention` per candidate; `kick_strength`
    `[steps, group, tokens]` and `noise_level` of a stochastic rollout; `elements` `[tokens, channels]` in {0, 1}, the
    region on the elements of the latents, finer than its tokens; `key` is what its noise was drawn from. Scoring
    fills in `rewards` `[group, rewards]`, `compared`, the same without candidates on whom a reward failed (see
    `objective.comparable`), `scores` `[group]` and `advantages` `[group]`, or `[rows, group]` with region
    advantages, one row for each region that has a reward; `region_scores` `[rows, group]` go with these; `logged` is
    what rewards logged with `log_extra`, by column, one entry per candidate.
    """

    edit: Edit
    conditions: Conditions
    schedule: Schedule
    region: Tensor
    trajectory: Tensor
    images: list[Image.Image]
    attention: Concentration | None
    attention_maps: Tensor | None
    regions: Tensor | None = None
    kick_strength: Tensor | None = None
    noise_level: float = 0.0
    key: tuple[Any, ...] = ()
    rewards: Tensor | None = None
    compared: Tensor | None = None
    scores: Tensor | None = None
    advantages: Tensor | None = None
    region_scores: Tensor | None = None
    logged: dict[str, list[Any]] = field(default_factory=dict)
    elements: Tensor | None = None

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
        return self.edit.mask_at(self.images[0].size)


def words_of(edit: Edit, column: str) -> list[str]:
    """The words of an edit's instruction that its column names.

    Raises:
        ValueError: no word, something else, or words that the instruction does not have.
    """
    value = edit.columns.get(column)
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise ValueError(f"{edit.label}, column {column!r}: got {value!r}, expected words of the instruction")
    if missing := [word for word in words if not find_words(edit.prompt, [word])]:
        raise ValueError(f"{edit.label}, column {column!r}: got {missing}, expected words of {edit.prompt!r}")
    return list(words)


def make_groups(
    editor: Editor,
    model: nn.Module,
    edits: Sequence[Edit],
    num_generations: int,
    exploration: Exploration,
    key: tuple[Any, ...],
    attention: Literal["none", "mass", "maps"] = "none",
    batch_size: int | None = None,
    cache_sources: bool = True,
    options: AttentionOptions | None = None,
) -> list[Group]:
    """Roll out a group of candidates for each edit.

    Args:
        edits: at any sizes; those of one size are integrated together.
        num_generations: candidates of each.
        key: what the noise is drawn from, besides the edit's row.
        attention: what to record of it: nothing, its mass on the region, or whole maps for pictures.
        batch_size: candidates at a time, which bounds memory; all of one size by default.
        cache_sources: whether the editor's cache may keep the sources' latents.
        options: which part of the attention to record; all of it by default.
    """
    column = None if options is None else options.words_column
    groups: list[Group | None] = [None] * len(edits)
    sizes = [editor.size_for(edit.source) for edit in edits]
    for size in dict.fromkeys(sizes):
        chosen = [i for i, other in enumerate(sizes) if other == size]
        members = [edits[i] for i in chosen]
        grid = editor.grid_for(*size)
        masks = [exploration.masks(edit) for edit in members]
        regions = [to_tokens(mask, grid, "max") for mask in masks]
        covered = torch.stack([to_tokens(mask.amax(0), grid, "mean") for mask in masks])
        sources, prompts = [edit.source for edit in members], [edit.prompt for edit in members]
        words = None if column is None else [words_of(edit, column) for edit in members]
        conditions = editor.encode(sources, prompts, cache_sources, words)
        noise = [
            exploration.noise(region, editor.channels, num_generations, (*key, edit.row))
            for edit, region in zip(members, regions, strict=True)
        ]
        injected = [
            exploration.kicks(region, editor.channels, num_generations, editor.num_inference_steps, (*key, edit.row))
            for edit, region in zip(members, regions, strict=True)
        ]
        kicks = [each for each in injected if each is not None]
        trajectory, concentration, maps = rollout(
            editor,
            model,
            torch.cat(noise),
            conditions.repeat(num_generations),
            None if attention == "none" else covered.repeat_interleave(num_generations, 0),
            batch_size,
            attention == "maps",
            Kicks.concatenate(kicks) if kicks else None,
            options,
        )
        schedule = editor.schedule(*size)
        # Decoding takes more memory than anything else, and one picture fills a GPU. A CPU has the memory, and rounds
        # another batch otherwise.
        together = batch_size or trajectory.shape[1] if trajectory.device.type == "cpu" else 1
        parts = trajectory[-1].split(together)
        images = [image for part in parts for image in editor.decode(part, *size)]
        for j, i in enumerate(chosen):
            part = slice(j * num_generations, (j + 1) * num_generations)
            groups[i] = Group(
                edit=edits[i],
                conditions=conditions[j : j + 1],
                schedule=schedule,
                region=regions[j].amax(0),
                trajectory=trajectory[:, part],
                images=images[part],
                attention=None if concentration is None else concentration[part],
                attention_maps=None if maps is None else maps[part].unflatten(-1, grid),
                regions=regions[j],
                elements=to_elements(masks[j].amax(0), grid, trajectory.shape[-1]),
                kick_strength=kicks[j].strength if kicks else None,
                noise_level=exploration.noise_level,
                key=(*key, edits[i].row),
            )
    return [group for group in groups if group is not None]
