"""One update on one edit, from noise to what it moves: what `rcgrpo explain` shows.

A group is rolled out, scored and compared by a trainer as in training. Its loss is taken and one step of the run's
optimizer follows, of which the model's own predictions tell what it did; then the weights are what they were.

Gotchas: the step is the first of a fresh optimizer at the full learning rate, on this edit alone; an update of a run
averages over several. Predictions of a model in half precision round off what a small step changes, so there the step
is drawn out until it is seen (`stretch`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..data.edits import Edit
from ..groups.diagnostics import InsideOutside, spearman, split_by_region
from ..groups.policies import region_mask
from ..groups.rollout import Group
from ..groups.transitions import Transitions, Where, choose, gather, micro_batches
from ..maths.objective import predict_clean
from ..maths.regions import to_places
from ..reporting.files import write_atomically
from ..reporting.statistics import pad_table
from .diagnosis import without_nan
from .one_update_picture import ALL, draw_update

if TYPE_CHECKING:
    from ..training.trainer import RCGRPOTrainer

SEEN = 0.01
"""Change of a prediction, relative to its size, that half precision still tells from its rounding (2⁻⁸ an element)."""


@dataclass(frozen=True)
class OneUpdate:
    """What one update does on one edit. G candidates; maps are `[height, width]` on the grid of latent pixels.

    Args:
        group: rolled out, scored and compared, its attention recorded.
        rewards: names, in the order of `group.rewards`.
        rows: names of the advantages' rows: regions with an objective of their own, or "all".
        where: (0, candidate, step) of each place that the update learned from.
        region: the region's tokens, in [0, 1].
        spread: standard deviation of the candidates' noise.
        asked: how strongly the loss pulls at the predicted result, averaged over the places.
        moved: how far one step moved it, likewise.
        pulls: `[rows, G]` in [-1, 1]: the cosine between what the step moved and the way to each candidate from the
            group's mean, on the row's tokens; NaN where nothing moved.
        prediction: what the model expects at the first of the places to come out.
        exaggerated: the same after the step, its change drawn `exaggeration` times as large.
        change: size of what moved, relative to the prediction.
        stretch: how many times as long the step was drawn, 1 unless rounding would hide it.
    """

    group: Group
    rewards: list[str]
    rows: list[str]
    where: list[Where]
    region: Tensor
    spread: Tensor
    asked: Tensor
    moved: Tensor
    pulls: Tensor
    prediction: Image.Image
    exaggerated: Image.Image
    exaggeration: float
    change: float
    stretch: float

    @property
    def advantages(self) -> Tensor:
        """`[rows, G]`."""
        return torch.atleast_2d(self.group.advantages).cpu()  # type: ignore[arg-type]

    @property
    def best_first(self) -> list[int]:
        """Candidates by the sum of their advantages."""
        return self.advantages.sum(0).argsort(descending=True, stable=True).tolist()

    def inside(self, values: Tensor) -> float:
        """The share of a map that lies in the region; NaN for an empty one."""
        return float((values * self.region).sum() / values.sum()) if bool(values.any()) else math.nan

    @property
    def noise(self) -> InsideOutside:
        """How much the candidates' noise differs, in its own standard deviations."""
        variances = self.spread.square().flatten()
        return InsideOutside(*(each.sqrt() for each in split_by_region(variances, self.region.flatten())))

    def numbers(self) -> dict[str, Any]:
        """What there is to say in numbers, for JSON."""
        group, attention = self.group, self.group.attention
        return {
            "edit": group.edit.label,
            "instruction": group.edit.prompt,
            "region_share": float(self.region.mean()),
            "noise_differs": {side: float(value) for side, value in self.noise._asdict().items()},
            "candidates": [
                {
                    "candidate": i,
                    "rewards": dict(zip(self.rewards, group.rewards[i].tolist(), strict=True)),  # type: ignore[index]
                    "advantages": dict(zip(self.rows, self.advantages[:, i].tolist(), strict=True)),
                    "pulls": dict(zip(self.rows, self.pulls[:, i].tolist(), strict=True)),
                    "attention_density": None if attention is None else float(attention.density[i]),
                }
                for i in self.best_first
            ],
            "learned_from": [{"candidate": anchor, "step": step} for _, anchor, step in self.where],
            "asked_inside": self.inside(self.asked),
            "moved_inside": self.inside(self.moved),
            "change": self.change,
            "stretch": self.stretch,
            "follows_advantages": dict(zip(self.rows, map(spearman, self.pulls, self.advantages), strict=True)),
        }


