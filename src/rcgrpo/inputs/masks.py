"""What a mask's values mean: the one reader of everything that users call a mask. The result is always 1 = edit.

Rows, `mask_image`, `rcgrpo edit --mask`, the app and `load_edit_dataset` all read masks here, so the same values give
the same region, or the same refusal, wherever they are handed in.

Gotcha: nothing says whether 1 of 255 is "edit" or "a 255th of edit". What can be told apart is; what cannot is refused,
because a region that hardly counts trains on something else than the user thinks.
"""

from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from .pictures import has_alpha, is_stored, open_picture, short

MAX_LABELS = 32
"""Grey levels, besides 0, up to which areas of one level are taken for labels rather than for a soft mask."""

NEARLY_BLACK = 8
"""What lossy compression (WebP) may make of black, of 255, in areas."""

COLOURED = 32
"""Difference of two channels, of 255, that compression does not make of a grey pixel."""

WEIGHTS = "rcgrpo:weights"
"""The mark of pictures that this library made, in `Image.info`, which resizing keeps and files do not."""

LEAST = 0.01
"""Floating masks whose highest weight is lower are of 0 and 1, or labels, that were divided by 255."""

REMEDY = (
    "make edit white (255, 1 or True) and keep black, or, in a data set, set mask_encoding='nonzero', for which every "
    "value but 0 is edit"
)


def mask_to_tensor(mask: Any, where: str = "mask") -> Tensor:
    """Any usual mask as fp32 `[height, width]` in [0, 1], 1 = edit.

    Args:
        mask: a picture (any mode) or whatever `open_picture` makes one of; an array, a tensor or nested lists of
            booleans, whole or floating numbers, `[H, W]`, `[1, H, W]` or `[H, W, 1]`.

            - booleans: True is edit;
            - 0 and one other whole number, or one alone (0/1, 0/255, 0/65535, a label): the other number is edit;
            - floating numbers in [0, 1]: weights, the highest at least 0.01 (1/255 is a 0/1 mask divided by 255);
            - several whole numbers: a soft mask, v / 255, or v / 65535 where 16 bits hold or need it. Its highest must
              be at least half of that; and areas (3×3 pixels) of one level below half, with at most 32 levels in all,
              are labels and no soft mask;
            - floating numbers above 1: as whole ones if they are; else v / 255, the highest in [127.5, 255];
            - black and one colour: the colour is edit. Greys in RGB: as grey.

            Transparent pixels are keep, whatever their colour; where all others have one colour, but black, alpha is
            the mask. All zeros are a mask of nothing; whether that can be used is for `check_mask` to say.
        where: what messages call the mask, e.g. "train row 17, column 'mask'".

    Raises:
        ValueError: naming `where`: another shape, no numbers, NaN or negative values; what could be labels (several
            values below half, several colours); alpha that says otherwise than the colours.
    """
    if is_stored(mask):
        mask = open_picture(mask, where)
    if isinstance(mask, Image.Image) and mask.info.get(WEIGHTS):
        return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)
    values = _of_picture(mask, where) if isinstance(mask, Image.Image) else array_of(mask, where)
    return torch.from_numpy(_weights(values, where))


def split_masks(masks: Any, where: str = "mask") -> list[Any]:
    """One mask, or several as a list or a batch `[N, H, W]`, `[N, 1, H, W]` or `[N, H, W, 1]`, as a list, unread."""
    if is_numbers(masks):
        masks = of_lists(masks, where)
    if not isinstance(masks, Tensor | np.ndarray):
        return list(masks) if isinstance(masks, list | tuple) else [masks]
    batched = masks.ndim == 4 or (masks.ndim == 3 and 1 not in (masks.shape[0], masks.shape[-1]))
    return list(masks) if batched else [masks]


def mask_picture(mask: Tensor) -> Image.Image:
    """A mask `[height, width]` in [0, 1] as an "L" picture, 255 = edit, which is read as it was made."""
    return as_weights(Image.fromarray((mask * 255).round().byte().numpy()))


def as_weights(picture: Image.Image) -> Image.Image:
    """Say of an "L" picture that its values are known to be weights, so that a reader has nothing to guess."""
    picture.info[WEIGHTS] = True
    return picture


def is_numbers(value: Any) -> bool:
    """Whether nested lists hold numbers, and so are an array, rather than pictures or arrays."""
    if not isinstance(value, list | tuple):
        return False
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, bool | int | float | np.number | np.bool_)


def of_lists(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where}: got lists of unequal lengths, expected [height, width] with 1 = edit") from error


