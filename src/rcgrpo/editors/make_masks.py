"""Masks for rows that have none, made once and kept in a folder that `load_edit_dataset(masks=...)` reads.

A maker is a callable from a canonical row to a mask; it raises `NoMask` where its method does not apply. Here are:
the difference with the ground truth, or what a judge sees in it; the editor's own velocity, with the instruction and
without (DiffEdit's idea, works for *add*); text-prompted segmentation with GroundingDINO and SAM 2, or with SAM 3 alone
(both work where the object is in the picture).

Gotchas: masks are found again by the row's `id`, so make and use them with the same preset and split. Models run in
inference mode and are loaded by the maker, not on import.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.loading import METADATA
from ..data.masks import difference_mask, mask_share, velocity_map, velocity_mask
from ..maths.noise import keyed_noise
from ..reporting.files import write_atomically
from ..rewards.judge_answers import parse_boxes
from ..rewards.judge_rewards import BOX_SCHEMA, SPATIAL_PROMPTS, SpatialRewardReward
from ..rewards.judges import Judge, Question
from ..rewards.registry import RewardError
from ..rewards.transport import Fault
from . import Editor

Maker = Callable[[Mapping[str, Any]], Image.Image]
SKIPPED = "skipped.log"
"""Rows without a mask, `id` and reason; not a name that `datasets` takes for data."""


class NoMask(Exception):
    """The method does not apply to this row; the message says why."""


# Makers ---------------------------------------------------------------------------------------------------------------


def from_difference(row: Mapping[str, Any], **settings: float) -> Image.Image:
    """Where `edited_image` differs from `input_image`; `settings` are `difference_mask`'s."""
    if row.get("edited_image") is None:
        raise NoMask("there is no ground truth to compare with")
    mask = difference_mask(row["input_image"], row["edited_image"], **settings)
    if mask is None:
        raise NoMask("source and ground truth hardly differ")
    return mask


class FromJudge:
    """The boxes that a judge of SpatialReward's kind draws around what differs from source to ground truth.

    Args:
        judge: who is asked; `SpatialRewardReward`'s own by default.
    """

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge or SpatialRewardReward().judge

    def __call__(self, row: Mapping[str, Any]) -> Image.Image:
        if row.get("edited_image") is None:
            raise NoMask("there is no ground truth to compare with")
        source = row["input_image"]
        text = SPATIAL_PROMPTS.semantics.replace("<instruction>", row["instruction"])
        (answer,) = asyncio.run(self.judge.answers([Question((source, row["edited_image"]), text, BOX_SCHEMA)], 1))
        if isinstance(answer, Fault):
            raise RewardError(f"the judge has no answer for the row {row['id']!r} ({answer}); try again, or check it")
        boxes = parse_boxes(answer[0])
        if not boxes:
            said = "the judge sees no edit" if boxes == [] else f"the judge named no regions: {answer[0][:100]!r}"
            raise NoMask(said)
        mask = Image.new("L", source.size, 0)
        for left, top, right, bottom in boxes:
            corner = math.floor(left * source.width), math.floor(top * source.height)
            mask.paste(255, (*corner, math.ceil(right * source.width), math.ceil(bottom * source.height)))
        return mask


