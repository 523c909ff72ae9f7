"""`python -m benchmarks.study a --workers 2`: run a table's cells that have no result yet, then write its page.

`python -m benchmarks.study publish` adds what was run to the published results and writes the documentation's page of
them; `python -m benchmarks.study restore` fills the folder to run in with the published results, to add to them.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from .harness import ROOT, Cell, Sizes, estimate, measured_rate, plan, run_cells, unfinished, weights_digest
from .record import Planned, keep, recall, remember, restore, result_file
from .tables import TABLES, common


def calibrate(threads: int) -> float:
    """Seconds that one sample takes through the embedded transformer, forwards."""
    import torch
    from diffusers import FluxTransformer2DModel

    from rcgrpo.tiny import WEIGHTS

    torch.set_num_threads(threads)
    model = FluxTransformer2DModel.from_pretrained(str(WEIGHTS / "transformer"))
    width, samples, tokens = model.config.in_channels, 24, 128
    inputs = {
        "hidden_states": torch.randn(samples, tokens, width),
        "timestep": torch.rand(samples),
        "pooled_projections": torch.randn(samples, model.config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(samples, 20, model.config.joint_attention_dim),
        "txt_ids": torch.zeros(20, 3),
        "img_ids": torch.zeros(tokens, 3),
        "guidance": torch.ones(samples) if model.config.guidance_embeds else None,
    }
    times = []
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            model(**inputs)
            times.append(time.perf_counter() - began)
    return min(times) / samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    described = "; ".join(f"{key}: {table.title.lower()}" for key, table in TABLES.items())
    parser.add_argument("table", choices=[*TABLES, "all", "publish", "restore"], help=described)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where cells and pages go")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="the table's own number of them by default")
    parser.add_argument("--only", nargs="+", default=[], help="some variants of one table")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="NAME=VALUE", help="for all variants")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--report", action="store_true", help="write pages of what there is, run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where `publish` writes, `restore` reads")
    parser.add_argument("--machine", default="two shared cores", help="what it ran on, for `publish`")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, default=size.default, help=f"{size.default} by default")
    args = parser.parse_args(argv)
    if args.table == "publish":
        return publish(args)
    if args.table == "restore":
        count = restore(published_in(args.docs), args.work)
        print(f"{args.work}: {count} published cells added")
        return 0
    from rcgrpo.tiny import WEIGHTS

    sizes = Sizes(**{size.name: getattr(args, size.name) for size in fields(Sizes)})
    overrides = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in args.overrides)}
    weights = weights_digest(WEIGHTS)
    chosen = list(TABLES) if args.table == "all" else [args.table]
    plans = {
        key: plan(TABLES[key], sizes, args.seeds or range(TABLES[key].seeds), weights, args.work, overrides, args.only)
        for key in chosen
    }
    cells = [cell for planned in plans.values() for cell in planned.values()]
    if args.estimate:
        announce(cells, args)
        return 0
    settings = {"sizes": asdict(sizes), "overrides": overrides, "common": common(), "weights": weights}
    for key, planned in plans.items():
        remember(args.work / key, settings, {place: cell.folder.name for place, cell in planned.items()})
    failed = []
    if not args.report:
        announce(cells, args)
        # Being told to end must end the cells too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        failed = run_cells(cells, args.workers, args.threads, report=lambda line: print(line, flush=True))
    from .pages import write_page

    for key in plans:
        found = section(args.work, key)
        if found is None:
            print(f"Table {key}: no cell has finished")
            continue
        print(f"\n{write_page(args.work / key, found)}\nWritten to {args.work / key}: page.md, summary.json, plot.png")
    return 1 if failed else 0


def announce(cells: list[Cell], args: argparse.Namespace) -> None:
    """Say how long it takes."""
    todo = unfinished(cells)
    if todo:
        # Decoding pictures, rewards and the optimizer come on top.
        rate = measured_rate(cells) or 1.3 * calibrate(args.threads)
        minutes = estimate(cells, rate, args.workers) / 60
        print(f"{len(todo)} cells to run, {args.workers} at a time: about {minutes:.0f} minutes", flush=True)
    else:
        print(f"nothing to run: all {len(cells)} cells are there", flush=True)


# What was found -------------------------------------------------------------------------------------------------------


def reproduce(key: str, settings: dict[str, Any], cells: Planned) -> str:
    """The commands that run these cells: one for the variants that have the same seeds."""
    seeds: dict[str, list[int]] = {}
    for name, seed in sorted(cells):
        seeds.setdefault(name, []).append(seed)
    alike: dict[tuple[int, ...], list[str]] = {}
    for variant in TABLES[key].variants:
        if variant.name in seeds:
            alike.setdefault(tuple(seeds[variant.name]), []).append(variant.name)
    changed = [f"--{name} {value}" for name, value in settings["sizes"].items() if value != getattr(Sizes(), name)]
    if settings["overrides"]:
        changed += ["--set", *(f"{name}={shlex.quote(json.dumps(v))}" for name, v in settings["overrides"].items())]
    lines = []
    for numbers, names in alike.items():
        only = [] if len(names) == len(TABLES[key].variants) else ["--only", *map(shlex.quote, names)]
        parts = ["python -m benchmarks.study", key, "--seeds", *map(str, numbers), *changed, *only]
        lines.append(" ".join(parts))
    return " && ".join(lines)


def section(work: Path, key: str) -> Any:
    """A table's section of the cells that have finished; `None` without any."""
    from .pages import Section
    from .summary import summarise

    kept = recall(work / key)
    if kept is None:
        return None
    files = {place: result_file(work, name) for place, name in kept["cells"].items()}
    finished = {place: json.loads(path.read_text()) for place, path in files.items() if path.exists()}
    if not finished:
        return None
    sizes, table = kept["settings"]["sizes"], TABLES[key]
    seconds = {files[place]: result["seconds"] for place, result in finished.items()}
    minutes, cpu = (sum(each[name] for each in seconds.values()) / 60 for name in ("total", "cpu"))
    groups = f"{sizes['survey_edits']} held-out edits × {sizes['survey_generations']} candidates"
    notes = []
    if table.kind == "train":
        notes.append(
            f"Training: the compute of {sizes['steps']} updates × {sizes['edits_per_update']} edits with 8 steps; "
            f"evaluation: {sizes['eval_edits']} held-out edits{f', and {groups}' if table.survey else ''}."
        )
    else:
        notes.append(f"Groups: {groups}.")
    notes.append(f"{len(files)} cells, {minutes:.0f} minutes of processes in all, {cpu:.0f} of them computing.")
    if missing := len(files) - len(finished):
        notes.append(f"**{missing} of {len(files)} cells have not finished.**")
    if lost := sum("note" in result for result in finished.values()):
        notes.append(
            f"Of {lost} cells only means were kept, not the values of single edits: where more seeds came later, a row "
            "with one of them has no interval over edits, and its `*` speaks of seeds alone."
        )
    command = reproduce(key, kept["settings"], kept["cells"])
    return Section(key, table, summarise(table, finished), command, notes)


def published_in(docs: Path) -> Path:
    return docs / "study" / "record"


def took(record: Path) -> str:
    """What all published cells took, each counted once however many tables have it."""
    results = [json.loads(path.read_text()) for path in record.glob("cells/*/result.json")]
    hours = sum(result["seconds"]["total"] for result in results) / 3600
    return f"All of it, {len(results)} cells, took {hours:.1f} hours of one core."


def publish(args: argparse.Namespace) -> int:
    """Keep what was run, and write the documentation's page of all that is kept."""
    from .pages import read_conclusions, write_study
    from .summary import fill_in

    record = published_in(args.docs)
    keep(args.work, record, TABLES)
    sections = [found for key in TABLES if (found := section(record, key)) is not None]
    if not sections:
        print(f"{args.work}: no table has a finished cell; run one first, such as `python -m benchmarks.study a`")
        return 1
    for found in sections:
        earlier = args.docs / "study" / f"{found.key}.json"
        if earlier.exists():
            fill_in(found.summary, json.loads(earlier.read_text()))
    conclusions = read_conclusions(Path(__file__).with_name("conclusions.md"))
    path = write_study(args.docs, sections, args.machine, conclusions, took(record))
    print(f"Written to {path}: tables {', '.join(found.key for found in sections)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
