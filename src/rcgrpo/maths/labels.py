"""Several regions in one picture: from a labelled mask, or a list of masks, to one mask for each region.

A sibling of `regions`, for edits that touch several objects. Gotcha: in a labelled mask a pixel's value is a *name*,
so 255 is no region here and soft values do not exist; a list of masks has neither limit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..inputs.masks import is_numbers, mask_to_tensor, of_lists

MAX_REGIONS = 32
"""More labels than this are a mistake: most likely a mask of 0 and 255 was given for a labelled one."""


def split_regions(value: Any, size: tuple[int, int] | None = None, where: str = "regions") -> Tensor:
    """One mask for each region, fp32 `[regions, height, width]` in [0, 1].

    Args:
        value: labels 0 (keep) and 1..K, as a palette or greyscale picture (the pixel's *number*, not its colour) or an
            integer array, tensor or nested list `[height, width]`; or a list of K masks as `mask_to_tensor` takes them,
            or numbers `[K, height, width]`. A label that does not occur, or an empty mask in the list, is a region that
            this picture does not have.
        size: the source picture's (height, width); by default that of the first region.
        where: what messages call the value.

    Raises:
        ValueError: no region at all, more than 32 labels, another size than the source's, or colours instead of labels.
    """
    if is_numbers(value):
        value = of_lists(value, where)
    if isinstance(value, Sequence) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3):
        masks = [mask_to_tensor(mask, f"{where}[{i}]") for i, mask in enumerate(value)]
    else:
        masks = _masks_of_labels(value, where)
    if not masks or not any(bool((mask > 0).any()) for mask in masks):
        raise ValueError(f"{where}: got no region, expected at least one pixel with a label of 1 or more")
    expected = tuple(masks[0].shape if size is None else size)
    for mask in masks:
        if tuple(mask.shape) != expected:
            whose = "first region's" if size is None else "source picture's"
            raise ValueError(
                f"{where}: got height × width {tuple(mask.shape)}, expected the {whose} {expected}; resize it (nearest)"
            )
    return torch.stack(masks)


def _masks_of_labels(value: Any, where: str) -> list[Tensor]:
    labels = np.asarray(value)
    if isinstance(value, Image.Image) and labels.ndim != 2:
        raise ValueError(f"{where}: got a picture of mode {value.mode}, expected labels: palette (P) or greyscale (L)")
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(
            f"{where}: got {labels.dtype} of shape {labels.shape}, expected integer labels [height, width], or a list "
            "of masks"
        )
    count = int(labels.max(initial=0))
    if count > MAX_REGIONS or int(labels.min(initial=0)) < 0:
        raise ValueError(
            f"{where}: got labels in {int(labels.min())}..{count}, expected 0 (keep) and 1 to at most {MAX_REGIONS}; "
            "divide a mask of 0 and 255 by 255"
        )
    return [torch.from_numpy((labels == label).astype(np.float32)) for label in range(1, count + 1)]
