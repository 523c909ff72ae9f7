"""Cells: what is planned, what is done already, and running the rest in parallel processes.

A cell is one process with a folder of its own, named by a digest of everything that its result depends on, so that a
finished cell is never repeated, two tables share the cells they have in common, and a changed setting or a retrained
editor never meets an old result. `result.json` appears whole or not at all. Cells of the first seed come first, so that
whatever stops the study leaves whole seeds.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import connection, forkserver
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from rcgrpo.reporting.files import write_atomically

from .tables import Kind, Table, Variant, common
from .worker import work_on

ROOT = Path(__file__).resolve().parents[2]
BACKWARD = 2
"""A backward counts as two forwards, as usual."""
EVALUATION_STEPS = 8


@dataclass(frozen=True)
class Sizes:
    """How large cells are.

    Args:
        steps: updates of `common()`'s settings; other settings get as many as the same compute pays for.
        edits_per_update: edits of an update.
        train_edits: training rows to draw from.
        eval_edits: held-out rows, one candidate each.
        eval_from: the first of them; rows that no choice has seen lie far from those that chose.
        survey_edits: held-out rows with a whole group each, for diversity, variance and leakage.
        survey_generations: candidates of such a group.
    """

    steps: int = 30
    edits_per_update: int = 6
    train_edits: int = 512
    eval_edits: int = 192
    eval_from: int = 0
    survey_edits: int = 12
    survey_generations: int = 8


SIZES_OF: dict[Kind, tuple[str, ...]] = {
    "train": ("edits_per_update", "train_edits", "eval_edits", "eval_from"),
    "groups": ("survey_edits", "survey_generations"),
}
"""Sizes that a cell's result depends on; `steps` does through the budget."""


@dataclass(frozen=True)
class Cell:
    """One process's work.

    Args:
        name: of its variant, for people.
        kind: of the table.
        config: all settings, `common()` and the variant's together.
        corruption: of the training masks.
        trained: false evaluates the base.
        survey: also look at whole groups after training.
        budget: compute that training may spend, in units.
        sizes, seed: as they say.
        weights: digest of the editor's weights.
        work: folder of the study.
    """

    name: str
    kind: Kind
    config: Mapping[str, Any]
    corruption: tuple[str, float] | None
    trained: bool
    survey: bool
    budget: float
    sizes: Mapping[str, int]
    seed: int
    weights: str
    work: Path

    @property
    def spec(self) -> dict[str, Any]:
        """What the result depends on, as JSON has it."""
        names = [*SIZES_OF[self.kind], *(SIZES_OF["groups"] if self.survey else ())]
        # Cells are older than `eval_from`, and those that do not have it are where they were.
        sizes = {name: self.sizes[name] for name in names if name != "eval_from" or self.sizes[name]}
        parts = {key: value for key, value in asdict(self).items() if key not in ("name", "work")}
        return json.loads(json.dumps({**parts, "sizes": sizes}))

    @cached_property
    def folder(self) -> Path:
        """`work/cells/DIGEST`."""
        return self.work / "cells" / digest(json.dumps(self.spec, sort_keys=True).encode())

    def result(self) -> dict[str, Any] | None:
        """What the cell found, `None` while it has not finished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def units(self) -> float:
        """Compute to expect: model calls on one sample, a backward as two."""
        sizes, config = Sizes(**self.sizes), self.config
        groups = sizes.survey_edits * sizes.survey_generations
        rollout = config["num_inference_steps"] * groups
        if self.kind == "train":
            measured = EVALUATION_STEPS * sizes.eval_edits + (rollout if self.survey else 0)
            return measured + (self.budget if self.trained else 0)
        # Three arms, each with two looks into the model and a gradient of every group; one or two rollouts to match.
        transitions = config["num_anchors"] * config["num_policy_steps"] * sizes.survey_edits
        return 4.5 * rollout + 3 * (2 * groups + (1 + BACKWARD) * transitions)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def weights_digest(folder: Path) -> str:
    """Of all weights below a diffusers folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


# Equal compute --------------------------------------------------------------------------------------------------------


def units_per_edit(config: Mapping[str, Any]) -> float:
    """Forwards, and backwards as two forwards each, that one edit costs in one update with these settings."""
    steps = config["num_inference_steps"]
    calls = 2 * steps - 1 if config.get("solver") == "heun" else steps
    transitions = config["num_anchors"] * config["num_policy_steps"]
    forwards = config["num_generations"] * calls / config.get("num_iterations", 1)
    forwards += transitions * (2 if config.get("beta") else 1)
    guided = 2 if config.get("true_cfg_scale", 1) > 1 else 1
    return guided * (forwards + BACKWARD * transitions)