class FromVelocity:
    """Where the instruction moves the editor's velocity; see `velocity_map`.

    Args:
        editor: any Kontext editor; its `resolution` is the one that the picture is looked at.
        num_draws: draws of noise that are averaged.
        sigma: noise level of the source's latents, in (0, 1]. DiffEdit uses one half; Kontext reads the clean source
            beside the noise, and only above that is there room for something to be added.
        threshold: where to cut the map, in [0, 1].
        seed: of the noise, with the row's id.
    """

    def __init__(
        self, editor: Editor, num_draws: int = 8, sigma: float = 0.75, threshold: float = 0.5, seed: int = 0
    ) -> None:
        if num_draws < 1:
            raise ValueError(f"num_draws: got {num_draws}, expected at least 1")
        for name, value in (("sigma", sigma), ("threshold", threshold)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}: got {value}, expected a number in (0, 1]")
        self.editor, self.num_draws, self.sigma, self.threshold, self.seed = editor, num_draws, sigma, threshold, seed

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any]) -> Image.Image:
        editor, source = self.editor, row["input_image"]
        conditions = editor.encode([source, source], [row["instruction"], ""])
        clean = conditions.source[:1].float()
        timestep = torch.full((2,), 1000 * self.sigma)
        velocities = []
        for draw in range(self.num_draws):
            noise = keyed_noise(tuple(clean.shape[1:]), self.seed, "velocity mask", row["id"], draw).to(clean.device)
            latents = (1 - self.sigma) * clean + self.sigma * noise
            velocities.append(
                editor.velocity(editor.pipeline.transformer, latents.repeat(2, 1, 1), timestep, conditions).float()
            )
        instructed, empty = torch.stack(velocities, dim=1)
        tokens = velocity_map(instructed, empty)
        grid = editor.grid_for(conditions.height, conditions.width)
        mask = velocity_mask(tokens, grid, source.size, self.threshold)
        if mask is None:
            raise NoMask("the instruction moves the velocity nowhere in particular")
        return mask


_OBJECT = (
    r"(?:remove|delete|erase|take away|get rid of|eliminate|cut out)\s+(?P<object>.+)",
    r"(?:replace|swap|substitute|exchange)\s+(?P<object>.+?)\s+(?:with|by|for)\b.*",
    r"(?:change|turn|transform|convert|alter|modify)\s+(?P<object>.+?)\s+(?:to|into|so that|from)\b.*",
    r"(?:recolou?r|paint|colou?r|dye|move|resize|enlarge|shrink|rotate|edit)\s+(?P<object>.+)",
    r"make\s+(?P<object>(?:the|a|an|his|her|their|its)\s+\w+(?:\s+of\s+\w+)?).*",
)
_ADD = r"(?:add|insert|put|place|draw|include|give)\b"
_TAIL = r"\s+(?:from|in|on|at|of)\s+(?:the|this)?\s*(?:picture|image|photo|photograph|scene|background)\b.*"


def object_phrase(instruction: str) -> str | None:
    """The object in the source that an English instruction is about, or `None` where it adds one or none is named.

    "Remove the red apple from the picture." gives "the red apple"; "replace the dog with a cat" gives "the dog".
    """
    text = re.sub(r"\s+", " ", instruction).strip().rstrip(".!")
    text = re.sub(r"^(?:please|can you|could you|let's)\s+", "", text, flags=re.IGNORECASE)
    if re.match(_ADD, text, re.IGNORECASE):
        return None
    for pattern in _OBJECT:
        found = re.fullmatch(pattern, text, re.IGNORECASE)
        if found:
            return re.sub(_TAIL, "", found["object"], flags=re.IGNORECASE).strip() or None
    return None


def row_phrase(row: Mapping[str, Any], column: str | None = None) -> str:
    """What is looked for in a row's picture: what `column` holds, by default `object_phrase` of the instruction.

    Raises:
        NoMask: neither names an object.
    """
    phrase = row.get(column) if column else object_phrase(row["instruction"])
    if not phrase:
        raise NoMask(f"no object to look for in {(row.get(column or 'instruction') or '')!r}")
    return str(phrase)


