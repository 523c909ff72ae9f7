"""Masks as data sets hold them, and masks where they hold none. Every mask here is an "L" picture with 255 = edit.

`decode_mask` reads eleven encodings by name. Where a row has no mask, `difference_mask` compares source and target and
`velocity_mask` asks the editor itself; text-prompted segmentation is in `make_masks`. `grow_mask` and `feather_mask`
move and soften the edge.

Gotchas: a picture's encoding cannot be guessed, as HumanEdit's mask is black where MagicBrush's is white: look at
`rcgrpo data inspect` before training. Run lengths count along rows in PIE-Bench, along columns in COCO.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..inputs.extras import require
from ..inputs.masks import array_of, mask_picture, mask_to_tensor
from ..inputs.pictures import decode_picture, is_stored, open_picture, short, to_rgb
from ..maths.regions import grow

Size = tuple[int, int]
"""Width and height in pixels, as Pillow counts."""

# Encodings ------------------------------------------------------------------------------------------------------------

PIE_SIDE = 512
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)
"""Of a mask that is no picture; Pillow refuses to open larger pictures too."""
PAINT = 250


def _binary(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(array, np.uint8(255), np.uint8(0)))


def _nonzero(image: Image.Image) -> Image.Image:
    """Anything but black, or palette index 0, = edit: instance maps and coloured annotations."""
    plain = image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
    array = np.asarray(image if plain else image.convert("RGB"))
    return _binary(array.reshape(*array.shape[:2], -1).max(-1) > 0)


def _alpha(image: Image.Image) -> Image.Image:
    """Alpha below 128 = edit: the region was cut out of the picture (HumanEdit)."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        raise ValueError(f"a picture of mode {image.mode} has no alpha channel")
    return _binary(np.asarray(image.convert("RGBA").getchannel("A")) < 128)


def _paint(image: Image.Image) -> Image.Image:
    """White paint on the picture (MagicBrush): alpha below 128 if alpha varies, else every channel at least 250."""
    rgba = np.asarray(image.convert("RGBA"))
    if np.ptp(rgba[..., 3]):
        return _binary(rgba[..., 3] < 128)
    return _binary(rgba[..., :3].min(-1) >= PAINT)


def _runs(runs: Sequence[int], border: bool) -> Image.Image:
    """Flat `[start, length, start, length, ...]` along the rows of a 512×512 picture (PIE-Bench).

    `border` also sets the outermost line of pixels, as the reference decoder does against errors of annotation there.
    """
    starts, lengths = np.asarray(runs, dtype=np.int64).reshape(-1, 2).T
    if (starts < 0).any() or (starts >= PIE_SIDE**2).any() or (lengths < 0).any():
        raise ValueError(f"runs outside the {PIE_SIDE}×{PIE_SIDE} pixels")
    steps = np.zeros(PIE_SIDE**2 + 1, dtype=np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, np.minimum(starts + lengths, PIE_SIDE**2), -1)
    mask = (np.cumsum(steps)[:-1] > 0).reshape(PIE_SIDE, PIE_SIDE)
    if border:
        mask[[0, -1], :] = mask[:, [0, -1]] = True
    return _binary(mask)


def _coco_counts(packed: bytes) -> list[int]:
    """COCO's packed run lengths: groups of five bits, lowest first; from the fourth on differences to the last but one.

    Bit 5 of a character (less 48) says that more follows, bit 4 of the last one is the sign. By hand, as pycocotools
    (2.0.11) fills masks whose counts are too short with whatever lies in memory.
    """
    counts: list[int] = []
    number = shift = 0
    for character in packed:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(character)!r} in packed counts")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("packed counts end in the middle of a number")
    return counts


def _rle(value: Mapping[str, Any]) -> Image.Image:
    """COCO's `{"size": [height, width], "counts": ...}`, packed or as a list; along columns, keep first."""
    (height, width), counts = value["size"], value["counts"]
    if isinstance(counts, str | bytes):
        counts = _coco_counts(counts.encode() if isinstance(counts, str) else counts)
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(f"a size of {height}×{width}, expected at most {MOST_PIXELS} pixels")
    counts = np.asarray(counts, dtype=np.int64)
    if ((counts < 0) | (counts > height * width)).any() or counts.sum() != height * width:
        raise ValueError(f"counts that sum to {counts.sum()} for {height}×{width} pixels")
    return _binary(np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T)


