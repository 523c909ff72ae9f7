"""What editors of diffusers' flow models have in common; a model's own file says only where it differs.

Gotchas: reference tokens follow the noisy ones and are cropped from the prediction; a schedule's shift counts the noisy
tokens only; `timestep` must be computed exactly as diffusers does, or a rollout differs from the pipeline in the last
bits.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from accelerate.hooks import UserCpuOffloadHook
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor, nn

from .attention import AttentionOptions, AttentionRecorder, unrecorded
from .cache import ConditionCache
from .conditions import Conditions
from .kept_encoders import KeptEncoders
from .late_encoders import LateEncoders
from .schedule import Schedule, Solver, make_solver
from .sizes import fit_size
from .words import as_long_as


class FlowEditor(KeptEncoders, ABC):
    """An `Editor` made of a diffusers pipeline.

    Args:
        pipeline: its text encoders, VAE, scheduler and tokenizers are used as they are. The transformer is passed to
            `velocity` by the caller, so that rollout and training share one wrapped module.
        resolution: pictures are edited at `resolution²` pixels, keeping their aspect ratio, in multiples of what one
            token covers.
        num_inference_steps: steps of the ODE.
        guidance_scale: as the pipeline's argument of this name; its default by default.
        max_sequence_length: tokens of an instruction, where the text encoder pads or cuts it.
        solver: what rollouts step with; the pipeline's own scheduler by default.
        true_cfg_scale: as the pipeline's argument of this name. Above 1, every velocity is guided away from the
            negative prompt, at twice the cost.
        negative_prompt: what guidance leads away from.
        cache: keeps what the encoders make of instructions and sources. Their weights must not change from then on.
        batch_guidance: ask for both halves of a guided velocity in one forward: quicker where one does not fill the
            device, at twice its memory, and rounded otherwise in the last bits than diffusers' two forwards.
        late: where the pipeline's text encoders come from if it was loaded without them; takes a cache.

    Raises:
        ValueError: a resolution below one token, or a solver for a scheduler whose noise levels it cannot take over.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    """Names of the layers that a LoRA is usually put on."""
    licenses: ClassVar[Mapping[str, Mapping[str, str]]]
    """What binds a LoRA of a base, by Hub id, as the base's own card says it."""
    lora_has_alpha: ClassVar[bool] = False
    """Whether the stock pipeline reads a LoRA's scale from `.alpha`; else a saved LoRA's is in its weights."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """The pipeline's text encoders."""
    sees_pictures: ClassVar[bool] = False
    """Whether the text encoder reads the source too."""
    one_prompt_a_call: ClassVar[bool] = True
    """Whether the pipeline's own call takes one prompt at a time, and a list of pictures as its references."""
    input_layer: ClassVar[str] = "x_embedder"
    """The transformer's layer that noisy and reference tokens enter by."""
    default_guidance: ClassVar[float | None] = None
    usual: ClassVar[Mapping[str, Any]] = {}
    """Where `usual_call` differs."""

    def __init__(
        self,
        pipeline: Any,
        resolution: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        max_sequence_length: int = 512,
        solver: Solver | None = None,
        true_cfg_scale: float = 1.0,
        negative_prompt: str = "",
        cache: ConditionCache | None = None,
        batch_guidance: bool = False,
        late: LateEncoders | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.resolution = resolution
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = self.default_guidance if guidance_scale is None else guidance_scale
        self.max_sequence_length = max_sequence_length
        self.solver = solver
        self.true_cfg_scale = true_cfg_scale
        self.negative_prompt = negative_prompt
        self.cache = cache
        self.batch_guidance = batch_guidance
        self.late = late
        self._offloads: list[UserCpuOffloadHook] = []
        self._device: torch.device | None = None
        if solver is not None and not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"solver: got {solver!r} with a pipeline whose scheduler is {type(pipeline.scheduler).__name__}, "
                "expected FlowMatchEulerDiscreteScheduler, whose noise levels the solver takes over; leave solver "
                "unset to step with the pipeline's own"
            )
        self.multiple = pipeline.vae_scale_factor * 2
        if resolution < self.multiple:
            raise ValueError(f"resolution: got {resolution}, expected at least {self.multiple} pixels for this model")

    @classmethod
    def usual_call(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """How a model is meant to be drawn with, in the words of this class, by what its `model_index.json` holds."""
        common = {"resolution": 1024, "num_inference_steps": 50, "max_sequence_length": 512}
        guidance = {"guidance_scale": cls.default_guidance, "true_cfg_scale": 1.0, "negative_prompt": ""}
        return common | guidance | dict(cls.usual)

    def with_steps(self, num_inference_steps: int) -> Self:
        """The same editor, models and cache shared, with another number of steps."""
        other = copy.copy(self)
        other.num_inference_steps = num_inference_steps
        return other

    # -------------------------------------------------------------------------------- what a model's file says

    @property
    def cfg_scale(self) -> float:
        """The scale of real guidance, two predictions combined; none at 1 or below."""
        return self.true_cfg_scale

    @abstractmethod
    def instruction_weights(self, prompt: str, words: Sequence[str] | None = None) -> Tensor:
        """1 for the tokens of the instruction, or of these words of it, `[tokens]`; aligned with the text's end.

        Raises:
            ValueError: words that the instruction, cut to its length, does not have.
        """

    @abstractmethod
    def _predict(self, model: nn.Module, latents: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """What the model answers, `[batch, tokens, channels]`, without guidance; all in the conditions' dtype.

        Args:
            time: `[batch]` in [0, 1].
        """

    @abstractmethod
    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Pictures `[batch, 3, height, width]` in [-1, 1] of clean latents in the VAE's dtype."""

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) at which the model reads the source of an output of this size."""
        return height, width

    def _shift(self, tokens: int) -> float:
        """`mu` of the scheduler's dynamic shift."""
        config = self.pipeline.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def _sigmas(self) -> np.ndarray | None:
        """Noise levels before the shift, or None where the scheduler makes its own."""
        return np.linspace(1.0, 1 / self.num_inference_steps, self.num_inference_steps)

    def _guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        return negative + self.cfg_scale * (positive - negative)

    def call_arguments(self, height: int, width: int) -> dict[str, Any]:
        """What the pipeline's own call takes to draw as this editor does, of a picture that `resized` has made."""
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.num_inference_steps,
            "max_sequence_length": self.max_sequence_length,
        }

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The picture to hand to the pipeline's own call, for an output of this size."""
        return self.pipeline.image_processor.resize(image, height, width)

    # -------------------------------------------------------------------------------- sizes

    def size_for(self, image: Image.Image) -> tuple[int, int]:
        """The (height, width) at which this picture is edited.

        Raises:
            ValueError: the picture is too long and thin to be one token high or wide.
        """
        height, width = fit_size(image.height, image.width, self.resolution**2, self.multiple)
        if not height or not width:
            raise ValueError(
                f"resolution: got {self.resolution} for a picture of {image.width}×{image.height}, expected at least "
                f"{self.multiple} pixels on its short side; raise it, or crop the picture"
            )
        return height, width

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a picture."""
        return height // self.multiple, width // self.multiple

    @property
    def channels(self) -> int:
        """Of a token."""
        return int(self.pipeline.transformer.config.in_channels)

    # -------------------------------------------------------------------------------- encode

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
        size = sizes.pop()
        read: dict[tuple[str, int], dict[str, Tensor]] = {}

        def text(prompt: str, image: Image.Image) -> dict[str, Tensor]:
            seen = image if self.sees_pictures else None
            key = (prompt, id(seen))
            if key not in read:
                read[key] = self._text(prompt, seen, size, cache_images or not self.sees_pictures)
            return read[key]

        texts = [text(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        negatives = [text(self.negative_prompt, image) if self.cfg_scale > 1 else {} for image in images]
        for text_encoder in self._offloads:
            text_encoder.offload()
        chosen: Sequence[Sequence[str] | None] = words or [None] * len(prompts)
        weights = [self.instruction_weights(prompt, some) for prompt, some in zip(prompts, chosen, strict=True)]
        reference, parts = self.reference_size(*size), []
        for image, positive, negative, weight in zip(images, texts, negatives, weights, strict=True):
            embeds = positive["prompt_embeds"]
            source = self._picture(image, *size, embeds.dtype, cache_images)
            parts.append(
                Conditions(
                    positive,
                    as_long_as(weight, embeds.shape[1]).unsqueeze(0),
                    source,
                    *size,
                    negative,
                    None if reference == size else self._picture(image, *reference, embeds.dtype, cache_images),
                    None if reference == size else self.grid_for(*reference),
                )
            )
        return Conditions.concatenate(parts)

    # -------------------------------------------------------------------------------- integrate

    def schedule(self, height: int, width: int) -> Schedule:
        """Sigmas and timesteps at this size, shifted as the pipeline does, and a solver that stands at the first."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        rows, columns = self.grid_for(height, width)
        timesteps, _ = retrieve_timesteps(
            scheduler, self.num_inference_steps, self.device, sigmas=self._sigmas(), mu=self._shift(rows * columns)
        )
        scheduler.set_begin_index(0)
        levels = scheduler.sigmas.to(timesteps.device, torch.float32)
        solver = scheduler if self.solver is None else make_solver(self.solver, levels)
        return Schedule(levels, timesteps, 2 if self.solver == "heun" else 1, solver)

    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """The model's velocity `[batch, tokens, channels]` at noisy latents.

        Args:
            model: the transformer, wrapped as it is trained.
            latents: `[batch, tokens, channels]`, any floating dtype; the model sees the conditions' dtype.
            timestep: `[batch]`, the schedule's timesteps in [0, 1000].
            conditions: of the same batch.
        """
        latents = latents.to(conditions.device, conditions.dtype)
        time = timestep.to(conditions.device, conditions.dtype) / 1000
        if not conditions.negative:
            return self._predict(model, latents, time, conditions)
        halves = conditions.halves()
        if self.batch_guidance:
            both = Conditions.concatenate(halves)
            return self._guide(*self._predict(model, latents.repeat(2, 1, 1), time.repeat(2), both).chunk(2))
        positive = self._predict(model, latents, time, halves[0])
        with unrecorded():
            return self._guide(positive, self._predict(model, latents, time, halves[1]))

    def attention(self, options: AttentionOptions | None = None) -> AttentionRecorder:
        """A recorder of the transformer's attention; refuses blocks that it does not have."""
        options = options or AttentionOptions()
        return AttentionRecorder(self.pipeline.transformer, options.blocks, options.direction)

    # -------------------------------------------------------------------------------- decode

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Pictures of clean latents `[batch, tokens, channels]`."""
        pixels = self._decode(latents.to(self.pipeline.vae.dtype), height, width)
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def decode_tensor(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The same before rounding, fp32 `[batch, 3, height, width]` in [0, 1], with a gradient."""
        return (self._decode(latents.to(self.pipeline.vae.dtype), height, width).float() / 2 + 0.5).clamp(0, 1)
