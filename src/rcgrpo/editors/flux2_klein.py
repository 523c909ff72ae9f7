"""FLUX.2-klein, base and distilled: Qwen3's stacked layers, positions of four axes, latents of the VAE's batch norm.

A base model is guided for real against an empty prompt; a distilled one not at all. The schedule's shift depends on the
number of steps, so fewer steps are also other noise levels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn

from .base import FlowEditor
from .conditions import Conditions
from .region_decoupled import RegionDecoupled, with_region
from .words import token_weights

_MAX_AREA = 1024 * 1024  # of a reference, in the stock pipeline too
_LARGE: dict[str, str] = {"license": "other", "license_name": "flux-non-commercial-license"}


def _capped(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The (height, width) at which a picture of this size is read: at most a megapixel, floored."""
    if height * width > _MAX_AREA:
        scale = math.sqrt(_MAX_AREA / (height * width))
        height, width = int(height * scale), int(width * scale)
    return height // multiple * multiple, width // multiple * multiple


class Flux2KleinEditor(FlowEditor):
    """FLUX.2-klein as the rollout sees it; arguments as in `FlowEditor`.

    `guidance_scale` above 1 guides a base model away from `negative_prompt`, and is ignored by a distilled one, which
    the pipeline's `is_distilled` tells; there is no `true_cfg_scale` besides.
    """

    # Every linear layer of the blocks. A double block has a list of layers under the name of a single block's last.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj"),
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)),
    )
    licenses: ClassVar = {
        **{f"black-forest-labs/FLUX.2-klein-{kind}4B": {"license": "apache-2.0"} for kind in ("", "base-")},
        **{
            f"black-forest-labs/FLUX.2-klein-{kind}9B": {
                **_LARGE,
                "license_link": f"https://huggingface.co/black-forest-labs/FLUX.2-klein-{kind}9B/blob/main/LICENSE.md",
            }
            for kind in ("", "base-")
        },
    }
    default_guidance = 4.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.true_cfg_scale != 1:
            raise ValueError(
                f"true_cfg_scale: got {self.true_cfg_scale} with a {type(self.pipeline).__name__}, expected 1, as its "
                "pipeline guides by guidance_scale alone; set that"
            )

    @classmethod
    def usual_call(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """A distilled model takes four steps, unguided."""
        usual = super().usual_call(index)
        return usual | {"num_inference_steps": 4, "guidance_scale": 1.0} if index.get("is_distilled") else usual

    @property
    def cfg_scale(self) -> float:
        """Guidance of a base model is real."""
        return 1.0 if self.pipeline.config.is_distilled else float(self.guidance_scale or 1)

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """References are read at a megapixel at most."""
        return _capped(height, width, self.multiple)

    def call_arguments(self, height: int, width: int) -> dict[str, Any]:
        """The call's negative prompt is the empty one."""
        return super().call_arguments(height, width) | {"guidance_scale": self.guidance_scale}

    def _shift(self, tokens: int) -> float:
        return compute_empirical_mu(tokens, self.num_inference_steps)

    def _sigmas(self) -> np.ndarray | None:
        return None if getattr(self.pipeline.scheduler.config, "use_flow_sigmas", False) else super()._sigmas()

    @property
    def _tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    def _around(self) -> tuple[str, str]:
        """What the chat template puts before and after an instruction."""
        mark = "\0"
        message = [{"role": "user", "content": mark}]
        text = self.pipeline.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, after = text.split(mark)
        return before, after

    def _padding(self) -> dict[str, Any]:
        return {"padding": "max_length", "truncation": True, "max_length": self.max_sequence_length}

    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """Of Qwen3's tokens, without the chat's."""
        return token_weights(self._tokenizer, prompt, words, self._around(), **self._padding())

    def _encode_text(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds}

    def _text_key(self, prompt: str, picture: Image.Image | None, size: tuple[int, int]) -> list[Any]:
        before, after = self._around()
        return [prompt, self._tokenizer(before + prompt + after, **self._padding()).input_ids]

    def _encode_picture(self, image: Image.Image, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        pixels = pipe.image_processor.preprocess(pipe.image_processor.resize(image, height, width), height, width)
        return pipe.prepare_image_latents([pixels], 1, None, self.device, pipe.vae.dtype)[0]

    def _embedded_guidance(self, count: int, device: torch.device) -> Tensor | None:
        """What the transformer is told of guidance, `[count]`."""
        return None

    def _predict(self, model: nn.Module, latents: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        grid = self.grid_for(conditions.height, conditions.width)
        # Only the shapes are read.
        output, reference = (torch.empty(1, 1, *size) for size in (grid, conditions.reference_grid or grid))
        ids = [Flux2KleinPipeline._prepare_latent_ids(output), Flux2KleinPipeline._prepare_image_ids([reference])]
        embeds = conditions.text["prompt_embeds"]
        prediction = model(
            hidden_states=torch.cat([latents, conditions.reference_tokens], dim=1),
            timestep=time,
            guidance=self._embedded_guidance(len(latents), conditions.device),
            encoder_hidden_states=embeds,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds[:1]).to(conditions.device),
            img_ids=torch.cat(ids, dim=1).to(conditions.device),
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        vae = self.pipeline.vae
        patches = latents.transpose(1, 2).unflatten(2, self.grid_for(height, width))
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(patches)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(patches)
        return vae.decode(self.pipeline._unpatchify_latents(patches * std + mean), return_dict=False)[0]


class Flux2Region(RegionDecoupled):
    """What FLUX.2's pipelines have in common: unpacked latents, and the first reference's size."""

    def _output_size(self: Any, pictures: Any, call: dict[str, Any]) -> tuple[int, int]:
        multiple = self.vae_scale_factor * 2
        height, width = _capped(pictures[0].height, pictures[0].width, multiple)
        return (call["height"] or height) // multiple * multiple, (call["width"] or width) // multiple * multiple

    def _draw(self: Any, count: int, height: int, width: int, dtype: torch.dtype | None, generator: Any) -> Tensor:
        dtype, channels = dtype or self.text_encoder.dtype, self.transformer.config.in_channels // 4
        return self.prepare_latents(count, channels, height, width, dtype, self._execution_device, generator)[0]

    def _from_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _to_tokens(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)


class RegionDecoupledFlux2KleinPipeline(Flux2Region, Flux2KleinPipeline):
    """FLUX.2-klein with region-decoupled initial noise (RC-GRPO-Editing, arXiv 2604.09386).

    Loads from any klein folder or Hub id, base or distilled. A list of pictures is one prompt's references, as in the
    stock pipeline, and a list of lists those of several; the first is the one that is edited.
    """

    editor_class = Flux2KleinEditor
    __call__ = with_region(Flux2KleinPipeline)

    def _is_guided(self, call: dict[str, Any]) -> bool:
        return call["guidance_scale"] > 1 and not self.config.is_distilled
