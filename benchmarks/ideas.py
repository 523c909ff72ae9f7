"""Ideas of others for groups, each in its simplest form: `python benchmarks/ideas.py pairs --output_dir runs/pairs`.

A subclass of the trainer for each, on the recipe of groups alone, whose flags follow. `fresh_edits.py` measures the
LoRAs, `two_turns.py` those of two turns; docs/results-groups.md says what came of it. `spread` takes
`--per_device_train_batch_size 12`, `turns` and `both_turns` 3, for as many groups an update as the others.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image, ImageChops
from torch import Tensor

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.cli.parsing import parse, use_embedded_model
from rcgrpo.cli.train import ScriptArguments, load_model
from rcgrpo.data.edits import Edit
from rcgrpo.data.scenes import PLACES, TASKS
from rcgrpo.groups.policies import NeighborPolicy
from rcgrpo.groups.rollout import Exploration, Group
from rcgrpo.groups.transitions import Transitions
from rcgrpo.groups.turns import next_edit
from rcgrpo.rewards import PendingScores

RECIPE = str(files("rcgrpo") / "recipes" / "tiny-groups.yaml")
TURNS = "turns"


def edit_rewards(group: Group) -> Tensor:
    """What the first reward, the edit's, says of each candidate, `[group]`."""
    return group.compared[:, 0]  # type: ignore[index]


