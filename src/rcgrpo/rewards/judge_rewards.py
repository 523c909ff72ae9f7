"""Rewards by a vision-language judge: questions about an edit, and how answers become scores.

Where it fits: `EditScoreReward`, `UnifiedRewardEditReward`, `SpatialRewardReward` and `LogitScoreReward` ask a `Judge`:
`ServerJudge` or `LocalJudge`. Why it exists: one way to ask and one parser for every judge.

The questions have VIEScore's structure (arXiv 2312.14867) on EditScore's scale (arXiv 2509.23909): *semantics*, from
both pictures, `[success, no over-editing]`; *quality*, from the edited picture alone, `[naturalness, no artefacts]`;
each 0..25. A judge that was trained on certain words should get those: see `EditPrompts`.

Gotchas: an answer that cannot be parsed is `None`, reported as a failure and counted as `faults["unparsable"]`; it is
never a number. The rewards are asynchronous; a local judge works in a thread and does not block the others. Judging a
crop (`crop_margin`) shows the judge the region and hides the background: pair it with a preservation reward.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from PIL import Image

from .judge_answers import BOX_SCALE, SCALE, edit_score, expected_score, parse_scores, spatial_score
from .judges import MODEL_VARIABLE, URL_VARIABLE, Judge, Question, ServerJudge
from .local_judge import LocalJudge
from .pictures import crop_to_region
from .registry import RewardError, register_reward
from .transport import Fault

DIGITS = ("0", "1", "2", "3", "4", "5")
SMALLEST_CROP = 56  # pixels; below two of Qwen-VL's merged patches a crop is mostly padding


@dataclass(frozen=True)
class EditPrompts:
    """What an edit judge is asked; `<instruction>` stands for the edit's instruction.

    Args:
        semantics: asked with the source and the edited picture, in this order.
        quality: asked with the edited picture alone.

    Both must ask for JSON with a list `score` of two numbers from 0 to 25. There are `EDITSCORE_PROMPTS`, EditScore's
    own, `SPATIAL_PROMPTS`, which ask for the edited regions first, and `EDIT_PROMPTS` for judges that were trained on
    neither.
    """

    semantics: str
    quality: str


def _editscore(name: str) -> str:
    """EditScore's own words, Apache-2.0; see `editscore/SOURCE.md`."""
    return (files(__package__) / "editscore" / f"{name}.txt").read_text(encoding="utf-8")


EDITSCORE_PROMPTS = EditPrompts(_editscore("semantics"), _editscore("quality"))

_FORMAT = """Answer with one JSON object and nothing else, the reasoning first and in at most three sentences:
{"reasoning": "...", "score": [a, b]}"""

EDIT_PROMPTS = EditPrompts(
    semantics=f"""You review the work of an automatic photo editor. The first picture is the original, the second one \
is the editor's result for this instruction:

<instruction>

Give two whole numbers from 0 to 25.
a, success: how far the result does what was asked. 0: nothing of it; 25: all of it, exactly as asked.
b, restraint: how far everything that was not asked about is left as it was. 0: it could be another scene; 25: not one \
thing changed that need not have.
Judge the pictures only, not how hard the task is. {_FORMAT}""",
    quality=f"""You review a picture that an automatic photo editor made. Give two whole numbers from 0 to 25.
a, naturalness: do light, shadows, perspective and proportions fit together? 0: plainly fake; 25: a believable picture.
b, cleanliness: is it free of smears, seams, noise, deformed bodies, faces or objects, and garbled letters? 0: full \
of them; 25: none to be found.
{_FORMAT}""",
)

