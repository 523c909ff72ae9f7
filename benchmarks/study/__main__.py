"""`python -m benchmarks.study a --workers 2`: run a table's cells that have no result yet, then write its page."""

import argparse
import os
import shlex
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .harness import Cell, Sizes, estimate, measured_rate, plan, run_cells, unfinished, weights_digest
from .tables import TABLES


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
    parser.add_argument("table", choices=[*TABLES, "all"], help=described)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where cells and pages go")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="the table's own number of them by default")
    parser.add_argument("--only", nargs="+", default=[], help="some variants of one table")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="NAME=VALUE", help="for all variants")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--report", action="store_true", help="write pages of what there is, run nothing")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, default=size.default, help=f"{size.default} by default")
    args = parser.parse_args(argv)
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
    failed = [] if args.report else run(cells, args)
    for key, planned in plans.items():
        publish(key, planned, args, " ".join(["python -m benchmarks.study", *map(shlex.quote, argv or sys.argv[1:])]))
    return 1 if failed else 0


def run(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Say how long it takes, then do it."""
    todo = unfinished(cells)
    if todo:
        # Decoding pictures, rewards and the optimizer come on top.
        rate = measured_rate(cells) or 1.3 * calibrate(args.threads)
        minutes = estimate(cells, rate, args.workers) / 60
        print(f"{len(todo)} cells to run, {args.workers} at a time: about {minutes:.0f} minutes", flush=True)
    if args.estimate:
        raise SystemExit
    # Being told to end must end the cells too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run_cells(cells, args.workers, args.threads, report=lambda line: print(line, flush=True))


def publish(key: str, planned: dict[tuple[str, int], Cell], args: argparse.Namespace, command: str) -> None:
    """The page of one table, of the cells that have finished."""
    from .pages import write_page
    from .summary import summarise

    finished: dict[tuple[str, int], Any] = {}
    for place, cell in planned.items():
        result = cell.result()
        if result is not None:
            finished[place] = result
    if not finished:
        print(f"Table {key}: no cell has finished")
        return
    missing = len(planned) - len(finished)
    minutes = sum({id(result): result["seconds"]["total"] for result in finished.values()}.values()) / 60
    notes = [f"{len(finished)} cells, {minutes:.0f} minutes of processes in all."]
    notes += [f"**{missing} of {len(planned)} cells have not finished.**"] if missing else []
    page = write_page(args.work / key, TABLES[key], summarise(TABLES[key], finished), command, notes)
    print(f"\n{page}\nWritten to {args.work / key}: page.md, summary.json, plot.png")


if __name__ == "__main__":
    sys.exit(main())