def extremes(values: Tensor, size: int) -> Tensor:
    """Indices of the `size / 2` largest and as many smallest, in their old order; NaN counts as smallest."""
    order = values.nan_to_num(-torch.inf).argsort(descending=True)
    return torch.cat([order[: size // 2], order[len(order) - size // 2 :]]).sort().values


def subset(group: Group, chosen: Tensor) -> Group:
    """The group with some of its candidates."""
    members = chosen.tolist()
    rewards = {name: getattr(group, name)[chosen] for name in ("rewards", "compared", "scores")}
    return replace(
        group,
        trajectory=group.trajectory[:, members],
        images=[group.images[i] for i in members],
        attention=group.attention[members] if group.attention is not None else None,  # type: ignore[index]
        region_scores=group.region_scores[:, chosen],  # type: ignore[index]
        logged={},
        **rewards,
    )


class Pairs(RCGRPOTrainer):
    """The antithetic pair as control variate: a candidate is compared with its mirrored twin, not with its group.

    In the sum over a pair, `A_i (x_i - x) + A_j (x_j - x)`, what both twins' rewards share multiplies
    `x_i + x_j - 2 x`, where their noise has cancelled; only the difference of their rewards has a direction.
    """

    def _finish(self, *given: Any) -> list[Group]:
        groups = super()._finish(*given)
        for group in groups:
            first, second = group.compared.chunk(2)  # type: ignore[union-attr]
            middle = (first + second) / 2
            group.compared = torch.cat([first - middle, second - middle])
        return groups


class ExtremesOfAll(RCGRPOTrainer):
    """The ceiling of explore-then-train: twice the candidates, all in full; the extremes by the edit's reward train."""

    times = 2

    def _begin(self, edits: Sequence[Edit], num_generations: int, *given: Any, **options: Any) -> Any:
        return super()._begin(edits, self.times * num_generations, *given, **options)

    def _finish(self, groups: list[Group], *given: Any) -> list[Group]:
        size = self.args.num_generations
        return [subset(group, extremes(edit_rewards(group), size)) for group in super()._finish(groups, *given)]


@dataclass(frozen=True)
class Picked(Exploration):
    """Some members of larger groups, `picked`, by the edit's row: noise comes from keys, so it can be had again."""

    pool: int = 0
    picked: dict[int, Tensor] = field(default_factory=dict)

    def noise(self, regions: Tensor, channels: int, size: int, key: tuple[Any, ...]) -> Tensor:
        return super().noise(regions, channels, self.pool, key)[self.picked[key[-1]]]


class ExploreThenTrain(RCGRPOTrainer):
    """Sol-RL (arXiv 2604.06916): many candidates explore cheaply, the extremes are rolled out again from their keys.

    Cheap is here one step of the ODE instead of three.
    """

    times, steps = 2, 1

    def _begin(
        self, edits: Sequence[Edit], num_generations: int, key: tuple[Any, ...], **options: Any
    ) -> tuple[list[Group], PendingScores]:
        editor, exploration, pool = self.editor, self.exploration, self.times * num_generations
        self.editor = editor.with_steps(self.steps)
        groups = self.make_groups(edits, pool, key, **options)
        self.scoring.fill_in(groups, self.scoring.receive(self._submit(groups)))
        picked = {group.edit.row: extremes(edit_rewards(group), num_generations) for group in groups}
        self.editor, self.exploration = editor, Picked(**vars(exploration), pool=pool, picked=picked)
        begun = super()._begin(edits, num_generations, key, **options)
        self.exploration = exploration
        return begun


class Spread(RCGRPOTrainer):
    """The ceiling of preferring edits with spread: of twice the edits the half whose edit's rewards differ most."""

    def _finish(self, *given: Any) -> list[Group]:
        groups = super()._finish(*given)
        spreads = torch.stack([edit_rewards(group).nan_to_num(0.0).std() for group in groups])
        return [groups[i] for i in spreads.argsort(descending=True)[: len(groups) // 2].sort().values.tolist()]


@dataclass(frozen=True)
class WeightedTokens(NeighborPolicy):
    """Within the region, tokens count by `relevance`, whose mean there is 1; the rest as they did."""

    def relevance(self, group: Group) -> Tensor:
        """`[tokens]`, ≥ 0."""
        raise NotImplementedError

    def weights(self, group: Group) -> Tensor:
        plain = super().weights(group)
        relevance = self.relevance(group).to(plain.device)
        mean = (relevance * group.region).sum() / group.region.sum()
        return torch.stack([plain[0] * relevance / mean, *plain[1:]])


class ByAttention(WeightedTokens):
    def relevance(self, group: Group) -> Tensor:
        return group.attention_maps.mean(0).flatten()  # type: ignore[union-attr]


class BySpread(WeightedTokens):
    def relevance(self, group: Group) -> Tensor:
        return group.trajectory[-1].std(0).mean(-1)


def block_means(latents: Tensor) -> Tensor:
    """Each token's 2 × 2 latent pixels replaced by their mean, an orthogonal projection of `[..., tokens, 4 C]`."""
    blocks = latents.unflatten(-1, (-1, 4))
    return blocks.mean(-1, keepdim=True).expand_as(blocks).flatten(-2)


class ByBlocks(NeighborPolicy):
    def log_probs(self, velocity: Tensor, transitions: Transitions, weights: Tensor) -> Tensor:
        # Where a step leads is linear in where it starts and in the velocity, so these may be filtered instead.
        t = replace(
            transitions, latents=block_means(transitions.latents), candidates=block_means(transitions.candidates)
        )
        return super().log_probs(block_means(velocity), t, weights)


class OtherPolicy(RCGRPOTrainer):
    kind: type[NeighborPolicy]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.policy = self.kind(**vars(self.policy))


class Star(OtherPolicy):
    """STAR (arXiv 2606.17979): advantages count where the instruction looks, by attention maps over image tokens."""

    kind = ByAttention

    def make_groups(self, *given: Any, **options: Any) -> list[Group]:
        return super().make_groups(*given, **{**options, "maps": self.model.training})


class WhereTheyDiffer(OtherPolicy):
    """Per-token advantages by how much the candidates' results differ there."""

    kind = BySpread


class Filtered(OtherPolicy):
    """Distances of block means alone: a quarter of the directions, while the noise stays as it is."""

    kind = ByBlocks


class BothTurns(RCGRPOTrainer):
    """MT-EditFlow (arXiv 2606.01985): the first turn's candidates are judged by what the second makes of them too.

    Each is followed by a second turn of one candidate, from the same noise for all; its rewards are added. The second
    turn itself is trained as always: on a group that starts from the best of the first.
    """

    def _take_scores(self, groups: Sequence[Group], pending: PendingScores) -> Any:
        scored = super()._take_scores(groups, pending)
        first = [group for group in groups if "turn" not in group.edit.columns]
        if not first or not self.model.training:
            return scored
        edits = [
            replace(following, row=group.edit.row)
            for group in first
            for image in group.images
            if (following := next_edit(group.edit, image, TURNS, 2)) is not None
        ]
        key = (self.args.seed, self.state.global_step, "return")
        later = self.make_groups(edits, 1, key, cache_sources=False)
        self.scoring.fill_in(later, self.scoring.receive(self._submit(later)))
        size = self.args.num_generations
        for i, group in enumerate(first):
            own = later[i * size : (i + 1) * size]
            for name in ("rewards", "compared", "scores"):
                setattr(group, name, getattr(group, name) + torch.cat([getattr(after, name) for after in own]))
        return scored


IDEAS = {
    "none": RCGRPOTrainer,
    "pairs": Pairs,
    "extremes": ExtremesOfAll,
    "explore": ExploreThenTrain,
    "spread": Spread,
    "attention": Star,
    "differ": WhereTheyDiffer,
    "filtered": Filtered,
    "turns": RCGRPOTrainer,
    "both_turns": BothTurns,
}


def in_turns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of two added objects as two turns, one object each."""
    parts = row["instruction"].removeprefix("add ").split(" and ")
    size, target, turns = row["mask"].width, row["input_image"], []
    for part, caption in zip(parts, row["caption"].split("|"), strict=True):
        place = next(i for i, name in enumerate(PLACES) if part.endswith(name))
        left, top = (size // 2 * at for at in (place % 2, place // 2))
        quarter = Image.new("L", row["mask"].size)
        quarter.paste(255, (left, top, left + size // 2, top + size // 2))
        mask = ImageChops.darker(row["mask"].convert("L"), quarter)
        target = Image.composite(row["edited_image"], target, mask)
        shown = {"task": "add", "caption": caption, "edited_image": target}
        turns.append({"instruction": f"add {part}", "mask": mask, **shown})
    return {**row, **turns[0], TURNS: turns[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("idea", choices=sorted(IDEAS))
    own, others = parser.parse_known_args()
    use_embedded_model()
    script, config = parse((ScriptArguments, RCGRPOConfig), ["--config", RECIPE, *others], None, "ideas.py")
    count = script.num_train_samples
    if own.idea in ("turns", "both_turns"):
        config = dataclasses.replace(config, turns_column=TURNS)
        rows: Any = [in_turns(row) for row in compbench_mini("train", count, tasks=["multi_object_add"])]
    else:
        rows = compbench_mini("train", count, tasks=script.train_tasks or TASKS)
    model = load_model(script, config, ())
    lora = LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=script.lora_target_modules)
    trainer = IDEAS[own.idea](model, list(script.reward_funcs), config, rows, peft_config=lora)
    began, wall = time.process_time(), time.perf_counter()
    trainer.train()
    trainer.save_model()
    took = f"{time.process_time() - began:.0f} s of a core, {time.perf_counter() - wall:.0f} s"
    (Path(config.output_dir) / "took.txt").write_text(took)
    print(took)
    trainer.close()


if __name__ == "__main__":
    main()
