"""How much of the instruction's attention falls on the region, exactly and without the attention matrix.

FLUX attends jointly over [text | noisy image | reference]. Attention is linear in its values, so attending once more
with the text queries alone and *indicators* of the noisy-image tokens as values returns the attention mass on the
region directly, computed by the same fused kernel in memory linear in the sequence.

The recorder listens with forward hooks to the normalised queries and keys inside each attention module and to the
rotary embedding. It replaces no processor, so a user's attention back-end, fused projections, LoRA layers and compiled
kernels stay as they are and the model's output keeps every bit. It records only under `torch.no_grad()`: during
training with gradient checkpointing, layers run twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

_LISTENING = ContextVar("_LISTENING", default=True)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Forwards in here leave no trace in any recorder, such as true CFG's pass of the negative prompt."""
    token = _LISTENING.set(False)
    try:
        yield
    finally:
        _LISTENING.reset(token)


def attention_shares(query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """`softmax(q kᵀ / √d) · values`, each row divided by its total over the values' tokens and averaged over heads.

    Args:
        query: `[batch, rows, heads, d]`, normalised and rotated.
        key: `[batch, keys, heads, d]`, likewise.
        values: `[batch, keys, groups + 1]`; the last column indicates every token that counts (the total).

    Returns:
        `[batch, rows, groups]`: the share of a row's counted attention that falls on each group.
    """
    heads = query.shape[2]
    mass = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        values.to(query.dtype).unsqueeze(1).expand(-1, heads, -1, -1),
    ).float()
    return (mass[..., :-1] / mass[..., -1:].clamp(min=1e-12)).mean(1)


@dataclass(frozen=True)
class Concentration:
    """Three readings of the same attention, `[batch]` each (algorithm section 6).

    `mass` in [0, 1] is the share on the region; `density` is mass per region share, 1 when attention is uniform;
    `contrast` in [0, 1] compares the mean inside with the mean outside, 0.5 when uniform.
    """

    mass: Tensor
    density: Tensor
    contrast: Tensor

    @classmethod
    def from_mass(cls, mass: Tensor, region: Tensor) -> "Concentration":
        """From the mass on a region `[batch, tokens]` in [0, 1] that is not empty."""
        share = region.mean(-1)
        inside = mass / share
        outside = (1 - mass) / (1 - share).clamp(min=1e-12)
        contrast = torch.where(share < 1, inside / (inside + outside), 0.5)
        return cls(mass, inside, contrast)

    def __getitem__(self, index: slice) -> "Concentration":
        return Concentration(self.mass[index], self.density[index], self.contrast[index])


class AttentionRecorder:
    """Records attention of instruction tokens on noisy-image tokens while a FLUX transformer runs without gradient.

        recorder = AttentionRecorder(transformer)
        with recorder.record(region, text_weights):
            rollout(...)
        recorder.concentration().density

    Args:
        transformer: a `FluxTransformer2DModel`; LoRA layers inside are fine.
        blocks: which blocks to read, numbered through the double and then the single ones; all by default.
    """

    def __init__(self, transformer: nn.Module, blocks: Sequence[int] | None = None) -> None:
        modules = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        chosen = range(len(modules)) if blocks is None else blocks
        if not chosen or any(not 0 <= block < len(modules) for block in chosen):
            raise ValueError(f"blocks: got {list(chosen)}, expected block numbers in 0..{len(modules) - 1}")
        self._attentions = [modules[block].attn for block in chosen]
        self._pos_embed = transformer.pos_embed
        self._sum: Tensor | None = None
        self._readings = 0

    @contextmanager
    def record(self, region: Tensor, text_weights: Tensor, maps: bool = False) -> Iterator["AttentionRecorder"]:
        """Record every forward inside the context; the context starts a new record.

        Args:
            region: `[batch, image tokens]` in [0, 1], the covered share of each token.
            text_weights: `[batch, text tokens]` ≥ 0, 0 for padding; rows need not be normalised.
            maps: keep the whole map over image tokens (for pictures) instead of the region's mass alone.
        """
        self._region, self._maps = region, maps
        self._text_weights = text_weights / text_weights.sum(-1, keepdim=True).clamp(min=1e-12)
        self._sum, self._readings = None, 0
        handles = [self._pos_embed.register_forward_hook(self._see_rotary)]
        for attention in self._attentions:
            seen: dict[str, Tensor] = {}
            names = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]
            names = [name for name in names if getattr(attention, name, None) is not None]
            for name in names:
                hook = self._make_hook(seen, name, last=name == names[-1])
                handles.append(getattr(attention, name).register_forward_hook(hook))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _see_rotary(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        self._rotary = output

    def _make_hook(self, seen: dict[str, Tensor], name: str, last: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() or not _LISTENING.get():
                return
            seen[name] = output
            if last:
                self._read(seen)
                seen.clear()

        return hook

    def _read(self, seen: dict[str, Tensor]) -> None:
        text_length = self._text_weights.shape[1]
        if "norm_added_k" in seen:
            query, key = seen["norm_added_q"], torch.cat([seen["norm_added_k"], seen["norm_k"]], dim=1)
        else:
            query, key = seen["norm_q"][:, :text_length], seen["norm_k"]
        cos, sin = self._rotary
        query = apply_rotary_emb(query, (cos[:text_length], sin[:text_length]), sequence_dim=1)
        key = apply_rotary_emb(key, (cos, sin), sequence_dim=1)

        tokens = self._region.shape[1]
        if self._maps:
            columns = torch.eye(tokens, device=key.device).expand(len(key), -1, -1)
        else:
            columns = self._region.to(key.device).unsqueeze(-1)
        values = key.new_zeros(len(key), key.shape[1], columns.shape[-1] + 1, dtype=torch.float32)
        values[:, text_length : text_length + tokens, :-1] = columns
        values[:, text_length : text_length + tokens, -1] = 1
        shares = attention_shares(query, key, values)
        reading = torch.einsum("btg,bt->bg", shares, self._text_weights.to(shares.device))
        self._sum = reading if self._sum is None else self._sum + reading
        self._readings += 1

    def _mean(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("attention: nothing was recorded; run the transformer inside `record`, without gradient")
        return (self._sum / self._readings).cpu()

    def concentration(self) -> Concentration:
        """Means over blocks, steps, heads and instruction tokens, for each sample of the batch."""
        region = self._region.cpu()
        mass = (self._mean() * region).sum(-1) if self._maps else self._mean().squeeze(-1)
        return Concentration.from_mass(mass, region)

    def attention_maps(self) -> Tensor:
        """`[batch, image tokens]`, each summing to 1; needs `record(..., maps=True)`."""
        if not self._maps:
            raise RuntimeError("attention maps were not recorded; use `record(..., maps=True)`")
        return self._mean()
