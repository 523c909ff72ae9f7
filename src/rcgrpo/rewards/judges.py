"""Who judges: a vision-language model behind an OpenAI-compatible server, or in this process (`local_judge.py`).

Where it fits: the rewards in `judge_rewards.py` put `Question`s to a `Judge`. Why it exists: one client and one failure
policy for every judge (vLLM, SGLang, llama.cpp, a hosted model, …). By hand, as the `openai` package retries by itself,
knows one server, and bounds neither a batch's time nor an answer's size; what it would spare is a dictionary.

Gotchas: a question without a usable answer comes back as a `Fault`, never as an exception, unless the server refused it
before any good answer: then the set-up is wrong and the run stops. Servers differ in what they know. One that ignores
`n` is asked again with the next seed; a field that one refuses is left out with `extra_body={"seed": None}`.
"""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from .pictures import once_each, to_png
from .registry import RewardError
from .transport import Deadline, Fault, Transport

URL_VARIABLE = "RCGRPO_JUDGE_URL"
MODEL_VARIABLE = "RCGRPO_JUDGE_MODEL"
KEY_VARIABLE = "RCGRPO_JUDGE_API_KEY"
ONE_MODEL = "llamacpp"
"""Whose server has one model and does not read a request's name of it."""

Ask = Callable[[dict[str, Any]], Awaitable[list[dict[str, Any]]]]
"""Puts a question to the server with further fields of the request, and gives the answer's `choices`."""


@dataclass(frozen=True)
class Question:
    """One user turn: pictures, then text; `schema` is the JSON schema of the answer, where the judge can enforce it."""

    images: tuple[Image.Image, ...]
    text: str
    schema: Mapping[str, Any] | None = None


class Judge(Protocol):
    """Whoever answers questions."""

    @property
    def faults(self) -> Counter[str]:
        """How often each kind of fault was met."""
        ...

    async def answers(self, questions: Sequence[Question], passes: int) -> list[list[str] | Fault]:
        """Up to `passes` sampled answers to each question, or why there are none."""
        ...

    async def log_probs(self, questions: Sequence[Question], tokens: Sequence[str]) -> list[list[float] | Fault]:
        """Log-probability of each token as the first one of the answer; -inf where it is too small to be told."""
        ...


