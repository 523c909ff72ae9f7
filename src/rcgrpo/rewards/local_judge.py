"""`LocalJudge`: a vision-language model in this process, through transformers and, for a LoRA, peft.

Where it fits: the judges' rewards ask it where there is no server. Why it exists: one machine with a large GPU needs no
second process, and a small judge can be tried in a notebook.

Gotchas: transformers is imported and weights are loaded by the first question, not by the constructor. Sampling uses
the Gumbel-max trick with a generator per answer, seeded by the question: it draws nothing from torch's global
generator, which another thread may be reading, and the same question gets the same answers in any batch. There is no
grammar to hold the answer to a schema here; what does not parse is dropped by the reward.
"""

import asyncio
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .judges import Question
from .registry import RewardError
from .transport import Fault


class LocalJudge:
    """A judge in this process.

    Args:
        model: Hub id or folder of an image-text-to-text model (Qwen2.5-VL, Qwen3-VL, …), or the loaded model itself.
        adapter: Hub id or folder of a LoRA for it.
        processor: the loaded processor; by default that of `model`.
        device: where the model goes; by default this process's GPU, else the CPU.
        dtype: of the weights; by default the checkpoint's.
        temperature, top_p: of sampled answers.
        max_new_tokens: bound of an answer's length.
        seed: another seed, other answers.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Raises:
        ValueError: a model object without its processor, a temperature that is not above 0, or a `top_p` outside
            ]0, 1].
    """

    def __init__(
        self,
        model: Any,
        adapter: str | None = None,
        *,
        processor: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_new_tokens: int = 512,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(model, str) and processor is None:
            raise ValueError("processor: got None with a loaded model, expected its processor as well")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected more than 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
        self.model, self.adapter, self.processor = model, adapter, processor
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code
        self.temperature, self.top_p = temperature, top_p
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loaded: Any = None

    async def answers(self, questions: Sequence[Question], passes: int) -> list[list[str] | Fault]:
        """See `judges.Judge`."""
        return await asyncio.to_thread(self._each, questions, lambda question: self._sample(question, passes))

    async def log_probs(self, questions: Sequence[Question], tokens: Sequence[str]) -> list[list[float] | Fault]:
        """See `judges.Judge`.

        Raises:
            RewardError: one of `tokens` is more than one token to this model.
        """
        return await asyncio.to_thread(self._each, questions, lambda question: self._first_token(question, tokens))

    def _each(self, questions: Sequence[Question], ask: Any) -> list[Any]:
        results: list[Any] = []
        with self._lock, torch.inference_mode():
            model = self._load()
            with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
                for question in questions:
                    try:
                        results.append(ask(question))
                    except torch.OutOfMemoryError as error:
                        self.faults["out_of_memory"] += 1
                        results.append(Fault("out_of_memory", str(error).splitlines()[0]))
        return results

    def _load(self) -> Any:
        if self._loaded is None:
            try:
                self._loaded = self._read().to(self.device or _own_device()).eval()
            except Exception as error:  # no other candidate would cure it, and each would try to load it again
                name = self.model if isinstance(self.model, str) else type(self.model).__name__
                text = f"the judge {name!r} cannot be loaded ({type(error).__name__}: {error})"
                raise RewardError(f"{text}; give a Hub id or folder that can, or a ServerJudge") from error
        return self._loaded

    def _read(self) -> Any:
        model = self.model
        if isinstance(model, str):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            trust = {"trust_remote_code": self.trust_remote_code}
            if self.processor is None:
                self.processor = AutoProcessor.from_pretrained(model, **trust)
            model = AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype, **trust)
        if self.adapter is None:
            return model
        from peft import PeftModel

        with warnings.catch_warnings():  # a LoRA with other names of layers would do nothing, and judge like its base
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, self.adapter)

    def _inputs(self, question: Question, copies: int = 1) -> Any:
        pictures = [{"type": "image", "image": image.convert("RGB")} for image in question.images]
        turn = {"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}
        return self.processor.apply_chat_template(
            [[turn]] * copies, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._loaded.device)

    def _sample(self, question: Question, passes: int) -> list[str]:
        from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        inputs, own = self._inputs(question, passes), self._loaded.generation_config
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        device = self._loaded.device
        generators = [
            torch.Generator(device).manual_seed(_seed(question, self.seed, number)) for number in range(passes)
        ]
        likely = [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)]
        sampling = LogitsProcessorList([*likely, GumbelNoise(generators)])
        output = self._loaded.generate(**inputs, generation_config=settings, logits_processor=sampling)
        return self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _first_token(self, question: Question, tokens: Sequence[str]) -> list[float]:
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
        if split := [token for token, found in zip(tokens, ids, strict=True) if len(found) != 1]:
            raise RewardError(f"tokens: got {split}, expected each to be one token of this model")
        logits = self._loaded(**self._inputs(question)).logits[0, -1].float()
        return torch.log_softmax(logits, dim=-1)[[found[0] for found in ids]].tolist()


class GumbelNoise:
    """A logits processor that turns the arg max of greedy decoding into a sample of `softmax(logits)`.

    Args:
        generators: one per row of the batch, on the device of the logits.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=generator, device=scores.device) for generator in self.generators]
        )
        return scores.float() - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def _own_device() -> Any:
    """That of this process in a run of several; a thread that scores would take the first GPU."""
    from accelerate.state import PartialState, is_initialized

    if is_initialized():
        return PartialState().device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _seed(question: Question, seed: int, number: int) -> int:
    digest = sha256(f"{seed}/{number}/{question.text}".encode())
    for image in question.images:
        digest.update(f"/{image.mode}/{image.size}/".encode() + image.tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
