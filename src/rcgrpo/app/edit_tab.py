"""The tab *Edit*: paint a region, say what to do, see what the base and a LoRA make of it."""

import tempfile
import time
from pathlib import Path
from typing import Any

from ..inputs.masks import mask_picture, mask_to_tensor
from ..maths.regions import check_mask
from .comparing import compare
from .drawing import Captioned, draw, framed, table
from .packing import pack
from .painting import PAINT, PAINT_OPACITY, brush_radius, painting_of, read_painting
from .studio import Studio, vocabulary
from .working import Controls, stepwise, told

CANDIDATES = (1, 2, 4, 8)


def edit_tab(studio: Studio) -> tuple[Any, Any]:
    """Lay the tab out, inside a `gradio.Tab`; its painting and its instruction, which other tabs read too."""
    import gradio as gr

    def brush(side: int) -> Any:
        return gr.Brush(colors=[(PAINT, PAINT_OPACITY)], color_mode="fixed", default_size=brush_radius(side))

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            painting = gr.ImageEditor(
                label="Picture",
                type="pil",
                brush=brush(studio.sampling.resolution),
                layers=False,
                transforms=(),
                sources=("upload", "clipboard"),
                elem_id="painting",
            )
            instruction = gr.Textbox(label="Instruction", placeholder="remove the apple", elem_id="instruction")
            lora = lora_choice(studio, "LoRA: folder, file or Hub id", 0, "lora")
            with gr.Row():
                candidates = gr.Radio(
                    CANDIDATES, value=2, label="Candidates", scale=2, min_width=210, elem_id="candidates"
                )
                seed = gr.Number(0, label="Seed", precision=0, scale=1, min_width=80)
            controls = Controls.laid_out("Edit", "edit")
            if studio.embedded:
                with gr.Accordion("What the embedded editor knows", open=False, elem_id="vocabulary"):
                    gr.Markdown(vocabulary())
            with gr.Accordion("More", open=False):
                strength = gr.Slider(0, 1, 0.5, label="How much candidates differ inside the region")
                own_size = gr.Checkbox(
                    label=f"At the picture's own size, instead of {studio.sampling.resolution}² pixels",
                    elem_id="own-size",
                )
                mask_file = gr.UploadButton(
                    "Take the region from a picture (white = edit)",
                    file_types=["image"],
                    size="sm",
                    elem_id="mask-file",
                )
        with gr.Column(scale=3, min_width=300):
            with gr.Column(visible=False, elem_id="results") as results:
                numbers = gr.Markdown(elem_id="numbers", elem_classes="numbers")
                with gr.Tab("Candidates"):
                    edits = picture_grid("candidates", "edits")
                with gr.Tab("Before/after"):
                    slider = gr.ImageSlider(
                        label="Before and after",
                        show_label=False,
                        type="pil",
                        format="png",
                        buttons=["fullscreen"],
                        interactive=False,
                        elem_id="slider",
                    )
                    gr.Markdown("The candidate that was clicked last; the first one by default.")
                with gr.Tab("Attention"):
                    gr.Markdown("Where the instruction's attention falls; one scale of colours for all.")
                    attention = picture_grid("attention", "attention")
                with gr.Tab("Outside"):
                    gr.Markdown("What changed outside the region; full colour is a quarter of the range.")
                    changes = picture_grid("changes", "changes")
                download = gr.DownloadButton("Download all as a zip", size="sm", elem_id="download")
            gr.Markdown(
                "### Examples\nClick one and press Edit, or open a picture of your own and paint over a region."
            )
            gallery = gr.Gallery(
                [(row["input_image"], row["instruction"]) for row in studio.examples],
                label="Examples",
                show_label=False,
                columns=3,
                height="max-content",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
            )
            before_after = gr.State([])

    def edit(
        painting: Any,
        instruction: str,
        lora: str | None,
        num_candidates: int,
        edit_strength: float,
        seed: float,
        own_size: bool,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        start = time.monotonic()
        with told(), studio.stops.heard(request.session_hash) as check:
            source, mask = read_painting(painting)
            text = studio.read(instruction, lora or "")
            entrants = studio.slot.entrants(lora or "")
            sampling = studio.drawing(seed, source if own_size else None)
            on_step = stepwise(progress, check, len(entrants))(0)
            comparison = compare(
                studio.pipeline, entrants, source, mask, text, sampling, int(num_candidates), edit_strength, on_step
            )
            settings = {
                "instruction": text,
                "lora": lora or None,
                "seed": sampling.seed,
                "edit_strength": edit_strength,
                "resolution": sampling.resolution,
                "num_inference_steps": sampling.num_inference_steps,
            }
            folder = tempfile.mkdtemp(dir=download.GRADIO_CACHE)
            packed = pack(comparison, settings, Path(folder, "edit.zip"), source.size if own_size else None)
            sides = [(drawing.edits, drawing.attention, drawing.changes) for drawing in draw(comparison)]
            grids: list[Captioned] = [[pair for pairs in kind for pair in pairs] for kind in zip(*sides, strict=True)]
            columns = len(entrants) if num_candidates == 1 else min(int(num_candidates), 4)
            unedited = framed(comparison.source, comparison.mask)
            pairs = [(unedited, picture) for picture, _ in grids[0]]
            return [
                *(gr.Gallery(pictures, columns=columns, selected_index=None) for pictures in grids),
                table(comparison),
                pairs[0],
                str(packed),
                pairs,
                gr.Column(visible=True),
                f"Done in {time.monotonic() - start:.1f} s at {'×'.join(map(str, comparison.source.size))} pixels.",
            ]
        return [*[gr.skip()] * 8, "Cancelled."]

    def fit_brush(painting: Any) -> Any:
        picture = None if painting is None else painting["background"]
        return gr.skip() if picture is None else gr.ImageEditor(brush=brush(min(picture.size)))

    def paint_file(painting: Any, file: str) -> Any:
        with told():
            if painting is None or painting["background"] is None:
                raise ValueError("picture: got none, expected one before its region; open a picture first")
            source = painting["background"]
            mask = mask_to_tensor(Path(file), "the region's file")
            check_mask(mask, (source.height, source.width), "the region's file")
            return painting_of(source, mask_picture(mask))

    def open_example(event: gr.SelectData) -> tuple[Any, str]:
        row = studio.examples[event.index]
        painted: Any = painting_of(row["input_image"], row["mask"])
        return gr.ImageEditor(painted, brush=brush(min(row["input_image"].size))), row["instruction"]

    def show_pair(pairs: list[Any], event: gr.SelectData) -> Any:
        return pairs[event.index]

    controls.wire(
        studio.stops,
        [controls.begin.click, instruction.submit],
        edit,
        [painting, instruction, lora, candidates, strength, seed, own_size],
        [edits, attention, changes, numbers, slider, download, before_after, results],
        "edit",
    )
    aside: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    mask_file.upload(paint_file, [painting, mask_file], painting, **aside)  # queued, or its errors would not be shown
    aside["queue"] = False
    painting.upload(fit_brush, painting, painting, **aside)
    gallery.select(open_example, None, [painting, instruction], **aside)
    edits.select(show_pair, before_after, slider, **aside)
    return painting, instruction


def lora_choice(studio: Studio, label: str, number: int, elem_id: str) -> Any:
    """A field for a LoRA, the studio's `number`-th one chosen."""
    import gradio as gr

    return gr.Dropdown(
        list(studio.loras),
        value=studio.loras[number] if number < len(studio.loras) else None,
        allow_custom_value=True,
        label=label,
        elem_id=elem_id,
    )


def picture_grid(label: str, elem_id: str) -> Any:
    """Pictures side by side with captions below, each enlarged by a click."""
    import gradio as gr

    return gr.Gallery(
        label=label,
        show_label=False,
        object_fit="contain",
        height="max-content",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
    )