class ServerJudge:
    """A judge behind an OpenAI-compatible server, e.g. `vllm serve Qwen/Qwen3-VL-8B-Instruct`.

    Args:
        url: the API's base, `http://host:8000/v1`, or several of equal servers.
        model: the name that the server knows it by (`GET /v1/models`).
        structured: send the JSON schema along (`response_format`), so that answers always parse; off for servers that
            do not know it.
        temperature, top_p, top_k, max_tokens: of sampled answers, by default EditScore's own. vLLM, SGLang and
            llama.cpp know `top_k`, which they would otherwise take from the model; `None` does not send it.
        seed: sent with each request, so that a server that honours it repeats itself.
        key_variable: the environment variable that holds the API key, if one is needed.
        extra_body: further fields of the request; `None` leaves a field out that is sent otherwise.
        options: as in `RemoteReward`: `timeout`, `retries`, `concurrency`, …; `timeout` is for a whole batch.

    Attributes:
        faults: how often each kind of fault was met; `cut_off` counts answers that reached `max_tokens`.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        *,
        structured: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int | None = 20,
        max_tokens: int = 512,
        seed: int = 42,
        key_variable: str = KEY_VARIABLE,
        extra_body: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.transport = Transport(url, token=os.environ.get(key_variable), **options)
        self.model, self.structured = model, structured
        self.sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens}
        self.seed = seed
        self.extra_body = extra_body or {}

    @property
    def faults(self) -> Counter[str]:
        return self.transport.faults

    def check(self) -> None:
        """Ask for the server's models, so that a run without its judge ends before anything is loaded.

        Raises:
            RewardError: no server answers, it takes no such key, or it does not know the model.
        """
        try:
            listed = self.transport.look("/models")
        except Fault as fault:
            raise RewardError(
                f"judge: got no answer from {', '.join(self.transport.urls)}, expected a judge there; start it, or "
                f"mend {URL_VARIABLE} ({fault})"
            ) from fault
        found = listed.get("data") if isinstance(listed, dict) else None
        models = [model for model in found if isinstance(model, dict)] if isinstance(found, list) else []
        names = [str(model.get("id")) for model in models]
        if names and self.model not in names and not any(model.get("owned_by") == ONE_MODEL for model in models):
            raise RewardError(
                f"judge: got the name {self.model!r}, expected one that {self.transport.urls[0]} serves "
                f"({', '.join(names)}); set {MODEL_VARIABLE}"
            )

    async def answers(self, questions: Sequence[Question], passes: int) -> list[list[str] | Fault]:
        async def sample(ask: Ask) -> list[str]:
            texts: list[str] = []
            while len(texts) < passes:  # once, unless the server does not know `n`
                try:
                    choices = await ask({"n": passes - len(texts), "seed": self.seed + len(texts), **self.sampling})
                except Fault:
                    if not texts:
                        raise
                    break
                for choice in choices:
                    text = choice["message"]["content"]
                    texts.append(text if isinstance(text, str) else "")
                    if choice.get("finish_reason") == "length":
                        self.faults["cut_off"] += 1
            return texts[:passes]

        return await self._each(questions, sample)

    async def log_probs(self, questions: Sequence[Question], tokens: Sequence[str]) -> list[list[float] | Fault]:
        # Temperature 1, so that a server which reports log-probabilities after scaling reports the same ones.
        wanted = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 20}

        async def read(ask: Ask) -> list[float]:
            (choice, *_) = await ask(wanted)
            likely = choice["logprobs"]["content"][0]["top_logprobs"]
            known = {entry["token"]: float(entry["logprob"]) for entry in likely}
            return [known.get(token, -math.inf) for token in tokens]

        return await self._each(questions, read)

    async def _each(self, questions: Sequence[Question], put: Callable[[Ask], Awaitable[Any]]) -> list[Any]:
        """What `put` makes of each question, or the `Fault` that it met."""
        deadline = self.transport.deadline()
        bodies = await asyncio.to_thread(self._bodies, questions)

        async def one(body: dict[str, Any]) -> Any:
            try:
                return await put(lambda fields: self._choices({**body, **fields}, deadline))
            except Fault as fault:
                return fault
            except (KeyError, IndexError, TypeError, ValueError) as error:
                if isinstance(error, RewardError):
                    raise
                self.faults["malformed"] += 1
                return Fault("malformed", f"the judge's answer lacks what was asked for ({error!r})")

        return await asyncio.gather(*(one(body) for body in bodies))

    def _bodies(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        url = once_each(lambda picture: "data:image/png;base64," + to_png(picture.convert("RGB")))

        bodies = []
        for question in questions:
            pictures = [{"type": "image_url", "image_url": {"url": url(image)}} for image in question.images]
            content = [*pictures, {"type": "text", "text": question.text}]
            body = {"model": self.model, "messages": [{"role": "user", "content": content}], "seed": self.seed}
            if question.schema is not None and self.structured:
                schema = {"name": "judgement", "schema": question.schema, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            bodies.append(body)
        return bodies

    async def _choices(self, body: dict[str, Any], deadline: Deadline) -> list[dict[str, Any]]:
        fields = {name: value for name, value in {**body, **self.extra_body}.items() if value is not None}
        content = await asyncio.to_thread(lambda: json.dumps(fields).encode())
        try:
            answer = await self.transport.post("/chat/completions", content, deadline)
        except Fault as fault:
            if fault.refused and not self.transport.answered:
                hint = HINTS.get(fault.kind, "")
                raise RewardError(f"the judge {self.model!r} is refused, check its set-up: {fault}{hint}") from fault
            raise
        if not answer["choices"]:
            raise ValueError("no choices")
        return answer["choices"]


HINTS = {
    "http_400": "; if it does not know `response_format`, set structured=False, or top_k=None if it does not know "
    '`top_k`, and leave out any other field that it refuses with extra_body={"name": None}',
    "http_404": "; the URL must be the API's base, mostly ending in /v1, and the model one of GET <URL>/models",
}
