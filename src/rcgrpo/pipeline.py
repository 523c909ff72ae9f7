"""`FluxKontextPipeline` with a region: `mask_image`, groups of candidates from one call, attention on the region.

Without the new arguments every call goes straight to diffusers, so its output keeps every bit. With a mask, candidates
start from region-decoupled noise (`noise.py`): alike outside the region, different inside. A saved folder names
diffusers' own class, so that anyone opens it without this package.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .attention import AttentionOptions, AttentionRecorder, Concentration
from .editors.flux_kontext import fit_size, instruction_token_weights
from .mask_reader import mask_to_tensor, split_masks
from .noise import perturb, region_strength
from .regions import check_mask, to_tokens


@dataclass
class RegionDecoupledPipelineOutput(BaseOutput):
    """What a call with a mask or `output_attention=True` returns.

    Args:
        images: as `FluxPipelineOutput.images`; the candidates of one prompt stand together.
        attention: concentration of the instruction's attention on the region, one value per image, if asked for.
        attention_maps: `[images, rows, columns]` over the token grid, each summing to 1, if asked for.
    """

    images: Any
    attention: Concentration | None = None
    attention_maps: Tensor | None = None


def _repeat_each(batch: Any, times: int) -> Any:
    """Each sample of a tensor, an array or a list `times` times in a row."""
    if isinstance(batch, Tensor):
        return batch.repeat_interleave(times, dim=0)
    return batch.repeat(times, axis=0) if isinstance(batch, np.ndarray) else [x for x in batch for _ in range(times)]


def _words(words: str | list[Any]) -> list[list[str]]:
    """The words of each prompt."""
    if isinstance(words, str):
        return [[words]]
    return words if words and isinstance(words[0], list) else [words]


class RegionDecoupledFluxKontextPipeline(FluxKontextPipeline):
    """FLUX.1-Kontext with region-decoupled initial noise (RC-GRPO-Editing, arXiv 2604.09386).

    Loads from any Kontext folder or Hub id. From another pipeline it is made, as every diffusers pipeline, by
    `from_pipe(pipe, dtype=pipe.dtype)`; without a dtype diffusers casts the shared weights to fp32. Offloading,
    LoRAs, IP adapters and compiled transformers work as in the stock pipeline.
    """

    def to_json_string(self) -> str:
        """The pipeline's index, naming diffusers' class so that stock diffusers opens the folder."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = FluxKontextPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any = None,
        prompt: str | list[str] | None = None,
        *args: Any,
        mask_image: Any = None,
        edit_strength: float = 0.5,
        keep_strength: float = 0.0,
        output_attention: bool = False,
        attention_options: AttentionOptions | None = None,
        attention_words: str | list[str] | list[list[str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Edit pictures; everything that diffusers' `FluxKontextPipeline` accepts is accepted, and means the same.

        Args:
            mask_image: region to edit, 1 or 255 = edit: a PIL image, array or tensor `[height, width]` of the source's
                size, or one for each prompt as a list or a batch (`[prompts, height, width]`, with or without a
                channel). Switches region-decoupled noise on: the candidates of a prompt (`num_images_per_prompt`) share
                a base noise, which is the one that stock diffusers would draw from `generator`, or `latents`, and
                differ from it by `edit_strength` inside and `keep_strength` outside the region. Images, masks,
                `latents` and generators then come one for each prompt, and each prompt's candidates are made from its
                own; the stock pipeline pairs several prompts and images wrongly when `num_images_per_prompt` > 1. The
                mask steers the noise alone: the source is not pasted back outside.
            edit_strength: in [0, 1]; 0 repeats the base noise, 1 draws independent noise.
            keep_strength: in [0, 1]; 0 keeps the background's noise bit by bit.
            output_attention: also measure how much of the instruction's attention falls on the region (needs
                `mask_image`). A compiled transformer runs uncompiled in such a call.
            attention_options: which blocks, steps and direction to measure; all blocks and steps, from the instruction
                to the image, by default.
            attention_words: words of the instruction to measure, such as "the hat": a string or a list for one prompt,
                a list of lists for several; all of it by default.

        Returns:
            `RegionDecoupledPipelineOutput` with a mask, or its three fields as a tuple if `return_dict=False`; without
            a mask diffusers' own output.

        Raises:
            ValueError: a mask that is empty or of another size than its source, strengths outside [0, 1], images,
                masks, generators or `latents` that are not one for each prompt, `output_attention` without a mask or
                with true CFG, attention's options without it, that read no step or name a column, words that a prompt
                does not have.
        """
        if not output_attention and (attention_options is not None or attention_words is not None):
            raise ValueError(
                "attention_options, attention_words: expected output_attention=True with them, which reads them"
            )
        options = attention_options or AttentionOptions()
        if options.words_column is not None:
            raise ValueError(
                f"attention_options.words_column: got {options.words_column!r}, expected none, as a call has no "
                "columns; give the words themselves as attention_words"
            )
        count = len(kwargs["sigmas"]) if kwargs.get("sigmas") is not None else kwargs.get("num_inference_steps", 28)
        if output_attention and not options.reads(count):
            raise ValueError(
                f"attention_options.steps_range: got {options.steps_range}, expected shares that hold at least one of "
                f"the {count} steps"
            )
        if attention_words is not None and not all(map(any, _words(attention_words))):
            raise ValueError(f"attention_words: got {attention_words!r}, expected words of each prompt")
        if mask_image is None:
            if output_attention:
                raise ValueError("output_attention: got True without mask_image, expected a region to measure on")
            return super().__call__(image, prompt, *args, **kwargs)
        if args:
            raise ValueError("mask_image: pass every argument after `prompt` by name when a mask is given")
        if image is None:
            raise ValueError("image: got None, expected the source picture(s) that mask_image belongs to")
        negative = any(kwargs.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        if output_attention and negative and kwargs.get("true_cfg_scale", 1.0) > 1:
            raise ValueError(
                "output_attention: cannot be combined with true_cfg_scale > 1, whose second pass would mix in"
            )

        group = kwargs.pop("num_images_per_prompt", None) or 1
        return_dict = kwargs.pop("return_dict", True)
        prompts, images, masks = self._align(image, prompt, mask_image, kwargs)
        height, width, grid = self._token_grid(kwargs)
        regions = torch.stack([to_tokens(mask, grid, "max") for mask in masks]).repeat_interleave(group, dim=0)
        strength = region_strength(regions, edit_strength, keep_strength).unsqueeze(-1)
        latents = self._group_noise(strength, len(masks), group, height, width, kwargs)

        for name in list(kwargs):
            if name.endswith("prompt_embeds") and kwargs[name] is not None:
                kwargs[name] = kwargs[name].repeat_interleave(group, dim=0)
            elif name in ("prompt_2", "negative_prompt", "negative_prompt_2") and kwargs[name] is not None:
                texts = [kwargs[name]] * len(masks) if isinstance(kwargs[name], str) else kwargs[name]
                kwargs[name] = _repeat_each(texts, group)
        if prompts is not None:
            prompts = _repeat_each(prompts, group)
        images = _repeat_each(images, group)

        recorder = AttentionRecorder(self.transformer, options.blocks, options.direction) if output_attention else None
        with ExitStack() as recording:
            if recorder is not None:
                texts = kwargs.get("prompt_2") or prompts  # the second prompt is T5's
                if attention_words is not None and len(_words(attention_words)) * group != len(texts or []):
                    raise ValueError(
                        f"attention_words: got {attention_words!r}, expected words of each of the {len(masks)} prompts"
                    )
                if texts is None:
                    weights = torch.ones(len(regions), kwargs["prompt_embeds"].shape[1])
                else:
                    words = None if attention_words is None else _repeat_each(_words(attention_words), group)
                    weights = instruction_token_weights(self, texts, kwargs.get("max_sequence_length", 512), words)
                covered = torch.stack([to_tokens(mask, grid, "mean") for mask in masks]).repeat_interleave(group, dim=0)
                order = getattr(self.scheduler, "order", 1)
                recording.enter_context(recorder.record(covered, weights, True, options.reads(count), order))
            output = super().__call__(images, prompts, latents=latents, return_dict=False, **kwargs)[0]
        attention = maps = None
        if recorder is not None:
            attention = recorder.concentration()
            maps = recorder.attention_maps().unflatten(-1, grid)
        if not return_dict:
            return output, attention, maps
        return RegionDecoupledPipelineOutput(output, attention, maps)

    def _align(
        self, image: Any, prompt: str | list[str] | None, mask_image: Any, kwargs: dict[str, Any]
    ) -> tuple[list[str] | None, Any, list[Tensor]]:
        """Prompts, images and masks, one of each per prompt, after checking that they belong together."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is None and kwargs.get("prompt_embeds") is None:
            raise ValueError("prompt: got neither prompt nor prompt_embeds, expected one of them")
        count = len(prompts) if prompts is not None else len(kwargs["prompt_embeds"])
        images = [image] if isinstance(image, Image.Image) else image
        if len(images) == 1 and count > 1:
            images = _repeat_each(images, count)
        given = split_masks(mask_image, "mask_image")
        given = given * count if len(given) == 1 else given
        generators = kwargs["generator"] if isinstance(kwargs.get("generator"), list) else [None]
        for name, values in (("image", images), ("mask_image", given), ("generator", generators)):
            if len(values) not in (1, count):
                raise ValueError(f"{name}: got {len(values)}, expected one, or one for each of the {count} prompts")
        masks = [mask_to_tensor(mask, f"mask_image[{i}]") for i, mask in enumerate(given)]
        for i, (mask, picture) in enumerate(zip(masks, images, strict=True)):
            check_mask(mask, self._picture_size(picture), f"mask_image[{i}]")
        return prompts, images, masks

    def _picture_size(self, picture: Any) -> tuple[int, int] | None:
        """(height, width) in pixels of anything that diffusers takes as an image; None for ready latents."""
        if isinstance(picture, Image.Image):
            return picture.height, picture.width
        if isinstance(picture, Tensor):  # `[..., channels, height, width]`
            return None if picture.shape[-3] == self.latent_channels else (picture.shape[-2], picture.shape[-1])
        height, width = (picture.shape if picture.ndim == 2 else picture.shape[:-1])[-2:]
        return height, width

    def _token_grid(self, kwargs: dict[str, Any]) -> tuple[int, int, tuple[int, int]]:
        """Height and width in pixels and the token grid of the pictures that the call will make."""
        multiple = self.vae_scale_factor * 2
        default = self.default_sample_size * self.vae_scale_factor
        height, width = fit_size(
            kwargs.get("height") or default, kwargs.get("width") or default, kwargs.get("max_area", 1024**2), multiple
        )
        return height, width, (height // multiple, width // multiple)

    def _group_noise(
        self, strength: Tensor, prompts: int, group: int, height: int, width: int, kwargs: dict[str, Any]
    ) -> Tensor:
        """Packed noise of `prompts · group` candidates; draws the base as diffusers would, then the differences."""
        device, generator = self._execution_device, kwargs.pop("generator", None)
        embeds = kwargs.get("prompt_embeds")
        dtype = self.text_encoder_2.dtype if embeds is None else embeds.dtype  # diffusers draws in the text's dtype
        channels = self.transformer.config.in_channels // 4
        rows, columns = 2 * (height // (self.vae_scale_factor * 2)), 2 * (width // (self.vae_scale_factor * 2))

        def draw(count: int) -> Tensor:
            shape = (count, channels, rows, columns)
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return self._pack_latents(noise, count, channels, rows, columns)

        base = kwargs.pop("latents", None)
        packed = (prompts, rows * columns // 4, channels * 4)
        if base is not None and tuple(base.shape) != packed:
            raise ValueError(
                f"latents: got shape {tuple(base.shape)}, expected [prompts, tokens, channels] = {packed}: with a mask "
                "the candidates of a prompt share one"
            )
        base = draw(prompts) if base is None else base.to(device, dtype)
        if isinstance(generator, list):
            delta = torch.cat([draw(prompts) for _ in range(group)]).unflatten(0, (group, prompts)).transpose(0, 1)
            delta = delta.flatten(0, 1)
        else:
            delta = draw(prompts * group)
        base = base.repeat_interleave(group, dim=0).float()
        return perturb(base, delta.float(), strength.to(device)).to(dtype)
