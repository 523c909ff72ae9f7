"""At which size a picture is edited, and whether a model may go where it is edited."""

import math

from torch import nn
from torch.distributed.fsdp import FSDPModule


def fit_size(height: int, width: int, max_area: int, multiple: int) -> tuple[int, int]:
    """The (height, width) at which diffusers' Kontext pipeline generates: `max_area` at this aspect ratio, floored."""
    aspect_ratio = width / height
    new_width = round((max_area * aspect_ratio) ** 0.5)
    new_height = round((max_area / aspect_ratio) ** 0.5)
    return new_height // multiple * multiple, new_width // multiple * multiple


def own_resolution(width: int, height: int) -> int:
    """The resolution at which a picture keeps its own size, as far as whole tokens allow."""
    return math.ceil(math.sqrt(width * height))


def can_move(part: nn.Module) -> bool:
    """Whether a model may go to another device, which bitsandbytes' 8-bit weights and sharded ones may not."""
    return not (getattr(part, "is_loaded_in_8bit", False) or isinstance(part, FSDPModule))