def explain_update(trainer: "RCGRPOTrainer", edit: Edit) -> OneUpdate:
    """What the first update of a run would do, were this edit all that it saw; the model stays as it is.

    Args:
        trainer: whose settings, rewards and model these are; `trainer.args.seed` draws the noise, as in training.
        edit: such as `trainer.train_dataset.edit(0)`.

    Raises:
        FloatingPointError: the loss is no number.
    """
    args = trainer.args
    key = (args.seed, 0)
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # mixed precision, as in training
    if args.gradient_checkpointing:
        trainer.pipeline.transformer.enable_gradient_checkpointing()
    trainer.model.train()
    (group,) = trainer.make_groups([edit], args.num_generations, key, maps=True)
    trainer.score_groups([group])
    steps = args.policy_step_indices
    chosen = choose([group], trainer.policy, args.num_anchors, args.num_policy_steps, steps, key)
    batches = micro_batches([group], chosen, args.train_micro_batch_size)
    places = [gather([group], where, trainer.policy, {}) for where in batches]
    before = _predictions(trainer, places)
    with _as_it_was(trainer) as weights:
        pull = _gradients(trainer, places, args.num_anchors * args.num_policy_steps)
        start = [weight.detach().clone() for weight in weights]
        if any(place.taught.any() for place in places):
            _step(trainer, weights)
        moved = _predictions(trainer, places) - before
        change, stretch = _size(moved, before), 1.0
        rough = args.bf16 or args.fp16 or group.conditions.dtype != torch.float32
        if rough and 0 < change < SEEN:
            stretch = SEEN / change
            with torch.no_grad():
                for weight, old in zip(weights, start, strict=True):
                    weight.copy_(old + stretch * (weight - old))
            moved = _predictions(trainer, places) - before
            change = _size(moved, before)
    trainer.forget_metrics()
    rows = trainer.args.named_regions or [ALL]
    results = group.trajectory[-1].cpu()
    masks = trainer.policy.weights(group).cpu() if rows == [ALL] else _masks(group, rows)
    grid = trainer.editor.grid_for(*group.size)
    largest = float(moved.abs().max())
    exaggeration = _round_number(4 * float(before[0].std()) / largest) if largest else 1.0
    pictures = torch.stack([before[0], before[0] + exaggeration * moved[0]]).to(group.trajectory.device)
    prediction, exaggerated = trainer.editor.decode(pictures, *group.size)

    def length(values: Tensor) -> Tensor:
        return to_places(values, grid).square().sum(-3).sqrt().mean(0)

    return OneUpdate(
        group=group,
        rewards=[reward.name for reward in trainer.rewards],
        rows=list(rows),
        where=[where for place in places for where in place.where],
        region=to_places(group.region.cpu().unsqueeze(-1).expand(-1, 4), grid)[0],
        spread=to_places(group.trajectory[0].cpu(), grid).var(0).mean(0).sqrt(),
        asked=length(pull),
        moved=length(moved),
        pulls=torch.stack([_cosines(moved, results - results.mean(0), mask) for mask in masks]),
        prediction=prediction,
        exaggerated=exaggerated,
        exaggeration=exaggeration,
        change=change,
        stretch=stretch,
    )


def _masks(group: Group, rows: Sequence[str]) -> Tensor:
    return torch.stack([region_mask(group, name).cpu() for name in rows])


@torch.no_grad()
def _predictions(trainer: "RCGRPOTrainer", places: Sequence[Transitions]) -> Tensor:
    """Predicted results, fp32 `[places, tokens, channels]` on the CPU."""
    found = []
    for place in places:
        velocity = trainer.editor.velocity(trainer.model, place.latents, place.timestep, place.conditions)
        found.append(predict_clean(place.latents, velocity.float(), place.sigma).cpu())
    return torch.cat(found)


def _gradients(trainer: "RCGRPOTrainer", places: Sequence[Transitions], count: int) -> Tensor:
    """Fills in the weights' gradients, as an update does, and returns the pull at the predictions, `-∂L/∂x̂₀ · σ²`."""
    pulls = []
    for place in places:
        with trainer.compute_loss_context_manager():
            velocity = trainer.editor.velocity(trainer.model, place.latents, place.timestep, place.conditions)
            velocity.retain_grad()
            loss = trainer.loss_of(trainer.model, velocity, place) * len(place.where) / count
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss: got {float(loss)} on {place.groups[0].edit.label}, expected a number")
        loss.backward()
        pull = torch.zeros_like(velocity) if velocity.grad is None else velocity.grad
        pulls.append((pull.float() * place.sigma.view(-1, 1, 1).to(pull.device)).cpu())
    return torch.cat(pulls)


