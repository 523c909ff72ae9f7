"""Qwen-Image-Edit-Plus (2509, 2511): a text encoder that sees the source, text of any length, rescaled guidance.

The source is read at a megapixel, whatever the output's size, as the stock pipeline reads it. Guidance keeps the norm
of each token's velocity, so a guided velocity is not linear in its two predictions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from torch import Tensor, nn

from .base import FlowEditor
from .cache import picture_digest
from .conditions import Conditions
from .region_decoupled import RegionDecoupled, with_region
from .words import as_long_as, token_weights

_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"


def _fitted(area: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of this area that the stock pipeline takes for this aspect ratio."""
    new_width, new_height = stock.calculate_dimensions(area, width / height)
    return new_height, new_width


class QwenImageEditPlusEditor(FlowEditor):
    """Qwen-Image-Edit-Plus as the rollout sees it; arguments as in `FlowEditor`.

    `true_cfg_scale` above 1 guides; the stock pipeline's own is 4, with " " as the negative prompt. `guidance_scale`
    and `max_sequence_length` are ignored, as by the stock pipeline.
    """

    # Every linear layer of the blocks but the modulation.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    licenses: ClassVar = {f"Qwen/Qwen-Image-Edit-{date}": {"license": "apache-2.0"} for date in ("2509", "2511")}
    usual: ClassVar = {"num_inference_steps": 40, "true_cfg_scale": 4.0, "negative_prompt": " "}
    sees_pictures = True
    input_layer = "img_in"

    def size_for(self, image: Image.Image) -> tuple[int, int]:
        """The (height, width) at which this picture is edited; at a resolution of 1024 the stock pipeline's own."""
        height, width = _fitted(self.resolution**2, image.height, image.width)
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """The source is read at a megapixel."""
        return _fitted(stock.VAE_IMAGE_SIZE, height, width)

    def call_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Without a negative prompt the call does not guide."""
        call = super().call_arguments(height, width)
        guidance = {"true_cfg_scale": self.true_cfg_scale, "negative_prompt": self.negative_prompt}
        return call | (guidance if self.cfg_scale > 1 else {})

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """As it is: the call reads it at a megapixel, whatever the output's size."""
        return image

    def _around(self) -> tuple[str, str]:
        """What the template puts before and after an instruction."""
        before, after = self.pipeline.prompt_template_encode.split("{}")
        return before + _PICTURE.format(1), after

    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """Of the tokens of the template and the instruction; the picture has one here, and more in the encoder."""
        return token_weights(self.pipeline.processor.tokenizer, prompt, words, self._around())

    def _seen(self, picture: Image.Image | None, size: tuple[int, int]) -> Any:
        """The source as the text encoder sees it."""
        return self.pipeline.image_processor.resize(picture, *_fitted(stock.CONDITION_IMAGE_SIZE, *size))

    def _encode_text(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompt=[prompt], image=[self._seen(picture, size)], device=self.device)
        # Stays on the CPU, where asking whether a batch has padding waits for nothing.
        return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.bool)}

    def _text_key(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> list[Any]:
        before, after = self._around()
        processor = self.pipeline.processor
        settings = [str(processor.image_processor), processor.tokenizer(before + prompt + after).input_ids]
        return [
            prompt,
            picture_digest(self._seen(picture, size)),
            self.pipeline.prompt_template_encode_start_idx,
            *settings,
        ]

    def _encode_picture(self, image: Image.Image, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        pixels = pipe.image_processor.preprocess(image, height, width).unsqueeze(2)
        # Only the reference is wanted; given noise is passed through untouched.
        noise = torch.empty(0)
        return pipe.prepare_latents(
            [pixels], 1, self.channels // 4, height, width, pipe.vae.dtype, self.device, None, noise
        )[1]

    def _predict(self, model: nn.Module, latents: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        grid = self.grid_for(conditions.height, conditions.width)
        mask = conditions.text["prompt_embeds_mask"]
        prediction = model(
            hidden_states=torch.cat([latents, conditions.reference_tokens], dim=1),
            timestep=time,
            guidance=None,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask.to(conditions.device),
            encoder_hidden_states=conditions.text["prompt_embeds"],
            img_shapes=[[(1, *grid), (1, *(conditions.reference_grid or grid))]] * len(latents),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    def _guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        combined = super()._guide(positive, negative)
        return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        shape = (1, pipe.vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(pipe.vae.config.latents_mean).view(shape).to(unpacked)
        inverse = 1.0 / torch.tensor(pipe.vae.config.latents_std).view(shape).to(unpacked)
        return pipe.vae.decode(unpacked / inverse + mean, return_dict=False)[0][:, :, 0]


class RegionDecoupledQwenImageEditPlusPipeline(RegionDecoupled, QwenImageEditPlusPipeline):
    """Qwen-Image-Edit-Plus with region-decoupled initial noise (RC-GRPO-Editing, arXiv 2604.09386).

    Loads from any folder or Hub id of 2509 and 2511. A list of pictures is one prompt's references, as in the stock
    pipeline, and a list of lists those of several; the last is the one that is edited.
    """

    editor_class = QwenImageEditPlusEditor
    edited_reference = -1
    __call__ = with_region(QwenImageEditPlusPipeline)

    def _output_size(self, pictures: Any, call: dict[str, Any]) -> tuple[int, int]:
        multiple = self.vae_scale_factor * 2
        height, width = _fitted(1024 * 1024, pictures[-1].height, pictures[-1].width)
        return (call["height"] or height) // multiple * multiple, (call["width"] or width) // multiple * multiple

    def _draw(self, count: int, height: int, width: int, dtype: torch.dtype | None, generator: Any) -> Tensor:
        dtype, channels = dtype or self.text_encoder.dtype, self.transformer.config.in_channels // 4
        return self.prepare_latents(None, count, channels, height, width, dtype, self._execution_device, generator)[0]

    def _is_guided(self, call: dict[str, Any]) -> bool:
        negative = call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None
        return call["true_cfg_scale"] > 1 and negative

    def _align_weights(self, weights: Tensor, arguments: dict[str, Any]) -> Tensor:
        pictures = [
            self.image_processor.resize(each, *_fitted(stock.CONDITION_IMAGE_SIZE, each.height, each.width))
            for each in arguments["image"]
        ]
        marks = "".join(_PICTURE.format(i + 1) for i in range(len(pictures)))
        texts = [self.prompt_template_encode.format(marks + prompt) for prompt in arguments["prompt"]]
        ids = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").input_ids
        return as_long_as(weights, ids.shape[1] - self.prompt_template_encode_start_idx)
