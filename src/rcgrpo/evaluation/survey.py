"""Many groups of a model, rolled out and judged, kept as numbers: what `rcgrpo diagnose` and the study ask.

The formulas are in `groups.diagnostics`; here they meet a model. Two explorations of one key start from the same draws,
so their numbers are paired edit by edit; `match_strength` makes them comparable at equal diversity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.edits import Edit
from ..editors import Editor
from ..editors.attention import blocks_of
from ..groups.diagnostics import InsideOutside, group_diagnostics, latent_variance, split_by_region, variance
from ..groups.rollout import Exploration, Group, make_groups
from ..maths.objective import group_advantages, quasi_norm
from ..rewards import Reward, score

JUDGES = ("reward", "edit", "keep", "held_out")
"""What a survey asks of every candidate: the whole reward, its two parts, and one that nothing is trained on."""


@dataclass(frozen=True)
class Finding:
    """What a survey found on one edit.

    `numbers` by name; `scores` of each judge `[G]`; `steps` and, where asked for, `depth`: latent and hidden variance
    at each noise level and after each block; `picture` is the first candidate, `attention_map` `[rows, columns]` its
    attention where recorded.
    """

    edit: Edit
    numbers: dict[str, float]
    scores: dict[str, Tensor]
    sigmas: Tensor
    steps: InsideOutside
    depth: InsideOutside | None
    picture: Image.Image
    attention_map: Tensor | None


def survey(
    editor: Editor,
    model: nn.Module,
    edits: Sequence[Edit],
    num_generations: int,
    exploration: Exploration,
    key: tuple[Any, ...],
    judges: Mapping[str, Reward],
    depth_step: int | None = None,
    num_maps: int = 0,
    edits_at_once: int = 4,
    batch_size: int | None = None,
    visit: Callable[[Group, dict[str, Tensor]], Any] | None = None,
) -> list[Finding]:
    """Roll out and judge a group of each edit, and keep numbers instead of latents.

    Args:
        num_generations: candidates of each edit, at least 2.
        key: what the noise is drawn from; explorations with the same key start from the same draws.
        judges: rewards under the names of `JUDGES`; a missing one leaves its numbers out.
        depth_step: also look at hidden states at this step, one more forward of each group.
        num_maps: of so many edits, the first ones, keep attention maps.
        edits_at_once: how many groups are held in memory.
        batch_size: candidates at a time in rollouts.
        visit: called with each group and its scores before the group is dropped, for what needs its latents.
    """
    findings: list[Finding] = []
    while len(findings) < len(edits):
        start = len(findings)
        mapping = start < num_maps
        part = edits[start : min(start + edits_at_once, num_maps) if mapping else start + edits_at_once]
        attention: Any = "maps" if mapping else "mass"
        groups = make_groups(editor, model, part, num_generations, exploration, key, attention, batch_size)
        for group in groups:
            scores = judge(group, judges)
            findings.append(_find(editor, model, group, scores, depth_step))
            if visit is not None:
                visit(group, scores)
    return findings


def _find(
    editor: Editor, model: nn.Module, group: Group, scores: Mapping[str, Tensor], depth_step: int | None
) -> Finding:
    rewards = scores.get("reward", torch.full([len(group.images)], math.nan))
    advantages = quasi_norm(group_advantages(rewards))
    parts: dict[str, Tensor] = {name: scores[name] for name in ("edit", "keep") if name in scores}
    logged = group_diagnostics(group, advantages, parts)
    numbers = {name.removeprefix("diagnostics/"): value for name, value in logged.items()}
    for name, values in scores.items():
        numbers[name] = float(values.nanmean())
    if "reward" in scores:
        numbers["reward_var"] = variance(rewards)
    if group.attention is not None:
        for measure in ("mass", "density", "contrast"):
            numbers[f"attention_{measure}"] = float(getattr(group.attention, measure).mean())
    return Finding(
        edit=group.edit,
        numbers=numbers,
        scores=dict(scores),
        sigmas=group.schedule.sigmas.cpu(),
        steps=latent_variance(group.trajectory.cpu(), group.region.cpu()),
        depth=None if depth_step is None else depth_variance(editor, model, group, depth_step),
        picture=group.images[0],
        attention_map=None if group.attention_maps is None else group.attention_maps[0],
    )


def judge(group: Group, judges: Mapping[str, Reward]) -> dict[str, Tensor]:
    """Each judge's scores of a group, `[G]`; NaN where there is none."""
    if not judges:
        return {}
    count = len(group.images)
    columns = {name: [value] * count for name, value in group.edit.columns.items()}
    context: dict[str, Any] = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    if group.attention is not None:
        for measure in ("mass", "density", "contrast"):
            context[f"attention_{measure}"] = getattr(group.attention, measure).tolist()
    scored = score(
        list(judges.values()),
        [group.edit.prompt] * count,
        group.images,
        [group.source] * count,
        [group.mask] * count,
        columns,
        [f"{group.edit.label}, candidate {i}" for i in range(count)],
        context,
    )
    return dict(zip(judges, scored.values.T, strict=True))


