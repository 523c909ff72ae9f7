"""A model with and without LoRAs on a data set: sampled in batches, measured, kept on disk as it goes.

Where it fits: `rcgrpo evaluate` reads flags, calls `run`, and hands the records to `results`. Pictures come from the
stock diffusers pipeline, without masks, as anybody gets them; what is measured stands in `held_out`. Every contender
starts each edit from the same noise, which depends on the seed and the row alone.

A folder holds `settings.json` (what decides the numbers), `samples.jsonl` (one line per row, appended batch by batch)
and `images/CONTENDER/ID.png`. Of several processes each does its share of the batches; until the end the others' lines
stand in `samples-1.jsonl` and so on.

Gotchas:
- In a multi-turn edit turn 2 starts from the contender's own turn 1, but its background is compared with the data
  set's source of turn 2, as CompBench's owners do.
- A batch is repeated whole after a crash, so that a resumed run equals an uninterrupted one. With another batch size
  it does up to rounding.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..data.edits import Edit, EditRows
from ..editors import open_editor
from ..editors.base import FlowEditor
from ..editors.lora import LORA_FILE, find_lora, load_lora
from ..maths.noise import keyed_generator
from ..reporting.files import write_atomically
from .compbench import NOT_SCORED, parse_turn, sub_task
from .held_out import Result, Scorer

BASE = "base"
SETTINGS, SAMPLES, IMAGES = "settings.json", "samples.jsonl", "images"
Record = dict[str, Any]


# Contenders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """The model as it is (no `lora`), or with one LoRA file."""

    name: str
    lora: Path | None = None


def contenders(loras: Sequence[str]) -> list[Contender]:
    """The base and one contender per LoRA, named after its folder, file or repository.

    Args:
        loras: each a file, a folder that holds one, or a Hub id; see `lora.find_lora`.

    Raises:
        ValueError: a folder without a LoRA, or a name that is neither here nor on the Hub.
    """
    found = [Contender(BASE)]
    for lora in loras:
        file = find_lora(lora)
        path = Path(lora).resolve() if Path(lora).exists() else Path(lora)
        if path.is_file():
            path = path.parent if path.name == LORA_FILE else path.with_suffix("")
        name = re.sub(r"[^\w.-]+", "-", path.name)
        same = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other.name) is not None for other in found)
        found.append(Contender(f"{name}-{same + 1}" if same else name, file))
    return found


def load_loras(pipeline: DiffusionPipeline, entrants: Sequence[Contender]) -> None:
    """Load every contender's LoRA beside the others; `switch_to` chooses among them.

    Raises:
        ValueError: one cannot be read or does not fit the model; see `lora.check_lora`.
    """
    for contender in entrants:
        if contender.lora is not None:
            load_lora(pipeline, contender.lora, _adapter(contender))


def switch_to(pipeline: DiffusionPipeline, contender: Contender) -> None:
    """Make the pipeline draw as this contender."""
    if contender.lora is not None:
        pipeline.enable_lora()
        pipeline.set_adapters(_adapter(contender))
    elif pipeline.get_list_adapters():
        pipeline.disable_lora()


def _adapter(contender: Contender) -> str:
    return f"rcgrpo_{contender.name}".replace(".", "_")  # PyTorch allows no dots in names of modules


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which rows are edited, in units of one row or of one edit's turns; `not_scored` counts the others by reason."""

    units: list[tuple[int, ...]]
    not_scored: dict[str, int]

    @property
    def rows(self) -> list[int]:
        """All row numbers, in the order of the units."""
        return [row for unit in self.units for row in unit]