def _from_pretrained(cls: Any, name: str, field: str, expected: str, kinds: Sequence[str] = ()) -> Any:
    """A model or its processor, with an error that says what to do where it cannot be had.

    `kinds` are the model types that the class can take its weights from: of another one `transformers` would load what
    fits and draw the rest at random.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type if kinds else None
        loaded = cls.from_pretrained(name) if kind is None or kind in kinds else None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}: got {name!r}, expected a folder or Hub id of {expected}; where its weights are gated, ask for "
            f"access on its page and run `hf auth login` ({type(error).__name__}: {error})"
        ) from error
    if loaded is None:
        raise ValueError(f"{field}: got {name!r}, which is a {kind!r}, expected a folder or Hub id of {expected}")
    return loaded


def _union(masks: Tensor, phrase: str) -> Image.Image:
    """Of the outlines `[objects, height, width]` of all that was found."""
    if not len(masks):
        raise NoMask(f"{phrase!r} was not found in the picture")
    union = masks.bool().any(0).cpu()
    if not union.any():
        raise NoMask(f"the outline of {phrase!r} is empty")
    return Image.fromarray(union.numpy().astype("uint8") * 255)


class FromText:
    """Text-prompted segmentation: GroundingDINO finds boxes, SAM 2 outlines what is in them; their union is the mask.

    Args:
        detector: Hub id or folder of a zero-shot detector of `transformers`.
        segmenter: Hub id or folder of a SAM 2.
        phrase_column: the column that names the object; by default `object_phrase` reads it off the instruction.
        box_threshold, text_threshold: GroundingDINO's.
        device: where both run.

    Raises:
        ValueError: a model that cannot be loaded.
    """

    def __init__(
        self,
        detector: str = "IDEA-Research/grounding-dino-tiny",
        segmenter: str = "facebook/sam2.1-hiera-small",
        phrase_column: str | None = None,
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, Sam2Model, Sam2Processor

        finder = ("detector", "a zero-shot detector such as IDEA-Research/grounding-dino-tiny")
        outliner = ("segmenter", "a SAM 2 such as facebook/sam2.1-hiera-small")
        self.detector = _from_pretrained(AutoModelForZeroShotObjectDetection, detector, *finder).to(device).eval()
        self.detector_processor = _from_pretrained(AutoProcessor, detector, *finder)
        sam2 = _from_pretrained(Sam2Model, segmenter, *outliner, kinds=("sam2", "sam2_video"))
        self.segmenter = sam2.to(device).eval()
        self.segmenter_processor = _from_pretrained(Sam2Processor, segmenter, *outliner)
        self.phrase_column, self.device = phrase_column, device
        self.box_threshold, self.text_threshold = box_threshold, text_threshold

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any]) -> Image.Image:
        image, phrase = row["input_image"], row_phrase(row, self.phrase_column)
        text = phrase.lower().rstrip(".") + "."  # GroundingDINO was trained on lower case with a full stop
        inputs = self.detector_processor(images=image, text=text, return_tensors="pt").to(self.device)
        found = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**inputs),
            inputs.input_ids,
            threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            target_sizes=[(image.height, image.width)],
        )[0]
        if not len(found["boxes"]):
            raise NoMask(f"{phrase!r} was not found in the picture")
        prompts = self.segmenter_processor(images=image, input_boxes=[found["boxes"].tolist()], return_tensors="pt")
        output = self.segmenter(**prompts.to(self.device), multimask_output=False)
        masks = self.segmenter_processor.post_process_masks(output.pred_masks.cpu(), prompts["original_sizes"].cpu())[0]
        return _union(masks.flatten(0, 1), phrase)


class FromConcept:
    """Text-prompted segmentation by SAM 3 alone: it outlines every instance of a noun phrase; their union is the mask.

    Promptable concept segmentation (SAM 3, arXiv 2511.16719). One model instead of two, but a larger one: 0.84 B
    parameters, 3.4 GB in fp32, and pictures are looked at with 1008×1008 pixels.

    Args:
        segmenter: Hub id or folder of a SAM 3. Access to Meta's weights must be asked for on the Hub.
        phrase_column: the column that names the object; by default `object_phrase` reads it off the instruction.
        score_threshold: least confidence of an instance, its own times that of the phrase being in the picture at all,
            in [0, 1).
        device: where it runs.

    Raises:
        ValueError: a threshold out of range, or a model that cannot be loaded.
    """

    def __init__(
        self,
        segmenter: str = "facebook/sam3",
        phrase_column: str | None = None,
        score_threshold: float = 0.5,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import Sam3Model, Sam3Processor

        if not 0 <= score_threshold < 1:
            raise ValueError(f"score_threshold: got {score_threshold}, expected a number in [0, 1)")
        outliner = ("segmenter", "a SAM 3 such as facebook/sam3")
        sam3 = _from_pretrained(Sam3Model, segmenter, *outliner, kinds=("sam3", "sam3_video"))
        self.segmenter = sam3.to(device).eval()
        self.processor = _from_pretrained(Sam3Processor, segmenter, *outliner)
        self.phrase_column, self.score_threshold, self.device = phrase_column, score_threshold, device

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any]) -> Image.Image:
        image, phrase = row["input_image"], row_phrase(row, self.phrase_column)
        inputs = self.processor(images=image, text=phrase, return_tensors="pt").to(self.device)
        length, limit = inputs["input_ids"].shape[1], self.segmenter.config.text_config.max_position_embeddings
        if length > limit:
            raise NoMask(f"{phrase!r} has {length} tokens, and SAM 3 reads {limit}")
        found = self.processor.post_process_instance_segmentation(
            self.segmenter(**inputs), threshold=self.score_threshold, target_sizes=[(image.height, image.width)]
        )[0]
        return _union(found["masks"], phrase)


# The folder -----------------------------------------------------------------------------------------------------------


class MaskFolder:
    """PNG masks and a `metadata.jsonl`, which `datasets` opens as an `imagefolder`.

    One line a mask: `file_name, id, group, task, instruction, method, share`. A mask is written before its line, and a
    line that was torn by a crash is dropped when the folder is opened again, so a row is either done or to be done.

    Args:
        folder: made if missing.
        method: how the masks are made; one folder holds one kind.

    Raises:
        ValueError: the folder holds masks of another method.
    """

    def __init__(self, folder: str | Path, method: str) -> None:
        self.folder, self.method = Path(folder), method
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output: got {self.folder}, which is a file, expected a folder or a new name")
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self._read(METADATA)
        others = {line["method"] for line in lines} - {method}
        if others:
            raise ValueError(
                f"output: {self.folder} holds masks made by {', '.join(sorted(others))}, expected a new folder or one "
                f"of {method!r}"
            )
        self.made = {line["id"] for line in lines if (self.folder / line["file_name"]).exists()}
        self.skipped = {line["id"]: line["reason"] for line in self._read(SKIPPED)}

    def __contains__(self, name: str) -> bool:
        return name in self.made or name in self.skipped

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")  # the last line may be half a one
        whole, lines = [], []
        for line in text.split("\n"):  # not at U+2028, which a text may hold
            try:
                lines.append(json.loads(line))
                whole.append(line + "\n")
            except json.JSONDecodeError:
                continue
        if "".join(whole) != text:
            with write_atomically(path) as part:
                part.write_text("".join(whole), encoding="utf-8")
        return lines

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def add(self, row: Mapping[str, Any], mask: Image.Image) -> None:
        """Store the mask of a row."""
        file_name = f"{hashlib.sha256(row['id'].encode()).hexdigest()[:16]}.png"
        with write_atomically(self.folder / file_name) as part:
            mask.save(part)
        known = {key: row[key] for key in ("id", "group", "task", "instruction") if row.get(key) is not None}
        known |= {"method": self.method, "share": round(mask_share(mask), 6)}
        self._append(METADATA, {"file_name": file_name, **known})
        self.made.add(row["id"])

    def skip(self, row: Mapping[str, Any], reason: str) -> None:
        """Remember that a row gets no mask, so that it is not tried again."""
        self._append(SKIPPED, {"id": row["id"], "reason": reason})
        self.skipped[row["id"]] = reason

    def fill(self, rows: Iterable[Mapping[str, Any]], maker: Maker) -> None:
        """Make the masks of the rows that are not done."""
        for row in rows:
            if row["id"] in self:
                continue
            try:
                self.add(row, maker(row))
            except NoMask as reason:
                self.skip(row, str(reason))
