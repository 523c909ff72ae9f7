"""Pictures for people: contact sheets, the region's outline, maps laid over a picture.

Reports, the model card and the command line draw from here. Plain pictures come in; no model, no metric and no trainer
is known. Gotcha: captions use Pillow's built-in font, which knows Latin letters only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont

from ..inputs.extras import require
from ..inputs.pictures import to_rgb
from .curves import FAINT, HAIR, INK
from .files import PathLike, write_atomically

MARGIN, GAP, BLOCK_GAP = 16, 4, 28
MAX_ROWS_IN_ONE_BLOCK = 8


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str] | None = None,
    cell: int = 128,
    path: PathLike | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Pictures in a grid on white: one row per sample with its caption below, one column per entry with a header.

    Args:
        columns: Header to one picture per sample, such as source, before, after. A picture that fits into the cell is
            enlarged by a whole factor without smoothing, a larger one is reduced; both are centred.
        captions: One per sample, such as the instruction; wrapped to the row's width.
        cell: Side of a picture's place in pixels.
        path: Where to save it as well.
        labels: One line for each picture of some columns, centred below it, such as its score.

    Returns:
        The sheet, RGB. More than eight samples are laid out in two blocks side by side, left block first.

    Raises:
        ValueError: No picture at all, columns, labels and captions of different lengths, or labels of no column.
    """
    lengths = {name: len(pictures) for name, pictures in columns.items()}
    labels = labels or {}
    if unknown := labels.keys() - columns.keys():
        raise ValueError(f"contact_sheet: got labels for {sorted(unknown)}; expected some of {list(columns)}.")
    lengths |= {f"labels of {name}": len(texts) for name, texts in labels.items()}
    if captions is not None:
        lengths["captions"] = len(captions)
    if not columns or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"A contact sheet needs one picture and caption per sample in every column; got {lengths}.")
    num_rows = len(next(iter(columns.values())))
    num_blocks = 2 if num_rows > MAX_ROWS_IN_ONE_BLOCK else 1
    rows_in_block = math.ceil(num_rows / num_blocks)

    head_size, size = max(13, cell // 9), max(12, cell // 10)
    head_font, font = ImageFont.load_default(head_size), ImageFont.load_default(size)
    block_width = len(columns) * (cell + GAP) - GAP
    headers = [_wrap(name, head_font, cell) for name in columns]
    wrapped = [_wrap(caption, font, block_width) for caption in captions or [""] * num_rows]
    head_line, line = round(1.3 * head_size), round(1.3 * size)
    head_height = head_line * max(len(lines) for lines in headers) + GAP
    caption_height = line * max(len(lines) for lines in wrapped) + 3 * GAP if captions is not None else 0
    label_height = line + GAP if labels else 0
    row_height = cell + label_height + GAP + caption_height

    width = 2 * MARGIN + num_blocks * (block_width + BLOCK_GAP) - BLOCK_GAP
    last_gap = GAP if captions is None else 3 * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + head_height + rows_in_block * row_height - last_gap), "white")
    draw = ImageDraw.Draw(sheet)
    for block in range(num_blocks):
        for column, lines in enumerate(headers):
            x = MARGIN + block * (block_width + BLOCK_GAP) + column * (cell + GAP) + cell / 2
            for i, text in enumerate(lines):
                draw.text((x, MARGIN + i * head_line), text, INK, head_font, anchor="ma")
    for row in range(num_rows):
        block, place = divmod(row, rows_in_block)
        left, top = MARGIN + block * (block_width + BLOCK_GAP), MARGIN + head_height + place * row_height
        for column, (name, pictures) in enumerate(columns.items()):
            picture = _fit(pictures[row], cell)
            corner = left + column * (cell + GAP) + (cell - picture.width) // 2, top + (cell - picture.height) // 2
            sheet.paste(picture, corner)
            draw.rectangle(
                (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height), None, HAIR
            )
            if name in labels:
                centre = left + column * (cell + GAP) + cell / 2
                draw.text((centre, top + cell + GAP), labels[name][row], INK, font, anchor="ma")
        for i, text in enumerate(wrapped[row]):
            draw.text((left, top + cell + label_height + GAP + i * line), text, FAINT, font)
    if path is not None:
        with write_atomically(path) as part:
            sheet.save(part)
    return sheet


def outline(image: Image.Image, mask: Image.Image, color: str = "#ff2d78", width: int | None = None) -> Image.Image:
    """The picture (RGB) with a line drawn just outside the edit region, so that nothing in the region is hidden.

    Args:
        mask: 255 = edit; resized to the picture if need be.
        color: Any colour name or code Pillow knows.
        width: Of the line in the picture's pixels; by default about a hundredth of the side.
    """
    region = mask.convert("L").resize(image.size, Image.Resampling.NEAREST).point(lambda value: 255 * (value > 127))
    width = width or max(1, round(min(image.size) / 100))
    line = ImageChops.subtract(region.filter(ImageFilter.MaxFilter(2 * width + 1)), region)
    drawn = to_rgb(image).copy()
    drawn.paste(ImageColor.getrgb(color), mask=line)
    return drawn


def heatmap(values: ArrayLike, image: Image.Image, vmax: float | None = None, colormap: str = "inferno") -> Image.Image:
    """A map such as attention, laid in colour over the greyed picture; the higher the value, the more it covers.

    Args:
        values: `height width`, non-negative, on any grid; stretched to the picture.
        image: What lies below.
        vmax: The value of full colour, by default the map's largest. Give before and after the same one.
        colormap: A matplotlib name.

    Raises:
        ValueError: `values` is not two-dimensional.
    """
    require("report", "maps in colour")
    from matplotlib import colormaps

    grid = np.asarray(values, dtype=np.float32)
    if grid.ndim != 2:
        raise ValueError(f"heatmap: values have shape {grid.shape}; expected height x width.")
    top = float(grid.max()) if vmax is None else vmax
    level = np.asarray(Image.fromarray(grid).resize(image.size, Image.Resampling.BILINEAR))
    level = np.clip(level / top, 0, 1) if top > 0 else np.zeros_like(level)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    colour = 255 * colormaps[colormap](level)[..., :3]
    cover = 0.15 + 0.7 * level[..., None]
    return Image.fromarray(np.round((1 - cover) * grey + cover * colour).astype(np.uint8))


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """RGB, within `cell x cell`: enlarged by a whole factor, or reduced keeping its proportions."""
    picture = to_rgb(picture)
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * cell / longest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: float) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, and inside a word only if it fills a line alone."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
