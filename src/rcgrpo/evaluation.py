"""Before and after on held-out edits: one candidate each, always from the same noise, so that differences are paired.

Reads pictures from the rollout and numbers from `metrics` and `rewards`; `report` turns them into tables and pictures.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from .data.edits import Edit
from .metrics import background_psnr, background_ssim
from .report import (
    PairedDifference,
    compare,
    contact_sheet,
    heatmap,
    markdown_table,
    outline,
    plot_curves,
    write_atomically,
)
from .rollout import Group
from .trainer import RCGRPOTrainer

Scores = dict[str, list[float | None]]


def roll_out_held_out(
    trainer: RCGRPOTrainer, edits: Sequence[Edit], description: str, batch_size: int = 32, maps: bool = True
) -> list[Group]:
    """One scored candidate for each edit with the trainer's current weights."""
    groups: list[Group] = []
    trainer.model.eval()  # what is logged here belongs to no training step
    with tqdm(total=len(edits), desc=description, unit="edit") as progress:
        for start in range(0, len(edits), batch_size):
            part = trainer.make_groups(edits[start : start + batch_size], 1, (trainer.args.seed, "eval"), maps)
            trainer.score_groups(part)
            groups += part
            progress.update(len(part))
    trainer.forget_metrics()
    return groups


def measure(groups: Sequence[Group], rewards: Sequence[str]) -> Scores:
    """Every metric of each group's first candidate: rewards, CompBench's background metrics, edit score, LP-T, LP-I.

    The background metrics are taken at the pictures' own size. The last three (see `rcgrpo.rewards.RegionScorer`) need
    the columns `task`, `caption` and `edited_image`, and objects of CompBench-mini; elsewhere they are left out.
    """
    images = [group.images[0] for group in groups]
    sources, masks = [group.source for group in groups], [group.mask for group in groups]
    scores: Scores = {"reward": [float(group.scores[0]) for group in groups]}  # type: ignore[index]
    for i, name in enumerate(rewards):
        if len(rewards) > 1:
            scores[name] = [float(group.rewards[0, i]) for group in groups]  # type: ignore[index]
    if {"task", "caption", "edited_image"} <= groups[0].edit.columns.keys():
        from .rewards import get_region_scorer, region_edit

        task, caption = ([group.edit.columns[name] for group in groups] for name in ("task", "caption"))
        targets = [group.edit.columns["edited_image"].resize(group.images[0].size) for group in groups]
        scores["edit score"] = region_edit(images=images, masks=masks, task=task, caption=caption, edited_image=targets)
        lp_t, scores["LP-I"] = get_region_scorer().lp(images, masks, caption, targets)
        # For a removal the caption names what must be gone, so its text score is not one of success.
        scores["LP-T"] = [None if name == "remove" else value for name, value in zip(task, lp_t, strict=True)]
    scores["background PSNR (dB)"] = list(background_psnr(images, sources, masks, size=None))
    scores["background SSIM"] = list(background_ssim(images, sources, masks, size=None))
    return {name: values for name, values in scores.items() if sum(v is not None and v == v for v in values) > 1}


def write_report(
    folder: Path,
    before: Sequence[Group],
    after: Sequence[Group],
    rewards: Sequence[str],
    log_history: list[dict[str, float]],
    settings: Mapping[str, Any],
    num_pictures: int = 12,
) -> list[PairedDifference]:
    """Write `metrics.json`, `metrics.md`, `reward_curves.png`, `samples/contact_sheet.png`, each whole or not at all.

    Returns:
        The rows of the before/after table, with 95 % bootstrap intervals of the paired difference.
    """
    old, new = measure(before, rewards), measure(after, rewards)
    rows = compare(old, new)
    with write_atomically(folder / "metrics.md") as path:
        path.write_text(markdown_table(rows) + "\n")
    with write_atomically(folder / "metrics.json") as path:
        summary = {
            "held_out": [asdict(row) for row in rows],
            "per_sample": {"before": old, "after": new},
            "settings": dict(settings),
        }
        path.write_text(json.dumps(summary, indent=1, default=str))
    shown = range(0, len(after), max(1, len(after) // num_pictures + 1))
    masks = [after[i].mask for i in shown]
    sheet: dict[str, list[Image.Image]] = {
        "source": [outline(after[i].source, mask) for i, mask in zip(shown, masks, strict=True)],
        "mask": masks,
        "before": [before[i].images[0] for i in shown],
        "after": [after[i].images[0] for i in shown],
    }
    if all(group.attention_maps is not None for group in after):
        sheet["attention"] = [heatmap(after[i].attention_maps[0].numpy(), after[i].source) for i in shown]  # type: ignore[index]
    contact_sheet(sheet, [after[i].edit.prompt for i in shown], path=folder / "samples" / "contact_sheet.png")
    if any("reward" in row for row in log_history):
        plot_curves(log_history, folder / "reward_curves.png")
    return rows
