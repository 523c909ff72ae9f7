"""What choosing buys without training: `python benchmarks/best_of.py --candidates 12 --edits 40`.

Of several candidates of the embedded editor for an edit, plain noise for each, the one that the main job's reward likes
best; how often that is right by the judge that no reward asks, for every number of candidates up to the largest. A
yardstick for training, at that many times the cost of a picture.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from tqdm.auto import tqdm

from rcgrpo.data.mini import render
from rcgrpo.data.scenes import TASKS
from rcgrpo.evaluation.held_out import Scorer
from rcgrpo.reporting.statistics import pad_table
from rcgrpo.rewards import region_margin
from rcgrpo.tiny import CALL, WEIGHTS

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fresh_edits import DRAWING, results_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--edits", type=int, default=40, help="of each task that draws something")
    parser.add_argument("--data_seed", type=int, default=7)
    parser.add_argument("--first", type=int, default=200, help="rows of each task before this one are left out")
    args = parser.parse_args()
    places = range(args.first, args.first + args.edits)
    rows = [render("test", len(TASKS) * i + TASKS.index(task), 64, args.data_seed) for task in DRAWING for i in places]
    pipeline = FluxKontextPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    scorer = Scorer(("correct", "psnr"), size=None)
    rewards, right, background = (np.empty((len(rows), args.candidates)) for _ in range(3))
    for i, row in enumerate(tqdm(rows, desc="edits")):
        noise = [torch.Generator().manual_seed(i * args.candidates + j) for j in range(args.candidates)]
        times = {"image": row["input_image"], "prompt": row["instruction"]}
        images = pipeline(**{k: [v] * args.candidates for k, v in times.items()}, generator=noise, **CALL).images
        columns = {"task": row["task"], "caption": row["caption"], "edited_image": row["edited_image"]}
        copies = {name: [value] * len(images) for name, value in columns.items()}
        rewards[i] = region_margin(images=images, masks=[row["mask"]] * len(images), **copies)
        found = scorer(results_of(images, [row] * len(images)))
        right[i], background[i] = found["correct"], found["psnr"]
    lines = []
    for count in sorted({2**i for i in range(args.candidates.bit_length())} | {args.candidates}):
        best = rewards[:, :count].argmax(axis=1)[:, None]
        chosen = np.take_along_axis(right, best, axis=1)[:, 0].reshape(len(DRAWING), -1).mean(axis=1)
        kept = np.take_along_axis(background, best, axis=1).mean()
        lines.append([str(count), *(f"{value:.1f}" for value in chosen), f"{chosen.mean():.1f}", f"{kept:.2f}"])
    any_right = right.max(axis=1).reshape(len(DRAWING), -1).mean(axis=1)
    lines.append([f"any of {args.candidates}", *(f"{value:.1f}" for value in any_right), f"{any_right.mean():.1f}", ""])
    print(pad_table([["best of", *DRAWING, "drawing: correct (%)", "background PSNR (dB)"], *lines]))


if __name__ == "__main__":
    main()
