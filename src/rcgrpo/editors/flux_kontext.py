"""Everything that is specific to FLUX.1-Kontext, behind five methods.

The rollout, the trainer and the pipeline know packed latents `[batch, tokens, channels]`, sigmas and `Conditions`; what
the transformer wants to be called with stands here alone. Gotchas: reference tokens follow the noisy ones and are
cropped from the prediction; the schedule's shift counts the noisy tokens only; `timestep` must be computed exactly as
diffusers does, or a rollout differs from the pipeline in the last bits.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline, calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor, nn

from ..attention import unrecorded
from .cache import ConditionCache, modules_digest, picture_digest, surroundings

Solver = Literal["euler", "heun", "dpmpp_2m", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


@dataclass(frozen=True)
class Conditions:
    """What a batch of edits is conditioned on; every tensor starts with the batch.

    `prompt_embeds` `[batch, text tokens, width]`, `pooled_prompt_embeds` `[batch, width]`, `text_weights`
    `[batch, text tokens]` (1 for the instruction's own tokens), `image_latents` `[batch, reference tokens, channels]`;
    `height` and `width` of the pictures in pixels; with true CFG the negative prompt's embeddings.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    text_weights: Tensor
    image_latents: Tensor
    height: int
    width: int
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def _map(self, function: Any) -> "Conditions":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditions(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def __getitem__(self, index: slice | Tensor) -> "Conditions":
        return self._map(lambda tensor: tensor[index])

    @classmethod
    def concatenate(cls, parts: Sequence["Conditions"]) -> "Conditions":
        """One batch of several of one picture size."""
        names = [f.name for f in fields(cls) if isinstance(getattr(parts[0], f.name), Tensor)]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**tensors, height=parts[0].height, width=parts[0].width)

    def repeat(self, times: int) -> "Conditions":
        """Each sample `times` times in a row, so that a group's candidates stand together."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))


@dataclass(frozen=True)
class Schedule:
    """Noise levels: `sigmas` `[steps + 1]` from 1 to 0, and what the model is told, `timesteps` `[steps]`.

    A second-order solver calls the model twice in a step: `order` 2. Its last step is of first order.
    """

    sigmas: Tensor
    timesteps: Tensor
    order: int = 1

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stages(self) -> Tensor:
        """The timesteps of all model calls of a rollout, in order."""
        if self.order == 1:
            return self.timesteps
        return torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def completes(self, stage: int) -> bool:
        """Whether a step ends with this model call."""
        return self.order == 1 or stage % 2 == 1 or stage == len(self.stages) - 1


def make_solver(solver: Solver, sigmas: Tensor) -> Any:
    """One of diffusers' schedulers, ready to step through given noise levels of a flow.

    Args:
        solver: `"euler"`; `"heun"`, which calls the model twice a step; `"dpmpp_2m"` (DPM-Solver++ 2M) and `"unipc"`,
            which remember the step before. All but Euler's are of second order.
        sigmas: `[steps + 1]` from 1 to 0.
    """
    steps = len(sigmas) - 1
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    made: Any = {
        "euler": FlowMatchEulerDiscreteScheduler,
        "heun": FlowMatchHeunDiscreteScheduler,
        "dpmpp_2m": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow),
        "unipc": lambda: UniPCMultistepScheduler(solver_type="bh2", **flow),
    }[solver]()
    made.set_timesteps(steps)
    # These schedulers take no sigmas, take them only shifted, or round the times that belong to them. Written over
    # theirs, all solvers walk the same levels.
    if solver == "heun":
        levels = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    else:
        levels = sigmas.clone()
        if solver in ("dpmpp_2m", "unipc"):  # at 1 the logarithm of the signal's share is infinite
            levels[0] = levels[0].clamp(max=1 - 1e-6)
    made.sigmas = levels.cpu()
    made.timesteps = 1000 * levels[:-1]
    made.set_begin_index(0)
    return made


def fit_size(height: int, width: int, max_area: int, multiple: int) -> tuple[int, int]:
    """The (height, width) at which diffusers' Kontext pipeline generates: `max_area` at this aspect ratio, floored."""
    aspect_ratio = width / height
    new_width = round((max_area * aspect_ratio) ** 0.5)
    new_height = round((max_area / aspect_ratio) ** 0.5)
    return new_height // multiple * multiple, new_width // multiple * multiple


def find_words(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Where these words stand in a text, first and last character + 1; whole words, in upper or lower case."""
    pattern = "|".join(re.escape(word.strip()) for word in words)
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)]


def instruction_token_weights(
    pipeline: FluxKontextPipeline,
    prompts: Sequence[str],
    length: int,
    words: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """1 for the T5 tokens of the instruction itself, 0 for padding and special tokens, `[batch, length]`.

    Args:
        length: tokens of a padded instruction.
        words: of each instruction; only their tokens count. All of them by default.

    Raises:
        ValueError: words that the instruction, cut to its length, does not have; a tokenizer that does not know where
            its tokens stand.
    """
    if words is not None and not pipeline.tokenizer_2.is_fast:
        raise ValueError(
            f"words: got {list(words)} with {type(pipeline.tokenizer_2).__name__}, expected a fast tokenizer, which "
            "knows where its tokens stand; load the pipeline's tokenizer_2 as T5TokenizerFast"
        )
    encoded = pipeline.tokenizer_2(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_special_tokens_mask=True,
        return_offsets_mapping=words is not None,
        return_tensors="pt",
    )
    weights = ((1 - encoded.special_tokens_mask) * encoded.attention_mask).float()
    for i, (prompt, chosen) in enumerate(zip(prompts, words or [], strict=words is not None)):
        begins, ends = encoded.offset_mapping[i].unbind(-1)
        named = torch.zeros(length, dtype=torch.bool)
        for first, last in find_words(prompt, chosen):
            named |= (begins < last) & (ends > first)
        weights[i] *= named
        if not weights[i].any():
            raise ValueError(
                f"words: got {list(chosen)}, expected words of {prompt!r} within its first {length} tokens"
            )
    return weights


def can_move(part: nn.Module) -> bool:
    """Whether a model may go to another device, which bitsandbytes' 8-bit weights may not."""
    return not getattr(part, "is_loaded_in_8bit", False)


class FluxKontextEditor:
    """FLUX.1-Kontext (any size, Kontext-tiny too) as the rollout sees it.

    Args:
        pipeline: a `FluxKontextPipeline`; its text encoders, VAE, scheduler and tokenizers are used as they are. The
            transformer is passed to `velocity` by the caller, so that rollout and training share one wrapped module.
        resolution: pictures are edited at `resolution²` pixels, keeping their aspect ratio, multiples of 16 (of
            `multiple` for smaller models).
        num_inference_steps: steps of the ODE.
        guidance_scale: distilled guidance, ignored by models without guidance embedding.
        max_sequence_length: T5 tokens.
        solver: what rollouts step with; the pipeline's own scheduler by default.
        true_cfg_scale: above 1, every velocity is guided away from the negative prompt, at twice the cost.
        negative_prompt: what true CFG guides away from.
        cache: keeps what the encoders make of instructions and sources. Their weights must not change from then on.
    """

    def __init__(
        self,
        pipeline: FluxKontextPipeline,
        resolution: int,
        num_inference_steps: int,
        guidance_scale: float = 3.5,
        max_sequence_length: int = 512,
        solver: Solver | None = None,
        true_cfg_scale: float = 1.0,
        negative_prompt: str = "",
        cache: ConditionCache | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.resolution = resolution
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.solver = solver
        self.true_cfg_scale = true_cfg_scale
        self.negative_prompt = negative_prompt
        self.cache = cache
        self._offloads: list[UserCpuOffloadHook] = []
        self._device: torch.device | None = None
        self.scheduler = pipeline.scheduler
        if solver is not None and not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"solver: got {solver!r} with a pipeline whose scheduler is {type(pipeline.scheduler).__name__}, "
                "expected FlowMatchEulerDiscreteScheduler, whose noise levels the solver takes over; leave solver "
                "unset to step with the pipeline's own"
            )
        self.multiple = pipeline.vae_scale_factor * 2
        if resolution < self.multiple:
            raise ValueError(f"resolution: got {resolution}, expected at least {self.multiple} pixels for this model")

    def with_steps(self, num_inference_steps: int) -> "FluxKontextEditor":
        """The same editor, models and cache shared, with another number of steps."""
        other = copy.copy(self)
        other.num_inference_steps = num_inference_steps
        return other

    # -------------------------------------------------------------------------------- sizes

    def size_for(self, image: Image.Image) -> tuple[int, int]:
        """The (height, width) at which this picture is edited."""
        return fit_size(image.height, image.width, self.resolution**2, self.multiple)

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a picture."""
        return height // self.multiple, width // self.multiple

    @property
    def channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels)

    # -------------------------------------------------------------------------------- encode

    def place(self, device: torch.device) -> None:
        """Move the models to a device.

        With a cache the text encoders stay on the CPU, come to the device when something new is to be encoded, and
        leave it again.
        """
        pipe = self.pipeline
        if self.cache is None:
            pipe.to(device)
            return
        for part in (pipe.transformer, pipe.vae):
            if can_move(part):
                part.to(device)
        encoders = [part for part in (pipe.text_encoder, pipe.text_encoder_2) if can_move(part)]
        self._offloads = [cpu_offload_with_hook(part, device)[1] for part in encoders]
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where everything is computed, wherever the text encoders wait."""
        return self._device or self.pipeline._execution_device

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        cache_images: bool = True,
        words: Sequence[Sequence[str]] | None = None,
    ) -> Conditions:
        """Encode sources of one common size (see `size_for`) and their instructions.

        Each is encoded by itself: its numbers are the same bits in every batch, from the cache or not. The stock
        pipeline encodes a batch at once, which some CPUs round differently in the last bits.

        Args:
            images, prompts: one of each for every edit.
            cache_images: whether a cache may keep the latents; not for pictures that nobody will bring again.
            words: of each instruction, whose attention is to be recorded; all of it by default.

        Raises:
            ValueError: pictures that would be edited at different sizes, words that are not in their instruction.
        """
        sizes = {self.size_for(image) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images: got pictures edited at {sorted(sizes)}, expected one size per batch")
        height, width = sizes.pop()
        guided = self.true_cfg_scale > 1
        texts = {prompt: self._encode_prompt(prompt) for prompt in prompts}
        negative = self._encode_prompt(self.negative_prompt) if guided else {}
        for text_encoder in self._offloads:
            text_encoder.offload()
        dtype = texts[prompts[0]]["prompt_embeds"].dtype

        def batch(name: str) -> Tensor:
            return torch.cat([texts[prompt][name] for prompt in prompts])

        def repeated(name: str) -> Tensor | None:
            return torch.cat([negative[name]] * len(prompts)) if guided else None

        return Conditions(
            batch("prompt_embeds"),
            batch("pooled_prompt_embeds"),
            instruction_token_weights(self.pipeline, prompts, self.max_sequence_length, words),
            torch.cat([self._encode_image(image, height, width, dtype, cache_images) for image in images]),
            height,
            width,
            repeated("prompt_embeds"),
            repeated("pooled_prompt_embeds"),
        )

    def _encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """`prompt_embeds` `[1, text tokens, width]` and `pooled_prompt_embeds` `[1, width]` of one instruction."""
        pipe, device = self.pipeline, self.device

        def make() -> dict[str, Tensor]:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=[prompt], prompt_2=None, device=device, max_sequence_length=self.max_sequence_length
            )
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

        if self.cache is None:
            return make()
        # The tokens speak for the tokenizers, and for the length that they are padded to.
        padded = {"padding": "max_length", "truncation": True}
        clip = pipe.tokenizer(prompt, max_length=pipe.tokenizer_max_length, **padded).input_ids
        t5 = pipe.tokenizer_2(prompt, max_length=self.max_sequence_length, **padded).input_ids
        made_from = [self._text_weights, surroundings(device), prompt, clip, t5]
        entry = self.cache.get(f"text-{self._text_weights[:12]}", made_from, make)
        return {name: tensor.to(device) for name, tensor in entry.items()}

    def _encode_image(self, image: Image.Image, height: int, width: int, dtype: torch.dtype, keep: bool) -> Tensor:
        """Packed latents of one source, `[1, reference tokens, channels]`."""
        pipe, device = self.pipeline, self.device

        def make() -> dict[str, Tensor]:
            pixels = pipe.image_processor.resize([image], height, width)
            pixels = pipe.image_processor.preprocess(pixels, height, width)
            # Only the reference is wanted; given noise is passed through untouched.
            noise = torch.empty(0)
            _, latents, _, _ = pipe.prepare_latents(
                pixels, 1, self.channels // 4, height, width, pipe.vae.dtype, device, latents=noise
            )
            return {"image_latents": latents.to(dtype)}

        if self.cache is None or not keep:
            return make()["image_latents"]
        # Tiling and slicing are plain attributes of the VAE.
        settings = {name: value for name, value in vars(pipe.vae).items() if isinstance(value, bool | int | float)}
        processor = dict(pipe.image_processor.config)
        made_from = [self._vae_weights, surroundings(device), settings, processor, dtype, height, width]
        kind = f"image-{self._vae_weights[:12]}"
        return self.cache.get(kind, [*made_from, picture_digest(image)], make)["image_latents"].to(device)

    @cached_property
    def _text_weights(self) -> str:
        return modules_digest(self.pipeline.text_encoder, self.pipeline.text_encoder_2)

    @cached_property
    def _vae_weights(self) -> str:
        return modules_digest(self.pipeline.vae)

    # -------------------------------------------------------------------------------- integrate

    def schedule(self, height: int, width: int) -> Schedule:
        """Sigmas and timesteps at this size, shifted as the pipeline does; leaves `scheduler` ready to step."""
        scheduler = self.pipeline.scheduler
        rows, columns = self.grid_for(height, width)
        mu = calculate_shift(
            rows * columns,
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / self.num_inference_steps, self.num_inference_steps)
        timesteps, _ = retrieve_timesteps(scheduler, self.num_inference_steps, self.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        levels = scheduler.sigmas.to(timesteps.device, torch.float32)
        if self.solver is None:
            self.scheduler = scheduler
        else:
            self.scheduler = make_solver(self.solver, levels)
        return Schedule(levels, timesteps, order=2 if self.solver == "heun" else 1)

    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """The model's velocity `[batch, tokens, channels]` at noisy latents.

        Args:
            model: the transformer, wrapped as it is trained.
            latents: `[batch, tokens, channels]`, any floating dtype; the model sees the conditions' dtype.
            timestep: `[batch]`, the schedule's timesteps in [0, 1000].
            conditions: of the same batch.
        """
        dtype, device = conditions.image_latents.dtype, conditions.image_latents.device
        rows, columns = self.grid_for(conditions.height, conditions.width)
        ids = FluxKontextPipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)
        reference_ids = ids.clone()
        reference_ids[:, 0] = 1
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([len(latents)], self.guidance_scale, device=device, dtype=torch.float32)

        def predict(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
            prediction = model(
                hidden_states=torch.cat([latents.to(device, dtype), conditions.image_latents], dim=1),
                timestep=timestep.to(device, dtype) / 1000,
                guidance=guidance,
                pooled_projections=pooled_prompt_embeds,
                encoder_hidden_states=prompt_embeds,
                txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
                img_ids=torch.cat([ids, reference_ids]),
                return_dict=False,
            )[0]
            return prediction[:, : latents.shape[1]]

        velocity = predict(conditions.prompt_embeds, conditions.pooled_prompt_embeds)
        if conditions.negative_prompt_embeds is None or conditions.negative_pooled_prompt_embeds is None:
            return velocity
        with unrecorded():
            negative = predict(conditions.negative_prompt_embeds, conditions.negative_pooled_prompt_embeds)
        return negative + self.true_cfg_scale * (velocity - negative)

    # -------------------------------------------------------------------------------- decode

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Pictures of clean latents `[batch, tokens, channels]`."""
        decoded = self._decode(latents, height, width)
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def decode_tensor(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The same before rounding, fp32 `[batch, 3, height, width]` in [0, 1], with a gradient."""
        return (self._decode(latents, height, width).float() / 2 + 0.5).clamp(0, 1)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        pipe = self.pipeline
        unpacked = pipe._unpack_latents(latents.to(pipe.vae.dtype), height, width, pipe.vae_scale_factor)
        unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(unpacked, return_dict=False)[0]