SPATIAL_PROMPTS = EditPrompts(
    semantics=f"""You review the work of an automatic photo editor. The first picture is the original, the second one \
is the editor's result for this instruction:

<instruction>

First say where the second picture was edited, each region as {{"id": 0, "label": "what it is", "bbox_2d": [x1, y1, \
x2, y2]}} with coordinates from 0 (left, top) to {BOX_SCALE} (right, bottom), none if nothing was. Look at these \
regions in both pictures; in the reasoning put <|bbox_0|> before what you say of region 0, and <|global|> before the \
whole. Then give two whole numbers from 0 to 25.
a, success: how far the result does what was asked. 0: nothing of it; 25: all of it, exactly as asked.
b, restraint: how far everything that was not asked about is left as it was. 0: it could be another scene; 25: not one \
thing changed that need not have.
Answer with one JSON object and nothing else, short in its reasoning:
{{"edit_region": [...], "reasoning": "...", "score": [a, b]}}""",
    quality=EDIT_PROMPTS.quality,
)

LOGIT_PROMPT = """The first picture is the original, the second one is an automatic photo editor's result for this \
instruction:

<instruction>

How good is the edit? Take into account whether the instruction was followed, whether the rest was left alone, and \
whether the result looks real. 0: worthless; 5: flawless. Answer with a single digit from 0 to 5 and nothing else."""

SCORE_SCHEMA = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "score": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": SCALE},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["reasoning", "score"],
    "additionalProperties": False,
}
_COORDINATES = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
_REGION = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "label": {"type": "string"}, "bbox_2d": _COORDINATES},
    "required": ["id", "label", "bbox_2d"],
    "additionalProperties": False,
}
BOX_SCHEMA = {
    "type": "object",
    "properties": {"edit_region": {"type": "array", "items": _REGION}, **SCORE_SCHEMA["properties"]},  # type: ignore[dict-item]
    "required": ["edit_region", "reasoning", "score"],
    "additionalProperties": False,
}


def default_judge(model: str, adapter: str | None = None, temperature: float = 0.7) -> Judge:
    """The judge at `RCGRPO_JUDGE_URL` (several with commas; model name in `RCGRPO_JUDGE_MODEL`), else a local one."""
    if url := os.environ.get(URL_VARIABLE):
        urls = [part.strip() for part in url.split(",")]
        return ServerJudge(urls, os.environ.get(MODEL_VARIABLE) or adapter or model, temperature=temperature)
    return LocalJudge(model, adapter, temperature=temperature)


class _EditJudgement:
    """What the judge rewards share: the pictures they show, and what happens to a candidate without a score."""

    columns: tuple[str, ...] = ()
    value_range = (0.0, 1.0)

    def __init__(self, judge: Judge, crop_margin: float | None, required: bool, name: str | None) -> None:
        if crop_margin is not None and crop_margin < 0:
            raise ValueError(f"crop_margin: got {crop_margin}, expected None (whole pictures) or 0 or more")
        self.judge, self.crop_margin, self.required = judge, crop_margin, required
        if name is not None:
            self.reward_name = name
        self._unparsable = 0

    @property
    def faults(self) -> Counter[str]:
        return self.judge.faults + Counter({"unparsable": self._unparsable})

    def check(self) -> None:
        """Refuse a judge that cannot be had, before anything is loaded; a judge may have a `check` of its own."""
        getattr(self.judge, "check", lambda: None)()

    def _shown(
        self, images: list[Image.Image], sources: list[Image.Image], masks: list[Image.Image] | None
    ) -> list[tuple[Image.Image, Image.Image] | None]:
        """Source and edited picture of each candidate; `None` where there is no region to crop to."""
        if self.crop_margin is None:
            return list(zip(sources, images, strict=True))
        if masks is None:
            raise RewardError("crop_margin is set, but there are no masks; pass masks, or set crop_margin to None")
        shown: list[tuple[Image.Image, Image.Image] | None] = []
        for image, source, mask in zip(images, sources, masks, strict=True):
            smallest = min(SMALLEST_CROP, *mask.size)
            before, edited = (crop_to_region(p, mask, self.crop_margin, smallest) for p in (source, image))
            shown.append(None if before is None or edited is None else (before, edited))
        return shown

    def _fail(self, index: int, answer: Fault | str, log_failure: Callable[[int, str], None]) -> None:
        """Report a candidate without a score: a fault, or what could not be read as a score."""
        if not isinstance(answer, Fault):
            self._unparsable += 1
            answer = f"unparsable: {answer}"
        log_failure(index, str(answer))


