"""The tab *Compare LoRAs*: two of them and the base on the same edits, from the same noise."""

import time
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.held_out import METRICS, Result, Scorer
from ..inputs.extras import missing
from ..reporting.statistics import compare as differences
from ..reporting.statistics import markdown_table, pad_table
from .comparing import compare
from .drawing import framed
from .edit_tab import lora_choice, picture_grid
from .painting import read_painting
from .studio import Studio
from .working import Controls, stepwise, told

MOST_EDITS = 24


def compare_tab(studio: Studio, painting: Any, instruction: Any) -> None:
    """Lay the tab out, inside a `gradio.Tab`.

    Args:
        painting, instruction: of the tab *Edit*, whose edit can take part.
    """
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("Two LoRAs and the base on the same edits, each edit from the same noise.")
            first = lora_choice(studio, "LoRA A", 0, "lora-a")
            second = lora_choice(studio, "LoRA B", 1, "lora-b")
            count = gr.Slider(
                0, MOST_EDITS, 6, step=1, label="Edits of CompBench-mini's held-out split", elem_id="count"
            )
            own = gr.Checkbox(label="And the one that is painted under Edit", elem_id="own-edit")
            seed = gr.Number(0, label="Seed", precision=0)
            controls = Controls.laid_out("Compare", "compare")
        with gr.Column(scale=3, min_width=300):
            numbers = gr.Markdown("Results appear here.", elem_id="compare-numbers", elem_classes="numbers")
            grid = picture_grid("source, base, LoRA A, LoRA B", "compared")

    def run(
        first: str | None,
        second: str | None,
        count: int,
        own: bool,
        painting: Any,
        instruction: str,
        seed: float,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        start = time.monotonic()
        with told(), studio.stops.heard(request.session_hash) as check:
            chosen = [lora.strip() for lora in (first or "", second or "") if lora.strip()]
            if not chosen:
                raise ValueError(
                    "LoRA A: got none, expected a folder, a file or a Hub id; with one alone, the base is B"
                )
            edits = studio.rows(int(count)) if count else []
            if own:
                source, mask = read_painting(painting)
                edits = [
                    {"input_image": source, "mask": mask, "instruction": studio.read(instruction, *chosen)},
                    *edits,
                ]
            if not edits:
                raise ValueError("edits: got none, expected at least one; raise the number, or paint one under Edit")
            entrants = studio.slot.entrants(*chosen)
            on_step = stepwise(progress, check, len(entrants), len(edits))
            pictures: list[tuple[Image.Image, str]] = []
            results: dict[str, list[Result]] = {one.name: [] for one in entrants}
            density: dict[str, list[float]] = {one.name: [] for one in entrants}
            for i, edit in enumerate(edits):
                drawn = compare(
                    studio.pipeline,
                    entrants,
                    edit["input_image"],
                    edit["mask"],
                    edit["instruction"],
                    studio.drawing(seed),
                    on_step=on_step(i),
                )
                pictures.append((framed(drawn.source, drawn.mask), edit["instruction"]))
                for outcome in drawn.outcomes:
                    caption = f"{outcome.name}: {outcome.background_psnr[0]:.2f} dB"
                    pictures.append((framed(outcome.images[0], drawn.mask), caption))
                    results[outcome.name].append(
                        Result(
                            outcome.images[0],
                            drawn.source,
                            drawn.mask,
                            edit.get("edited_image"),
                            edit.get("caption"),
                            edit.get("task") or "",
                        )
                    )
                    density[outcome.name] += outcome.density
            return [
                _tables(results, density),
                gr.Gallery(pictures, columns=1 + len(entrants), selected_index=None),
                f"Done in {time.monotonic() - start:.1f} s, {len(edits)} edits.",
            ]
        return [gr.skip(), gr.skip(), "Cancelled."]

    controls.wire(
        studio.stops,
        [controls.begin.click],
        run,
        [first, second, count, own, painting, instruction, seed],
        [numbers, grid],
        "compare",
    )


def _tables(results: dict[str, list[Result]], density: dict[str, list[float]]) -> str:
    """Means of each contender, and what changed from the first LoRA to the second, or from the base to the only one."""
    names = ["psnr"] if missing("tiny") else ["psnr", "correct", "closeness"]
    scorer = Scorer(names, size=None)
    scores: dict[str, dict[str, list[float | None]]] = {
        contender: {METRICS[name].label: values for name, values in scorer(own).items()}
        | {"attention on the region": [*density[contender]]}
        for contender, own in results.items()
    }
    known = [label for label in next(iter(scores.values())) if all(_mean(own[label]) for own in scores.values())]
    lines = [["", *known], *([name, *(_mean(own[label]) for label in known)] for name, own in scores.items())]
    text = pad_table([lines[0], *lines[1:]])
    before, after = list(scores)[-2:]
    if len(results[before]) > 1:
        pairs = differences(*({label: scores[name][label] for label in known} for name in (before, after)))
        text += f"\n\nFrom **{before}** to **{after}**, edit by edit:\n\n{markdown_table(pairs)}"
    return text


def _mean(values: list[float | None]) -> str:
    """Nothing where fewer than two edits have a value, unless there is but one edit."""
    given = [value for value in values if value is not None and value == value]
    return f"{np.mean(given):.2f}" if len(given) > 1 or len(values) == 1 == len(given) else ""
