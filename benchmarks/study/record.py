"""What a study's folder remembers of each table, and the part of it that is published.

A folder, `runs/study` or the published one, has for every table a `plan.json` (settings, and which cell each variant
and seed is) and the cells' results below `cells/`. The published one holds no more than that, so that a clone can write
every page again and go on from there: `restore` fills a folder to run in.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rcgrpo.reporting.files import write_atomically

from .harness import Sizes

Planned = dict[tuple[str, int], str]
"""Variant and seed to the name of the cell's folder."""
Results = Mapping[tuple[str, int], Mapping[str, Any]]
"""Variant and seed to what the cell found."""
KEPT = ("spec", "arms", "seconds", "compute", "match", "note")
"""Parts of a result that are published; the training log is not."""
DIGITS = 7


def remember(folder: Path, settings: Mapping[str, Any], cells: Planned) -> None:
    """Write which cells a table has; seeds and variants add up as long as the settings are the same."""
    earlier = recall(folder)
    settings = json.loads(json.dumps(settings))
    known: Planned = dict(earlier["cells"]) if earlier is not None and earlier["settings"] == settings else {}
    known |= cells
    content = {"settings": settings, "cells": [[variant, seed, name] for (variant, seed), name in known.items()]}
    with write_atomically(folder / "plan.json") as path:
        path.write_text(json.dumps(content, indent=1))


def recall(folder: Path) -> dict[str, Any] | None:
    """What `remember` wrote, its cells by variant and seed; a size that was not known yet had its default."""
    path = folder / "plan.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    content["settings"]["sizes"] = asdict(Sizes()) | content["settings"]["sizes"]
    return {**content, "cells": {(variant, seed): name for variant, seed, name in content["cells"]}}


def per_edit(arm: Mapping[str, Any], metric: str) -> np.ndarray:
    """A metric's values by edit, NaN where there is none; empty for a metric of the whole cell."""
    return np.array(arm["per_edit"].get(metric, []), dtype=np.float64)


def result_file(work: Path, name: str) -> Path:
    return work / "cells" / name / "result.json"


def keep(work: Path, published: Path, tables: Iterable[str]) -> None:
    """Add to the published folder what was run in `work`, and drop the results that no table names any more."""
    named = set()
    for key in tables:
        if (plan := recall(work / key)) is not None:
            remember(published / key, plan["settings"], plan["cells"])
        if (plan := recall(published / key)) is not None:
            named |= set(plan["cells"].values())
    for name in sorted(named):
        if (source := result_file(work, name)).exists():
            result = json.loads(source.read_text())
            with write_atomically(result_file(published, name)) as path:
                path.write_text(json.dumps({part: rounded(result[part]) for part in KEPT if part in result}) + "\n")
    for folder in (published / "cells").glob("*"):
        if folder.name not in named:
            shutil.rmtree(folder)


def restore(published: Path, work: Path) -> int:
    """Copy into `work` every published file that it does not have; the number of cells that were copied."""
    copied = 0
    for source in sorted(published.rglob("*.json")):
        target = work / source.relative_to(published)
        if not target.exists():
            with write_atomically(target) as path:
                shutil.copyfile(source, path)
            copied += source.name == "result.json"
    return copied


def rounded(value: Any) -> Any:
    """Numbers to the digits that mean something, so that files stay small; everything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
