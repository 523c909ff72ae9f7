"""The region: from whatever a user calls a mask to weights on the token grid. `mask` is always 1 = edit.

Everything downstream (noise, distances, attention, rewards) reads the region through these few functions. Gotcha: a
token covers many pixels; exploration must reach every pixel of the region (`"max"`), a measure of attention must not
count a token of which one pixel belongs to it as a whole one (`"mean"`).
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def mask_to_tensor(mask: Any) -> Tensor:
    """Any usual mask as fp32 `[height, width]` in [0, 1], 1 = edit.

    Args:
        mask: PIL image (read as luminance, 255 = edit; palette and RGBA pictures are converted), array or tensor
            `[H, W]`, `[1, H, W]` or `[H, W, 1]`, boolean, uint8 (0..255; an array with no value above 1 is read as
            0/1) or floating (0..1).

    Raises:
        ValueError: another shape, NaN, or values outside these ranges.
    """
    if isinstance(mask, Image.Image):
        return torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    tensor = torch.as_tensor(np.asarray(mask) if not isinstance(mask, Tensor) else mask)
    if tensor.ndim == 3 and 1 in (tensor.shape[0], tensor.shape[-1]):
        tensor = tensor.squeeze(0 if tensor.shape[0] == 1 else -1)
    if tensor.ndim != 2:
        raise ValueError(f"mask: got shape {tuple(tensor.shape)}, expected [height, width] with 1 = edit")
    if tensor.dtype == torch.bool:
        return tensor.float()
    if not tensor.is_floating_point():
        tensor = tensor.float() / (255 if tensor.numel() and tensor.max() > 1 else 1)
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise ValueError(f"mask: got values in [{tensor.min()}, {tensor.max()}], expected [0, 1] with 1 = edit")
    return tensor.float()


def check_mask(mask: Tensor, size: tuple[int, int] | None = None, where: str = "mask") -> None:
    """Refuse a mask that no edit can use.

    Args:
        mask: `[height, width]`.
        size: the picture's (height, width) when the two must agree.
        where: what the message calls the mask, e.g. "train row 17, column 'mask'".

    Raises:
        ValueError: another size than the picture's, or no edit pixel at all.
    """
    if size is not None and tuple(mask.shape) != tuple(size):
        raise ValueError(
            f"{where}: got a mask of height × width {tuple(mask.shape)}, expected the source picture's {tuple(size)}; "
            "resize it (nearest) or fix the pairing"
        )
    if not bool((mask > 0).any()):
        raise ValueError(f"{where}: got an empty mask, expected at least one edit pixel (1 or 255 = edit, not keep)")


def is_full(mask: Tensor) -> bool:
    """Whether the mask leaves no pixel to keep, which turns the region constraint off."""
    return bool((mask >= 1).all())


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Dilate `[..., height, width]` by a square of the given radius in pixels; 0 returns the mask unchanged."""
    if pixels < 0:
        raise ValueError(f"pixels: got {pixels}, expected a radius of 0 or more")
    if pixels == 0:
        return mask
    height, width = mask.shape[-2:]
    flat = mask.reshape(-1, 1, height, width)
    return F.max_pool2d(flat, 2 * pixels + 1, stride=1, padding=pixels).reshape(mask.shape)


def to_tokens(mask: Tensor, grid: tuple[int, int], reduce: Literal["max", "mean"]) -> Tensor:
    """A pixel mask on the token grid.

    Args:
        mask: `[..., height, width]` in [0, 1].
        grid: (rows, columns) of tokens; pixels need not divide evenly.
        reduce: `"max"`: any edit pixel makes an edit token (exploration, distances); `"mean"`: the covered share
            (attention).

    Returns:
        `[..., rows · columns]`, row-major as FLUX packs its tokens.
    """
    pool = F.adaptive_max_pool2d if reduce == "max" else F.adaptive_avg_pool2d
    pooled = pool(mask.reshape(-1, 1, *mask.shape[-2:]), grid)
    return pooled.reshape(*mask.shape[:-2], grid[0] * grid[1])


def region_weights(mask: Tensor, keep_weight: float) -> Tensor:
    """Distance weights `w = m + λ_keep (1 - m)` (algorithm section 4), same shape as the mask."""
    if keep_weight < 0:
        raise ValueError(f"keep_weight: got {keep_weight}, expected 0 or more")
    return mask + keep_weight * (1 - mask)
