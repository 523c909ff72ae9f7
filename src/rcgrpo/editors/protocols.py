"""What rollout, trainer and diagnostics ask of a model. `base.FlowEditor` has most of it for models of diffusers."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from .attention import AttentionOptions, AttentionRecorder
from .conditions import Conditions
from .schedule import Schedule


class Editor(Protocol):
    """An image editor that follows a flow: `encode · schedule · velocity · decode`.

    Latents are packed, `[batch, tokens, channels]`, one token for a square of the output's pixels. The transformer is
    handed to `velocity` by the caller, so that rollout and training share one wrapped module.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    """Names of the layers that a LoRA is usually put on."""

    input_layer: ClassVar[str]
    """The transformer's layer that noisy and reference tokens enter by."""

    pipeline: Any
    num_inference_steps: int

    @property
    def channels(self) -> int:
        """Of a token."""

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """Of the pipeline."""

    def with_steps(self, num_inference_steps: int) -> Self:
        """The same editor, models and cache shared, with another number of steps."""

    def place(self, device: torch.device) -> None:
        """Move the models to a device."""

    def size_for(self, image: Image.Image) -> tuple[int, int]:
        """The (height, width) at which this picture is edited."""

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a picture."""

    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """`[tokens]`, 1 for the instruction's own, or its words'; refuses words that it does not have."""

    def encode(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        cache_images: bool = True,
        words: Sequence[Sequence[str]] | None = None,
    ) -> Conditions:
        """What sources of one common size and their instructions are for the model."""

    def schedule(self, height: int, width: int) -> Schedule:
        """Noise levels at this size, with a solver that stands at the first."""

    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """The model's velocity at noisy latents, guided where the editor guides."""

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Pictures of clean latents."""

    def call_arguments(self, height: int, width: int) -> dict[str, Any]:
        """What the pipeline's own call takes to draw as this editor does, of a picture that `resized` has made."""

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The picture to hand to the pipeline's own call, for an output of this size."""

    def attention(self, options: AttentionOptions | None = None) -> AttentionRecorder:
        """A recorder of the transformer's attention."""
