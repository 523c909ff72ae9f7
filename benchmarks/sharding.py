"""A sharded model on several CPU processes beside plain data parallelism: `python benchmarks/sharding.py`.

LoRA and full fine-tuning of a random small Kontext, three updates of eight edits, once plain and once with
`shard_model`; then half as many processes go on from the sharded run's second checkpoint. The table says how far each
ends from the plain run's weights, relative to how far training moved.
"""

import argparse
import os
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


def train(folder: Path, full: bool, sharded: bool, resume: bool, name: str) -> None:
    """One run of this process; the first one writes its weights."""
    import tiny_training as tiny
    from rcgrpo import compbench_mini
    from rcgrpo.training.sharding import full as whole

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    options: dict[str, Any] = tiny.ADAM | {"per_device_train_batch_size": EDITS // world, "seed": 1, "check_rows": 1}
    options |= {"save_strategy": "steps", "save_steps": 2, "shard_model": sharded, "train_micro_batch_size": 3}
    kind = "full" if full else "LoRA"
    rows, peft = compbench_mini("train", 3 * EDITS, 32), None if full else True
    trainer = tiny.make(folder / kind / name, rows, tiny.flat_for_removals, peft=peft, **options)
    start = {key: whole(weight) for key, weight in tiny.weights(trainer).items()}
    trainer.train(resume_from_checkpoint=str(folder / kind / "sharded" / "checkpoint-2") if resume else None)
    end = {key: whole(weight) for key, weight in tiny.weights(trainer).items()}
    if rank == 0:
        torch.save((start, end), folder / kind / f"{name}.pt")
    trainer.model_wrapped = trainer.model


def worker(folder: Path, resume: bool) -> None:
    for full in (False, True):
        for sharded in (int(os.environ["WORLD_SIZE"]) > 1,) if resume else (False, True):  # one process holds all
            train(folder, full, sharded, resume, "resumed" if resume else "sharded" if sharded else "plain")
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(Path(options.worker[0]), options.worker[1] == "resume")
    lines = [["", "processes", "distance to plain"]]
    with tempfile.TemporaryDirectory() as name:
        folder, many = Path(name), options.processes
        for number, what in ((many, "train"), (many // 2, "resume")):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
            subprocess.run([*launcher, __file__, "--worker", str(folder), what], check=True, stdout=subprocess.DEVNULL)
        for kind in ("LoRA", "full"):
            start, plain = torch.load(folder / kind / "plain.pt")
            norm = sum(float((plain[key] - start[key]).square().sum()) for key in plain) ** 0.5
            for which, number in (("sharded", f"{many}"), ("resumed", f"{many} to {many // 2}")):
                _, other = torch.load(folder / kind / f"{which}.pt")
                apart = sum(float((plain[key] - other[key]).square().sum()) for key in plain) ** 0.5
                lines.append([f"{kind}, {which}", number, f"{apart / norm:.1e}"])
    print(pad_table(lines))


if __name__ == "__main__":
    main()