@register_reward("editscore", required=True, value_range=(0.0, 1.0))
class EditScoreReward(_EditJudgement):
    """EditScore (arXiv 2509.23909): how well an edit succeeds, spares the rest and looks, in [0, 1].

    Each pass asks about semantics and about quality and gives `sqrt(SC · PQ) / 10`; the reward is the mean over the
    passes that could be parsed, and `None`, a failure, if none could.

    Args:
        judge: who is asked. By default the server at `RCGRPO_JUDGE_URL`, else EditScore's LoRA on Qwen3-VL-8B in this
            process, loaded on first use (17 GB of weights; a server on another GPU is the faster choice).
        prompts: what is asked; EditScore's own words, on which its models were trained.
        passes: sampled answers per question to average over. EditScore's own default is 1; more are less noisy.
        crop_margin: judge only the mask's bounding box, grown by this share of its longer side; `None`: whole pictures.
        required: whether the run must stop when the judge fails persistently, as it does by default: what a dead judge
            leaves to train with, a preservation reward perhaps, is not what was asked for.
        name: another name in logs, e.g. when two of these are used.
    """

    def __init__(
        self,
        judge: Judge | None = None,
        *,
        prompts: EditPrompts = EDITSCORE_PROMPTS,
        passes: int = 4,
        crop_margin: float | None = None,
        required: bool = True,
        name: str | None = None,
    ) -> None:
        if passes < 1:
            raise ValueError(f"passes: got {passes}, expected at least 1")
        super().__init__(judge or self._default_judge(), crop_margin, required, name)
        self.prompts, self.passes = prompts, passes

    schema: Mapping[str, Any] = SCORE_SCHEMA
    """Of the answer about semantics."""

    def _default_judge(self) -> Judge:
        return default_judge("Qwen/Qwen3-VL-8B-Instruct", "EditScore/EditScore-Qwen3-VL-8B-Instruct")

    def _pass_score(self, semantics: list[float], quality: list[float]) -> float:
        return edit_score(semantics, quality)

    async def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        source_images: list[Image.Image],
        masks: list[Image.Image] | None = None,
        log_failure: Callable[[int, str], None] = lambda index, reason: None,
        **columns: Any,
    ) -> list[float | None]:
        """One score per candidate; `None` where there is no region to crop to, or no usable answer."""
        shown = self._shown(images, source_images, masks)
        questions = []
        for prompt, pair in zip(prompts, shown, strict=True):
            if pair is not None:
                semantics = self.prompts.semantics.replace("<instruction>", prompt)
                quality = self.prompts.quality.replace("<instruction>", prompt)
                questions += [Question(pair, semantics, self.schema), Question(pair[1:], quality, SCORE_SCHEMA)]
        answers = iter(await self.judge.answers(questions, self.passes))
        scores: list[float | None] = []
        for index, pair in enumerate(shown):
            scores.append(None if pair is None else self._combine(index, next(answers), next(answers), log_failure))
        return scores

    def _combine(
        self,
        index: int,
        semantics: list[str] | Fault,
        quality: list[str] | Fault,
        log_failure: Callable[[int, str], None],
    ) -> float | None:
        if isinstance(semantics, Fault):
            self._fail(index, semantics, log_failure)
            return None
        if isinstance(quality, Fault):
            self._fail(index, quality, log_failure)
            return None
        parsed = [(parse_scores(s), parse_scores(q)) for s, q in zip(semantics, quality, strict=False)]
        scores = [self._pass_score(s, q) for s, q in parsed if s is not None and q is not None]
        if not scores:
            broken = next((text for text in (*semantics, *quality) if parse_scores(text) is None), "nothing")
            self._fail(index, f"the judge said {broken[:200]!r}", log_failure)
            return None
        return math.fsum(scores) / len(scores)


