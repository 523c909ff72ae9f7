"""What a vision-language model says to many questions at once: the arithmetic of `LocalJudge`.

Where it fits: below `local_judge`; it knows transformers' models and nothing of rewards. Why it exists: `generate`
reads a prompt again for each of its samples, keeps rows that have ended, and draws from torch's global generator.

What is computed, and kept, once here: a prompt for all of its sampled answers, and all that stands before a prompt's
last picture for all prompts that share it, such as the system's turn and the source of a group of candidates. Attention
is causal, so this is exact but for rounding. Prompts whose answers have ended leave the batch.

Gotchas: sharing takes a model of Qwen-VL's kind, whose processor says which pixels belong to which picture; prompts of
others are read whole. A token is drawn with one number of its answer's own generator, so a question's answers depend on
no other question but through rounding.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CHECK = 8
"""Tokens after which answers that have ended leave the batch; to look at each one's end would hold up a GPU."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the likeliest token, `top_k` None considers all of them."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int | None = 20
    max_new_tokens: int = 512


@dataclass
class Prefill:
    """Prompts that have been read: `logits` `[prompts, vocabulary]` in fp32 of what follows each, and how to go on.

    `cache` holds keys and values; `mask` `[prompts, tokens]` says which of its tokens are real; `position` `[prompts]`
    is that of the next token.
    """

    logits: Tensor
    cache: Any
    mask: Tensor
    position: Tensor


def read_prompts(model: Any, batch: Any, pictures: Sequence[Sequence[bytes]]) -> Prefill:
    """Run the prompts through the model.

    Args:
        model: as `AutoModelForImageTextToText` gives it.
        batch: what its processor made of the prompts, padded on the left, on the CPU.
        pictures: what tells the pictures of each prompt apart, in order.
    """
    from transformers import DynamicCache

    cache, device = DynamicCache(), model.device
    mask = batch["attention_mask"]
    rope = getattr(model.model, "get_rope_index", None)
    if rope is None or "mm_token_type_ids" not in batch or not all(pictures):
        position = mask.cumsum(-1) - 1
        inputs = {name: value.to(device) for name, value in batch.items()}
        return Prefill(ask(model, cache, 1, **inputs)[:, 0], cache, mask.to(device), position[:, -1].to(device) + 1)
    positions = rope(**{name: batch[name] for name in inspect.signature(rope).parameters if name in batch})[0]
    stages, owner = _split(batch, positions, pictures)
    first, second = ({name: value.to(device) for name, value in stage.items()} for stage in stages)
    ask(model, cache, 1, **first)
    owner = owner.to(device)
    cache.batch_select_indices(owner)
    second["attention_mask"] = torch.cat([first["attention_mask"][owner], second["attention_mask"]], dim=1)
    logits = ask(model, cache, 1, **second)[:, 0]
    return Prefill(logits, cache, second["attention_mask"], positions.amax((0, 2)).to(device) + 1)


def ask(model: Any, cache: Any, count: int, **inputs: Any) -> Tensor:
    """Logits behind the last `count` tokens, `[batch, count, vocabulary]`; `cache` grows by all that were read."""
    known = inspect.signature(type(model).forward).parameters
    inputs["cache" if "cache" in known else "past_key_values"] = cache  # its name changed within transformers 5
    return model(**inputs, use_cache=True, logits_to_keep=count).logits.float()


Inputs = dict[str, Tensor]
Part = tuple[int, int, int, range]
"""Of a prompt: its row, the part's first token and its end, the numbers of its pictures."""


