"""A diffusers pipeline with a region: `mask_image`, groups of candidates from one call, attention on the region.

One mixin for all of them. Without the new arguments every call goes straight to diffusers, so its output keeps every
bit. With a mask, candidates start from region-decoupled noise (`maths.noise`): alike outside the region, different
inside. A saved folder names diffusers' own class, so that anyone opens it without this package.
"""

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines import auto_pipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..inputs.masks import mask_to_tensor, split_masks
from ..maths.noise import perturb, region_strength
from ..maths.regions import check_mask, to_tokens
from .attention import AttentionOptions, Concentration

if TYPE_CHECKING:
    from .base import FlowEditor

_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


@dataclass
class RegionDecoupledPipelineOutput(BaseOutput):
    """What a call with a mask or `output_attention=True` returns.

    Args:
        images: as in diffusers' own output; the candidates of one prompt stand together.
        attention: concentration of the instruction's attention on the region, one value per image, if asked for.
        attention_maps: `[images, rows, columns]` over the token grid, each summing to 1, if asked for.
    """

    images: Any
    attention: Concentration | None = None
    attention_maps: Tensor | None = None


_DOC = """Edit pictures; everything that diffusers' `{stock}` accepts is accepted, and means the same.

        Args:
            mask_image: region to edit, 1 or 255 = edit: a PIL image, array or tensor `[height, width]` of the source's
                size, or one for each prompt as a list or a batch (`[prompts, height, width]`, with or without a
                channel). Switches region-decoupled noise on: the candidates of a prompt (`num_images_per_prompt`) share
                a base noise, which is the one that stock diffusers would draw from `generator`, or `latents`, and
                differ from it by `edit_strength` inside and `keep_strength` outside the region. Images, masks,
                `latents` and generators then come one for each prompt, and each prompt's candidates are made from its
                own, whatever the stock pipeline does with several; or generators come one for each candidate: a
                prompt's first one draws the base, then each its difference. The mask steers the noise alone: the source
                is not pasted back outside.
            edit_strength: in [0, 1]; 0 repeats the base noise, 1 draws independent noise.
            keep_strength: in [0, 1]; 0 keeps the background's noise bit by bit.
            output_attention: also measure how much of the instruction's attention falls on the region (needs
                `mask_image`). With guidance the negative prompt's pass is not measured. A compiled transformer runs
                uncompiled in such a call.
            attention_options: which blocks, steps and direction to measure; all blocks and steps, from the instruction
                to the image, by default.
            attention_words: words of the instruction to measure, such as "the hat": a string or a list for one prompt,
                a list of lists for several; all of it by default.

        Returns:
            `RegionDecoupledPipelineOutput` with a mask, or its three fields as a tuple if `return_dict=False`; without
            a mask diffusers' own output.

        Raises:
            ValueError: a mask that is empty or of another size than its source, strengths outside [0, 1], images,
                masks, generators or `latents` of a wrong number, `output_attention` without a mask, attention's options
                without it, that read no step or name a column, words that a prompt does not have.
        """


