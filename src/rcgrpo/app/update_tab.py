"""The tab *One update*: what `rcgrpo explain` draws for an edit."""

import time
from pathlib import Path
from typing import Any

from PIL import Image

from .edit_tab import lora_choice
from .studio import Studio
from .working import Controls, told


def update_tab(studio: Studio) -> None:
    """Lay the tab out, inside a `gradio.Tab`, for a studio that can explain."""
    import gradio as gr

    assert studio.explain is not None
    gr.Markdown(
        "One edit, one group of candidates, one update: the noise that is shared, rewards and advantages, where the "
        "loss asks for a change and what one step of the optimizer moves. The weights stay as they are. "
        "Settings are those of `rcgrpo explain`."
    )
    with gr.Row():
        edit = gr.Number(
            0, label="Edit: a row of CompBench-mini, from 0", precision=0, minimum=0, elem_id="update-edit"
        )
        lora = lora_choice(studio, "LoRA: none, or whose next update", len(studio.loras), "update-lora")
    controls = Controls.laid_out("Explain", "explain", stoppable=False)
    picture = gr.Image(
        label="One update",
        show_label=False,
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        visible=False,
        elem_id="update-picture",
    )
    with gr.Accordion("In numbers", open=False):
        text = gr.Markdown(elem_id="update-text", elem_classes="numbers")

    def explain(edit: float, lora: str | None, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        start = time.monotonic()
        with told():
            progress(0.1, desc="opening the model, rolling out, updating")
            folder = studio.explain(int(edit or 0), (lora or "").strip())  # type: ignore[misc]
            with Image.open(folder / "update.png") as drawn:
                page = drawn.convert("RGB")
            words = Path(folder, "update.md").read_text(encoding="utf-8")
            return [gr.Image(page, visible=True), words, f"Done in {time.monotonic() - start:.1f} s."]
        raise AssertionError("told() raises")

    controls.wire(studio.stops, [controls.begin.click], explain, [edit, lora], [picture, text], "explain")
