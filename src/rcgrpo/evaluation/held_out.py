"""What is measured on an edit, by name, and the report that a training run writes of itself.

Held-out edits are compared pairwise: one candidate each, always from the same noise. Reads pictures from the rollout
and numbers from `maths.metrics`, `compbench` and `rewards`; `reporting` turns them into tables and pictures. A whole
benchmark, with several LoRAs and in pieces that survive a crash, is `benchmark`'s work.
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.edits import Edit, EditRows
from ..groups.diagnostics import target_closeness
from ..inputs.extras import missing, require
from ..inputs.masks import mask_picture
from ..inputs.pictures import to_rgb
from ..maths.metrics import background_lpips, background_psnr, background_ssim, load_lpips
from ..reporting.curves import plot_curves
from ..reporting.files import write_atomically
from ..reporting.learning_curve import Curve, plot_learning_curve
from ..reporting.sheets import contact_sheet, heatmap, outline
from ..reporting.statistics import PairedDifference, compare, markdown_table
from ..rewards import get_region_scorer, get_second_scorer
from ..rewards.builtin import ADDS, REMOVES, edit_score
from ..rewards.clip_model import CLIP_MODEL, Clip
from .changed_most import thumbnail, write_changed_most
from .compbench import local_clip_scores

if TYPE_CHECKING:  # TRL takes seconds to load, and `rcgrpo evaluate` has no use for it
    from ..groups.rollout import Group
    from ..training.trainer import RCGRPOTrainer

Scores = dict[str, list[float | None]]


# Metrics by name ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How tables call a metric, and which way is better."""

    label: str
    higher_is_better: bool = True


METRICS = {
    "lc_t": Metric("LC-T"),
    "lc_i": Metric("LC-I"),
    "psnr": Metric("background PSNR (dB)"),
    "ssim": Metric("background SSIM"),
    "lpips": Metric("background LPIPS", higher_is_better=False),
    "lp_t": Metric("LP-T"),
    "lp_i": Metric("LP-I"),
    "edit_score": Metric("edit score"),
    "correct": Metric("correct (%)"),
    "closeness": Metric("closeness"),
}
COMPBENCH_METRICS = ("lc_t", "lc_i", "psnr", "ssim", "lpips")
"""CompBench's own; the first two need CLIP ViT-L/14, the last SqueezeNet, both fetched on first use."""

EMBEDDED_METRICS = ("lp_t", "lp_i", "edit_score", "correct", "closeness")
"""Those that know the objects of CompBench-mini and nothing else. Nobody trains on the last two: no reward asks the
second network that judges `correct`, and no edit reward reads the ground truth's pixels, as `closeness` does."""

MINI_METRICS = ("psnr", "ssim", *EMBEDDED_METRICS)
"""Those that need no download."""

NEEDS_CLIP = frozenset({"lc_t", "lc_i"})


@dataclass(frozen=True)
class Result:
    """An edited picture and what it is judged by; source, mask (255 = edit) and target may have another size."""

    image: Image.Image
    source: Image.Image
    mask: Image.Image
    target: Image.Image | None = None
    caption: str | None = None
    task: str = ""

    @classmethod
    def of(cls, image: Image.Image, edit: Edit) -> "Result":
        """What one edit became, judged by CompBench's columns as far as there are any."""
        columns = edit.columns
        return cls(
            image,
            edit.source,
            mask_picture(edit.mask),
            columns.get("edited_image"),
            columns.get("caption"),
            columns.get("task") or "",
        )

    def at_own_size(self) -> "Result":
        """Everything at the edited picture's size."""
        size = self.image.size
        return replace(
            self,
            source=self.source.resize(size, Image.Resampling.BICUBIC),
            mask=self.mask.resize(size, Image.Resampling.NEAREST),
            target=None if self.target is None else to_rgb(self.target).resize(size, Image.Resampling.BICUBIC),
        )