def with_region(stock: type) -> Callable[..., Any]:
    """The `__call__` of a diffusers pipeline, with a region: its signature and ours in one."""
    theirs = inspect.signature(stock.__call__)

    def __call__(
        self: Any,
        *args: Any,
        mask_image: Any = None,
        edit_strength: float = 0.5,
        keep_strength: float = 0.0,
        output_attention: bool = False,
        attention_options: AttentionOptions | None = None,
        attention_words: str | list[str] | list[list[str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        bound = theirs.bind(self, *args, **kwargs)
        bound.apply_defaults()
        call = {name: value for name, value in bound.arguments.items() if name != "self"}
        options = _check_attention(call, mask_image, output_attention, attention_options, attention_words)
        if mask_image is None:
            return stock.__call__(self, *args, **kwargs)
        with torch.no_grad():
            return self._edit_region(
                stock.__call__, call, mask_image, edit_strength, keep_strength, options, attention_words
            )

    ours = [p for p in inspect.signature(__call__).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    __call__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *ours])  # type: ignore[attr-defined]
    __call__.__doc__ = _DOC.format(stock=stock.__name__)
    return __call__


def _check_attention(
    call: dict[str, Any],
    mask_image: Any,
    wanted: bool,
    options: AttentionOptions | None,
    words: Any,
) -> AttentionOptions | None:
    """What to measure, None where nothing is."""
    if not wanted:
        if options is not None or words is not None:
            raise ValueError(
                "attention_options, attention_words: expected output_attention=True with them, which reads them"
            )
        return None
    if mask_image is None:
        raise ValueError("output_attention: got True without mask_image, expected a region to measure on")
    options = options or AttentionOptions()
    if options.words_column is not None:
        raise ValueError(
            f"attention_options.words_column: got {options.words_column!r}, expected none, as a call has no "
            "columns; give the words themselves as attention_words"
        )
    if not options.reads(_number_of_steps(call)):
        raise ValueError(
            f"attention_options.steps_range: got {options.steps_range}, expected shares that hold at least one of "
            f"the {_number_of_steps(call)} steps"
        )
    if words is not None and not all(map(any, _words(words))):
        raise ValueError(f"attention_words: got {words!r}, expected words of each prompt")
    return options


def _number_of_steps(call: dict[str, Any]) -> int:
    return call["num_inference_steps"] if call["sigmas"] is None else len(call["sigmas"])


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


def _join(outputs: list[Any]) -> Any:
    """The pictures of several calls as one call would return them."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return np.concatenate(outputs) if isinstance(outputs[0], np.ndarray) else [x for output in outputs for x in output]


class RegionDecoupled:
    """What a pipeline class of diffusers needs besides itself; its `__call__` is `with_region(stock)`.

    A class says how its model draws noise (`_draw`), how large its pictures will be (`_output_size`), whether a call is
    guided (`_is_guided`) and how `latents` come (`_to_tokens`, `_from_tokens`); its editor knows the rest.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where diffusers has no inpainting of its own for a model, its `AutoPipelineForInpainting` opens this one."""
        super().__init_subclass__(**kwargs)
        stock = next((c.__name__ for c in cls.__mro__ if c.__module__.startswith("diffusers.")), "")
        if name := auto_pipeline._get_model(stock):
            auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING.setdefault(name, cls)

    editor_class: ClassVar[type["FlowEditor"]]
    edited_reference: ClassVar[int] = 0
    """Which of a prompt's pictures is the one that is edited, where there may be several."""

    def to_json_string(self) -> str:
        """The pipeline's index, naming diffusers' class so that stock diffusers opens the folder."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # -------------------------------------------------------------------------------- what a class says

    def _output_size(self, pictures: Any, call: dict[str, Any]) -> tuple[int, int]:
        """(height, width) in pixels of what a call makes of one prompt's pictures."""
        raise NotImplementedError

    def _draw(self, count: int, height: int, width: int, dtype: torch.dtype | None, generator: Any) -> Tensor:
        """Packed noise, as the stock call draws it; in the text encoder's dtype by default."""
        raise NotImplementedError

    def _is_guided(self, call: dict[str, Any]) -> bool:
        """Whether each step asks the model a second time, for the negative prompt."""
        raise NotImplementedError

    def _texts_read(self, call: dict[str, Any]) -> Any:
        """The instruction(s) whose tokens ask for attention."""
        return call["prompt"]

    def _to_tokens(self, latents: Tensor) -> Tensor:
        """Packed, of what the stock call takes as `latents`."""
        return latents

    def _from_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The other way round."""
        return tokens

    # -------------------------------------------------------------------------------- a call with a mask

    def _edit_region(
        self,
        stock_call: Callable[..., Any],
        call: dict[str, Any],
        mask_image: Any,
        edit_strength: float,
        keep_strength: float,
        options: AttentionOptions | None,
        words: Any,
    ) -> Any:
        if call["image"] is None:
            raise ValueError("image: got None, expected the source picture(s) that mask_image belongs to")
        group, return_dict = call["num_images_per_prompt"] or 1, call["return_dict"]
        pictures, masks = self._align(call, mask_image)
        (height, width), count = self._common_size(pictures, call), len(masks)
        editor = self.editor_class(
            self, max(height, width), _number_of_steps(call), max_sequence_length=call["max_sequence_length"]
        )
        grid = editor.grid_for(height, width)
        if words is not None and len(_words(words)) != count:
            raise ValueError(f"attention_words: got {words!r}, expected words of each of the {count} prompts")
        regions = torch.stack([to_tokens(mask, grid, "max") for mask in masks]).repeat_interleave(group, dim=0)
        strength = region_strength(regions, edit_strength, keep_strength).unsqueeze(-1)
        noise = self._group_noise(strength, count, group, (height, width), grid, call)
        covered = torch.stack([to_tokens(mask, grid, "mean") for mask in masks]).repeat_interleave(group, dim=0)

        outputs, readings, maps = [], [], []
        recorder = None if options is None else editor.attention(options)
        prompts_a_call = 1 if editor.one_prompt_a_call else count
        for start in range(0, count, prompts_a_call):
            part = slice(start, start + prompts_a_call)
            mine = slice(start * group, part.stop * group)
            arguments = self._arguments(call, pictures[part], part, count, group)
            recording: Any = nullcontext()
            if recorder is not None and options is not None:
                some = None if words is None else _words(words)[part]
                recording = recorder.record(
                    covered[mine],
                    self._text_weights(editor, arguments, some, len(covered[mine])),
                    maps=True,
                    steps=options.reads(editor.num_inference_steps),
                    order=getattr(self.scheduler, "order", 1),  # type: ignore[attr-defined]
                    passes=1 + self._is_guided(call),
                )
            with recording:
                latents = self._from_tokens(noise[mine], grid)
                outputs.append(stock_call(self, **arguments, latents=latents, return_dict=False)[0])
            if recorder is not None:
                readings.append(recorder.concentration())
                maps.append(recorder.attention_maps().unflatten(-1, grid))
        images = _join(outputs)
        attention = Concentration.concatenate(readings) if readings else None
        attention_maps = torch.cat(maps) if maps else None
        if not return_dict:
            return images, attention, attention_maps
        return RegionDecoupledPipelineOutput(images, attention, attention_maps)

    def _align(self, call: dict[str, Any], mask_image: Any) -> tuple[Any, list[Tensor]]:
        """Images and masks, one of each per prompt, after checking that they belong together.

        Where the stock call takes a list of pictures as one prompt's references, so does each entry here, as a list;
        the mask belongs to the one that the output takes its size from.
        """
        prompt, embeds = call["prompt"], call["prompt_embeds"]
        if prompt is None and embeds is None:
            raise ValueError("prompt: got neither prompt nor prompt_embeds, expected one of them")
        given: Any = embeds if prompt is None else prompt
        count = 1 if isinstance(given, str) else len(given)
        pictures = call["image"]
        pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
        if self.editor_class.one_prompt_a_call and count == 1:
            pictures = [list(pictures)]
        if len(pictures) == 1 and count > 1:
            pictures = _repeat_each(pictures, count)
        given = split_masks(mask_image, "mask_image")
        given = given * count if len(given) == 1 else given
        for name, values in (("image", pictures), ("mask_image", given)):
            if len(values) not in (1, count):
                raise ValueError(f"{name}: got {len(values)}, expected one, or one for each of the {count} prompts")
        generators, candidates = call["generator"], count * (call.get("num_images_per_prompt") or 1)
        if isinstance(generators, list) and len(generators) not in (1, count, candidates):
            expected = f"one, or one for each of the {count} prompts or {candidates} candidates"
            raise ValueError(f"generator: got {len(generators)}, expected {expected}")
        if self.editor_class.one_prompt_a_call:
            pictures = [each if isinstance(each, list) else [each] for each in pictures]
        masks = [mask_to_tensor(mask, f"mask_image[{i}]") for i, mask in enumerate(given)]
        edited = [each[self.edited_reference] if isinstance(each, list) else each for each in pictures]
        for i, (mask, picture) in enumerate(zip(masks, edited, strict=True)):
            check_mask(mask, self._picture_size(picture), f"mask_image[{i}]")
        return pictures, masks

    def _picture_size(self, picture: Any) -> tuple[int, int] | None:
        """(height, width) in pixels of anything that diffusers takes as an image; None for ready latents."""
        if isinstance(picture, Image.Image):
            return picture.height, picture.width
        if isinstance(picture, Tensor):  # `[..., channels, height, width]`
            latent_channels = getattr(self, "latent_channels", None)
            return None if picture.shape[-3] == latent_channels else (picture.shape[-2], picture.shape[-1])
        height, width = (picture.shape if picture.ndim == 2 else picture.shape[:-1])[-2:]
        return height, width

    def _common_size(self, pictures: Any, call: dict[str, Any]) -> tuple[int, int]:
        sizes = sorted({self._output_size(each, call) for each in pictures})
        if len(sizes) > 1:
            raise ValueError(
                f"image: got pictures that are edited at {sizes}, expected one size per call with a mask; give height "
                "and width, or make a call for each"
            )
        return sizes[0]

    def _group_noise(
        self,
        strength: Tensor,
        prompts: int,
        group: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        call: dict[str, Any],
    ) -> Tensor:
        """Packed noise of `prompts · group` candidates; draws the base as diffusers would, then the differences."""
        generator, embeds, base = call["generator"], call["prompt_embeds"], call["latents"]
        dtype = None if embeds is None else embeds.dtype  # diffusers draws in the text's dtype
        each = isinstance(generator, list) and len(generator) == prompts * group > prompts  # one for each candidate

        def draw(count: int) -> Tensor:
            alone = isinstance(generator, list) and len(generator) == 1  # serves all prompts
            mine = generator[::group] if each and count == prompts else generator
            return self._draw(count, *size, dtype, mine[0] if alone else mine)

        if base is None:
            base = draw(prompts)
        else:
            channels = self.transformer.config.in_channels  # type: ignore[attr-defined]
            tokens = torch.empty(prompts, strength.shape[1], channels, device="meta")
            if base.shape != (expected := self._from_tokens(tokens, grid).shape):
                raise ValueError(
                    f"latents: got shape {tuple(base.shape)}, expected {tuple(expected)}, one noise for each prompt: "
                    "with a mask the candidates of a prompt share it"
                )
            base = self._to_tokens(base)
        if isinstance(generator, list) and not each:
            delta = torch.cat([draw(prompts) for _ in range(group)]).unflatten(0, (group, prompts)).transpose(0, 1)
            delta = delta.flatten(0, 1)
        else:
            delta = draw(prompts * group)
        base = base.to(delta.device, delta.dtype).repeat_interleave(group, dim=0).float()
        return perturb(base, delta.float(), strength.to(delta.device)).to(delta.dtype)

    def _arguments(self, call: dict[str, Any], pictures: Any, part: slice, count: int, group: int) -> dict[str, Any]:
        """The stock call's arguments for some of the prompts."""
        one = self.editor_class.one_prompt_a_call
        arguments = {k: v for k, v in call.items() if k not in ("generator", "latents", "return_dict")}
        arguments["num_images_per_prompt"] = group if one else 1
        arguments["image"] = pictures[0] if one else _repeat_each(pictures, group)
        for name, value in call.items():
            if value is not None and (name in _TEXTS or "prompt_embeds" in name):
                each = ([value] * count if isinstance(value, str) else value)[part]
                arguments[name] = each if one else _repeat_each(each, group)
        return arguments

    def _text_weights(self, editor: "FlowEditor", arguments: dict[str, Any], words: Any, rows: int) -> Tensor:
        """`[candidates, text tokens]`: which tokens ask for attention."""
        texts = self._texts_read(arguments)
        if texts is None and words is not None:
            raise ValueError(
                f"attention_words: got {words!r} with prompt_embeds alone, expected the prompts they are of"
            )
        if texts is None:
            return torch.ones(rows, arguments["prompt_embeds"].shape[1])
        each = rows // len(texts)
        chosen = [None] * len(texts) if words is None else _repeat_each(words, len(texts) // len(words))
        weights = torch.stack(
            [editor.instruction_weights(text, some) for text, some in zip(texts, chosen, strict=True)]
        )
        return self._align_weights(weights, arguments).repeat_interleave(each, dim=0)

    def _align_weights(self, weights: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Weights of the tokenized instructions, as long as the text that the model reads."""
        return weights
