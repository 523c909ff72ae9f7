"""Editors of true (or tiny) size with random weights, without text encoders and without a download, that train.

What `rcgrpo plan` knows of a model's configuration is built and filled; instructions become random numbers of the
right shape. What they draw means nothing, what they cost does.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rcgrpo.planning.known import KNOWN, Parts
from rcgrpo.planning.model import Shape, block_counts, make_editor
from rcgrpo.training import trainer

KONTEXT, KLEIN = "black-forest-labs/FLUX.1-Kontext-dev", "black-forest-labs/FLUX.2-klein-4B"
_SMALL_VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
_SMALL = {
    KONTEXT: {"num_attention_heads": 1, "joint_attention_dim": 64, "pooled_projection_dim": 32},
    KLEIN: {"num_attention_heads": 1, "joint_attention_dim": 64},
}


def parts_of(model: str, tiny: bool) -> Parts:
    """A model's configurations; with `tiny` one head, two blocks, a small VAE."""
    if not tiny:
        return KNOWN[model]
    blocks = dict.fromkeys(block_counts(KNOWN[model]), 1)
    small = {"transformer": {**_SMALL[model], **blocks}, "vae": _SMALL_VAE}
    return {name: {**part, **small.get(name, {})} for name, part in KNOWN[model].items()}


def random_pipeline(parts: Parts, device: torch.device, blocks: Mapping[str, int] | None = None) -> Any:
    """On the device, the transformer in bf16 and the VAE in fp32; with so many blocks, all by default."""
    pipeline = make_editor(parts, blocks or block_counts(parts), Shape(64)).pipeline
    for part in (pipeline.transformer, pipeline.vae):
        part.to_empty(device=device)
        for name, weight in part.named_parameters():
            nn.init.normal_(weight.data, std=0.02) if weight.ndim > 1 else weight.data.fill_("bias" not in name)
        for name, kept in part.named_buffers():
            kept.fill_("var" in name)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0))
    return pipeline


@contextmanager
def without_text_encoders(parts: Parts, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within it trainers take such pipelines, and encode instructions as random numbers."""
    config = parts["transformer"]

    def embed(editor: Any, prompt: str, picture: Any, size: Any) -> dict[str, Tensor]:
        made = torch.Generator().manual_seed(len(prompt))
        shapes = {"prompt_embeds": (1, editor.max_sequence_length, config.get("joint_attention_dim", 4096))}
        if "pooled_projection_dim" in editor.pipeline.transformer.config:
            shapes["pooled_prompt_embeds"] = (1, config.get("pooled_projection_dim", 768))
        return {k: torch.randn(shape, generator=made).to(editor.device, dtype) for k, shape in shapes.items()}

    def weigh(editor: Any, prompt: str, words: Any = None) -> Tensor:
        return (torch.arange(editor.max_sequence_length) < 16).float()

    kind = type(make_editor(parts, dict.fromkeys(block_counts(parts), 1), Shape(64)))
    with (
        patch.object(kind, "_encode_text", embed),
        patch.object(kind, "instruction_weights", weigh),
        patch.object(kind, "encoders", ()),
        patch.object(trainer, "load_pipeline", lambda pipeline, _: pipeline),
    ):
        yield
