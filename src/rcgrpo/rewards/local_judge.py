"""`LocalJudge`: a vision-language model in this process, through transformers and, for a LoRA, peft.

Where it fits: the judges' rewards ask it where there is no server; `generation.py` does the arithmetic. Why it exists:
one machine with a large GPU needs no second process, and a small judge can be tried in a notebook.

Gotchas: transformers is imported and weights are loaded by the first question, not by the constructor. Answers are
drawn with a generator each, seeded by the question: nothing is drawn from torch's global generator, which another
thread may be reading, and but for rounding the same question gets the same answers in any batch. On a GPU everything
runs on a stream of its own, beside the rollouts. There is no grammar to hold the answer to a schema here; what does not
parse is dropped by the reward.
"""

import asyncio
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..inputs.access import fetch
from .generation import Prefill, Sampling, read_prompts, write_answers
from .judges import URL_VARIABLE, Question
from .registry import RewardError
from .transport import Fault

OLDER_NAMES = {r"^visual\.": "model.visual.", r"^model\.(?!language_model\.|visual\.)": "model.language_model."}
"""Names of layers in LoRAs of Qwen2-VL and Qwen2.5-VL from before transformers 4.52, and what they are called now."""


class LocalJudge:
    """A judge in this process.

    Args:
        model: Hub id or folder of an image-text-to-text model (Qwen2.5-VL, Qwen3-VL, …), or the loaded model itself.
        adapter: Hub id or folder of a LoRA for it, which is merged into the weights.
        processor: the loaded processor; by default that of `model`.
        device: where the model goes; by default this process's GPU, else the CPU.
        dtype: of the weights; by default the checkpoint's.
        temperature, top_p, top_k: of sampled answers, by default EditScore's own; temperature 0 takes the likeliest
            token, `top_k` None considers all of them.
        max_new_tokens: bound of an answer's length.
        batch_size: answers that are under way at once. Halved for the rest of a call where memory is short.
        sleep: keep the weights on the CPU between two calls, so that updates have the GPU for themselves; waking up
            takes the time of their transfer.
        seed: another seed, other answers.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Attributes:
        faults: how often each kind of fault was met; `cut_off` counts answers that reached `max_new_tokens`.

    Raises:
        ValueError: a model object without its processor, or a number out of its range.
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
        top_k: int | None = 20,
        max_new_tokens: int = 512,
        batch_size: int = 128,
        sleep: bool = False,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(model, str) and processor is None:
            raise ValueError("processor: got None with a loaded model, expected its processor as well")
        if not temperature >= 0:
            raise ValueError(f"temperature: got {temperature}, expected 0 or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
        for name, value in (("top_k", top_k or 1), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.model, self.adapter, self.processor = model, adapter, processor
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code
        self.sampling = Sampling(temperature, top_p, top_k, max_new_tokens)
        self.batch_size, self.sleep, self.seed = batch_size, sleep, seed
        self.faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loaded: Any = None
        self._asleep: dict[Tensor, Tensor] = {}
        self._stream: Any = None

    def check(self) -> None:
        """Look for the configurations of model and LoRA, without loading any weights.

        Raises:
            ValueError: they cannot be had.
        """
        expected = f"the Hub id or folder of a judge or its LoRA, which can be had; or name a server in {URL_VARIABLE}"
        for name, file in ((self.model, "config.json"), (self.adapter, "adapter_config.json")):
            if isinstance(name, str):
                fetch("judge", name, file, expected)

    async def answers(self, questions: Sequence[Question], passes: int) -> list[list[str] | Fault]:
        """See `judges.Judge`."""
        at_once = max(1, self.batch_size // passes)
        return await asyncio.to_thread(self._in_batches, questions, at_once, lambda some: self._sample(some, passes))

    async def log_probs(self, questions: Sequence[Question], tokens: Sequence[str]) -> list[list[float] | Fault]:
        """See `judges.Judge`.

        Raises:
            RewardError: one of `tokens` is more than one token to this model.
        """
        ask = partial(self._first_token, tokens=tokens)
        return await asyncio.to_thread(self._in_batches, questions, self.batch_size, ask)

    def _in_batches(self, questions: Sequence[Question], at_once: int, ask: Any) -> list[Any]:
        results: list[Any] = []
        with self._lock, torch.inference_mode(), self._awake():
            while len(results) < len(questions):
                some = questions[len(results) :][:at_once]
                try:
                    results += ask(some)
                except torch.OutOfMemoryError as error:
                    if len(some) > 1:
                        at_once = len(some) // 2
                        continue
                    self.faults["out_of_memory"] += 1
                    results.append(Fault("out_of_memory", str(error).splitlines()[0]))
        return results

    # -------------------------------------------------------------------------------- the model

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The model loaded and on its device, which is this thread's, with a stream of its own."""
        device = torch.device(self.device or _own_device())
        if device.type != "cuda":
            self._load(device)
            yield
            return
        with torch.cuda.device(device):
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                self._load(device)
                for tensor, copy in self._asleep.items():
                    tensor.data = copy.to(device, non_blocking=True)
                try:
                    yield
                finally:
                    for tensor, copy in self._asleep.items():
                        tensor.data = copy
                    if self._asleep:
                        torch.cuda.empty_cache()  # what another stream has freed stays its own

    def _load(self, device: torch.device) -> None:
        if self._loaded is not None:
            return
        try:
            loaded = self._read().eval()
            kind = loaded.config._attn_implementation
            if kind not in ("sdpa", "eager"):
                raise ValueError(f"attn_implementation: got {kind!r}, expected 'sdpa' or 'eager', which take any mask")
        except Exception as error:  # no other candidate would cure it, and each would try to load it again
            name = self.model if isinstance(self.model, str) else type(self.model).__name__
            text = f"the judge {name!r} cannot be loaded ({type(error).__name__}: {error})"
            raise RewardError(f"{text}; give a Hub id or folder that can, or a ServerJudge") from error
        if self.sleep and device.type == "cuda":
            parts = (*loaded.parameters(), *loaded.buffers())
            self._asleep = {tensor: tensor.data.cpu().pin_memory() for tensor in parts}
        else:
            loaded = loaded.to(device)
        self._loaded = loaded

    def _read(self) -> Any:
        model = self.model
        if isinstance(model, str):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            trust = {"trust_remote_code": self.trust_remote_code}
            if self.processor is None:
                self.processor = AutoProcessor.from_pretrained(model, **trust)
            model = AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype, **trust)
        if self.adapter is None:
            return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's own, its LoRA within
        from peft import PeftModel

        with warnings.catch_warnings():  # a LoRA with other names of layers would do nothing, and judge like its base
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, self.adapter, key_mapping=OLDER_NAMES).merge_and_unload()

    # -------------------------------------------------------------------------------- questions

    def _prompts(self, questions: Sequence[Question]) -> tuple[Prefill, list[list[bytes]]]:
        """The questions as the model has read them, and digests of their pictures."""
        turns = []
        for question in questions:
            pictures = [{"type": "image", "image": image.convert("RGB")} for image in question.images]
            turns.append([{"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}])
        batch = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        digests = [[_digest(image) for image in question.images] for question in questions]
        return read_prompts(self._loaded, batch, digests), digests

    def _sample(self, questions: Sequence[Question], passes: int) -> list[list[str]]:
        prompts, digests = self._prompts(questions)
        uniform = torch.empty(len(questions), passes, self.sampling.max_new_tokens)
        for question, shown, numbers in zip(questions, digests, uniform, strict=True):
            for number in range(passes):
                seed = _seed(question.text, shown, self.seed, number)
                torch.rand(numbers.shape[1:], generator=torch.Generator().manual_seed(seed), out=numbers[number])
        ends = self._loaded.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        tokens, ended = write_answers(self._loaded, prompts, uniform, self.sampling, ends)
        if cut_off := ended.numel() - int(ended.sum()):
            self.faults["cut_off"] += cut_off
        return [self.processor.batch_decode(some, skip_special_tokens=True) for some in tokens]

    def _first_token(self, questions: Sequence[Question], tokens: Sequence[str]) -> list[list[float]]:
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
        if split := [token for token, found in zip(tokens, ids, strict=True) if len(found) != 1]:
            raise RewardError(f"tokens: got {split}, expected each to be one token of this model")
        logits = self._prompts(questions)[0].logits
        return torch.log_softmax(logits, dim=-1)[:, [found[0] for found in ids]].tolist()


def _own_device() -> Any:
    """That of this process in a run of several; a thread that scores would take the first GPU."""
    from accelerate.state import PartialState, is_initialized

    if is_initialized():
        return PartialState().device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _digest(image: Image.Image) -> bytes:
    return sha256(f"{image.mode}/{image.size}/".encode() + image.tobytes()).digest()


def _seed(text: str, pictures: Sequence[bytes], seed: int, number: int) -> int:
    digest = sha256(b"".join([f"{seed}/{number}/{text}/".encode(), *pictures])).digest()
    return int.from_bytes(digest[:8], "big") >> 1
