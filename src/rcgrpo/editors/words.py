"""Which tokens of what a text encoder reads are the instruction's own, or those of some of its words."""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def find_words(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Where these words stand in a text, first and last character + 1; whole words, in upper or lower case."""
    pattern = "|".join(re.escape(word.strip()) for word in words)
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)]


def token_weights(
    tokenizer: Any,
    prompt: str,
    words: Sequence[str] | None = None,
    around: tuple[str, str] = ("", ""),
    **options: Any,
) -> Tensor:
    """1 for the tokens of the instruction itself, 0 for a template's, padding and special tokens, `[tokens]`.

    Args:
        tokenizer: of the text encoder.
        prompt: the instruction.
        words: of the instruction; only their tokens count. All of it by default.
        around: what a template puts before and after the instruction.
        options: of the tokenizer's call, such as padding.

    Raises:
        ValueError: words that the instruction, cut to its length, does not have; a tokenizer that does not know where
            its tokens stand, where that must be known.
    """
    placed = words is not None or any(around)
    if placed and not tokenizer.is_fast:
        raise ValueError(
            f"words: got {words} with {type(tokenizer).__name__}, expected a fast tokenizer, which knows where its "
            f"tokens stand; load the pipeline with {type(tokenizer).__name__}Fast"
        )
    encoded = tokenizer(
        around[0] + prompt + around[1],
        return_special_tokens_mask=True,
        return_offsets_mapping=placed,
        return_tensors="pt",
        **options,
    )
    weights = ((1 - encoded.special_tokens_mask) * encoded.attention_mask)[0].float()
    if not placed:
        return weights
    spans = [(0, len(prompt))] if words is None else find_words(prompt, words)
    begins, ends = (encoded.offset_mapping[0] - len(around[0])).unbind(-1)
    named = torch.zeros(len(weights), dtype=torch.bool)
    for first, last in spans:
        named |= (begins < last) & (ends > first)
    weights *= named
    if words is not None and not weights.any():
        raise ValueError(
            f"words: got {list(words)}, expected words of {prompt!r} within its first {len(weights)} tokens"
        )
    return weights


def as_long_as(weights: Tensor, length: int) -> Tensor:
    """Weights `[..., tokens]` cut or filled up with zeros at their beginning, where a template's tokens are."""
    return F.pad(weights, (length - weights.shape[-1], 0))
