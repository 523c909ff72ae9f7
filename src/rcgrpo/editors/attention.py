"""How much of the instruction's attention falls on the region, exactly and without the attention matrix.

The editors' transformers attend jointly over [text | noisy image | reference]. What is asked is how a text token's
attention is shared out among the noisy-image tokens, and there the softmax's total cancels: attending once more, with
the instruction's queries, over the noisy-image keys alone gives the same shares. Attention is linear in its values, so
with the region as value its share comes out directly. Padding does not ask, so memory is linear in the picture's
tokens. The other way round, each noisy-image token is asked what share of its attention on the text falls on the
instruction.

The recorder listens with forward hooks to what each attention module is called with (the rotary embedding, the text's
mask) and to the normalised queries and keys inside it. It replaces no processor, so a user's attention back-end, fused
projections and LoRA layers stay as they are and the model's output keeps every bit. It records only under
`torch.no_grad()`: during training with gradient checkpointing, layers run twice. A compiled transformer runs uncompiled
meanwhile: compiled code calls no new hooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
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


def attention_shares(query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """`softmax(q kᵀ / √d) · values`, averaged over heads.

    Args:
        query: `[batch, rows, heads, d]`, normalised and rotated.
        key: `[batch, keys, heads, d]`, likewise, of the tokens that share the attention among them.
        values: `[batch, keys, groups]`, how much of each token belongs to each group.
        mask: boolean `[batch, keys]`, False for tokens that get no attention.

    Returns:
        `[batch, rows, groups]` fp32: the share of a row's attention that falls on each group.
    """
    query, key, values = query.transpose(1, 2), key.transpose(1, 2), values.to(query.dtype).unsqueeze(1)
    mask = None if mask is None else mask[:, None, None]
    if query.device.type == "cpu":  # few rows: the fused kernel of the CPU takes twice the time
        query, key = query.contiguous(), key.contiguous()
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(-1) @ values
    else:
        shares = F.scaled_dot_product_attention(query, key, values.expand(-1, query.shape[1], -1, -1), mask)
    return shares.float().mean(1)


def as_turns(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One complex factor for each pair of features, `[tokens, d / 2]`, text first, of what a block is called with.

    FLUX's blocks get cosines and sines, `[tokens, d]` each; Qwen-Image's get complex factors, the picture's and the
    text's.
    """
    if rotary[0].is_complex():
        return torch.cat([rotary[1], rotary[0]])
    cos, sin = rotary  # each value twice, once for each feature of a pair
    return torch.complex(cos[:, ::2].float(), sin[:, ::2].float())


def rotate(states: Tensor, turns: Tensor) -> Tensor:
    """A rotary embedding as a product of complex numbers, several times quicker than with real ones.

    Args:
        states: `[batch, tokens, heads, d]`, neighbouring features are a pair.
        turns: complex `[tokens, d / 2]`, one factor for each pair.
    """
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2).to(states.dtype)


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

    @classmethod
    def concatenate(cls, parts: Sequence["Concentration"]) -> "Concentration":
        """One batch of several."""
        readings = zip(*((part.mass, part.density, part.contrast) for part in parts), strict=True)
        return cls(*(torch.cat(reading) for reading in readings))


Direction = Literal["text_to_image", "image_to_text"]


def check_direction(direction: str) -> None:
    """Refuse what is no `Direction`."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction: got {direction!r}, expected one of {', '.join(get_args(Direction))}")


@dataclass(frozen=True)
class AttentionOptions:
    """Which part of the attention is read.

    Args:
        blocks: numbers of blocks, through the double and then the single ones; all by default.
        steps_range: share of the ODE's steps, from and to, each in [0, 1].
        words_column: the edits' column with the words of the instruction to read (a string, or a list of them); all of
            the instruction by default.
        direction: `"text_to_image"`, how the instruction's tokens share out their attention among the noisy-image
            tokens; or `"image_to_text"`, the share of each noisy-image token's attention on the text that falls on the
            instruction's tokens, made to sum to 1 over the image.

    Raises:
        ValueError: another direction, or no two shares in order.
    """

    blocks: Sequence[int] | None = None
    steps_range: tuple[float, float] = (0.0, 1.0)
    words_column: str | None = None
    direction: Direction = "text_to_image"

    def __post_init__(self) -> None:
        check_direction(self.direction)
        shares = tuple(self.steps_range)
        if len(shares) != 2 or not 0 <= shares[0] <= shares[1] <= 1:
            raise ValueError(f"steps_range: got {shares}, expected two shares of the steps in order, such as (0, 0.5)")

    def reads(self, steps: int) -> range:
        """Those of so many steps that are read, which may be none."""
        first, last = (round(share * steps) for share in self.steps_range)
        return range(first, last)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """A transformer's blocks in the order in which they run: double ones, then, where it has some, single ones."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


