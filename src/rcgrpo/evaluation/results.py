"""From a benchmark's records to what is read: `results.json`, the tables of `results.md`, and `report.html`.

Where it fits: after `benchmark.run`. Means and intervals are `reporting.statistics`', the sub-tasks and what others
published are `compbench`'s, the page of pictures is `reporting.gallery`'s.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.edits import EditRows
from ..inputs.masks import mask_picture
from ..inputs.pictures import decode_picture
from ..reporting.files import write_atomically
from ..reporting.gallery import Card, Table, write_gallery
from ..reporting.sheets import outline
from ..reporting.statistics import Estimate, macro_bootstrap, pad_table
from .benchmark import Plan, Record, picture_path
from .compbench import PUBLISHED, PUBLISHED_SOURCE, categorise, video_id
from .held_out import COMPBENCH_METRICS, METRICS

INTERVALS = "Means with 95 % bootstrap intervals. A category's mean is the mean of its sub-tasks' means."


@dataclass(frozen=True)
class Standing:
    """A contender's means, metric to estimate; with `difference` those of its paired differences to the base."""

    name: str
    estimates: dict[str, Estimate]
    difference: bool = False


@dataclass(frozen=True)
class Section:
    """One category or sub-task: its sub-tasks, how many edits were scored, and how the contenders stand."""

    name: str
    sub_tasks: tuple[str, ...]
    n: int
    standings: list[Standing]


def summarise(
    records: Sequence[Record], names: Sequence[str], metrics: Sequence[str], by_video: bool = True
) -> tuple[list[Section], list[Section]]:
    """Means with 95 % bootstrap intervals, of each category and of each sub-task.

    Args:
        records: of `benchmark.run`; those without scores are passed over.
        names: the contenders, the base first.
        metrics: names from `METRICS`.
        by_video: draw whole videos again instead of edits, as neighbouring frames of one are nearly the same.

    Returns:
        Categories (macro means over their sub-tasks) and sub-tasks.
    """
    scored = [record for record in records if "scores" in record]
    categories = categorise([record["sub_task"] for record in scored])

    def section(name: str, tasks: tuple[str, ...]) -> Section:
        rows = [record for record in scored if record["sub_task"] in tasks]
        values = np.array([[[r["scores"][n][m] for m in metrics] for n in names] for r in rows], dtype=np.float64)
        columns = np.concatenate([values, values[:, 1:] - values[:, :1]], axis=1)  # [edits, contenders, metrics]
        clusters = [video_id(r["image_path"]) or r["id"] if by_video else r["id"] for r in rows]
        estimates = iter(macro_bootstrap(columns.reshape(len(rows), -1), [r["sub_task"] for r in rows], clusters))
        standings = [Standing(name, {m: next(estimates) for m in metrics}) for name in names]
        standings += [
            Standing(f"{name} − {names[0]}", {m: next(estimates) for m in metrics}, difference=True)
            for name in names[1:]
        ]
        return Section(name, tasks, len(rows), standings)

    sub_tasks = dict.fromkeys(task for tasks in categories.values() for task in tasks)
    return [section(*item) for item in categories.items()], [section(task, (task,)) for task in sub_tasks]


def result_tables(categories: Sequence[Section], sub_tasks: Sequence[Section], published: bool) -> list[Table]:
    """One table per category and one of all sub-tasks.

    Args:
        published: add what others published for a category, where a metric is CompBench's.
    """
    metrics = list(categories[0].standings[0].estimates)
    head = ["", *(f"{METRICS[m].label} {'↑' if METRICS[m].higher_is_better else '↓'}" for m in metrics)]
    tables = []
    for section in categories:
        lines = [head, *map(_cells, section.standings)]
        if published and not {*COMPBENCH_METRICS}.isdisjoint(metrics):
            for model, values in PUBLISHED.get(section.name, {}).items():
                cells = [f"{values[name]:.3f}" if name in values else "" for name in metrics]
                lines.append([f"{model}: published in {PUBLISHED_SOURCE}, not measured here", *cells])
        title = f"{section.name} ({', '.join(section.sub_tasks)}): {section.n} edit{'' if section.n == 1 else 's'}"
        tables.append(Table(title, lines))
    lines = [["sub-task", "n", *head]]
    for section in sub_tasks:
        lines += [[section.name, str(section.n), *_cells(standing)] for standing in section.standings]
    return [*tables, Table("Sub-tasks", lines, text_columns=(0, 2))]


def _cells(standing: Standing) -> list[str]:
    sign = "+" if standing.difference else "-"
    return [standing.name, *(_number(name, estimate, sign) for name, estimate in standing.estimates.items())]


