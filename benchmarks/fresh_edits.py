"""LoRAs on edits that no table and no choice has seen: `python benchmarks/fresh_edits.py runs/seeds/*/ --edits 80`.

The embedded editor alone, then with each LoRA, in diffusers' own pipeline: the same edits and the same noise for all of
them. By task: correct (by a judge that no reward asks), background PSNR, closeness to the ground truth; each LoRA's
difference to the base with a bootstrap over edits, and the mean over LoRAs with Student's interval over them. `margin`
is `region_margin` by that same judge, whose mean moves before counts do. What is measured is kept in `--work`, so more
LoRAs cost only their own time.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from tqdm.auto import tqdm

from rcgrpo.data.mini import render
from rcgrpo.data.scenes import TASKS
from rcgrpo.evaluation.held_out import Result, Scorer
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.statistics import pad_table
from rcgrpo.rewards import get_second_scorer
from rcgrpo.rewards.pictures import image_tensor
from rcgrpo.rewards.region_margin import margins
from rcgrpo.tiny import CALL, WEIGHTS

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.study.summary import over_seeds

DRAWING = ("add", "replace", "multi_object_add")
ORDER = (*DRAWING, "remove", "multi_object_remove", "implicit_reasoning")
METRICS = {
    "correct": ("correct (%)", 1),
    "psnr": ("background PSNR (dB)", 2),
    "closeness": ("closeness", 4),
    "margin": ("margin", 3),
}
AT_ONCE = 48


def results_of(images: Sequence[Image.Image], rows: Sequence[dict]) -> list[Result]:
    """Edited pictures with what they are judged by."""
    return [
        Result(image, row["input_image"], row["mask"], row["edited_image"], row["caption"], row["task"])
        for image, row in zip(images, rows, strict=True)
    ]


def second_margin(images: Sequence[Image.Image], rows: Sequence[dict]) -> list[float]:
    columns = ([row[name] for row in rows] for name in ("mask", "task", "caption", "edited_image"))
    with torch.no_grad():
        return margins(get_second_scorer(), [image_tensor(image) for image in images], *columns).tolist()


def open_pipeline(lora: Path | None) -> FluxKontextPipeline:
    """diffusers' own, alone or with a LoRA."""
    pipeline = FluxKontextPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def kept_at(lora: Path | None, work: Path) -> Path:
    """Where what is measured of a LoRA is kept, by its content."""
    content = b"" if lora is None else (lora / "pytorch_lora_weights.safetensors").read_bytes()
    return work / f"{hashlib.sha256(content).hexdigest()[:16]}.json"


def measure(lora: Path | None, rows: Sequence[dict], work: Path) -> dict[str, list[float]]:
    """Every metric by row, with NaN where a task has none."""
    kept = kept_at(lora, work)
    if kept.exists() and set(METRICS) <= (found := json.loads(kept.read_text())).keys():
        return found
    pipeline = open_pipeline(lora)
    scorer = Scorer(tuple(name for name in METRICS if name != "margin"), size=None)
    found = {name: [] for name in METRICS}
    for start in tqdm(range(0, len(rows), AT_ONCE), desc="base" if lora is None else lora.name):
        part = rows[start : start + AT_ONCE]
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        sources, prompts = ([row[name] for row in part] for name in ("input_image", "instruction"))
        images = pipeline(image=sources, prompt=prompts, generator=noise, **CALL).images
        for name, values in scorer(results_of(images, part)).items():
            found[name] += [float("nan") if value is None else float(value) for value in values]
        found["margin"] += second_margin(images, part)
    with write_atomically(kept) as path:
        path.write_text(json.dumps(found))
    return found


def drawing(change: np.ndarray, tasks: np.ndarray) -> list[np.ndarray]:
    return [change[tasks == task] for task in DRAWING]


def interval(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """A bootstrap of the mean of means, edits resampled within each task."""
    random = np.random.default_rng(0)
    draws = [random.choice(part, (10_000, len(part))).mean(axis=1) for part in parts]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(low), float(high)


def table(name: str, base: np.ndarray, after: dict[str, np.ndarray], tasks: np.ndarray) -> str:
    """Markdown: a row for each LoRA and, of several, one for their mean."""
    title, places = METRICS[name]

    def row(label: str, change: np.ndarray) -> list[str]:
        low, high = interval(drawing(change, tasks))
        mean = np.mean([part.mean() for part in drawing(change, tasks)])
        cells = [f"{change[tasks == task].mean():+.{places}f}" for task in ORDER]
        return [label, *cells, f"{mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"]

    lines = [["base", *(f"{base[tasks == task].mean():.{places}f}" for task in ORDER), ""]]
    lines += [row(label, values - base) for label, values in after.items()]
    if len(after) > 1:
        changes = np.stack([values - base for values in after.values()])
        lines.append(row(f"mean of {len(after)}", changes.mean(axis=0)))
    if len(after) > 2:
        lines.append(["± over LoRAs", *(spread(changes[:, tasks == task].mean(axis=1), places) for task in ORDER)])
        each = np.mean([changes[:, tasks == task].mean(axis=1) for task in DRAWING], axis=0)
        lines[-1].append(spread(each, places))
    heads = [title, *(task.replace("multi_object", "two") for task in ORDER), "drawing"]
    return pad_table([heads, *lines])


def spread(values: np.ndarray, places: int) -> str:
    """Half of Student's 95 % interval of a mean over LoRAs."""
    return f"± {over_seeds(values.tolist()).half:.{places}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", type=Path, nargs="+", help="folders with pytorch_lora_weights.safetensors")
    parser.add_argument("--edits", type=int, default=80, help="of each task")
    parser.add_argument("--data_seed", type=int, default=7, help="of the rendered rows; 0 is the data set's own")
    parser.add_argument("--first", type=int, default=100, help="rows of each task before this one are left out")
    parser.add_argument("--work", type=Path, default=Path("runs/fresh_edits"))
    args = parser.parse_args()
    places = range(args.first, args.first + args.edits)
    rows = [render("test", len(TASKS) * i + TASKS.index(task), 64, args.data_seed) for i in places for task in ORDER]
    tasks = np.array([row["task"] for row in rows])
    work = args.work / f"{args.data_seed}-{args.first}-{args.edits}"
    base = measure(None, rows, work)
    after = {lora.resolve().name: measure(lora, rows, work) for lora in args.loras}
    for name in METRICS:
        numbers = {label: np.array(found[name]) for label, found in after.items()}
        print(f"\n{table(name, np.array(base[name]), numbers, tasks)}")


if __name__ == "__main__":
    main()