class Scorer:
    """Measures edited pictures; loads what the metrics need when it is made, so that a long run fails at its start.

    Args:
        metrics: names from `METRICS`.
        size: side in pixels at which backgrounds and crops are compared, CompBench's is 512; None compares at the
            edited picture's own size. LP-T, LP-I and the edit score always do.
        clip_model: Hub id or folder; LC-T and LC-I are defined with the default.
        lpips_weights: see `load_lpips`.

    Raises:
        ValueError: an unknown metric, or weights that cannot be loaded.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        size: int | None = 512,
        clip_model: str = CLIP_MODEL,
        lpips_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics or len(set(metrics)) < len(metrics):
            raise ValueError(f"metrics: got {list(metrics)}, expected some of {', '.join(METRICS)}, each once")
        self.metrics, self.size = tuple(metrics), size
        others = " ".join(name for name in metrics if name not in {*NEEDS_CLIP, "lpips"}) or " ".join(MINI_METRICS[:2])
        if self._embedded:
            require("tiny", f"the metrics {', '.join(EMBEDDED_METRICS)}")
        try:
            self.clip = Clip(clip_model) if NEEDS_CLIP & {*metrics} else None
            self.lpips = load_lpips(lpips_weights) if "lpips" in metrics else None
        except ValueError as error:
            raise ValueError(f"{error}. Metrics that need neither: {others}") from error
        if self.lpips is not None:
            self.lpips.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, results: Sequence[Result]) -> Scores:
        """Metric to one value per picture, in the order asked for; None where a metric does not apply.

        PSNR, SSIM and LPIPS do not apply where the mask leaves no background; LC-I, LP-I and closeness without a
        target; LP-T to removals, whose caption names what must be gone; the embedded ones to unknown objects.
        """
        own = [result.at_own_size() for result in results] if self.size is None or self._embedded else []
        compared = own if self.size is None else results
        images, sources, masks = zip(*((r.image, r.source, r.mask) for r in compared), strict=True)
        scores: dict[str, Sequence[float | None]] = {}
        if self.clip is not None:
            targets, captions = [r.target for r in compared], [r.caption for r in compared]
            scores["lc_t"], scores["lc_i"] = local_clip_scores(images, targets, masks, captions, self.clip, self.size)
        if "psnr" in self.metrics:
            scores["psnr"] = background_psnr(images, sources, masks, self.size)
        if "ssim" in self.metrics:
            scores["ssim"] = background_ssim(images, sources, masks, self.size)
        if self.lpips is not None:
            scores["lpips"] = background_lpips(images, sources, masks, self.lpips, self.size)
        if self._embedded:
            scores |= _embedded_scores(own)
        return {name: [None if v is None or v != v else v for v in scores[name]] for name in self.metrics}

    @property
    def _embedded(self) -> bool:
        return not {*EMBEDDED_METRICS}.isdisjoint(self.metrics)


def _embedded_scores(results: Sequence[Result]) -> dict[str, list[float | None]]:
    """The embedded metrics, with `rewards.RegionScorer`; 100 is correct, 0 is not."""
    images, masks, targets = zip(*((r.image, r.mask, r.target) for r in results), strict=True)
    tasks, captions = [r.task for r in results], [r.caption or "" for r in results]
    lp_t, lp_i = get_region_scorer().lp(images, masks, captions, targets)
    draws, sources = [task in ADDS for task in tasks], [r.source for r in results]
    correct = get_second_scorer().correct(images, masks, captions, draws, targets, sources)
    return {
        "correct": [
            None if value is None or task not in (*ADDS, *REMOVES) else 100.0 * value
            for task, value in zip(tasks, correct, strict=True)
        ],
        "closeness": target_closeness(list(images), list(masks), list(targets)),
        "lp_t": [None if task in REMOVES else value for task, value in zip(tasks, lp_t, strict=True)],
        "lp_i": lp_i,
        "edit_score": [edit_score(*values) for values in zip(tasks, lp_t, lp_i, strict=True)],
    }


# Before and after training --------------------------------------------------------------------------------------------

NUM_PICTURES = 12
"""Edits on the contact sheet."""

TASK_METRICS = ("correct", "closeness", "psnr")
"""Metrics that a report also gives for each task."""

NUM_EXAMPLES = 3
"""Edits whose pictures are written one by one."""


@dataclass(frozen=True)
class HeldOut:
    """One candidate of a held-out edit, as the report needs it: small, as it is kept while a run trains.

    Args:
        row: of the edit in its data set.
        prompt: the instruction.
        scores: metric to value, None where it does not apply.
        pictures: `source`, `mask`, `edited` and, where it was recorded, `attention`; empty for an edit that is not
            shown.
        task: the kind of edit, where the data name it.
        small: `source`, `mask` and `edited` of every edit, within 128 pixels.
    """

    row: int
    prompt: str
    scores: dict[str, float | None]
    pictures: dict[str, Image.Image]
    task: str = ""
    small: dict[str, Image.Image] = field(default_factory=dict)


def judge_held_out(
    trainer: "RCGRPOTrainer", rows: EditRows, description: str, batch_size: int = 32, maps: bool = True
) -> list[HeldOut]:
    """One candidate of each edit with the trainer's current weights, from the same noise each time.

    Every process calls it and does its share of the edits; all get the whole list, in the order of the rows.

    Args:
        rows: usually `trainer.eval_dataset`.
        description: of the progress bar.
        batch_size: edits at a time, on each process.
        maps: draw attention maps too.
    """
    accelerator, names = trainer.accelerator, [reward.name for reward in trainer.rewards]
    share = range(accelerator.process_index, len(rows), accelerator.num_processes)
    shown = set(_shown(len(rows)))
    judged: list[HeldOut] = []
    trainer.model.eval()  # what is logged here belongs to no training step
    with (
        trainer.rolling_out(),
        tqdm(total=len(share), desc=description, unit="edit", disable=not accelerator.is_main_process) as progress,
    ):
        for start in range(0, len(share), batch_size):
            edits = [rows.edit(row) for row in share[start : start + batch_size]]
            groups = trainer.make_groups(edits, 1, (trainer.args.seed, "eval"), maps)
            trainer.score_groups(groups)
            for row, group, scores in zip(share[start:], groups, measure(groups, names), strict=False):
                pictures = _pictures(group) if row in shown else {}
                task = str(group.edit.columns.get("task") or "")
                small = {"source": group.source, "mask": group.mask, "edited": group.images[0]}
                small = {name: thumbnail(picture) for name, picture in small.items()}
                judged.append(HeldOut(row, group.edit.prompt, scores, pictures, task, small))
            progress.update(len(edits))
    trainer.forget_metrics()
    return sorted(gather_object(judged), key=lambda one: one.row)


def measure(groups: Sequence["Group"], rewards: Sequence[str]) -> list[dict[str, float | None]]:
    """Every metric of each group's first candidate: rewards, the embedded metrics, background PSNR and SSIM.

    All are taken at the pictures' own size; the embedded ones where the data have their columns.
    """
    # CompBench has these columns too, and its users need not have the embedded judge, which knows few of its objects.
    embedded = {"task", "caption", "edited_image"} <= groups[0].edit.columns.keys() and not missing("tiny")
    scores: Scores = {"reward": [float(group.scores[0]) for group in groups]}  # type: ignore[index]
    for i, name in enumerate(rewards):
        # On the embedded data this one is the edit score.
        if len(rewards) > 1 and not (embedded and name == "region_edit"):
            scores[name] = [float(group.rewards[0, i]) for group in groups]  # type: ignore[index]
    order = ("correct", "closeness", "edit_score", "lp_i", "lp_t")
    names = [*(order if embedded else ()), "psnr", "ssim"]
    measured = Scorer(names, size=None)([Result.of(group.images[0], group.edit) for group in groups])
    scores |= {METRICS[name].label: values for name, values in measured.items()}
    return [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]


def write_report(
    folder: Path,
    before: Sequence[HeldOut],
    after: Sequence[HeldOut],
    log_history: list[dict[str, Any]],
    settings: Mapping[str, Any],
) -> list[PairedDifference]:
    """Write `metrics.json`, `metrics.md`, `reward_curves.png` and the pictures in `samples`, each whole or not at all.

    A run that was evaluated on its way (`eval_strategy`) also gets `learning_curve.png`, and its `curve` in the JSON.

    The pictures are `contact_sheet.png`, `changed_most.png` with the edits that rose and fell most, and, for the page
    on the Hub, source and edited picture of a few edits, which `metrics.json` lists as `examples`. A metric is
    left out where fewer than two edits have a value on either side, such as the embedded ones where the objects are
    not CompBench-mini's.

    Args:
        before, after: of `judge_held_out`, of the same rows.

    Returns:
        The rows of the before/after table, with 95 % bootstrap intervals of the paired difference.
    """
    old, new = _columns(before), _columns(after)
    common = [name for name in old if name in new]
    rows = compare({name: old[name] for name in common}, {name: new[name] for name in common})
    tasks = compare_tasks(before, after)
    with write_atomically(folder / "metrics.md") as path:
        tables = [markdown_table(rows), *(f"{task}\n\n{markdown_table(own)}" for task, own in tasks.items())]
        path.write_text("\n\n".join(tables) + "\n")
    shown, curve = _shown(len(after)), Curve.of(log_history)
    with write_atomically(folder / "metrics.json") as path:
        summary = {
            "held_out": [asdict(row) for row in rows],
            "by_task": {task: [asdict(row) for row in own] for task, own in tasks.items()},
            "per_sample": {"before": old, "after": new},
            "examples": [_save_example(folder, after[i]) for i in shown[:NUM_EXAMPLES]],
            "settings": dict(settings),
            "curve": asdict(curve),
        }
        path.write_text(json.dumps(summary, indent=1, default=str))
    sheet: dict[str, list[Image.Image]] = {
        "source": [outline(after[i].pictures["source"], after[i].pictures["mask"]) for i in shown],
        "mask": [after[i].pictures["mask"] for i in shown],
        "before": [before[i].pictures["edited"] for i in shown],
        "after": [after[i].pictures["edited"] for i in shown],
    }
    if all("attention" in after[i].pictures for i in shown):
        sheet["attention"] = [after[i].pictures["attention"] for i in shown]
    contact_sheet(sheet, [after[i].prompt for i in shown], path=folder / "samples" / "contact_sheet.png")
    write_changed_most(folder / "samples" / "changed_most.png", before, after)
    if any("reward" in row for row in log_history):
        plot_curves(log_history, folder / "reward_curves.png")
    if len(curve.steps) > 1:
        plot_learning_curve(curve, folder / "learning_curve.png")
    return rows


def compare_tasks(before: Sequence[HeldOut], after: Sequence[HeldOut]) -> dict[str, list[PairedDifference]]:
    """What a mean over all edits hides: the metrics of `TASK_METRICS` for each task, where there are several."""
    tasks = dict.fromkeys(one.task for one in after)
    tables = {}
    for task in tasks if len(tasks) > 1 else ():
        old, new = (_columns([one for one in side if one.task == task]) for side in (before, after))
        common = [METRICS[name].label for name in TASK_METRICS if {METRICS[name].label} <= old.keys() & new.keys()]
        if common:
            tables[task] = compare({name: old[name] for name in common}, {name: new[name] for name in common})
    return tables


def _shown(number: int) -> list[int]:
    """The places of the edits on the contact sheet; even spacing would fall in step with tasks that take turns."""
    return sorted(random.Random(0).sample(range(number), min(NUM_PICTURES, number)))


def _pictures(group: "Group") -> dict[str, Image.Image]:
    pictures = {"source": group.source, "mask": group.mask, "edited": group.images[0]}
    if group.attention_maps is not None:
        pictures["attention"] = heatmap(group.attention_maps[0].numpy(), group.source)
    return pictures


def _columns(judged: Sequence[HeldOut]) -> Scores:
    """Metric to one value per edit, of those metrics that two edits at least have a value of."""
    names = dict.fromkeys(name for one in judged for name in one.scores)
    scores = {name: [one.scores.get(name) for one in judged] for name in names}
    return {name: values for name, values in scores.items() if sum(v is not None and v == v for v in values) > 1}


def _save_example(folder: Path, judged: HeldOut) -> dict[str, str]:
    """Write an edit's source and first candidate; what `hub.model_card` takes as an example."""
    example = {"prompt": judged.prompt}
    for name in ("source", "edited"):
        example[name] = f"samples/{judged.row:03d}_{name}.png"
        with write_atomically(folder / example[name]) as path:
            judged.pictures[name].save(path)
    return example