@register_reward("unified_reward_edit", required=True, value_range=(0.0, 1.0))
class UnifiedRewardEditReward(EditScoreReward):
    """UnifiedReward-Edit: `EditScoreReward` asked of that model, which answers the same kind of questions.

    By default the server at `RCGRPO_JUDGE_URL` (`vllm serve CodeGoat24/UnifiedReward-Edit-qwen3vl-8b`), else the same
    model in this process.
    """

    def _default_judge(self) -> Judge:
        return default_judge("CodeGoat24/UnifiedReward-Edit-qwen3vl-8b")


@register_reward("spatial_reward", required=True, value_range=(0.0, 1.0))
class SpatialRewardReward(EditScoreReward):
    """SpatialReward (arXiv 2602.07458): the judge says where the edit is before it scores it, in [0, 1].

    Each pass gives `SC^0.8 · PQ^0.2 / 10`, see `spatial_score`. By default one pass at temperature 0, as its authors'
    reward server asks, of the server at `RCGRPO_JUDGE_URL`, else of SpatialReward-8B in this process. The words of the
    questions are ours, their form is the one that it was trained on; its authors' words come without a licence.

    Args:
        judge, prompts, passes, crop_margin, required, name: as in `EditScoreReward`.
    """

    schema = BOX_SCHEMA

    def __init__(
        self,
        judge: Judge | None = None,
        *,
        prompts: EditPrompts = SPATIAL_PROMPTS,
        passes: int = 1,
        crop_margin: float | None = None,
        required: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(judge, prompts=prompts, passes=passes, crop_margin=crop_margin, required=required, name=name)

    def _default_judge(self) -> Judge:
        return default_judge("SpatialReward/SpatialReward-8B", temperature=0.0)

    def _pass_score(self, semantics: list[float], quality: list[float]) -> float:
        return spatial_score(semantics, quality)


@register_reward("edit_r1", required=True, value_range=(0.0, 1.0))
class LogitScoreReward(_EditJudgement):
    """Edit-R1's reward (arXiv 2510.16888): the expected digit 0..5 of the judge's first token, over 5, in [0, 1].

    No reasoning and no sampling: one forward per candidate, and a score that moves smoothly. A server reports the 20
    likeliest tokens only; a digit that is not among them counts as probability 0.

    Args:
        judge: who is asked. By default the server at `RCGRPO_JUDGE_URL`, else Qwen2.5-VL-7B in this process.
        prompt: what is asked; `<instruction>` stands for the edit's instruction.
        crop_margin, required, name: as in `EditScoreReward`.
    """

    def __init__(
        self,
        judge: Judge | None = None,
        *,
        prompt: str = LOGIT_PROMPT,
        crop_margin: float | None = None,
        required: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(judge or default_judge("Qwen/Qwen2.5-VL-7B-Instruct"), crop_margin, required, name)
        self.prompt = prompt

    async def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        source_images: list[Image.Image],
        masks: list[Image.Image] | None = None,
        log_failure: Callable[[int, str], None] = lambda index, reason: None,
        **columns: Any,
    ) -> list[float | None]:
        """One score per candidate; `None` where there is no region to crop to, or no digit among the likely tokens."""
        shown = self._shown(images, source_images, masks)
        questions = [
            Question(pair, self.prompt.replace("<instruction>", prompt))
            for prompt, pair in zip(prompts, shown, strict=True)
            if pair is not None
        ]
        answers = iter(await self.judge.log_probs(questions, DIGITS))
        scores: list[float | None] = []
        for index, pair in enumerate(shown):
            answer = None if pair is None else next(answers)
            score = None if answer is None or isinstance(answer, Fault) else expected_score(answer)
            if answer is not None and score is None:
                fault = "no digit from 0 to 5 is among the likely first tokens (turn thinking off)"
                self._fail(index, answer if isinstance(answer, Fault) else fault, log_failure)
            scores.append(score)
        return scores