class AttentionRecorder:
    """Records attention of instruction tokens on noisy-image tokens while a transformer runs without gradient.

        recorder = AttentionRecorder(transformer)
        with recorder.record(region, text_weights):
            rollout(...)
        recorder.concentration().density

    Args:
        transformer: of FLUX.1, FLUX.2 or Qwen-Image; LoRA layers inside are fine.
        blocks, direction: as in `AttentionOptions`.

    Raises:
        ValueError: blocks that the transformer does not have, or another direction.
    """

    def __init__(
        self,
        transformer: nn.Module,
        blocks: Sequence[int] | None = None,
        direction: Direction = "text_to_image",
    ) -> None:
        modules = blocks_of(transformer)
        check_direction(direction)
        self._asks_text = direction == "text_to_image"
        chosen = range(len(modules)) if blocks is None else blocks
        if not chosen or any(not 0 <= block < len(modules) for block in chosen):
            raise ValueError(f"attention_blocks: got {list(chosen)}, expected block numbers in 0..{len(modules) - 1}")
        self._attentions = [modules[block].attn for block in chosen]
        self._transformer = transformer
        self._sum: Tensor | None = None
        self._readings = 0

    @contextmanager
    def record(
        self,
        region: Tensor,
        text_weights: Tensor,
        maps: bool = False,
        steps: range | None = None,
        order: int = 1,
        passes: int = 1,
    ) -> Iterator["AttentionRecorder"]:
        """Record forwards inside the context; the context starts a new record.

        Args:
            region: `[batch, image tokens]` in [0, 1], the covered share of each token.
            text_weights: `[batch, text tokens]` ≥ 0, 0 for padding; rows need not be normalised.
            maps: keep the whole map over image tokens (for pictures) instead of the region's mass alone.
            steps: which steps to read, counted from the first forward in here; all by default.
            order: calls of the model in a step.
            passes: forwards of a call, of which the first is read: 2 where guidance asks again for a negative prompt.
        """
        self._region, self._maps, self._steps = region, maps, steps
        self._order, self._passes = order, passes
        self._rotary: Any = None
        weights = text_weights / text_weights.sum(-1, keepdim=True).clamp(min=1e-12)
        self._text_length = weights.shape[1]
        # Padding asks nothing, and most of a text is padding. One row stays where there is nothing else.
        asking = (weights > 0).any(0).nonzero().squeeze(-1)
        self._rows = asking if len(asking) else torch.zeros(1, dtype=torch.long, device=weights.device)
        self._row_weights = weights[:, self._rows]
        self._values = torch.eye(region.shape[1]).expand(len(region), -1, -1) if maps else region.unsqueeze(-1)
        self._text = weights.unsqueeze(-1)
        self._sum, self._readings, self._forwards = None, 0, 0
        handles = [self._transformer.register_forward_pre_hook(self._count)]
        for attention in self._attentions:
            handles.append(attention.register_forward_pre_hook(self._see_arguments, with_kwargs=True))
            seen: dict[str, Tensor] = {}
            query, key = "norm_q", "norm_k"
            if getattr(attention, "norm_added_q", None) is not None:  # a double block's text has norms of its own
                query, key = ("norm_added_q", key) if self._asks_text else (query, "norm_added_k")
            for part, name in (("query", query), ("key", key)):
                handles.append(getattr(attention, name).register_forward_hook(self._make_hook(seen, part)))
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, args: Any) -> None:
        self._forwards += self._listens

    def _see_arguments(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["image_rotary_emb"] is not self._rotary:  # one for all blocks of a forward
            self._rotary = kwargs["image_rotary_emb"]
            self._turns = as_turns(self._rotary)
        self._text_mask = kwargs.get("encoder_hidden_states_mask")

    @property
    def _listens(self) -> bool:
        return _LISTENING.get() and not torch.is_grad_enabled()

    def _make_hook(self, seen: dict[str, Tensor], part: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            call, number = divmod(self._forwards - 1, self._passes)
            skipped = number > 0 or (self._steps is not None and call // self._order not in self._steps)
            if skipped or not self._listens:
                return
            seen[part] = output
            if len(seen) == 2:
                self._read(seen["query"], seen["key"])
                seen.clear()

        return hook

    def _read(self, query: Tensor, key: Tensor) -> None:
        """One block's queries and keys: of one kind of tokens in a double block, of all of them in a single one."""
        batch = len(self._region)  # where both halves of guidance are one batch, the negative one comes last
        query, key = query[:batch], key[:batch]
        start, tokens = self._text_length, self._region.shape[1]
        if self._values.device != key.device:
            moved = (tensor.to(key.device) for tensor in (self._rows, self._row_weights, self._values, self._text))
            self._rows, self._row_weights, self._values, self._text = moved
        image, joint = slice(start, start + tokens), key.shape[1] == len(self._turns)
        if self._asks_text:
            query = rotate(query[:, self._rows], self._turns[self._rows])
            key = rotate(key[:, image] if joint else key[:, :tokens], self._turns[image])
            shares = attention_shares(query, key, self._values)
            reading = torch.einsum("brg,br->bg", shares, self._row_weights)
        else:
            query = rotate(query[:, image] if joint else query[:, :tokens], self._turns[image])
            key = rotate(key[:, :start], self._turns[:start])
            mask = None if self._text_mask is None else self._text_mask[:batch].bool()
            shares = attention_shares(query, key, self._text, mask)
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)
            reading = torch.einsum("bpg,bpo->bg", self._values, shares)
        self._sum = reading if self._sum is None else self._sum + reading
        self._readings += 1

    def _mean(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("attention: nothing was recorded; run the transformer inside `record`, without gradient")
        return (self._sum / self._readings).cpu()

    def concentration(self) -> Concentration:
        """Means over what was read: blocks, steps, heads and instruction tokens; for each sample of the batch."""
        region = self._region.cpu()
        mass = (self._mean() * region).sum(-1) if self._maps else self._mean().squeeze(-1)
        return Concentration.from_mass(mass, region)

    def attention_maps(self) -> Tensor:
        """`[batch, image tokens]`, each summing to 1; needs `record(..., maps=True)`."""
        if not self._maps:
            raise RuntimeError("attention maps were not recorded; use `record(..., maps=True)`")
        return self._mean()