def _step(trainer: "RCGRPOTrainer", weights: Sequence[Tensor]) -> None:
    """One step of the optimizer that the configuration names."""
    if trainer.args.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(weights, trainer.args.max_grad_norm)
    used, trainer.optimizer = trainer.optimizer, None
    try:
        trainer.create_optimizer().step()
    finally:
        trainer.optimizer = used


@contextmanager
def _as_it_was(trainer: "RCGRPOTrainer") -> Iterator[list[Tensor]]:
    """The trained weights, without gradients; afterwards they are what they were."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    kept = [weight.detach().clone() for weight in weights]
    trainer.model.zero_grad(set_to_none=True)
    try:
        yield weights
    finally:
        trainer.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def _size(change: Tensor, values: Tensor) -> float:
    return float(change.norm() / values.norm())


def _cosines(moved: Tensor, ways: Tensor, mask: Tensor) -> Tensor:
    """`[G]`: cosines of `[places, N, C]` with `[G, N, C]` on tokens `[N]`, averaged over the places."""
    weighted = mask.sqrt().unsqueeze(-1)
    moved, ways = (moved * weighted).flatten(1), (ways * weighted).flatten(1)
    lengths = moved.norm(dim=-1, keepdim=True) * ways.norm(dim=-1)
    return torch.where(lengths > 0, moved @ ways.T / lengths, math.nan).nanmean(0)


def _round_number(value: float) -> float:
    """One that a person can read: 1, 2, 5, 10, 20, ..."""
    ten = 10.0 ** math.floor(math.log10(max(value, 1.0)))
    return max(step * ten for step in (1, 2, 5) if step * ten <= max(value, 1.0))


def write_update(folder: Path, update: OneUpdate, settings: Mapping[str, Any]) -> str:
    """Write `update.png`, `update.md` and `update.json`; the text of the second is returned.

    Args:
        settings: what the run's are, for the JSON.
    """
    text = describe(update)
    content = {**update.numbers(), "settings": {"rcgrpo": __version__, **settings}}
    with write_atomically(folder / "update.json") as path:
        path.write_text(json.dumps(without_nan(content), indent=1, default=str) + "\n")
    with write_atomically(folder / "update.md") as path:
        path.write_text(text)
    with write_atomically(folder / "update.png") as path:
        draw_update(update).save(path)
    return text


def describe(update: OneUpdate) -> str:
    """One update in words and a table, Markdown."""
    group, noise, regions = update.group, update.noise, update.rows
    several = len(regions) > 1
    head = ["candidate", *update.rewards]
    head += [f"advantage, {name}" if several else "advantage" for name in regions]
    head += [f"pull, {name}" if several else "pull" for name in regions]
    lines = []
    for i in update.best_first:
        numbers = [*group.rewards[i].tolist()]  # type: ignore[index]
        signed = [*update.advantages[:, i].tolist(), *update.pulls[:, i].tolist()]
        shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in numbers]
        lines.append([f"#{i}", *shown, *("–" if math.isnan(value) else f"{value:+.2f}" for value in signed)])
    share = float(update.region.mean())
    facts = [f"- Region: {share:.0%} of the picture, in whole tokens."]
    facts += [f"- Noise: candidates differ by {noise.inside:.2f} σ inside, by {noise.outside:.2f} σ outside."]
    if group.attention is not None:
        facts.append(f"- Attention on the region: {float(group.attention.density.mean()):.2f} times its even share.")
    if not update.advantages.any():
        facts.append("- **All candidates score alike, so the group teaches nothing.** Training drops it.")
    else:
        places = ", ".join(f"#{anchor} step {step}" for _, anchor, step in update.where)
        facts += [
            f"- The update learned from: {places}.",
            f"- The loss asks for change: {update.inside(update.asked):.0%} of it inside.",
            f"- One step changes predictions by {update.change:.2%}, {update.inside(update.moved):.0%} of it inside.",
        ]
    if update.stretch > 1:
        facts.append(f"- The step was drawn {update.stretch:.0f} times as long, as rounding would hide it.")
    title = f'# One update on "{group.edit.prompt}" ({group.edit.label})'
    return "\n\n".join([title, pad_table([head, *lines]), "\n".join(facts)]) + "\n"
