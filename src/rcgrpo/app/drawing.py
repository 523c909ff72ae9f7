"""A comparison as pictures with captions and a table, for people.

Gotcha: colours mean the same in every picture of a kind: attention maps of a comparison share one scale, and changes
have one that never moves.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..reporting.sheets import heatmap, outline
from .comparing import Comparison
from .painting import PAINT

CHANGE_FULL_COLOUR = 0.25
"""A change by this share of the range has full colour; always the same, so that pictures can be compared."""

SHOWN_SIDE = 320

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
    drawings = []
    for outcome in comparison.outcomes:
        psnr = [f"{outcome.name}: background {_decibels(value)}" for value in outcome.background_psnr]
        density = [f"{outcome.name}: ×{value:.2f} on the region" for value in outcome.density]
        looks = [heatmap(grid, image, brightest) for grid, image in zip(outcome.attention, outcome.images, strict=True)]
        spoiled = [heatmap(change, comparison.source, CHANGE_FULL_COLOUR) for change in outcome.changes]
        drawings.append(
            Drawing(
                *(
                    [
                        (framed(picture, comparison.mask), caption)
                        for picture, caption in zip(pictures, captions, strict=True)
                    ]
                    for pictures, captions in ((outcome.images, psnr), (looks, density), (spoiled, psnr))
                )
            )
        )
    return drawings


def framed(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the region's outline, enlarged by a whole factor if it is small."""
    factor = max(1, SHOWN_SIDE // max(picture.size))
    enlarged = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    return outline(enlarged, mask, PAINT)


def table(comparison: Comparison) -> str:
    """Means over the candidates, as Markdown."""
    lines = ["| | background PSNR | attention on the region |", "|---|---|---|"]
    for outcome in comparison.outcomes:
        psnr, density = float(np.mean(outcome.background_psnr)), float(np.mean(outcome.density))
        lines.append(f"| {outcome.name} | {_decibels(psnr)} | ×{density:.2f} |")
    return "\n".join(lines)


def _decibels(value: float) -> str:
    return f"{value:.2f} dB" if value == value else "–"
