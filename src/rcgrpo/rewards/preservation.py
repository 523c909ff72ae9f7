"""Preservation with learned distances, and the plain L1: how well everything outside the mask is kept.

Where it fits: beside `background_keep`, `background_psnr` and `background_ssim` of `builtin.py`, which need no weights.
Why it exists: pixels punish a faint shift of colour as hard as a changed face; LPIPS and DINO see the difference.

Gotchas: like every preservation reward these are at their best for an editor that does nothing. The source is pasted
into the region before a network looks, so that the edit itself cannot leak into its surroundings through receptive
fields or attention. Weights are loaded by the first call.
"""

from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, cosine_similarity

from ..maths.metrics import load_lpips
from .pictures import image_tensor, outside, place
from .registry import register_reward


@register_reward("background_l1", value_range=(0.0, 1.0))
def background_l1(
    images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
) -> list[float | None]:
    """`1 - mean |difference|` over the pixels and channels outside the mask, in [0, 1]. All-edit masks give `None`."""
    scores: list[float | None] = []
    for image, source, mask in zip(images, source_images, masks, strict=True):
        keep = outside(image, source, mask)
        difference = (image_tensor(image) - image_tensor(source)).abs()[:, keep]
        scores.append(1 - difference.mean().item() if keep.any() else None)
    return scores


class _NetworkReward:
    """Shows a network each candidate with the source pasted into its region, and the source.

    Args:
        device: "cuda", "cpu", …; by default the current GPU if there is one.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def _place(self) -> str:
        return self.device or place()

    def __call__(
        self, images: list[Image.Image], source_images: list[Image.Image], masks: list[Image.Image], **columns: Any
    ) -> list[float | None]:
        """One score per candidate; an all-edit mask gives `None`."""
        scores: list[float | None] = []
        for image, source, mask in zip(images, source_images, masks, strict=True):
            keep = outside(image, source, mask)
            kept = image_tensor(source)
            shown = torch.where(keep, image_tensor(image), kept)
            scores.append(self._compare(shown, kept, keep) if keep.any() else None)
        return scores

    def _compare(self, shown: Tensor, kept: Tensor, keep: Tensor) -> float:
        """The score of a candidate; pictures `[3, height, width]` in [0, 1], `keep` boolean `[height, width]`."""
        raise NotImplementedError


@lru_cache(maxsize=2)
def lpips_on(device: str, net: str) -> nn.Module:
    """LPIPS with a distance for each pixel, on a device; `load_lpips` says what can go wrong."""
    return load_lpips(net=net, spatial=True).to(device)


@register_reward("background_lpips", value_range=(0.0, 1.0))
class BackgroundLPIPS(_NetworkReward):
    """`1 - LPIPS` (arXiv 1801.03924) against the source, averaged over the pixels outside the mask, at least 0.

    Pictures need about 64 pixels a side; smaller ones are a failure.

    Args:
        net: "squeeze", as in CompBench, "alex" or "vgg".
        device: "cuda", "cpu", …; by default the current GPU if there is one.
    """

    def __init__(self, net: str = "squeeze", device: str | None = None) -> None:
        super().__init__(device)
        self.net = net

    @torch.no_grad()
    def _compare(self, shown: Tensor, kept: Tensor, keep: Tensor) -> float:
        place = self._place()
        distance = lpips_on(place, self.net)(2 * shown[None].to(place) - 1, 2 * kept[None].to(place) - 1)
        return max(0.0, 1 - distance[0, 0].cpu()[keep].mean().item())


@register_reward("background_dino", value_range=(-1.0, 1.0))
class BackgroundDINO(_NetworkReward):
    """Mean cosine of DINO's patch features with the source's, over patches with a pixel outside the mask, in [-1, 1].

    Args:
        model: Hub id or folder of a DINOv2 or DINOv3 ViT.
        side: pictures are resized to a square of so many pixels, rounded down to whole patches.
        device: "cuda", "cpu", …; by default the current GPU if there is one.
    """

    def __init__(self, model: str = "facebook/dinov2-base", side: int = 448, device: str | None = None) -> None:
        super().__init__(device)
        self.model, self.side = model, side

    @cached_property
    def _network(self) -> tuple[Any, Tensor, Tensor]:
        from transformers import AutoImageProcessor, AutoModel

        network = AutoModel.from_pretrained(self.model).to(self._place()).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(self.model)
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        return network, mean, std

    @torch.no_grad()
    def _compare(self, shown: Tensor, kept: Tensor, keep: Tensor) -> float:
        network, mean, std = self._network
        grid = self.side // network.config.patch_size
        side = grid * network.config.patch_size
        pictures = torch.nn.functional.interpolate(
            torch.stack((shown, kept)), size=(side, side), mode="bicubic", antialias=True
        )
        pixels = ((pictures.clamp(0, 1) - mean) / std).to(network.device)
        # Class and register tokens come first, patches last.
        patches = network(pixel_values=pixels).last_hidden_state[:, -grid * grid :].float().cpu()
        kept_patches = adaptive_max_pool2d(keep[None].float(), (grid, grid)).flatten().bool()
        return cosine_similarity(patches[0], patches[1], dim=-1)[kept_patches].mean().clamp(-1, 1).item()