def array_of(mask: Any, where: str) -> np.ndarray:
    """`[height, width]` of booleans or numbers."""
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = mask.float() if mask.dtype == torch.bfloat16 else mask
    values = of_lists(mask, where)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values.squeeze(0 if values.shape[0] == 1 else -1)
    if values.ndim != 2:
        got = f"shape {tuple(values.shape)}" if values.ndim else short(mask)
        _refuse(where, got, "[height, width] with 1 = edit, or a picture", "fix the mask")
    if values.dtype.kind not in "biuf":
        _refuse(where, f"values of type {values.dtype}", "booleans or numbers with 1 = edit", "fix the mask")
    return values


def _of_picture(image: Image.Image, where: str) -> np.ndarray:
    """`[height, width]` of booleans or numbers: colours are gone, and what is transparent is 0."""
    if image.mode in ("1", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    if has_alpha(image):
        return _of_alpha(image.convert("RGBA"), where)
    if image.mode == "L":
        return np.asarray(image)
    rgb = image.convert("RGB")
    colours = rgb.getcolors(2)
    if colours is not None and sum(colour != (0, 0, 0) for _, colour in colours) <= 1:
        return (np.asarray(rgb) > 0).max(axis=-1)
    red, green, blue = (np.asarray(channel) for channel in rgb.split())
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    if spread.max(initial=0) > COLOURED:
        _refuse(where, "a picture of several colours, which may be labels or a photograph", "black and white", REMEDY)
    return np.asarray(image.convert("L"))


def _of_alpha(image: Image.Image, where: str) -> np.ndarray:
    rgba = np.asarray(image)
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min(initial=255) == 255:
        return _of_picture(image.convert("RGB"), where)
    seen, hidden = colours[alpha > 0], colours[alpha == 0]
    if len(hidden) and (hidden != hidden[0]).any():
        _refuse(
            where,
            "a picture whose colours say something else than its alpha: they differ beneath transparent pixels",
            "one of them to be the mask",
            "save that one alone, as black and white; or, in a data set, set mask_encoding='alpha' where transparent "
            "means edit",
        )
    if len(seen) and not (seen != seen[0]).any():
        if not seen.any():
            _refuse(
                where,
                "a picture that is black and transparent",
                "white = edit",
                "save its alpha channel as black and white; or, in a data set, set mask_encoding='alpha' where "
                "transparent means edit",
            )
        return alpha
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return _of_picture(shown.convert("RGB"), where)


def _weights(values: np.ndarray, where: str) -> np.ndarray:
    """Booleans or numbers as fp32 weights in [0, 1]."""
    if values.dtype.kind == "b" or not values.size:
        return values.astype(np.float32)
    low, peak = values.min(), values.max()
    outside = f"values in [{low}, {peak}]"
    if not low >= 0 or not np.isfinite(peak):
        _refuse(where, outside, "[0, 1] with 1 = edit", REMEDY)
    if values.dtype.kind == "f" and (peak <= 1 or (values != np.round(values)).any()):
        full, least = (1, LEAST) if peak <= 1 else (255, 127.5)
        if not (peak == 0 or least <= peak <= full):
            _refuse(where, outside, f"[0, 1] with 1 = edit, and somewhere at least {LEAST}", REMEDY)
        return (values / full).astype(np.float32)
    if ((values == 0) | (values == peak)).all():
        return (values > 0).astype(np.float32)
    full = 65535 if peak > 255 or values.dtype in (np.int16, np.uint16) else 255
    if peak > full:
        _refuse(where, f"several {outside}", "0 and one other, or at most 65535", REMEDY)
    if 2 * int(peak) < full:
        _refuse(where, f"several values, whose brightest is {int(peak)} of {full}", "white = edit", REMEDY)
    if _has_areas(values.astype(np.int64), full // 2):
        _refuse(where, f"areas of values below half of {full}, which look like labels", "a mask of one region", REMEDY)
    return values.astype(np.float32) / full


def _has_areas(values: np.ndarray, half: int) -> bool:
    """Whether few levels, one of them at most half but not 0, fill 3×3 pixels: soft edges and compression do not."""
    counts = np.bincount(values.ravel())
    if np.count_nonzero(counts[1:]) > MAX_LABELS or not counts[1 : half + 1].any():
        return False
    compressed = np.count_nonzero(counts[half + 1 :]) > 1  # white is not one white, so black need not be one black
    levels = torch.from_numpy(values)[None].float()  # exact: at most 65535
    lowest = -max_pool2d(pad(-levels, (1, 1, 1, 1)), 3, 1)  # beyond the border is 0, so nothing there is level
    level = (lowest > NEARLY_BLACK * compressed) & (lowest <= half) & (lowest == max_pool2d(levels, 3, 1, 1))
    return bool(level.any())


def _refuse(where: str, got: str, expected: str, remedy: str) -> NoReturn:
    raise ValueError(f"{where}: got {got}, expected {expected}; {remedy}")