def _number(metric: str, estimate: Estimate, sign: str) -> str:
    """`mean [low, high]`, decibels with two decimals, the rest with three; a dash where there is no value."""
    if not estimate.n:
        return "–"
    form = f"{sign}.{2 if metric == 'psnr' else 3}f"
    interval = f" [{estimate.low:{form}}, {estimate.high:{form}}]" if estimate.low == estimate.low else ""
    return f"{estimate.mean:{form}}{interval}"


def write_results(
    folder: Path,
    records: Sequence[Record],
    rows: EditRows,
    plan: Plan,
    names: Sequence[str],
    metrics: Sequence[str],
    settings: Mapping[str, Any],
    by_video: bool = True,
    published: bool = True,
    num_pictures: int = 200,
) -> str:
    """Write `results.json`, `results.md` and `report.html`, each whole or not at all.

    Args:
        records: of `benchmark.run`, which left its pictures in `folder`.
        rows, plan: what was evaluated.
        names: the contenders, the base first.
        metrics: names from `METRICS`.
        settings: for the title and for `results.json`.
        by_video: see `summarise`.
        published: whether what others published belongs beside the results.
        num_pictures: how many rows `report.html` shows, the worst ones.

    Returns:
        The text of `results.md`.

    Raises:
        ValueError: no row has scores.
    """
    failed = {record["id"]: record["error"] for record in records if "error" in record}
    if len(failed) == len(records):
        raise ValueError(
            f"dataset: none of {len(records)} rows could be read, expected at least one; drop or mend them. "
            f"The first: {next(iter(failed.values()))}"
        )
    not_scored = {**plan.not_scored, **({"unreadable": len(failed)} if failed else {})}
    notes = [f"Not scored: {', '.join(f'{name} ({n})' for name, n in not_scored.items())}."] if not_scored else []
    categories, sub_tasks = summarise(records, names, metrics, by_video)
    tables = result_tables(categories, sub_tasks, published)
    blocks = [f"### {table.title}\n\n{pad_table(table.lines, table.text_columns)}" for table in tables]
    text = "\n\n".join([INTERVALS, *blocks, *notes]) + "\n"
    content = {
        "settings": dict(settings),
        "contenders": list(names),
        "metrics": {name: asdict(METRICS[name]) for name in metrics},
        "categories": [asdict(section) for section in categories],
        "sub_tasks": [asdict(section) for section in sub_tasks],
        "not_scored": not_scored,
        "unreadable": failed,
        "intervals": {"confidence": 0.95, "resampled": "videos" if by_video else "edits"},
        "published": {"source": PUBLISHED_SOURCE, "categories": PUBLISHED} if published else None,
    }
    with write_atomically(folder / "results.json") as path:
        path.write_text(json.dumps(_without_nan(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with write_atomically(folder / "results.md") as path:
        path.write_text(text, encoding="utf-8")
    ranked = worst_first(records, names[-1], metrics)
    shown = ranked[:num_pictures]
    cut = f"; the {len(shown)} worst of {names[-1]} are shown" if len(shown) < len(ranked) else ""
    write_gallery(
        folder / "report.html",
        title=f"{_shown(settings.get('model', 'A model'))} on {_shown(settings.get('dataset', 'its data'))}",
        notes=[INTERVALS, f"{len(ranked)} edits scored{cut}.", *notes],
        tables=tables,
        cards=_cards(folder, shown, rows, names),
        names=names,
        metrics={name: METRICS[name] for name in metrics},
        first=main_metric(metrics),
    )
    return text


def main_metric(metrics: Sequence[str]) -> str:
    """The one that says most about the edit itself."""
    return next((name for name in ("edit_score", "lc_i", "lp_i") if name in metrics), metrics[0])


def worst_first(records: Sequence[Record], name: str, metrics: Sequence[str]) -> list[Record]:
    """The scored records by one contender's main metric, those without a value last."""
    main = main_metric(metrics)
    sign = 1 if METRICS[main].higher_is_better else -1

    def rank(record: Record) -> tuple[bool, float]:
        value = record["scores"][name][main]
        return value is None, 0.0 if value is None else sign * value

    return sorted((record for record in records if "scores" in record), key=rank)


def _cards(folder: Path, records: Sequence[Record], rows: EditRows, names: Sequence[str]) -> Iterator[Card]:
    for record in records:
        edit = rows.edit(record["row"])
        pictures = {"source": edit.source, "region": outline(edit.source, mask_picture(edit.mask))}
        for name in names:
            pictures[name] = decode_picture(picture_path(folder, name, record["row"]), f"{name}, {record['id']}")
        if edit.columns.get("edited_image") is not None:
            pictures["target"] = edit.columns["edited_image"]
        label = " ".join(part for part in (record["id"], record["image_path"]) if part)
        yield Card(pictures, record["instruction"], record["sub_task"], label, record["scores"])


def _shown(name: str) -> str:
    """A Hub id as it is, and of a folder of this machine its last part, as the page may travel."""
    return Path(name).name if Path(name).is_absolute() else name


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