def make_plan(rows: EditRows, num_samples: int | None = None) -> Plan:
    """Pair the turns of multi-turn edits and leave out the tasks that no metric scores.

    Args:
        rows: with CompBench's columns `task` and `image_path` where there are any.
        num_samples: so many units, evenly spaced over the data set; all by default.

    Raises:
        ValueError: nothing is left.
    """
    tasks, paths = _column(rows, "task"), _column(rows, "image_path")
    not_scored: Counter[str] = Counter()
    turns: dict[tuple[str, str], dict[int, int]] = {}
    units: list[tuple[int, ...]] = []
    for row, (task, path) in enumerate(zip(tasks, paths, strict=True)):
        turn = parse_turn(path)
        if task in NOT_SCORED:
            not_scored[task] += 1
        elif turn is None:
            units.append((row,))
        else:
            turns.setdefault((task, turn.name), {})[turn.number] = row
    for (task, _), members in turns.items():
        ordered = sorted(members)
        if ordered == list(range(1, len(ordered) + 1)):
            units.append(tuple(members[number] for number in ordered))
        else:
            not_scored[f"{task} without its other turn"] += len(members)
    units.sort()
    if not units:
        raise ValueError(f"dataset: got no rows that can be scored, only {dict(not_scored)}")
    if num_samples is not None and num_samples < len(units):
        units = [units[i * len(units) // num_samples] for i in range(num_samples)]
    return Plan(units, dict(not_scored))


def _column(rows: EditRows, name: str) -> list[str]:
    """A text column, empty where the data set has none; pictures stay undecoded."""
    known = getattr(rows.rows, "column_names", None)
    if known is not None:
        return [value or "" for value in rows.rows[name]] if name in known else [""] * len(rows)
    return [rows.rows[i].get(name) or "" for i in range(len(rows))]


def rows_digest(rows: EditRows, plan: Plan) -> str:
    """A short digest of which rows are evaluated, to tell one selection from another."""
    columns = [_column(rows, name) for name in ("task", "image_path", rows.prompt_column)]
    text = repr([[column[row] for column in columns] for row in plan.rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Sampling -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How every contender draws.

    Args:
        resolution: pictures are made at `resolution²` pixels, keeping the source's aspect ratio.
        num_inference_steps, guidance_scale, max_sequence_length, true_cfg_scale, negative_prompt: as in the editor.
        seed: of the noise.
    """

    resolution: int
    num_inference_steps: int
    guidance_scale: float | None = None
    max_sequence_length: int = 512
    seed: int = 0
    true_cfg_scale: float = 1.0
    negative_prompt: str = ""

    def editor(self, pipeline: DiffusionPipeline) -> FlowEditor:
        """Knows at which size a picture is edited, and what the pipeline's own call takes for it."""
        return open_editor(
            pipeline,
            self.resolution,
            self.num_inference_steps,
            self.guidance_scale,
            self.max_sequence_length,
            true_cfg_scale=self.true_cfg_scale,
            negative_prompt=self.negative_prompt,
        )

    def size_for(self, pipeline: DiffusionPipeline, picture: Image.Image) -> tuple[int, int]:
        """The (height, width) in pixels at which a picture is edited.

        Raises:
            ValueError: the picture is too long and thin to be one token high or wide.
        """
        return self.editor(pipeline).size_for(picture)


def sample(pipeline: DiffusionPipeline, edits: Sequence[Edit], sampling: Sampling) -> list[Image.Image]:
    """One picture per edit, whose noise depends on the seed and `edit.row` alone; few calls, of one size each."""
    editor = sampling.editor(pipeline)
    sizes = [editor.size_for(edit.source) for edit in edits]
    pictures: dict[int, Image.Image] = {}
    for height, width in dict.fromkeys(sizes):
        same = [i for i, size in enumerate(sizes) if size == (height, width)]
        for chosen in [[i] for i in same] if editor.one_prompt_a_call else [same]:
            drawn = pipeline(
                image=[editor.resized(edits[i].source, height, width) for i in chosen],
                prompt=[edits[i].prompt for i in chosen],
                generator=[keyed_generator(sampling.seed, "evaluate", edits[i].row) for i in chosen],
                **editor.call_arguments(height, width),
            ).images
            pictures.update(zip(chosen, drawn, strict=True))
    return [pictures[i] for i in range(len(edits))]


# Run ------------------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, settings: Mapping[str, Any], resume: bool) -> list[Record]:
    """Make the folder for these settings, or check that it was made with them.

    Returns:
        The records that an earlier run left; a last line that a crash cut short is not among them.

    Raises:
        ValueError: the folder holds an evaluation and `resume` is False, or one with other settings.
    """
    file = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        with write_atomically(file) as path:
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return []
    if not resume:
        raise ValueError(
            f"output_dir: {folder} holds an earlier evaluation, expected a new folder; name another one, or resume it"
        )
    earlier = json.loads(file.read_text(encoding="utf-8"))
    differing = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
    if differing:
        changes = "; ".join(f"{key}: then {earlier.get(key)!r}, now {settings.get(key)!r}" for key in differing)
        raise ValueError(
            f"resume: {folder} was evaluated with other settings ({changes}); set them back, or name another output_dir"
        )
    return read_records(folder)


def read_records(folder: Path) -> list[Record]:
    """The records written so far, by any process."""
    texts = [file.read_text(encoding="utf-8") for file in [folder / SAMPLES, *_others_samples(folder)] if file.exists()]
    # What follows the last line break was not finished.
    return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]


def _others_samples(folder: Path) -> list[Path]:
    """The files of the processes beside the main one."""
    return sorted(folder.glob("samples-*.jsonl"))


def _write_records(folder: Path, records: Sequence[Record]) -> None:
    """All that was written so far becomes these records, in one file."""
    with write_atomically(folder / SAMPLES) as path:
        path.write_text("".join(map(_line, records)), encoding="utf-8")
    for file in _others_samples(folder):
        file.unlink()


def run(
    pipeline: DiffusionPipeline,
    entrants: Sequence[Contender],
    rows: EditRows,
    plan: Plan,
    sampling: Sampling,
    scorer: Scorer,
    folder: Path,
    earlier: Sequence[Record] = (),
    batch_size: int = 8,
) -> list[Record]:
    """Sample and measure what `earlier` lacks; each batch is on disk before the next one starts.

    A row that cannot be read is recorded with its error and gets no scores. Every process of a launch calls it.

    Args:
        pipeline: with the contenders' LoRAs loaded.
        earlier: from `open_folder`; the same on every process.
        batch_size: units of `plan` at a time.

    Returns:
        One record for each chosen row, in order: `id`, `row`, `task`, `sub_task`, `image_path`, `instruction`, and
        `scores` (contender to metric to value or None) or `error`.
    """
    pipeline.set_progress_bar_config(disable=True)
    state = PartialState()
    known = {record["row"]: record for record in earlier}
    batches = [plan.units[i : i + batch_size] for i in range(0, len(plan.units), batch_size)]
    done = [all(row in known for unit in batch for row in unit) for batch in batches]
    kept = [known[row] for batch, ready in zip(batches, done, strict=True) if ready for unit in batch for row in unit]
    if state.is_main_process:
        _write_records(folder, kept)  # without the lines of half-written batches
    state.wait_for_everyone()
    left = [batch for batch, ready in zip(batches, done, strict=True) if not ready]
    share = left[state.process_index :: state.num_processes]
    file = folder / (SAMPLES if state.is_main_process else f"samples-{state.process_index}.jsonl")
    total = len(kept) + sum(len(unit) for batch in share for unit in batch)
    fresh: list[Record] = []
    with (
        tqdm(
            total=total, initial=len(kept), desc="evaluating", unit="edit", disable=not state.is_main_process
        ) as progress,
        file.open("a", encoding="utf-8") as stream,
    ):
        for batch in share:
            made = _run_batch(pipeline, entrants, rows, batch, sampling, scorer, folder)
            stream.write("".join(map(_line, made)))
            stream.flush()
            os.fsync(stream.fileno())
            fresh += made
            progress.update(len(made))
    records = {record["row"]: record for record in [*kept, *gather_object(fresh)]}
    ordered = [records[row] for row in plan.rows]
    if state.is_main_process:
        _write_records(folder, ordered)
    return ordered


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _run_batch(
    pipeline: DiffusionPipeline,
    entrants: Sequence[Contender],
    rows: EditRows,
    batch: Sequence[tuple[int, ...]],
    sampling: Sampling,
    scorer: Scorer,
    folder: Path,
) -> list[Record]:
    edits: list[list[Edit]] = []
    records: dict[int, Record] = {}
    for unit in batch:
        try:
            decoded = [rows.edit(row) for row in unit]
        except ValueError as error:
            records |= {row: _record(rows, row, error=str(error)) for row in unit}
            continue
        edits.append(decoded)
        records |= {edit.row: _record(rows, edit.row, scores={}) for edit in decoded}
    for contender in entrants:
        switch_to(pipeline, contender)
        results: list[tuple[int, Result]] = []
        previous: dict[int, Image.Image] = {}
        for turn in range(max(map(len, edits), default=0)):
            members = [i for i, unit in enumerate(edits) if turn < len(unit)]
            starts = [replace(edits[i][turn], source=previous.get(i, edits[i][turn].source)) for i in members]
            for i, picture in zip(members, sample(pipeline, starts, sampling), strict=True):
                previous[i] = picture
                results.append((edits[i][turn].row, Result.of(picture, edits[i][turn])))
        scores = scorer([result for _, result in results]) if results else {}
        for place, (row, result) in enumerate(results):
            with write_atomically(picture_path(folder, contender.name, row)) as path:
                result.image.save(path)
            records[row]["scores"][contender.name] = {name: values[place] for name, values in scores.items()}
    return [records[row] for unit in batch for row in unit]


def _record(rows: EditRows, row: int, **outcome: Any) -> Record:
    columns = rows.rows[row]
    task, path = (columns.get(name) or "" for name in ("task", "image_path"))
    return {
        "id": f"{row:05d}",
        "row": row,
        "task": task,
        "sub_task": sub_task(task, path) or "all",
        "image_path": path,
        "instruction": str(columns[rows.prompt_column]),
        **outcome,
    }


def picture_path(folder: Path, contender: str, row: int) -> Path:
    """Where a contender's picture of a row lies."""
    return folder / IMAGES / contender / f"{row:05d}.png"
