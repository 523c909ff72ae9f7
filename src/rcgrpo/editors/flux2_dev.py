"""FLUX.2-dev: as klein, but Mistral's text after a system message, and guidance that is distilled."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from PIL import Image
from torch import Tensor

from .flux2_klein import Flux2KleinEditor, Flux2Region
from .region_decoupled import with_region

_BASE = "black-forest-labs/FLUX.2-dev"


class Flux2Editor(Flux2KleinEditor):
    """FLUX.2-dev as the rollout sees it; arguments as in `FlowEditor`. `guidance_scale` is told to the transformer."""

    licenses: ClassVar = {
        _BASE: {
            "license": "other",
            "license_name": "flux-dev-non-commercial-license",
            "license_link": f"https://huggingface.co/{_BASE}/blob/main/LICENSE.txt",
        }
    }

    @property
    def cfg_scale(self) -> float:
        """There is no real guidance."""
        return 1.0

    @property
    def _tokenizer(self) -> Any:
        return self.pipeline.tokenizer.tokenizer  # of a processor

    def _around(self) -> tuple[str, str]:
        (messages,) = format_input(["\0"], self.pipeline.system_message)
        before, after = self.pipeline.tokenizer.apply_chat_template(messages, tokenize=False).split("\0")
        return before, after

    def _padding(self) -> dict[str, Any]:
        """The template may begin with the token that the tokenizer would put there once more."""
        first = self._tokenizer.bos_token
        begun = first is not None and self._around()[0].startswith(first)
        return super()._padding() | ({"add_special_tokens": False} if begun else {})

    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """Of Mistral's tokens; the pipeline takes marks of pictures out of an instruction."""
        return super().instruction_weights(prompt.replace("[IMG]", ""), words)

    def _text_key(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> list[Any]:
        return super()._text_key(prompt.replace("[IMG]", ""), picture, size)

    def _embedded_guidance(self, count: int, device: torch.device) -> Tensor | None:
        scale: Any = self.guidance_scale
        return torch.full([count], scale, device=device, dtype=torch.float32)


class RegionDecoupledFlux2Pipeline(Flux2Region, Flux2Pipeline):
    """FLUX.2-dev with region-decoupled initial noise (RC-GRPO-Editing, arXiv 2604.09386); pictures as with klein."""

    editor_class = Flux2Editor
    __call__ = with_region(Flux2Pipeline)

    def _is_guided(self, call: dict[str, Any]) -> bool:
        return False
