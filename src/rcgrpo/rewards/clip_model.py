"""CLIP's two towers, for the rewards and for CompBench's LC-T and LC-I."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..maths.metrics import first_words

CLIP_MODEL = "openai/clip-vit-large-patch14"
"""The CLIP that LC-T and LC-I are defined with. Any other one gives other numbers."""


CLIP_BATCH = 32
"""Pictures that CLIP looks at together."""


class Clip:
    """CLIP's two towers, frozen, in fp32. Features have unit norm.

    Args:
        name: Hub id or folder of a `CLIPModel`, such as `CLIP_MODEL`.
        device: where it runs; by default the current GPU if there is one.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, name: str = CLIP_MODEL, device: str | None = None) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        try:
            model = CLIPModel.from_pretrained(name, dtype=torch.float32)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(name)
            # Pillow's resizing, as in the owners' time; torchvision's differs in the last digits.
            self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(name)
        except Exception as error:  # huggingface_hub, safetensors and transformers raise their own kinds
            raise ValueError(
                f"CLIP: got {name!r}, expected a Hub id or folder of a CLIP model, which could not be loaded "
                f"({first_words(error)})"
            ) from error
        self.model = model.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """`[images, width]` on the CPU."""
        rows = []
        for start in range(0, len(images), CLIP_BATCH):
            pixels = self.image_processor(
                [np.asarray(image.convert("RGB")) for image in images[start : start + CLIP_BATCH]],
                return_tensors="pt",
                input_data_format="channels_last",  # a crop of three rows would be taken for three channels
            )["pixel_values"]
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
            rows.append(normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """`[texts, width]` on the CPU; what exceeds the model's positions is cut off, as torchmetrics does."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        ids, attention = (tokens[key][:, :limit].to(self.model.device) for key in ("input_ids", "attention_mask"))
        pooled = self.model.text_model(input_ids=ids, attention_mask=attention).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1).cpu()
