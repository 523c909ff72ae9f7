"""The region: from a mask in pixels to weights on the token grid. `mask` is always 1 = edit.

Everything downstream (noise, distances, attention, rewards) reads the region through these few functions. Gotcha: a
token covers many pixels; exploration must reach every pixel of the region (`"max"`), a measure of attention must not
count a token of which one pixel belongs to it as a whole one (`"mean"`).

At the end, `corrupt` spoils a region on purpose, for studies of how good a mask has to be.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs.extras import require
from ..inputs.masks import mask_to_tensor
from .noise import keyed_generator


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
    for dim in (-2, -1):  # the maximum over a square is that of its rows' maxima
        reach = min(pixels, mask.shape[dim])
        padding = (reach, reach) if dim == -1 else (0, 0, reach, reach)
        mask = F.pad(mask, padding, value=-math.inf)
        covered = 1
        while covered < 2 * reach + 1:  # each entry is the maximum over `covered` of them
            step = min(covered, 2 * reach + 1 - covered)
            length = mask.shape[dim] - step
            mask = torch.maximum(mask.narrow(dim, 0, length), mask.narrow(dim, step, length))
            covered += step
    return mask


def at_size(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask `[height, width]` at another (height, width), for a source that is edited there: no edit pixel is lost."""
    return to_tokens(mask, size, "max").reshape(size)


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