def updates_for(config: Mapping[str, Any], budget: float, edits_per_update: int) -> int:
    """Updates that a budget pays for with these settings, at least one."""
    return max(1, round(budget / (edits_per_update * units_per_edit(config))))


class Compute:
    """Counts samples that went through a transformer, forwards and backwards apart."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    @property
    def units(self) -> int:
        return self.forwards + BACKWARD * self.backwards

    def report(self) -> dict[str, int]:
        return {"forwards": self.forwards, "backwards": self.backwards, "units": self.units}

    @contextmanager
    def counting(self, transformer: nn.Module) -> Iterator[None]:
        """Count every call inside, also through wrappers such as PEFT's."""

        def count(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output.sample
            self.forwards += len(states)
            if states.requires_grad:
                states.register_hook(self._count_backward)

        handle = transformer.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


# Planning -------------------------------------------------------------------------------------------------------------


def plan(
    table: Table,
    sizes: Sizes,
    seeds: Sequence[int],
    weights: str,
    work: Path,
    overrides: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
) -> dict[tuple[str, int], Cell]:
    """The table's cells by variant and seed, a whole seed after the other.

    Args:
        overrides: settings for all variants, below their own.
        only: names of variants; all by default.

    Raises:
        ValueError: a name that the table does not have.
    """
    names = [variant.name for variant in table.variants]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"only: got {unknown}, expected some of {', '.join(names)}")
    chosen = [variant for variant in table.variants if not only or variant.name in only]
    start = {**common(), **(overrides or {})}
    budget = sizes.steps * sizes.edits_per_update * units_per_edit(start)

    def cell(variant: Variant, seed: int) -> Cell:
        return Cell(
            name=variant.name,
            kind=table.kind,
            config={**start, **variant.config},
            corruption=variant.corruption,
            trained=variant.trained,
            survey=table.survey,
            budget=budget if variant.trained and table.kind == "train" else 0.0,
            sizes=asdict(sizes),
            seed=seed,
            weights=weights,
            work=work,
        )

    return {(variant.name, seed): cell(variant, seed) for seed in seeds for variant in chosen}


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """Those without a result, each once."""
    return list({cell.folder: cell for cell in cells if cell.result() is None}.values())


def estimate(cells: Sequence[Cell], seconds_per_unit: float, workers: int, overhead: float = 8.0) -> float:
    """Seconds that the unfinished cells will take; `overhead` is a cell's start and pictures."""
    todo = unfinished(cells)
    total = sum(cell.units * seconds_per_unit + overhead for cell in todo)
    longest = max((cell.units * seconds_per_unit + overhead for cell in todo), default=0.0)
    return max(total / workers, longest)


def measured_rate(cells: Sequence[Cell]) -> float | None:
    """Seconds per unit of the middle one of the cells that have finished, `None` where none has."""
    finished = {cell.folder: (cell, result) for cell in cells if (result := cell.result()) is not None}
    return median(result["seconds"]["total"] / cell.units for cell, result in finished.values()) if finished else None


# Running --------------------------------------------------------------------------------------------------------------


CELL = "benchmarks.study.cell:main"

# Freed memory stays in the process: giving it back to the system and asking again costs a sixth of a rollout.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """What the processes of cells inherit; this process is left as it was."""
    before = dict(os.environ)
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_cells(
    cells: Sequence[Cell],
    workers: int = 2,
    threads: int = 1,
    work: str = CELL,
    preload: Sequence[str] = ("benchmarks.study.preload",),
    report: Callable[[str], None] = print,
) -> list[Cell]:
    """Run what has no result yet, so many processes at a time; the output of each goes to `log.txt` in its folder.

    A cell that fails stops no other. Processes are forked from one that has imported everything, as imports would take
    longer than many a cell. They end when this one is interrupted or killed.

    Args:
        work: `module:function` that is called with a cell's folder.
        preload: modules to import once; they must not start threads.

    Returns:
        The cells that failed.
    """
    waiting, failed = unfinished(cells), []
    total, done = len(waiting), 0
    running: dict[Any, tuple[Cell, float]] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with environment(threads):
        forkserver.ensure_running()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                with write_atomically(cell.folder / "cell.json") as path:
                    path.write_text(json.dumps(cell.spec, indent=1))
                process = context.Process(target=work_on, args=(work, str(cell.folder)))
                process.start()
                running[process] = cell, time.perf_counter()
            connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.exitcode is not None]:
                cell, began = running.pop(process)
                done += 1
                took = f"{time.perf_counter() - began:.0f} s"
                if process.exitcode or cell.result() is None:
                    failed.append(cell)
                    report(f"[{done}/{total}] FAILED after {took}: see {cell.folder / 'log.txt'}")
                else:
                    report(f"[{done}/{total}] {cell.name}, seed {cell.seed}, in {took}")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    return failed
