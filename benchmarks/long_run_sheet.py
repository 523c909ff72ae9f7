"""The README's picture: twelve held-out edits by the embedded editor, before and after the long run whose LoRA ships.

    python benchmarks/long_run_sheet.py docs/images/long_run.png

Four of each task that draws something, drawn by a fixed seed and not picked, from rows that no report of the run has
seen; the same noise before and after. Below each picture is what the second judge, which no reward asks, says of it.
"""

import random
import sys
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

from rcgrpo.data.mini import render
from rcgrpo.data.scenes import TASKS
from rcgrpo.reporting.sheets import contact_sheet, outline
from rcgrpo.rewards import get_second_scorer
from rcgrpo.tiny import CALL, LONG_RUN, WEIGHTS


def main() -> None:
    drawn = random.Random(0)
    rows = [
        render("test", len(TASKS) * i + TASKS.index(task), 64, 7)
        for task in ("add", "replace", "multi_object_add")
        for i in sorted(drawn.sample(range(40), 4))
    ]
    sources, targets, masks, captions, prompts = (
        [row[name] for row in rows] for name in ("input_image", "edited_image", "mask", "caption", "instruction")
    )
    pipe = FluxKontextPipeline.from_pretrained(WEIGHTS)
    columns = {"source": [outline(source, mask) for source, mask in zip(sources, masks, strict=True)]}
    labels = {}
    for name, lora in (("before", None), ("after", LONG_RUN)):
        if lora is not None:
            pipe.load_lora_weights(lora)
        noise = [torch.Generator().manual_seed(i) for i in range(len(rows))]
        columns[name] = pipe(image=sources, prompt=prompts, generator=noise, **CALL).images
        right = get_second_scorer().correct(columns[name], masks, captions, [True] * len(rows), targets, sources)
        labels[name] = ["right" if each else "wrong" for each in right]
        print(name, sum(map(bool, right)), "of", len(rows), "right")
    columns["ground truth"] = targets
    contact_sheet(columns, prompts, path=Path(sys.argv[1]), labels=labels)


if __name__ == "__main__":
    main()
