"""Where an editor's encoders are, and what of theirs is kept: the half of `base.FlowEditor` that deals with the cache.

Why it exists: a text encoder may be larger than the model that is trained, and works for moments of a step. With a
cache it waits on the CPU, or, where all that is needed is kept, is not even loaded (`late_encoders`).
"""

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from PIL import Image
from torch import Tensor, nn

from .cache import ConditionCache, modules_digest, picture_digest, surroundings
from .late_encoders import LateEncoders
from .sizes import can_move


class KeptEncoders:
    """The encoders of `FlowEditor`, which documents the attributes."""

    encoders: ClassVar[tuple[str, ...]]
    pipeline: Any
    cache: ConditionCache | None
    late: LateEncoders | None
    _offloads: list[UserCpuOffloadHook]
    _device: torch.device | None

    @abstractmethod
    def _encode_text(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> dict[str, Tensor]:
        """One instruction as `Conditions.text`, of a picture to be edited at this (height, width)."""

    @abstractmethod
    def _text_key(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> list[Any]:
        """All that `_encode_text` depends on besides the encoders' weights."""

    @abstractmethod
    def _encode_picture(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Packed latents of one source at this size, `[1, tokens, channels]`."""

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Of the pipeline, as far as they are loaded."""
        parts = [getattr(self.pipeline, name) for name in self.encoders]
        return [part for part in parts if part is not None]

    def place(self, device: torch.device) -> None:
        """Move the models to a device.

        With a cache the text encoders stay on the CPU, come to the device when something new is to be encoded, and
        leave it again.
        """
        pipe, self._device = self.pipeline, device
        if self.cache is None and can_move(pipe.transformer):
            pipe.to(device)
            return
        for part in (pipe.transformer, pipe.vae, *(self.text_encoders if self.cache is None else ())):
            if can_move(part):
                part.to(device)
        if self.cache is not None:
            self._offload_encoders()

    def place_encoders(self, device: torch.device) -> None:
        """Move what encodes to a device, where it stays; nothing else."""
        for part in (*self.text_encoders, self.pipeline.vae):
            if can_move(part):
                part.to(device)
        self._device = device

    def _offload_encoders(self) -> None:
        parts = [part for part in self.text_encoders if can_move(part)]
        self._offloads = [cpu_offload_with_hook(part, self._device)[1] for part in parts]

    def load_encoders(self) -> None:
        """Load the text encoders that the pipeline was loaded without; does nothing if they are there."""
        if self.late is None or self.text_encoders:
            return
        parts = self.late.load()
        for part in parts.values():
            part.requires_grad_(False).eval()
        self.pipeline.register_modules(**parts)
        if self._device is not None:
            self._offload_encoders()

    @property
    def device(self) -> torch.device:
        """Where everything is computed, wherever the text encoders wait."""
        return self._device or self.pipeline._execution_device

    def _text(self, prompt: str, picture: Image.Image | None, size: tuple[int, int], keep: bool) -> dict[str, Tensor]:
        if self.cache is None or not keep:
            self.load_encoders()
            return self._encode_text(prompt, picture, size)
        made_from = [self._text_weights, surroundings(self.device), *self._text_key(prompt, picture, size)]
        kind = f"text-{self._text_weights[:12]}"

        def make() -> dict[str, Tensor]:
            self.load_encoders()
            return self._encode_text(prompt, picture, size)

        entry = self.cache.get(kind, made_from, make)
        # Masks stay on the CPU.
        return {name: each.to(self.device) if each.is_floating_point() else each for name, each in entry.items()}

    def _picture(self, image: Image.Image, height: int, width: int, dtype: torch.dtype, keep: bool) -> Tensor:
        """Packed latents of one source, `[1, tokens, channels]`."""

        def make() -> dict[str, Tensor]:
            return {"image_latents": self._encode_picture(image, height, width).to(dtype)}

        if self.cache is None or not keep:
            return make()["image_latents"]
        # Tiling and slicing are plain attributes of the VAE; what it counts while it works is private.
        plain = {name: value for name, value in vars(self.pipeline.vae).items() if not name.startswith("_")}
        settings = {name: value for name, value in plain.items() if isinstance(value, bool | int | float)}
        processor = dict(self.pipeline.image_processor.config)
        made_from = [self._vae_weights, surroundings(self.device), settings, processor, dtype, height, width]
        kind = f"image-{self._vae_weights[:12]}"
        return self.cache.get(kind, [*made_from, picture_digest(image)], make)["image_latents"].to(self.device)

    @cached_property
    def _text_weights(self) -> str:
        if self.late is not None and self.late.weights is not None:
            return self.late.weights
        weights = modules_digest(*self.text_encoders)
        if self.late is not None:
            self.late.remember(weights)
        return weights

    @cached_property
    def _vae_weights(self) -> str:
        return modules_digest(self.pipeline.vae)
