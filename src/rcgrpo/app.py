"""`rcgrpo app`: paint a region, edit it with and without a LoRA, see where the editor looked and what it spoiled.

Where it fits: `compare` makes the pictures and the numbers and knows no page; `draw` turns them into what is shown;
`create_app` is the page, in Gradio (`pip install rcgrpo[app]`), which is imported when a page is made.

Gotchas: base and LoRA start from the same noise, drawn from the seed alone, so what differs between them is the LoRA.
One LoRA is loaded at a time, and again when its file has changed, so a run in progress can be watched. Edits are made
one after another, whoever asks. Numbers are taken at the size of the edit, before anything is enlarged for the page.
"""

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import compbench_mini
from .editors import RegionDecoupledFluxKontextPipeline
from .evaluation.benchmark import Contender, Sampling, contenders, load_loras, switch_to
from .inputs.masks import mask_picture, mask_to_tensor
from .inputs.pictures import to_rgb
from .maths.metrics import first_words, masked_psnr
from .maths.regions import at_size, check_mask
from .reporting.sheets import heatmap, outline
from .rewards.transport import is_loopback

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 8
CHANGE_FULL_COLOUR = 0.25
"""A change by this share of the range has full colour; always the same, so that pictures can be compared."""

SHOWN_SIDE = 320
CSS = """
.thumbnail-item { aspect-ratio: auto !important; height: auto !important; overflow: visible !important; }
.thumbnail-item .caption-label { position: static !important; max-width: none !important; white-space: normal }
"""
"""Captions stand below their pictures instead of on them."""

NUM_EXAMPLES, EXAMPLE_SIDE = 6, 256
PAINT, PAINT_OPACITY = "#ff2d78", 0.6


