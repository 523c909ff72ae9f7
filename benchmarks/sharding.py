"""A sharded model on several CPU processes beside plain data parallelism: `python benchmarks/sharding.py`.

LoRA and full fine-tuning of a random small Kontext, three updates of eight edits, once plain and once with
`shard_model`; then half as many processes go on from the sharded run's second checkpoint. The table says how far each
ends from the plain run's weights, relative to how far training moved. `--against_one` compares plain data parallelism
with one process instead; `--nodes 2` has two launchers form the group, as on two machines.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from rcgrpo.reporting.statistics import pad_table

EDITS = 8
RUNS = {"train": ("plain", "sharded"), "resume": ("resumed",), "plain": ("plain",), "one": ("one",)}
"""Of each way to call a worker, in order."""


def train(folder: Path, full: bool, name: str) -> None:
    """One run of this process; the first one writes its weights."""
    import tiny_training as tiny
    from rcgrpo import compbench_mini
    from rcgrpo.training.sharding import full as whole

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sharded = name in ("sharded", "resumed") and world > 1  # one process holds all
    options: dict[str, Any] = tiny.ADAM | {"per_device_train_batch_size": EDITS // world, "seed": 1, "check_rows": 1}
    options |= {"save_strategy": "steps", "save_steps": 2, "shard_model": sharded, "train_micro_batch_size": 3}
    if name == "one":
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": EDITS}
    kind = "full" if full else "LoRA"
    rows, peft = compbench_mini("train", 3 * EDITS, 32), None if full else True
    trainer = tiny.make(folder / kind / name, rows, tiny.flat_for_removals, peft=peft, **options)
    start = {key: whole(weight) for key, weight in tiny.weights(trainer).items()}
    resume = str(folder / kind / "sharded" / "checkpoint-2") if name == "resumed" else None
    trainer.train(resume_from_checkpoint=resume)
    end = {key: whole(weight) for key, weight in tiny.weights(trainer).items()}
    if rank == 0:
        torch.save((start, end), folder / kind / f"{name}.pt")
    trainer.model_wrapped = trainer.model


def worker(folder: Path, what: str, kinds: Sequence[str]) -> None:
    for kind in kinds:
        for name in RUNS[what]:
            train(folder, kind == "full", name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(folder: Path, what: str, kinds: Sequence[str], processes: int, nodes: int) -> None:
    """Run workers; each of several nodes has a launcher of its own, which find each other at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *(meet if nodes > 1 else ["--standalone"])]
    command = [*launcher, "--nproc_per_node", str(processes // nodes), __file__, "--worker", str(folder), what, *kinds]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(nodes)]
    if any([process.wait() for process in running]):
        sys.exit(f"{what} on {processes} processes failed")


def distance(folder: Path, kind: str, name: str) -> str:
    """From the plain run's weights."""
    start, plain = torch.load(folder / kind / "plain.pt")
    _, other = torch.load(folder / kind / f"{name}.pt")
    norm = sum(float((plain[key] - start[key]).square().sum()) for key in plain) ** 0.5
    return f"{sum(float((plain[key] - other[key]).square().sum()) for key in plain) ** 0.5 / norm:.1e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=1, help="launchers that share the processes")
    parser.add_argument("--against_one", action="store_true", help="plain data parallelism against one process")
    parser.add_argument("--kinds", nargs="+", default=["LoRA", "full"], choices=["LoRA", "full"])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        folder, what, *kinds = options.worker
        return worker(Path(folder), what, kinds)
    many, kinds = options.processes, options.kinds
    lines = [["", "processes", "distance to plain"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(folder, "plain" if options.against_one else "train", kinds, many, options.nodes)
        which, fewer = ("one", 1) if options.against_one else ("resume", many // 2)
        launch(folder, which, kinds, fewer, 1)
        for kind in kinds:
            if options.against_one:
                lines.append(
                    [f"{kind}, one process", f"{many} on {options.nodes} nodes", distance(folder, kind, "one")]
                )
            else:
                lines.append([f"{kind}, sharded", f"{many}", distance(folder, kind, "sharded")])
                lines.append([f"{kind}, resumed", f"{many} to {fewer}", distance(folder, kind, "resumed")])
    print(pad_table(lines))


if __name__ == "__main__":
    main()