def _ignore(name: str, value: Any) -> None:
    """A survey keeps no log for rewards."""


@torch.no_grad()
def depth_variance(editor: Editor, model: nn.Module, group: Group, step: int) -> InsideOutside:
    """How much a group's hidden states differ, before the first block and after each, `[blocks + 1]` on the CPU.

    One forward of the whole group at the latents that it had at this step. The variance across candidates is divided by
    the states' mean square at that depth, because blocks differ in scale.

    Args:
        model: the transformer as `editor.velocity` takes it; adapters inside are fine.
        step: which step of the rollout, from 0.
    """
    transformer = editor.pipeline.transformer
    modules = [getattr(transformer, editor.input_layer), *blocks_of(transformer)]
    members, tokens, region = group.trajectory.shape[1], len(group.region), group.region.cpu()
    pictures = tokens + group.conditions.reference_tokens.shape[1]
    found: list[InsideOutside] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if len(found) == len(modules):
            return  # guidance asks again, for the negative prompt
        # Blocks return (text, image) or, joined, text and image; reference tokens follow the noisy ones.
        states = (output[1] if isinstance(output, tuple) else output)[:members, -pictures:][:, :tokens].float()
        spread = states.var(0).mean(-1) / states.square().mean().clamp(min=1e-20)
        found.append(split_by_region(spread.cpu(), region))

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        latents = group.trajectory[step]
        timestep = group.schedule.timesteps[step].expand(len(latents))
        editor.velocity(model, latents, timestep, group.conditions.repeat(len(latents)))
    finally:
        for handle in handles:
            handle.remove()
    return InsideOutside(torch.stack([f.inside for f in found]), torch.stack([f.outside for f in found]))


class Match(NamedTuple):
    """A strength, the diversity that it reaches, and how often it was tried."""

    strength: float
    reached: float
    evaluations: int


def match_strength(
    measure: Callable[[float], float],
    target: float,
    tolerance: float = 0.02,
    max_evaluations: int = 10,
    known: Mapping[float, float] | None = None,
) -> Match:
    """The strength in [0, 1] at which a measure of spread hits a target.

    A spread grows about as a power of the strength. The search steps along the power law through the two points nearest
    to the target (the square, while there is only one) and halves the bracket every third time.

    Args:
        measure: strength to spread, rising from 0 at strength 0; each call costs a rollout.
        target: ≥ 0.
        tolerance: relative; the search ends within it.
        max_evaluations: calls of `measure` at most.
        known: strengths in (0, 1] whose spread is known already.

    Returns:
        The nearest that was tried or known; strength 1 where even that falls short of the target.
    """
    tried, evaluations = dict(known or {}), 0
    while True:
        low = max((strength for strength, spread in tried.items() if spread < target), default=0.0)
        high = min((strength for strength, spread in tried.items() if spread >= target), default=math.inf)
        if tried:
            strength, reached = min(tried.items(), key=lambda point: abs(point[1] - target))
            ended = evaluations == max_evaluations or low == 1
            if ended or abs(reached - target) <= tolerance * target:
                return Match(strength, reached, evaluations)
        halve = evaluations % 3 == 2 and high <= 1
        guess = (low + high) / 2 if halve else _guess(tried, low, high, target)
        tried[guess] = measure(guess)
        evaluations += 1


def _guess(tried: Mapping[float, float], low: float, high: float, target: float) -> float:
    """Where the power law through the nearest points reaches the target, inside the bracket and off its ends."""
    nearest = sorted((abs(math.log(r / target)), s, r) for s, r in tried.items() if r > 0 and target > 0)[:2]
    if not nearest:
        return 1.0 if high > 1 else (low + high) / 2
    _, strength, spread = nearest[0]
    power = 2.0
    if len(nearest) == 2 and nearest[1][2] != spread:
        power = math.log(nearest[1][2] / spread) / math.log(nearest[1][1] / strength)
    guess = strength * (target / spread) ** (1 / power if power > 0 else 0.5)
    if high > 1:  # nothing tried reaches the target yet
        return min(1.0, max(1.02 * guess, low + 0.01 * (1 - low)))
    margin = 0.01 * (high - low)
    return min(max(guess, low + margin), high - margin)
