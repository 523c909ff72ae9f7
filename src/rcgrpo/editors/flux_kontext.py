"""FLUX.1-Kontext: CLIP's pooled and T5's padded text, positions of three axes, guidance that is distilled."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowEditor
from .conditions import Conditions
from .region_decoupled import RegionDecoupled, with_region
from .sizes import fit_size
from .words import token_weights

_PADDED: dict[str, Any] = {"padding": "max_length", "truncation": True}


class FluxKontextEditor(FlowEditor):
    """FLUX.1-Kontext (any size, Kontext-tiny too) as the rollout sees it; arguments as in `FlowEditor`.

    `guidance_scale` is distilled into the model, and ignored by models without guidance embedding; `true_cfg_scale`
    is real guidance on top.
    """

    # Every linear layer of the blocks, and the model's last layer, which shares a name with theirs.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )
    licenses: ClassVar = {
        "kontext-tiny": {"license": "apache-2.0"},
        "black-forest-labs/FLUX.1-Kontext-dev": {
            "license": "other",
            "license_name": "flux-1-dev-non-commercial-license",
            "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev/blob/main/LICENSE.md",
        },
    }
    lora_has_alpha = True
    encoders = ("text_encoder", "text_encoder_2")
    one_prompt_a_call = False
    default_guidance = 3.5
    usual: ClassVar = {"num_inference_steps": 28}

    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """Of T5's tokens; CLIP's are pooled."""
        return token_weights(self.pipeline.tokenizer_2, prompt, words, max_length=self.max_sequence_length, **_PADDED)

    def _encode_text(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _text_key(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> list[Any]:
        # The tokens speak for the tokenizers, and for the length that they are padded to.
        pipe = self.pipeline
        clip = pipe.tokenizer(prompt, max_length=pipe.tokenizer_max_length, **_PADDED).input_ids
        t5 = pipe.tokenizer_2(prompt, max_length=self.max_sequence_length, **_PADDED).input_ids
        return [prompt, clip, t5]

    def _encode_picture(self, image: Image.Image, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        pixels = pipe.image_processor.resize([image], height, width)
        pixels = pipe.image_processor.preprocess(pixels, height, width)
        # Only the reference is wanted; given noise is passed through untouched.
        noise = torch.empty(0)
        _, latents, _, _ = pipe.prepare_latents(
            pixels, 1, self.channels // 4, height, width, pipe.vae.dtype, self.device, latents=noise
        )
        return latents

    def _predict(self, model: nn.Module, latents: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        place: dict[str, Any] = {"device": conditions.device, "dtype": conditions.dtype}
        rows, columns = self.grid_for(conditions.height, conditions.width)
        ids = FluxKontextPipeline._prepare_latent_image_ids(1, rows, columns, **place)
        reference_ids = ids.clone()
        reference_ids[:, 0] = 1
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            scale: Any = self.guidance_scale
            guidance = torch.full([len(latents)], scale, device=conditions.device, dtype=torch.float32)
        embeds = conditions.text["prompt_embeds"]
        prediction = model(
            hidden_states=torch.cat([latents, conditions.reference_tokens], dim=1),
            timestep=time,
            guidance=guidance,
            pooled_projections=conditions.text["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, **place),
            img_ids=torch.cat([ids, reference_ids]),
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(unpacked, return_dict=False)[0]

    def call_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Without `max_area` the output would have a megapixel, and the reference one of seventeen sizes."""
        call = super().call_arguments(height, width) | {"max_area": height * width, "_auto_resize": False}
        call["guidance_scale"] = self.guidance_scale
        if self.cfg_scale > 1:
            call |= {"true_cfg_scale": self.true_cfg_scale, "negative_prompt": self.negative_prompt}
        return call


class RegionDecoupledFluxKontextPipeline(RegionDecoupled, FluxKontextPipeline):
    """FLUX.1-Kontext with region-decoupled initial noise (RC-GRPO-Editing, arXiv 2604.09386).

    Loads from any Kontext folder or Hub id. From another pipeline it is made, as every diffusers pipeline, by
    `from_pipe(pipe, dtype=pipe.dtype)`; without a dtype diffusers casts the shared weights to fp32. Offloading,
    LoRAs, IP adapters and compiled transformers work as in the stock pipeline.
    """

    editor_class = FluxKontextEditor
    __call__ = with_region(FluxKontextPipeline)

    def _output_size(self, pictures: Any, call: dict[str, Any]) -> tuple[int, int]:
        default = self.default_sample_size * self.vae_scale_factor
        height, width = call["height"] or default, call["width"] or default
        return fit_size(height, width, call["max_area"], self.vae_scale_factor * 2)

    def _draw(self, count: int, height: int, width: int, dtype: torch.dtype | None, generator: Any) -> Tensor:
        dtype = dtype or self.text_encoder_2.dtype
        channels, device = self.transformer.config.in_channels // 4, self._execution_device
        return self.prepare_latents(None, count, channels, height, width, dtype, device, generator)[0]

    def _is_guided(self, call: dict[str, Any]) -> bool:
        embeds = call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
        return call["true_cfg_scale"] > 1 and (call["negative_prompt"] is not None or embeds)

    def _texts_read(self, call: dict[str, Any]) -> Any:
        return call["prompt_2"] or call["prompt"]  # the second prompt is T5's
