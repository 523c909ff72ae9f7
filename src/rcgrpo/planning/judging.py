"""What a judge in this process takes: its weights, and what it holds while it reads and writes.

Its language model's own code reads prompts and writes the last tokens of answers, as long as they may become, on
tensors without contents, with two and three layers, and is extended to all of them, as `measuring` does it for the
editor. What the vision tower allocates is gone before the answers are written and not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ..rewards import LocalJudge, Reward
from ..rewards.generation import Prefill, Sampling, ask, draw, read_prompts, write_answers
from .counting import Counter, storages, without_contents
from .known import JUDGES
from .model import default_dtype, without_meta

CLASSES = {
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3ForCausalLM", 32),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2ForCausalLM", 28),
}
"""Kinds of judges: the model, one with its language model alone, pixels of a token's side."""

_LETTERS = 4  # of a token of English, at least
_FRAME = 32  # tokens of turns and of the marks around pictures


@dataclass(frozen=True)
class Judging:
    """A judge at work.

    Args:
        model: a key of `known.JUDGES`.
        questions: that it reads at a time.
        passes: answers to each; 0 where only the first token is looked at.
        tokens: of a question, pictures among them.
        length: of an answer, at most.
    """

    model: str
    questions: int
    passes: int
    tokens: int
    length: int

    @property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        return JUDGES[self.model]


def judging_of(rewards: Sequence[Reward], candidates: int, side: int) -> tuple[list[Judging], list[str]]:
    """The judges in this process among rewards, and the names of those that nothing is known of.

    Args:
        candidates: that are scored at a time.
        side: of a candidate, in pixels.
    """
    found, unknown = [], []
    for reward in rewards:
        judge: Any = getattr(reward.function, "judge", None)
        if not isinstance(judge, LocalJudge):
            continue
        if judge.model not in JUDGES:
            unknown.append(reward.name)
            continue
        reward_function: Any = reward.function
        passes = getattr(reward_function, "passes", 0)
        asked = getattr(reward_function, "prompts", None)
        texts = [reward_function.prompt] if asked is None else [asked.semantics, asked.quality]
        tokens = (
            2 * (side // CLASSES[JUDGES[judge.model]["model_type"]][2]) ** 2 + max(map(len, texts)) // _LETTERS + _FRAME
        )
        at_once = min(max(1, judge.batch_size // max(1, passes)), candidates * len(texts))
        length = judge.sampling.max_new_tokens if passes else 0
        found.append(Judging(judge.model, at_once, passes, tokens, length))
    return found, unknown


def judge_weights(judging: Judging) -> float:
    """Bytes, in bf16."""
    kind, config = judging.config["model_type"], judging.config
    made: Any = getattr(transformers, CLASSES[kind][0])
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = made(transformers.AutoConfig.for_model(kind, **settings))
    return 2.0 * sum(weight.numel() for weight in model.parameters())


def measure_judge(judging: Judging, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes besides the weights: keys and values, and what is allocated on the way."""
    layers = judging.config["text_config"]["num_hidden_layers"]
    two, three = (_measure(judging, dtype, count) for count in (2, 3))  # the first one keeps less than any other
    return max(two[label] + (layers - 2) * (three[label] - two[label]) for label in two if label != "between")


def _measure(judging: Judging, dtype: torch.dtype, layers: int) -> dict[str, int]:
    kind: Any = getattr(transformers, CLASSES[judging.config["model_type"]][1])
    text = {**judging.config["text_config"], "num_hidden_layers": layers}
    with default_dtype(dtype), torch.device("meta"):
        model = kind(kind.config_class(**text)).requires_grad_(False).eval()
    shape = judging.questions, judging.tokens
    with without_contents():
        without_meta(model)
        batch = {name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        with Counter(storages(model)) as counter, torch.no_grad():
            counter.label = "read"
            prompts = read_prompts(model, batch, [[]] * judging.questions)
            if judging.passes:
                _write(model, prompts, judging, counter)
        return counter.peaks


def _write(model: Any, prompts: Prefill, judging: Judging, counter: Counter) -> None:
    """The first token of each answer and the last one, which is the moment when keys and values grow once more."""
    from ..rewards.roomy_layer import ROOM

    questions, passes, length = judging.questions, judging.passes, judging.length
    full = -(-passes * (length - 2) // ROOM) * ROOM  # tokens of answers that leave no room
    counter.label, sampling = "write", Sampling(max_new_tokens=length)
    write_answers(model, prompts, torch.zeros(questions, passes, 2), sampling, [0])
    counter.label = "between"
    for layer in prompts.cache.layers:
        written = layer.keys[:, :, :1].repeat(1, 1, full - passes, 1)
        layer.update(written, written)
        del written
    counter.label = "write"
    tokens = torch.zeros(questions, passes, dtype=torch.long)
    mask = torch.zeros(questions, 1, passes, judging.tokens + full + passes, dtype=model.dtype)
    logits = ask(model, prompts.cache, passes, input_ids=tokens, attention_mask=mask, position_ids=tokens)
    draw(logits.flatten(0, 1), tokens.flatten(), sampling)
