"""How well an edit keeps the background: the metrics of CompBench (arXiv 2505.12200), pictures in, floats out.

Evaluation and the preservation rewards call these on decoded pictures; nothing here knows an editor. PSNR, SSIM and
LPIPS follow the benchmark's own code: pictures (bicubic) and masks (nearest) are resized to 512x512, the edit region is
multiplied to black in both pictures, and the *whole* frame is compared. What it asks of the
foreground is in `evaluation`.

Gotchas:
- Black against black is a perfect match, so `background_psnr` reads `-10·log10(background share)` dB above
  `masked_psnr`, which looks at the background pixels alone. Compare numbers of one kind, over the same masks.
- Masks are pictures with 255 = edit, as the benchmark reads them; `mask_to_tensor` is not asked. A picture whose edit
  pixels hold 1 counts as all background.
- Masks are not grown: growing is for training.
"""

import math
import os
import pickle
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..inputs.pictures import to_rgb

COMPBENCH_SIZE = 512
MAX_PSNR = 100.0
"""Identical pictures have an infinite PSNR, which would swallow every mean; PSNR is capped at this many dB."""


def background_psnr(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    size: int | None = COMPBENCH_SIZE,
) -> list[float]:
    """PSNR in dB over the frame with the edit region blacked out, as CompBench reports it.

    Args:
        images: The edited pictures.
        references: What their background should look like: the sources, or the ground-truth edits.
        masks: 255 = edit, any mode that converts to "L".
        size: Side in pixels to which all are resized first, whatever their shape; the benchmark's is 512. `None` keeps
            the pictures' own size (for 64-pixel CompBench-mini, where enlarging says nothing).

    Returns:
        One float per picture, at most `MAX_PSNR`; NaN where the mask leaves no background.

    Raises:
        ValueError: Lists of different lengths; with `size=None`, a picture, reference and mask of different sizes.
    """

    def psnr(image: torch.Tensor, reference: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

        return peak_signal_noise_ratio(image * background, reference * background, data_range=1.0)

    return [min(value, MAX_PSNR) for value in _per_picture(psnr, images, references, masks, size)]


def background_ssim(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    size: int | None = COMPBENCH_SIZE,
) -> list[float]:
    """SSIM (-1..1, 1 = identical) over the frame with the edit region blacked out, as CompBench reports it.

    Arguments, returns and errors are those of `background_psnr`. Pictures need at least 11 pixels a side.
    """

    def ssim(image: torch.Tensor, reference: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

        value = structural_similarity_index_measure(image * background, reference * background, data_range=1.0)
        assert isinstance(value, torch.Tensor)
        return value

    return _per_picture(ssim, images, references, masks, size)


def background_lpips(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    network: nn.Module,
    size: int | None = COMPBENCH_SIZE,
) -> list[float]:
    """LPIPS (0 = identical, lower is better) over the frame with the edit region blacked out, as CompBench reports it.

    Arguments, returns and errors are those of `background_psnr`; `network` comes from `load_lpips`.
    """
    device = next(network.parameters()).device

    @torch.no_grad()
    def lpips(image: torch.Tensor, reference: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        shown, kept = ((2 * picture * background - 1).to(device) for picture in (image, reference))
        return network(shown, kept)

    return _per_picture(lpips, images, references, masks, size)


def load_lpips(weights: str | os.PathLike[str] | None = None, net: str = "squeeze", spatial: bool = False) -> nn.Module:
    """torchmetrics' LPIPS, frozen: `network(image, reference)` on RGB in -1..1.

    torchmetrics brings the linear heads; the trunk's ImageNet weights are torchvision's, fetched on first use.

    Args:
        weights: the trunk as a local file instead: torchvision's `squeezenet1_1-*.pth`, or any state dict of its names.
        net: the trunk: "squeeze" (SqueezeNet 1.1, 4.7 MB), "alex" (233 MB) or "vgg" (528 MB); with `weights` the first.
        spatial: a distance for each pixel, `[batch, 1, height, width]`, instead of one for each picture.

    Raises:
        ValueError: the weights cannot be fetched, read, or do not fit.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    try:
        if weights is None:
            return _NoTrainLpips(net=net, spatial=spatial)  # type: ignore[arg-type]
        network = _NoTrainLpips(net="squeeze", pnet_rand=True, spatial=spatial)
        given = torch.load(weights, map_location="cpu", weights_only=True)
        # torchmetrics cuts torchvision's `features.K` into `slices.I.K`.
        trunk = {name: given[f"features.{name.split('.', 2)[2]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(trunk)
        return network
    except (OSError, KeyError, RuntimeError, ImportError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"LPIPS ({net}): got {weights or 'no file'}, expected torchvision's ImageNet weights, which could not be "
            f"loaded ({first_words(error)}); put them into $TORCH_HOME/hub/checkpoints, or leave LPIPS out"
        ) from error


def masked_psnr(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    size: int | None = None,
) -> list[float]:
    """PSNR in dB over the background pixels alone: unlike `background_psnr`, it does not rise with the mask's area.

    Arguments, returns and errors are those of `background_psnr`, but pictures keep their own size unless one is given.
    """

    def psnr(image: torch.Tensor, reference: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        squared_error = ((image - reference) * background).square().mean()
        return -10 * torch.log10(squared_error / background.square().mean())

    return [min(value, MAX_PSNR) for value in _per_picture(psnr, images, references, masks, size)]


def first_words(error: Exception) -> str:
    """The kind of an error and its first sentence: libraries add advice that would not help here."""
    return f"{type(error).__name__}: {re.split(r'[.] |$', str(error).strip(), maxsplit=1, flags=re.MULTILINE)[0]}"


def _per_picture(
    metric: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    size: int | None,
) -> list[float]:
    """`metric(image, reference, background)` for each triple, one at a time: memory stays that of one picture."""
    if not len(images) == len(references) == len(masks):
        raise ValueError(
            f"Got {len(images)} images, {len(references)} references and {len(masks)} masks; expected as many of each."
        )
    values = []
    for index, (image, reference, mask) in enumerate(zip(images, references, masks, strict=True)):
        if size is None:
            for name, other in (("references", reference), ("masks", mask)):
                if other.size != image.size:
                    raise ValueError(
                        f"{name}[{index}] is {other.width}x{other.height} but images[{index}] is "
                        f"{image.width}x{image.height}; resize one of them, or pass `size` to resize all."
                    )
        background = 1 - _to_tensor(mask.convert("L"), size, Image.Resampling.NEAREST)
        if not background.any():
            values.append(math.nan)
            continue
        edited, expected = (
            _to_tensor(to_rgb(picture), size, Image.Resampling.BICUBIC) for picture in (image, reference)
        )
        values.append(float(metric(edited, expected, background)))
    return values


def _to_tensor(picture: Image.Image, size: int | None, resample: Image.Resampling) -> torch.Tensor:
    """`1 channels height width`, fp32 in 0..1."""
    if size is not None:
        picture = picture.resize((size, size), resample)
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