def _boxes(value: Sequence[Any], size: Size | None, corners: bool, relative: bool) -> Image.Image:
    """One box or a list of them, as corners (x, y, x, y) or corner and extent (x, y, width, height).

    Every pixel that a box touches is edit; what lies outside the picture is cut off.
    """
    if size is None:
        raise ValueError("boxes, but no picture to place them in")
    boxes = np.asarray(value, dtype=np.float64).reshape(-1, 4).copy()
    if not corners:
        boxes[:, 2:] += boxes[:, :2]
    if relative:
        boxes *= (*size, *size)
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("a box that ends before it begins")
    mask = np.zeros(size[::-1], dtype=bool)
    # Relative numbers such as 0.1 are not exact in binary; a whole pixel must not be added for that.
    low, high = np.floor(boxes[:, :2] + 1e-6), np.ceil(boxes[:, 2:] - 1e-6)
    for (left, top), (right, bottom) in zip(low.clip(0).astype(int), high.clip(0).astype(int), strict=True):
        mask[top:bottom, left:right] = True
    return _binary(mask)


PICTURE_DECODERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "nonzero": _nonzero,
    "alpha": _alpha,
    "paint": _paint,
}
VALUE_DECODERS: dict[str, Callable[[Any, Size | None], Image.Image]] = {
    "runs": lambda value, size: _runs(value, border=False),
    "runs-border": lambda value, size: _runs(value, border=True),
    "rle": lambda value, size: _rle(value),
    "boxes-xyxy": lambda value, size: _boxes(value, size, corners=True, relative=False),
    "boxes-xywh": lambda value, size: _boxes(value, size, corners=False, relative=False),
    "boxes-xyxy-relative": lambda value, size: _boxes(value, size, corners=True, relative=True),
    "boxes-xywh-relative": lambda value, size: _boxes(value, size, corners=False, relative=True),
}
PICTURE_ENCODINGS = ("luma", *PICTURE_DECODERS)
"""Whose masks are pictures, and may be paths; of the others texts are JSON."""

ENCODINGS = (*PICTURE_ENCODINGS, *VALUE_DECODERS)


def decode_mask(value: Any, encoding: str, size: Size | None, where: str = "mask") -> Image.Image:
    """A mask as a data set holds it, as an "L" picture with 255 = edit.

    Args:
        value: a picture in any form that `open_picture` reads, for `luma` also numbers as `mask_to_tensor` takes them;
            for the encodings without pictures lists, mappings or their JSON.
        encoding: one of `ENCODINGS`.
        size: the source's (width, height); a mask of the same proportions is brought to it (nearest). None leaves it.
        where: what messages call the mask, e.g. "train row 17, column 'mask'".

    Raises:
        ValueError: naming `where`: another encoding, what it cannot read, or other proportions than the source's.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"mask_encoding: got {encoding!r}, expected one of {', '.join(ENCODINGS)}")
    try:
        if encoding == "luma":
            mask = mask_picture(mask_to_tensor(value, where))
        elif encoding == "nonzero" and not (is_stored(value) or isinstance(value, Image.Image)):
            mask = _binary(array_of(value, where) > 0)
        elif encoding in PICTURE_DECODERS:
            # In eight bits the small numbers of a 16-bit instance map would all be 0.
            picture = open_picture(value, where) if encoding == "nonzero" else decode_picture(value, where)
            mask = PICTURE_DECODERS[encoding](picture)
        else:
            mask = VALUE_DECODERS[encoding](json.loads(value) if isinstance(value, str) else value, size)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        if str(error).startswith(where):
            raise
        raise ValueError(
            f"{where}: got {short(value)}, expected a mask encoded as {encoding!r} ({error}); set `mask_encoding` "
            f"to one of {', '.join(ENCODINGS)} or fix the row"
        ) from error
    return mask if size is None else fit_mask(mask, size, where)


def fit_mask(mask: Image.Image, size: Size, where: str = "mask") -> Image.Image:
    """The mask at the source's size (nearest), if the proportions agree to 2 % or two pixels.

    Raises:
        ValueError: other proportions: mask and source do not belong together, or one of them is turned.
    """
    if mask.size == size:
        return mask
    expected = mask.width * size[1] / size[0]
    if abs(mask.height - expected) > max(2, 0.02 * expected):
        raise ValueError(
            f"{where}: got a mask of width × height {mask.size}, expected the proportions of the source picture's "
            f"{size}; fix the pairing or the orientation"
        )
    return mask.resize(size, Image.Resampling.NEAREST)


# Edges ----------------------------------------------------------------------------------------------------------------


def grow_mask(mask: Image.Image, share: float) -> Image.Image:
    """Grown on every side by `share` of the picture's short side, rounded to pixels; grey values spread as they are."""
    radius = _pixels("mask_growth", share, mask.size)
    if not radius:
        return mask
    return Image.fromarray(grow(torch.from_numpy(np.array(mask)).float(), radius).byte().numpy())