# Compare --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one contender made of an edit, candidate by candidate.

    Args:
        name: "base", or the LoRA's.
        images: RGB, at the size of the edit.
        attention: `[candidates, rows, columns]` over the token grid: where the instruction's attention falls, summing
            to 1.
        density: the attention on the region over the region's share of the picture; 1 = as if spread evenly.
        changes: `[candidates, height, width]` in [0, 1]: the greatest difference of a colour channel from the source,
            0 inside the region.
        background_psnr: dB over the pixels outside the region, as `background/psnr` in the training log; NaN where
            there are none.
    """

    name: str
    images: list[Image.Image]
    attention: Tensor
    density: list[float]
    changes: np.ndarray
    background_psnr: list[float]


@dataclass(frozen=True)
class Comparison:
    """The source and the mask ("L", 255 = edit) at the size of the edit, and what each contender made of them."""

    source: Image.Image
    mask: Image.Image
    outcomes: list[Outcome]


def compare(
    pipeline: RegionDecoupledFluxKontextPipeline,
    entrants: Sequence[Contender],
    source: Image.Image,
    mask: Image.Image,
    instruction: str,
    sampling: Sampling,
    num_candidates: int = 1,
    edit_strength: float = 0.5,
) -> Comparison:
    """Edit a picture with each contender, from the same noise.

    Args:
        pipeline: with the contenders' LoRAs loaded.
        entrants: of `benchmark.contenders`.
        source: any size; it is edited at `sampling.resolution²` pixels, keeping its aspect ratio.
        mask: of the source's size, as `mask_to_tensor` reads it. Any edit pixel counts when it is reduced.
        instruction: what to do.
        sampling: resolution, steps, guidance and seed.
        num_candidates: how many, at least 1; they differ inside the region.
        edit_strength: by how much, in [0, 1].

    Raises:
        ValueError: no instruction, an empty mask or one of another size, numbers out of range.
    """
    if not instruction.strip():
        raise ValueError("instruction: got nothing, expected what to do, such as 'remove the apple'")
    if num_candidates < 1:
        raise ValueError(f"num_candidates: got {num_candidates}, expected at least 1")
    if mask.size != source.size:
        raise ValueError(f"mask: got {mask.size}, expected the source's size {source.size}")
    editor = sampling.editor(pipeline)
    height, width = editor.size_for(source)
    region = at_size(mask_to_tensor(mask), (height, width))
    check_mask(region)
    source = editor.resized(to_rgb(source), height, width)
    mask = mask_picture((region > 0).float())
    outcomes = []
    for contender in entrants:
        switch_to(pipeline, contender)
        drawn = pipeline(
            image=source,
            prompt=instruction,
            mask_image=mask,
            edit_strength=edit_strength,
            output_attention=True,
            num_images_per_prompt=num_candidates,
            generator=torch.Generator().manual_seed(sampling.seed),
            **editor.call_arguments(height, width),
        )
        outcomes.append(
            Outcome(
                contender.name,
                drawn.images,
                drawn.attention_maps,
                drawn.attention.density.tolist(),
                np.stack([changes_outside(image, source, mask) for image in drawn.images]),
                masked_psnr(drawn.images, [source] * num_candidates, [mask] * num_candidates),
            )
        )
    return Comparison(source, mask, outcomes)


def changes_outside(image: Image.Image, source: Image.Image, mask: Image.Image) -> np.ndarray:
    """`[height, width]` in [0, 1]: the greatest difference of a channel, 0 inside the region (mask above 0)."""
    pixels, before = (np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in (image, source))
    return np.abs(pixels - before).max(axis=-1) * (np.asarray(mask.convert("L")) == 0)


# Draw -----------------------------------------------------------------------------------------------------------------

Captioned = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Drawing:
    """What the page shows of one contender: captioned pictures, one for each candidate."""

    edits: Captioned
    attention: Captioned
    changes: Captioned


def draw(comparison: Comparison) -> list[Drawing]:
    """The pictures of each contender; maps of one kind have one scale of colours for all contenders."""
    brightest = max(float(outcome.attention.max()) for outcome in comparison.outcomes)

    def finish(picture: Image.Image) -> Image.Image:
        factor = max(1, SHOWN_SIDE // max(picture.size))
        enlarged = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
        return outline(enlarged, comparison.mask, PAINT)

    drawings = []
    for outcome in comparison.outcomes:
        psnr = [f"background {_decibels(value)}" for value in outcome.background_psnr]
        density = [f"×{value:.2f} on the region" for value in outcome.density]
        looks = [heatmap(grid, image, brightest) for grid, image in zip(outcome.attention, outcome.images, strict=True)]
        spoiled = [heatmap(change, comparison.source, CHANGE_FULL_COLOUR) for change in outcome.changes]
        drawings.append(
            Drawing(
                *(
                    [(finish(picture), caption) for picture, caption in zip(pictures, captions, strict=True)]
                    for pictures, captions in ((outcome.images, psnr), (looks, density), (spoiled, psnr))
                )
            )
        )
    return drawings


def table(comparison: Comparison) -> str:
    """Means over the candidates, as Markdown."""
    lines = ["| | background PSNR | attention on the region |", "|---|---|---|"]
    for outcome in comparison.outcomes:
        psnr, density = float(np.mean(outcome.background_psnr)), float(np.mean(outcome.density))
        lines.append(f"| {outcome.name} | {_decibels(psnr)} | ×{density:.2f} |")
    return "\n".join(lines)


def _decibels(value: float) -> str:
    return f"{value:.2f} dB" if value == value else "–"


# The page -------------------------------------------------------------------------------------------------------------


class LoraSlot:
    """The one LoRA that is loaded into a pipeline, changed when another is asked for or its file has changed."""

    def __init__(self, pipeline: RegionDecoupledFluxKontextPipeline) -> None:
        self.pipeline = pipeline
        self._loaded: list[tuple[Contender, int]] = []

    def entrants(self, lora: str) -> list[Contender]:
        """The base and, unless `lora` is empty, that LoRA: a folder, a file or a Hub id.

        Raises:
            ValueError: it cannot be found, or does not fit the model.
        """
        found = contenders([lora.strip()] if lora.strip() else [])
        wanted = [(contender, contender.lora.stat().st_mtime_ns) for contender in found if contender.lora is not None]
        if wanted != self._loaded:
            self._clear()
            load_loras(self.pipeline, found)
            self._loaded = wanted
        return found

    def _clear(self) -> None:
        self._loaded = []
        self.pipeline.unload_lora_weights()


def read_painting(painting: Any) -> tuple[Image.Image, Image.Image]:
    """Picture (RGB) and mask ("L", 255 = painted) of what `gr.ImageEditor` hands over.

    Raises:
        ValueError: no picture, or nothing painted.
    """
    if not painting or painting["background"] is None:
        raise ValueError("picture: got none, expected one; open a picture, or click an example")
    source = to_rgb(painting["background"])
    covered = np.zeros((source.height, source.width), dtype=bool)
    for layer in painting["layers"]:
        alpha = layer.convert("RGBA").getchannel("A").resize(source.size, Image.Resampling.NEAREST)
        covered |= np.asarray(alpha) > 255 * PAINT_OPACITY / 2  # a stroke's edge is smoothed
    if not covered.any():
        raise ValueError("mask: got nothing painted, expected the region to edit; paint over it with the brush")
    return source, Image.fromarray(np.where(covered, 255, 0).astype(np.uint8))


def painting_of(source: Image.Image, mask: Image.Image) -> dict[str, Any]:
    """The other way round: a picture with its region painted, for `gr.ImageEditor`."""
    layer = Image.new("RGBA", source.size, PAINT)
    layer.putalpha(mask.convert("L").point(lambda value: round(PAINT_OPACITY * value)))
    together = Image.alpha_composite(source.convert("RGBA"), layer)
    return {"background": to_rgb(source), "layers": [layer], "composite": together}


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
        ModuleNotFoundError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the app needs Gradio: pip install 'rcgrpo[app]'") from error

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
