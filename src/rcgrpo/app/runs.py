"""A training run as its folder tells it, finished or not: curves, pictures, tables, candidates step by step.

Where it fits: the tab *Training run* shows what `read_run` returns; nothing here knows a page. Figures that the run
drew itself are taken as they are; of a run that has not come so far they are drawn from its last checkpoint's log.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ..editors.lora import LORA_FILE
from ..reporting.curves import plot_curves
from ..reporting.learning_curve import Curve, plot_learning_curve

FIGURES = {
    "Curves": "reward_curves.png",
    "Learning curve": "learning_curve.png",
    "Before and after": "samples/contact_sheet.png",
    "Changed most": "samples/changed_most.png",
}
"""Title to the file that a finished run writes."""

KINDS = {"completions": "training", "eval_completions": "evaluation"}
"""How the files of candidates begin, and of what they are."""


@dataclass(frozen=True)
class Candidates:
    """What was recorded at one step: a table, and a picture where there is one."""

    step: int
    table: Path
    picture: Path | None

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Names of the columns, and a row for each candidate."""
        table = pyarrow.parquet.read_table(self.table)
        return table.column_names, [list(row.values()) for row in table.to_pylist()]


@dataclass(frozen=True)
class Run:
    """
    Args:
        folder: the run's `output_dir`.
        step, max_steps: of the newest checkpoint; 0 where there is none.
        log_history: the newest checkpoint's.
        figures: title to picture.
        metrics: the before/after tables as Markdown, empty until the run is done.
        candidates: "training" and "evaluation" to what was recorded, in order of steps.
    """

    folder: Path
    step: int
    max_steps: int
    log_history: Sequence[Mapping[str, Any]]
    figures: dict[str, Path]
    metrics: str
    candidates: dict[str, list[Candidates]]


def read_run(folder: str | Path, drawn: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: the `output_dir`; a checkpoint in it will do too.
        drawn: a folder for figures that the run itself has not drawn.

    Raises:
        ValueError: there is no such folder, or it holds no run.
    """
    if not str(folder).strip():
        raise ValueError("run: got nothing, expected the output_dir of a training run")
    path = Path(str(folder).strip()).expanduser()
    if not path.is_dir():
        raise ValueError(f"run: got {str(folder)!r}, expected a folder that exists, the output_dir of a training run")
    if re.fullmatch(r"checkpoint-\d+", path.name):
        path = path.parent
    state = _newest_state(path)
    candidates = {kind: _candidates(path / "completions", prefix) for prefix, kind in KINDS.items()}
    figures = {title: path / name for title, name in FIGURES.items() if (path / name).is_file()}
    if not (state or figures or any(candidates.values())):
        only = "a LoRA alone, which is no run" if (path / LORA_FILE).is_file() else "none of them"
        raise ValueError(
            f"run: got {str(folder)!r}, expected the output_dir of a training run, with checkpoint-N, completions or "
            f"reward_curves.png in it; it holds {only}"
        )
    log_history = state.get("log_history", [])
    figures |= {title: file for title, file in _draw(log_history, drawn).items() if title not in figures}
    metrics = path / "metrics.md"
    return Run(
        path,
        state.get("global_step", 0),
        state.get("max_steps", 0),
        log_history,
        {title: figures[title] for title in FIGURES if title in figures},
        metrics.read_text(encoding="utf-8") if metrics.is_file() else "",
        {kind: found for kind, found in candidates.items() if found},
    )


def _newest_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json` of the newest checkpoint that can be read; one may just be written."""
    checkpoints = [child for child in folder.glob("checkpoint-*") if child.name.removeprefix("checkpoint-").isdigit()]
    newest = sorted(checkpoints, key=lambda child: -int(child.name.removeprefix("checkpoint-")))
    for checkpoint in [folder, *newest]:
        try:
            return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {}


def _candidates(folder: Path, prefix: str) -> list[Candidates]:
    """What was recorded under this name, in order of steps."""
    tables = {int(name[1]): file for file in folder.glob(f"{prefix}_*.parquet") if (name := _numbered(file, prefix))}
    pictures = {step: file.with_suffix(".jpg") for step, file in tables.items()}
    return [
        Candidates(step, tables[step], pictures[step] if pictures[step].is_file() else None) for step in sorted(tables)
    ]


def _numbered(file: Path, prefix: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{prefix}_(\d+)", file.stem)


def _draw(log_history: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """The figures that a log makes, as far as it does."""
    figures: dict[str, Path] = {}
    if any("reward" in row for row in log_history):
        figures["Curves"] = folder / FIGURES["Curves"]
        plot_curves(log_history, figures["Curves"])
    curve = Curve.of(log_history)
    if len(curve.steps) > 1:
        figures["Learning curve"] = folder / FIGURES["Learning curve"]
        plot_learning_curve(curve, figures["Learning curve"])
    return figures
