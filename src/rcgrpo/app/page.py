"""The page, in Gradio (`pip install rcgrpo[app]`), which is imported when a page is made, and its server.

Gotchas: edits are made one after another, whoever asks. A visitor sees what a `ValueError` says, and of any other error
its first words.
"""

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import compbench_mini
from ..editors import RegionDecoupledFluxKontextPipeline
from ..evaluation.benchmark import Sampling
from ..inputs.extras import require
from ..maths.metrics import first_words
from ..rewards.transport import is_loopback
from .comparing import compare
from .drawing import Captioned, draw, table
from .loras import LoraSlot
from .painting import PAINT, PAINT_OPACITY, painting_of, read_painting

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 8
CSS = """
.thumbnail-item { aspect-ratio: auto !important; height: auto !important; overflow: visible !important; }
.thumbnail-item .caption-label { position: static !important; max-width: none !important; white-space: normal }
"""
"""Captions stand below their pictures instead of on them."""

NUM_EXAMPLES, EXAMPLE_SIDE = 6, 256


def create_app(
    pipeline: RegionDecoupledFluxKontextPipeline,
    sampling: Sampling,
    loras: Sequence[str] = (),
    prepare: Callable[[str], str] = str.strip,
) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        pipeline: the base, on its device, without LoRAs.
        sampling: how to draw; the page sets the seed.
        loras: offered for choice, the first one chosen; others can be typed.
        prepare: what happens to an instruction before the editor reads it.

    Raises:
        ModuleNotFoundError: the extra `app` is missing.
    """
    require("app", "the app")
    import gradio as gr

    slot = LoraSlot(pipeline)

    def edit(
        painting: Any, instruction: str, lora: str | None, num_candidates: int, edit_strength: float, seed: int
    ) -> list[Any]:
        try:
            source, mask = read_painting(painting)
            entrants = slot.entrants(lora or "")
            comparison = compare(
                pipeline,
                entrants,
                source,
                mask,
                prepare(instruction or ""),
                replace(sampling, seed=int(seed or 0)),
                int(num_candidates),
                edit_strength,
            )
        except torch.OutOfMemoryError as error:
            text = "The GPU's memory is full; ask for fewer candidates, or start with a smaller --resolution."
            raise gr.Error(text, print_exception=False) from error
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
        except Exception as error:
            logger.exception("an edit failed")
            raise gr.Error(html.escape(first_words(error), quote=False), print_exception=False) from error
        shown: list[list[Captioned]] = [[d.edits, d.attention, d.changes] for d in draw(comparison)]
        base, with_lora = shown[0], shown[1] if len(shown) > 1 else [[], [], []]
        return [*base, *with_lora, table(comparison), gr.Column(visible=len(shown) > 1)]

    examples = [row for row in compbench_mini("test", NUM_EXAMPLES, EXAMPLE_SIDE) if row["mask"] is not None]

    def open_example(event: gr.SelectData) -> tuple[dict[str, Any], str]:
        row = examples[event.index]
        return painting_of(row["input_image"], row["mask"]), row["instruction"]

    def side(title: str, visible: bool) -> tuple[Any, list[Any]]:
        with gr.Column(visible=visible, min_width=240) as column:
            gr.Markdown(f"### {title}")
            galleries = []
            for label in ("edited", "where the instruction's attention falls", "what changed outside the region"):
                gr.Markdown(label)  # a gallery's own label would cover a corner of the first picture
                galleries.append(
                    gr.Gallery(label=label, show_label=False, columns=2, object_fit="contain", height="max-content")
                )
        return column, galleries

    with gr.Blocks(title="rcgrpo", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True) as page:
        gr.Markdown(
            "## Edit a region, with and without a LoRA\n"
            "Open a picture or click an example, paint over the region to edit, say what to do, and press Edit."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                painting = gr.ImageEditor(
                    label="Picture; paint the region to edit",
                    type="pil",
                    brush=gr.Brush(colors=[(PAINT, PAINT_OPACITY)], color_mode="fixed", default_size=24),
                    layers=False,
                    transforms=(),
                    sources=("upload", "clipboard"),
                    elem_id="painting",
                )
                instruction = gr.Textbox(label="Instruction", placeholder="remove the apple", elem_id="instruction")
                lora = gr.Dropdown(
                    list(loras),
                    value=loras[0] if loras else None,
                    allow_custom_value=True,
                    label="LoRA: folder, file or Hub id",
                    elem_id="lora",
                )
                with gr.Row():
                    candidates = gr.Slider(1, MAX_CANDIDATES, 2, step=1, label="Candidates", min_width=120)
                    strength = gr.Slider(0, 1, 0.5, label="Their difference", min_width=120)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=80)
                button = gr.Button("Edit", variant="primary", elem_id="edit")
                gr.Markdown("Examples")
                gallery = gr.Gallery(
                    [(row["input_image"], row["instruction"]) for row in examples],
                    label="Examples",
                    show_label=False,
                    columns=3,
                    height="max-content",
                    allow_preview=False,
                    interactive=False,
                    elem_id="examples",
                )
            with gr.Column(scale=3):
                numbers = gr.Markdown(elem_id="numbers")
                with gr.Row():
                    _, base_galleries = side("base", True)
                    lora_column, lora_galleries = side("with the LoRA", False)
        asked = [painting, instruction, lora, candidates, strength, seed]
        answered = [*base_galleries, *lora_galleries, numbers, lora_column]
        for event in (button.click, instruction.submit):
            event(
                edit,
                asked,
                answered,
                concurrency_limit=1,
                concurrency_id="editor",
                api_name="edit",
                show_progress="full",
            )
        gallery.select(open_example, None, [painting, instruction])
    return page


def serve(
    page: Any, host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None, block: bool = True
) -> str:
    """Serve the page until interrupted; its address, at once if not to `block`.

    Args:
        page: from `create_app`.
        host: the address to listen on.
        port: 0 for the first free one from 7860.
        auth: user and password that the page asks for.
        block: stay until SIGINT.

    Raises:
        ValueError: an address that others can reach, without `auth`.
        OSError: the port is taken.
    """
    if auth is None and not is_loopback(host):
        raise ValueError(
            f"host: got {host!r}, which other machines can reach, without a password; set one, or listen on 127.0.0.1"
        )
    address = page.launch(
        server_name=host,
        server_port=port or None,
        auth=auth,
        share=False,
        ssr_mode=False,
        quiet=True,
        max_file_size="64mb",
        css=CSS,
        prevent_thread_lock=True,
    )[1]
    print(f"rcgrpo app on {address}", flush=True)
    if block:
        page.block_thread()
    return address