def to_elements(mask: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """A pixel mask on the elements of packed latents, four times as fine as `to_tokens`: any edit pixel makes an edit.

    A token packs 2 × 2 latent pixels, places inside and channels outside, as in FLUX, FLUX.2 and Qwen-Image.

    Args:
        mask: `[..., height, width]` in [0, 1].
        grid: (rows, columns) of tokens.
        channels: of a packed token, a multiple of 4.

    Returns:
        `[..., rows · columns, channels]`.
    """
    rows, columns = grid
    fine = to_tokens(mask, (2 * rows, 2 * columns), "max").unflatten(-1, (rows, 2, columns, 2))
    places = fine.transpose(-2, -3).reshape(*mask.shape[:-2], rows * columns, 4)
    return torch.cat([places] * (channels // 4), dim=-1)


def to_places(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Packed latents on the grid of latent pixels, `[..., channels / 4, 2 · rows, 2 · columns]`; see `to_elements`.

    Args:
        latents: `[..., rows · columns, channels]`, channels a multiple of 4.
        grid: (rows, columns) of tokens.
    """
    rows, columns = grid
    packed = latents.unflatten(-1, (-1, 2, 2)).unflatten(-4, (rows, columns))  # ... rows columns channels 2 2
    return packed.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def region_weights(mask: Tensor, keep_weight: float) -> Tensor:
    """Distance weights `w = m + λ_keep (1 - m)` (algorithm section 4), same shape as the mask."""
    if keep_weight < 0:
        raise ValueError(f"keep_weight: got {keep_weight}, expected 0 or more")
    return mask + keep_weight * (1 - mask)


# Imperfect masks on purpose -------------------------------------------------------------------------------------------

Corruption = Literal["grow", "shrink", "shift", "holes", "blob_noise", "box", "missing", "wrong_object"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)


def corrupt(mask: Any, kind: Corruption, severity: float, key: object = 0, other: Any = None) -> Tensor:
    """A mask with a known fault.

    Lengths are shares of √area of the region and chance is drawn on a grid of fixed size, so a severity means the same
    at 64 and at 1024 pixels, up to the rounding of pixels (which can tip a close choice of side for `shift` and
    `wrong_object`). A key draws one fault, which a higher severity makes worse.

    | kind | at severity 1 | in between |
    |---|---|---|
    | `grow` | reaches √area / 2 further on every side | the reach is proportional |
    | `shrink` | only the core is left, where it is deeper than 90 % of its deepest point | the depth is proportional |
    | `shift` | moved by √area, at most half the shorter side, in a direction drawn from the key | in proportion |
    | `holes` | 3/4 of the region's area is missing, in blobs | the share is proportional |
    | `blob_noise` | half the region's area is missing, as much is added elsewhere, in blobs | both are proportional |
    | `box` | each connected part becomes its bounding box | fills up from the outline |
    | `missing` | the full picture: nothing is known about the region | the same, with probability `severity` |
    | `wrong_object` | `other`, or else the region in a mirrored place | the same, with probability `severity` |

    Blobs are about 1/8 of the region's bounding box wide for `holes`, and 1/16 of the picture's shorter side for
    `blob_noise`. `shift` turns round where there is more room on the other side; what leaves the picture all the same
    comes in again at the opposite border. The mirrored place is the one of left-right, upside-down and both that
    overlaps the region least, or, for a region in the middle, the picture's corners. The picture's border counts as an
    edge of the region for `shrink`. A full mask has nowhere to go: only `shrink`, `holes` and `blob_noise` change it.

    Args:
        mask: what `mask_to_tensor` reads, `[height, width]` in [0, 1] with at least one edit pixel. Soft values are
            kept where the region stays; pixels that are added are 1.
        kind: one of `CORRUPTIONS`.
        severity: in [0, 1]; 0 gives the mask back unchanged.
        key: anything with a stable `repr`, e.g. `(seed, row)`; all chance comes from `kind` and this.
        other: for `wrong_object`, the mask of another object, of the same size.

    Returns:
        fp32 `[height, width]` in [0, 1], never empty. A missing mask is all ones, which turns the region constraint
        off as `is_full` says, rather than zeros, which no edit can use.

    Raises:
        ValueError: an unknown kind, a severity outside [0, 1], an empty mask, or `other` of another size or empty.
        ModuleNotFoundError: the extra `masks` is missing.
    """
    require("masks", "corrupt")
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(CORRUPTIONS)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity: got {severity}, expected a number in [0, 1]; 0 leaves the mask as it is")
    mask = mask_to_tensor(mask)
    check_mask(mask)
    if other is not None:
        other = mask_to_tensor(other)
        check_mask(other, (mask.shape[0], mask.shape[1]), "other")
    if severity == 0:
        return mask
    generator = keyed_generator("corrupt", kind, key)
    inside = mask > 0
    extent = math.sqrt(inside.sum().item())
    if kind == "grow":
        return mask + (~inside & (_distance(inside) <= severity * extent / 2))
    if kind == "shrink":
        depth = _depth(inside)
        return mask * (depth > severity * 0.9 * depth.max())
    if kind == "shift":
        angle = 2 * math.pi * torch.rand((), generator=generator).item()
        rows, columns = _bounding_box(inside)
        way = min(extent, min(mask.shape) / 2)
        down = _turned(way * math.sin(angle), rows.start, mask.shape[0] - rows.stop)
        across = _turned(way * math.cos(angle), columns.start, mask.shape[1] - columns.stop)
        return mask.roll((round(severity * down), round(severity * across)), (0, 1))
    if kind == "holes":
        field, box = torch.zeros(mask.shape, dtype=torch.float64), _bounding_box(inside)
        field[box] = _blobs((8, 8), field[box].shape, generator)
        return mask.masked_fill(_lowest(field, inside, severity * 3 / 4), 0)
    if kind == "blob_noise":
        cells = [round(16 * side / min(mask.shape)) for side in mask.shape]
        field = _blobs((cells[0], cells[1]), mask.shape, generator)
        gone = _lowest(field, inside, severity / 2)
        come = _lowest(field, ~inside, min(1.0, severity / 2 * inside.sum().item() / max(1, (~inside).sum().item())))
        return mask.masked_fill(gone, 0).masked_fill(come, 1)
    if kind == "box":
        from scipy.ndimage import find_objects, label

        gap, filled = _distance(inside), torch.zeros_like(inside)
        for box in find_objects(label(inside.numpy(), np.ones((3, 3)))[0]):
            filled[box] |= gap[box] <= severity * gap[box].max()
        return mask + (~inside & filled)
    if torch.rand((), generator=generator).item() >= severity:
        return mask
    if kind == "missing":
        return torch.ones_like(mask)
    if other is not None:
        return other
    middle = (mask.shape[0] // 2, mask.shape[1] // 2)
    places = [mask.flip(1), mask.flip(0), mask.flip(0, 1), mask.roll(middle, (0, 1))]
    # In tenths, so that a pixel more or less at another resolution seldom decides between places as good as each other.
    return min(places, key=lambda place: round(10 * (torch.minimum(place, mask).sum() / mask.sum()).item()))


def _bounding_box(inside: Tensor) -> tuple[slice, slice]:
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _distance(inside: Tensor) -> Tensor:
    """How far each pixel's centre lies outside the region's edge, in pixels; 0 inside."""
    from scipy.ndimage import distance_transform_edt

    return torch.from_numpy(distance_transform_edt(~inside.numpy()) - 0.5).clamp(min=0)


def _depth(inside: Tensor) -> Tensor:
    """How far each pixel's centre lies inside the region's edge or the picture's border, in pixels; 0 outside."""
    return _distance(~F.pad(inside, (1, 1, 1, 1)))[1:-1, 1:-1]


def _turned(way: float, before: int, after: int) -> float:
    """A signed way along one axis, turned round if the room there is too short and shorter than on the other side."""
    room, other_room = (after, before) if way > 0 else (before, after)
    return -way if abs(way) > room and other_room > room else way


def _blobs(cells: tuple[int, int], size: torch.Size, generator: torch.Generator) -> Tensor:
    """A smooth random field whose hills are a cell wide, the same hills at every size."""
    coarse = torch.randn(1, 1, *cells, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, tuple(size), mode="bicubic", align_corners=False)[0, 0]


def _lowest(field: Tensor, where: Tensor, share: float) -> Tensor:
    """The given share of the pixels of `where`, rounded down: those that lie lowest in the field."""
    chosen = torch.zeros_like(where)
    order = field[where].argsort(stable=True)
    picked = torch.zeros(len(order), dtype=torch.bool)
    picked[order[: int(share * len(order))]] = True
    chosen[where] = picked
    return chosen
