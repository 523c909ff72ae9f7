"""What a batch of edits is conditioned on, whatever the model: the one thing that travels from encoding to the update.

What a model's own forward wants (pooled embeddings, masks, ...) lies in `text` under names that only its editor's file
knows. Everything else here is read by rollout, policies and trainer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

Texts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conditions:
    """A batch of edits of one picture size; every tensor starts with the batch.

    `text`: the instruction as the model reads it, by its editor's own names; `[batch, text tokens, ...]` where a text
    has tokens. `text_weights` `[batch, text tokens]`: 1 for the instruction's own tokens, 0 for others. `source`
    `[batch, tokens, channels]`: the source's latents on the output's token grid. `height`, `width`: of the output in
    pixels. `negative`: like `text`, of what guidance leads away from; empty without guidance. `references`
    `[batch, reference tokens, channels]` and their `reference_grid` (rows, columns): the source as the model reads it,
    where that is not `source` itself.
    """

    text: Texts
    text_weights: Tensor
    source: Tensor
    height: int
    width: int
    negative: Texts = field(default_factory=dict)
    references: Tensor | None = None
    reference_grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def device(self) -> torch.device:
        """Where the model is asked."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the model is asked."""
        return self.source.dtype

    @property
    def reference_tokens(self) -> Tensor:
        """The source as the model reads it."""
        return self.source if self.references is None else self.references

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            text={name: function(tensor) for name, tensor in self.text.items()},
            negative={name: function(tensor) for name, tensor in self.negative.items()},
            text_weights=function(self.text_weights),
            source=function(self.source),
            references=None if self.references is None else function(self.references),
        )

    def __getitem__(self, part: slice | Tensor) -> Self:
        return self._map(lambda tensor: tensor[part])

    def repeat(self, times: int) -> Self:
        """Each sample `times` times in a row, so that a group's candidates stand together."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def halves(self) -> tuple[Self, Self]:
        """What the two predictions of a guided velocity are conditioned on: the text, and the negative in its place."""
        return replace(self, negative={}), replace(self, text=self.negative, negative={})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One batch of several of one picture size; texts of different lengths are padded with zeros at their ends."""
        first = parts[0]

        def joined(texts: Sequence[Texts]) -> dict[str, Tensor]:
            return {name: _join([text[name] for text in texts]) for name in texts[0]}

        return replace(
            first,
            text=joined([part.text for part in parts]),
            negative=joined([part.negative for part in parts]),
            text_weights=_join([part.text_weights for part in parts]),
            source=torch.cat([part.source for part in parts]),
            references=None if first.references is None else torch.cat([part.reference_tokens for part in parts]),
        )


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the batch, after padding the second dimension, if there is one, to the longest."""
    if tensors[0].ndim > 1:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [_pad(tensor, longest) for tensor in tensors]
    return torch.cat(list(tensors))


def _pad(tensor: Tensor, length: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]))
