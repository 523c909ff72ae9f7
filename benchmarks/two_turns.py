"""Two objects, added one after the other: `python benchmarks/two_turns.py runs/a runs/b --edits 160`.

The rows of two added objects of `fresh_edits.py`, the same judge; in diffusers' own pipeline each object is a turn that
edits what the turn before gave. What is measured is the last picture, as if it had been edited at once.
"""

import argparse
import json
import random
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
from rcgrpo.evaluation.held_out import Scorer
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.sheets import contact_sheet, outline
from rcgrpo.reporting.statistics import pad_table
from rcgrpo.tiny import CALL

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fresh_edits import AT_ONCE, METRICS, interval, kept_at, open_pipeline, results_of, second_margin
from benchmarks.ideas import TURNS, in_turns

TASK = "multi_object_add"
DRAWN = 6
HOW = ("at once", "in turns")


def edited(pipeline: FluxKontextPipeline, rows: Sequence[dict], how: str, seed: int) -> list[Image.Image]:
    """The rows' last pictures, each turn of each row from noise of its own."""
    turns = [rows]
    if how == "in turns":
        first = [in_turns(row) for row in rows]
        turns = [first, [row[TURNS][0] for row in first]]
    images = [row["input_image"] for row in rows]
    for number, turn in enumerate(turns):
        noise = [torch.Generator().manual_seed(1000 * number + seed + i) for i in range(len(rows))]
        images = pipeline(image=images, prompt=[row["instruction"] for row in turn], generator=noise, **CALL).images
    return images


def measure(lora: Path | None, rows: Sequence[dict], work: Path) -> dict[str, dict[str, list[float]]]:
    """Every metric by row, of both turns and of the same edits at once."""
    kept = kept_at(lora, work)
    if kept.exists():
        return json.loads(kept.read_text())
    pipeline = open_pipeline(lora)
    scorer = Scorer(tuple(name for name in METRICS if name != "margin"), size=None)
    found: dict[str, dict[str, list[float]]] = {how: {name: [] for name in METRICS} for how in HOW}
    for start in tqdm(range(0, len(rows), AT_ONCE), desc="base" if lora is None else lora.name):
        part = rows[start : start + AT_ONCE]
        for how in HOW:
            images = edited(pipeline, part, how, start)
            for name, values in scorer(results_of(images, part)).items():
                found[how][name] += [float("nan") if value is None else float(value) for value in values]
            found[how]["margin"] += second_margin(images, part)
    with write_atomically(kept) as path:
        path.write_text(json.dumps(found))
    return found


def draw(lora: Path, rows: Sequence[dict], path: Path) -> None:
    """Some rows, drawn by a fixed seed, with what the second judge says of each."""
    chosen = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), min(DRAWN, len(rows))))]
    columns = {"source": [outline(row["input_image"], row["mask"]) for row in chosen]}
    labels = {}
    for title, pipeline in (("before", open_pipeline(None)), ("after", open_pipeline(lora))):
        for how in HOW:
            images = edited(pipeline, chosen, how, 0)
            columns[f"{title}, {how}"] = images
            said = Scorer(("correct",), size=None)(results_of(images, chosen))["correct"]
            labels[f"{title}, {how}"] = ["right" if value else "wrong" for value in said]
    columns["ground truth"] = [row["edited_image"] for row in chosen]
    contact_sheet(columns, [row["instruction"] for row in chosen], path=path, labels=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", type=Path, nargs="+", help="folders with pytorch_lora_weights.safetensors")
    parser.add_argument("--edits", type=int, default=160)
    parser.add_argument("--data_seed", type=int, default=7, help="of the rendered rows; 0 is the data set's own")
    parser.add_argument("--first", type=int, default=100, help="rows before this one are left out")
    parser.add_argument("--sheet", type=Path, help=f"draw {DRAWN} of the edits by the last LoRA, too")
    parser.add_argument("--work", type=Path, default=Path("runs/two_turns"))
    args = parser.parse_args()
    places = range(args.first, args.first + args.edits)
    rows = [render("test", len(TASKS) * i + TASKS.index(TASK), 64, args.data_seed) for i in places]
    work = args.work / f"{args.data_seed}-{args.first}-{args.edits}"
    measured = {"base": measure(None, rows, work)}
    measured |= {lora.resolve().name: measure(lora, rows, work) for lora in args.loras}
    lines = [["", *(title for title, _ in METRICS.values())]]
    for label, found in measured.items():
        for how, values in found.items():
            cells = []
            for name, (_, digits) in METRICS.items():
                own = np.array(values[name])
                change = own - np.array(measured["base"][how][name])
                low, high = interval([change])
                sure = f" ({change.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
                cells.append(f"{own.mean():.{digits}f}{'' if label == 'base' else sure}")
            lines.append([f"{label}, {how}", *cells])
    print(pad_table(lines))
    if args.sheet is not None:
        draw(args.loras[-1], rows, args.sheet)


if __name__ == "__main__":
    main()
