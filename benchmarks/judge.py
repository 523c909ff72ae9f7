"""Candidates a CPU second of `LocalJudge` against asking one question at a time: `python benchmarks/judge.py`.

A small random Qwen2.5-VL judges groups of candidates as EditScore does, two questions to each. The other way is
transformers' own: a question at a time, `generate` on as many copies of it as there are passes; and for Edit-R1's logit
reward a forward a question. Both in one process, in turn, in seconds of the CPU; the figure is their ratio.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rcgrpo.rewards import EDIT_PROMPTS, LocalJudge
from rcgrpo.rewards.judges import Question
from tiny_judge import build_tiny_judge


def pictures(count: int, size: int, seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def questions(edits: int, generations: int, size: int) -> list[Question]:
    asked = []
    for number, source in enumerate(pictures(edits, size, 0)):
        for candidate in pictures(generations, size, number + 1):
            text = EDIT_PROMPTS.semantics.replace("<instruction>", f"make the roof of house {number} red")
            asked += [Question((source.copy(), candidate), text), Question((candidate,), EDIT_PROMPTS.quality)]
    return asked


@torch.inference_mode()
def one_by_one(model, processor, asked: list[Question], passes: int, length: int) -> None:
    """As transformers' documentation has it; `length` 0 asks for the first token's logits alone."""
    for question in asked:
        shown = [{"type": "image", "image": image} for image in question.images]
        turn = {"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}
        inputs = processor.apply_chat_template(
            [[turn]] * passes, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if length:
            sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
            model.generate(**inputs, do_sample=True, max_new_tokens=length, eos_token_id=None, **sampling)
        else:
            model(**inputs).logits[:, -1].log_softmax(-1)


def run(ask: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    asyncio.run(ask())


def seconds(way: Callable[[], None]) -> float:
    start = process_time()
    way()
    return process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=2)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--size", type=int, default=112, help="side of a picture")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    model, processor = build_tiny_judge(width=args.width, layers=args.layers, pixels=args.size**2)
    asked = questions(args.edits, args.generations, args.size)
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = -1  # no answer ends early, so that both write as much
    judge = LocalJudge(model, processor=processor, device="cpu", max_new_tokens=args.length)
    candidates = args.edits * args.generations
    print(f"{candidates} candidates, {args.length} tokens an answer, {torch.get_num_threads()} threads")
    cases = (("EditScore", args.passes, args.length), ("EditScore", 1, args.length), ("Edit-R1", 1, 0))
    for name, passes, length in cases:
        some = asked if length else asked[::2]  # Edit-R1 asks one question, about both pictures
        ask = partial(judge.answers, some, passes) if length else partial(judge.log_probs, some, "012345")
        ways = (partial(one_by_one, model, processor, some, passes, length), partial(run, ask))
        times = [[seconds(way) for way in ways] for _ in range(args.rounds + 1)][1:]  # the first round warms up
        ratios = [old / new for old, new in times]
        old, new = (candidates / median(each) for each in zip(*times, strict=True))
        print(
            f"{name}, {passes} passes: {old:.2f} -> {new:.2f} candidates a CPU second, {median(ratios):.1f} times "
            f"[{min(ratios):.1f} to {max(ratios):.1f}]"
        )
    model.generation_config.eos_token_id = ends


if __name__ == "__main__":
    main()