def feather_mask(mask: Image.Image, share: float) -> Image.Image:
    """A soft edge outside the region, falling evenly to 0 over `share` of the picture's short side.

    The region itself keeps its values, and no pixel gets less than it had.
    """
    width = _pixels("mask_feather", share, mask.size)
    array = np.asarray(mask)
    if not width or not array.any():
        return mask
    require("masks", "mask_feather")
    from scipy import ndimage

    distance, nearest = ndimage.distance_transform_edt(array == 0, return_indices=True)
    edge = array[tuple(nearest)] * np.clip(1 - distance / (width + 1), 0, 1)
    return Image.fromarray(np.maximum(array, np.round(edge)).astype(np.uint8))


def _pixels(name: str, share: float, size: Size) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: got {share}, expected a share of the picture's short side in [0, 1]")
    return round(share * min(size))


def mask_share(mask: Image.Image) -> float:
    """The share of the picture's pixels that are edit (at least half white), in [0, 1]."""
    return float((np.asarray(mask) > 127).mean())


# Masks from a ground truth --------------------------------------------------------------------------------------------


RGB_TO_XYZ = ((0.412453, 0.35758, 0.180423), (0.212671, 0.71516, 0.072169), (0.019334, 0.119193, 0.950227))
D65 = (0.95047, 1.0, 1.08883)


