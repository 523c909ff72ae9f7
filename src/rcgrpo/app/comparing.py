"""One edit by several contenders, from the same noise: their pictures, and the numbers that go with them.

Where it fits: the app shows what `compare` returns, and so can a script or a notebook; nothing here knows a page.

Gotchas: noise is drawn from the seed alone, so what differs between base and LoRA is the LoRA. Numbers are taken at the
size of the edit, before anything is enlarged for the page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..editors import RegionDecoupledFluxKontextPipeline
from ..evaluation.benchmark import Contender, Sampling, switch_to
from ..inputs.masks import mask_picture, mask_to_tensor
from ..inputs.pictures import to_rgb
from ..maths.metrics import masked_psnr
from ..maths.regions import at_size, check_mask

OnStep = Callable[[str, int, int], None]
"""Hears of every step: the contender's name, how many steps are done, of how many. What it raises ends the edit."""


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
    on_step: OnStep | None = None,
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
        on_step: called after each step of each contender.

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
            callback_on_step_end=_reporting(on_step, contender.name),
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


def _reporting(on_step: OnStep | None, name: str) -> Callable[..., dict[str, Any]] | None:
    """`on_step` as diffusers calls it."""
    if on_step is None:
        return None

    def after_step(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step(name, step + 1, pipeline.num_timesteps)
        return {}

    return after_step


def changes_outside(image: Image.Image, source: Image.Image, mask: Image.Image) -> np.ndarray:
    """`[height, width]` in [0, 1]: the greatest difference of a channel, 0 inside the region (mask above 0)."""
    pixels, before = (np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in (image, source))
    return np.abs(pixels - before).max(axis=-1) * (np.asarray(mask.convert("L")) == 0)