def _split(batch: Any, positions: Tensor, pictures: Sequence[Sequence[bytes]]) -> tuple[tuple[Inputs, Inputs], Tensor]:
    """The inputs of the parts that prompts share, each once, those of the rest of each prompt, and whose is whose.

    Args:
        positions: `[3, prompts, tokens]`.
    """
    ids, mask, is_picture = batch["input_ids"], batch["attention_mask"], batch["mm_token_type_ids"] == 1
    length = ids.shape[1]
    grid = batch["image_grid_thw"]
    ends = grid.prod(-1).cumsum(0).tolist()
    pixels = [batch["pixel_values"][start:end] for start, end in zip([0, *ends], ends, strict=False)]
    firsts: list[Part] = []
    rests: list[Part] = []
    owner: list[int] = []
    known: dict[Any, int] = {}
    number = 0  # of the prompt's first picture
    for row, shown in enumerate(pictures):
        start = length - int(mask[row].sum())
        begins = is_picture[row] & ~pad(is_picture[row], (1, -1))
        cut = int(begins.nonzero()[-1])
        last = number + len(shown) - 1
        key = (ids[row, start:cut].numpy().tobytes(), *shown[:-1])
        if key not in known:
            known[key] = len(firsts)
            firsts.append((row, start, cut, range(number, last)))
        owner.append(known[key])
        rests.append((row, cut, length, range(last, last + 1)))
        number = last + 1

    def stage(parts: list[Part]) -> Inputs:
        longest = max(end - start for _, start, end, _ in parts)
        made = {
            name: torch.stack([pad(value[..., r, s:e], (longest - e + s, 0)) for r, s, e, _ in parts], dim=-2)
            for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions))
        }
        chosen = [number for *_, numbers in parts for number in numbers]
        if chosen:
            made["pixel_values"] = torch.cat([pixels[number] for number in chosen])
            made["image_grid_thw"] = grid[chosen]
        return made

    return (stage(firsts), stage(rests)), torch.tensor(owner)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token of each row, `[rows]`: temperature, then top-k, then top-p, as transformers applies them.

    Args:
        logits: `[rows, vocabulary]`.
        uniform: `[rows]`, in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    likeliest, ids = (logits / sampling.temperature).topk(count)
    shares = likeliest.softmax(-1)
    shares = shares * (shares.cumsum(-1) - shares < sampling.top_p)
    sums = shares.cumsum(-1)
    index = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, index.clamp(max=count - 1)).squeeze(-1)


def write_answers(
    model: Any, prompts: Prefill, uniform: Tensor, sampling: Sampling, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sampled answers to prompts that have been read, as many to each.

    All answers to a prompt are written beside each other behind it: a step reads a token of each, and a mask lets it
    see the prompt and its own answer alone. So a prompt's keys and values are there, and are read, once.

    Args:
        prompts: used up.
        uniform: `[prompts, answers, max_new_tokens]` in [0, 1).
        ends: tokens that end an answer.

    Returns:
        Tokens `[prompts, answers, length]`, filled up with the first of `ends`; and `[prompts, answers]`, whether each
        has ended.
    """
    from transformers.cache_utils import DynamicLayer

    from .roomy_layer import RoomyLayer

    rows, passes, length = uniform.shape
    cache, device = prompts.cache, prompts.logits.device
    cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    uniform, stops = uniform.to(device), torch.tensor(ends, device=device)
    sees = prompts.mask[:, None, None].bool().expand(-1, 1, passes, -1)
    own = torch.eye(passes, dtype=torch.bool, device=device).repeat(1, length)
    sees = torch.cat([sees, own.expand(rows, 1, -1, -1)], dim=-1)
    hidden = torch.zeros_like(sees, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
    start = prompts.mask.shape[1]
    logits = prompts.logits[:, None].expand(-1, passes, -1)
    position = prompts.position[:, None].expand(-1, passes)
    written = torch.full((rows, passes, length), ends[0], device=device)
    ended = torch.zeros(rows, passes, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)  # whose prompts are still in the batch
    for step in range(length):
        token = draw(logits.flatten(0, 1), uniform[alive, :, step].flatten(), sampling).view(-1, passes)
        token = torch.where(ended[alive], stops[0], token)
        written[alive, :, step] = token
        ended[alive] |= torch.isin(token, stops)
        if step + 1 == length:
            break
        if step % CHECK == CHECK - 1:
            on = (~ended[alive].all(-1)).nonzero().squeeze(-1)
            if len(on) == 0:
                return written[..., : step + 1], ended
            if len(on) <= 0.75 * len(alive):  # copying keys and values costs about a token
                cache.batch_select_indices(on)
                alive, token, position, hidden = alive[on], token[on], position[on], hidden[on]
        places = position + step
        if hasattr(model.model, "get_rope_index"):
            places = places.expand(3, -1, -1)
        mask = hidden[..., : start + (step + 1) * passes]
        logits = ask(model, cache, passes, input_ids=token, attention_mask=mask, position_ids=places)
    return written, ended