def srgb_to_lab(image: Image.Image) -> np.ndarray:
    """CIE L*a*b* (D65, 2°) of an sRGB picture, float32 `[height, width, 3]`, L* in [0, 100].

    By hand, as is `otsu`: scikit-image would bring five packages for twenty lines; the tests hold both to it.
    """
    rgb = np.asarray(to_rgb(image), dtype=np.float32) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    ratio = linear @ np.asarray(RGB_TO_XYZ, dtype=np.float32).T / np.asarray(D65, dtype=np.float32)
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold: the cut that leaves the least variance within the two classes (Otsu, 1979)."""
    if values.min() == values.max():
        return float(values.max())
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    moment = np.cumsum(counts * centres)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(centres[int(np.nanargmax(between[:-1]))])


def difference_mask(
    source: Image.Image,
    target: Image.Image,
    threshold: float = 0.06,
    blur: float = 0.005,
    radius: float = 0.005,
    speck: float = 5e-4,
    growth: float = 0.02,
) -> Image.Image | None:
    """Where the ground truth differs from the source.

    The distance in L*a*b* of the blurred pictures, over 100, is cut at `max(threshold, Otsu)`; opening, closing and the
    removal of specks take away what compression and a regenerated background leave; the rest is grown.

    Args:
        source, target: the same scene; a target of another size is resized.
        threshold: least difference that counts, 0.06 = six units of L*a*b*.
        blur: standard deviation, as a share of the short side (at least half a pixel).
        radius: of opening and closing, as a share of the short side (at least one pixel).
        speck: regions that cover less than this share of the picture are dropped.
        growth: of the result, as a share of the short side.

    Returns:
        `None` where nothing differs enough. A target that was drawn afresh everywhere gives a mask of nearly
        everything: look at its `mask_share`.
    """
    require("masks", "masks from the difference of two pictures")
    from scipy import ndimage

    short = min(source.size)
    if target.size != source.size:
        target = to_rgb(target).resize(source.size, Image.Resampling.BICUBIC)
    sigma = (max(0.5, blur * short),) * 2 + (0.0,)
    first, second = (ndimage.gaussian_filter(srgb_to_lab(image), sigma, mode="nearest") for image in (source, target))
    difference = np.linalg.norm(first - second, axis=-1) / 100
    changed = difference > max(threshold, otsu(difference))
    reach = max(1, round(radius * short))
    ball = np.hypot(*np.ogrid[-reach : reach + 1, -reach : reach + 1]) <= reach + 0.5
    # Padded with itself, or the picture's border would be eaten by either.
    changed = np.pad(changed, 2 * reach, mode="edge")
    changed = ndimage.binary_closing(ndimage.binary_opening(changed, ball), ball)
    changed = changed[2 * reach : -2 * reach, 2 * reach : -2 * reach]
    labels, count = ndimage.label(changed, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = (areas >= max(1, speck * changed.size))[labels]
    return grow_mask(_binary(kept), growth) if kept.any() else None


def change_inside(source: Image.Image, target: Image.Image, mask: Image.Image) -> float | None:
    """How much of what the ground truth changes lies in the region: a check of masks before training.

    Args:
        source, target: as `difference_mask` takes them.
        mask: "L", the source's size, 255 = edit.

    Returns:
        Share of the changed pixels in [0, 1], soft masks in proportion; `None` where nothing differs enough. Low
        means that the mask misses the edit, or that the target was drawn afresh everywhere.
    """
    changed = difference_mask(source, target, growth=0.0)
    return None if changed is None else float(np.asarray(mask)[np.asarray(changed) > 0].mean() / 255)


# Masks from the editor itself -----------------------------------------------------------------------------------------


def velocity_map(instructed: Tensor, empty: Tensor, clip: float = 3.0) -> Tensor:
    """How much the instruction moves the velocity at each token, in [0, 1].

    DiffEdit's map (arXiv 2210.11427, section 3.2) with velocities in the place of noise estimates: absolute difference,
    mean over draws and channels, cut at `clip` times its mean, divided by that.

    Args:
        instructed, empty: `[draws, tokens, channels]`, at the same noisy latents, with the instruction and without.
        clip: outliers above this multiple of the mean count as it.

    Returns:
        fp32 `[tokens]`.
    """
    if instructed.shape != empty.shape or instructed.ndim != 3:
        raise ValueError(
            f"velocities: got shapes {tuple(instructed.shape)} and {tuple(empty.shape)}, expected two of "
            "[draws, tokens, channels]"
        )
    difference = (instructed.float() - empty.float()).abs().mean(dim=(0, 2))
    ceiling = clip * difference.mean()
    return (difference / ceiling).clamp(0, 1) if ceiling > 0 else torch.zeros_like(difference)


def velocity_mask(tokens: Tensor, grid: tuple[int, int], size: Size, threshold: float = 0.5) -> Image.Image | None:
    """A mask of a `velocity_map`, or `None` where no token reaches the threshold.

    Args:
        tokens: `[rows · columns]`, row-major, in [0, 1].
        grid: rows and columns of tokens.
        size: (width, height) of the mask; the map is interpolated to it before the cut.
        threshold: DiffEdit's 0.5 by default. The cut keeps what moves by 1.5 times the mean or more.
    """
    image = Image.fromarray(tokens.reshape(grid).float().cpu().numpy())
    smooth = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    mask = smooth >= threshold
    return _binary(mask) if mask.any() and math.isfinite(float(smooth.sum())) else None
