"""`sharding.py` and `processes/lockstep.py` in training: a sharded model learns what one on each process does."""

import pytest
import torch

from tiny_training import ADAM, distance, on_two_processes

pytestmark = pytest.mark.filterwarnings("ignore")

WORKER = """
import sys
from pathlib import Path
import torch
import tiny_training as t
from rcgrpo import compbench_mini

folder, rows = Path(sys.argv[1]), [dict(row) for row in compbench_mini("train", 12, 32)]
for row in rows[::4]:  # of another size, so that the first process needs more forwards
    row["input_image"], row["mask"] = (row[name].resize((64, 32)) for name in ("input_image", "mask"))
options = t.ADAM | {"train_micro_batch_size": 2, "check_rows": 1, "save_strategy": "steps", "save_steps": 2}
options |= {"per_device_train_batch_size": 2, "shuffle_dataset": False, "max_grad_norm": 0.5}

def run(name, peft, sharded, resume=None, reward=t.flat_for_removals, **changes):
    trainer = t.make(folder / name, rows, reward, peft=peft, shard_model=sharded, **(options | changes))
    counts.clear()
    transformer = trainer.pipeline.transformer
    transformer.register_forward_pre_hook(lambda *_: counts.append(1))
    start = {k: v.full_tensor() if sharded else v.clone() for k, v in t.weights(trainer).items()}
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    trained = {k: (v.full_tensor() if sharded else v).detach() for k, v in t.weights(trainer).items()}
    if rank == 0:
        torch.save((start, trained, trainer.state.log_history), folder / f"{name}.pt")
    torch.save(len(counts), folder / f"{name}.{rank}.count")
    return trainer

counts, rank = [], int(__import__("os").environ["RANK"])
run("lora", True, False, beta=0.1)
run("lora sharded", True, True, beta=0.1)
run("lora resumed", True, False, "lora sharded/checkpoint-2", beta=0.1)
run("full", None, False, gradient_checkpointing=False)
run("full sharded", None, True, gradient_checkpointing=False)

def fail(trainer):
    decode, calls = trainer.editor._decode, []
    def broken(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return decode(*given)
    trainer.editor._decode = broken
trainer = t.make(folder / "failing", rows, peft=True, shard_model=True, **options)
if rank == 1:
    fail(trainer)
try:
    trainer.train()
except RuntimeError as error:
    (folder / f"told{rank}").write_text(str(error))
trainer.close()
"""


def test_two_processes_learn_what_they_do_without_and_fail_together(tmp_path):
    status, errors = on_two_processes(tmp_path, WORKER)
    assert status == 0, errors[-3000:]
    for kind in ("lora", "full"):
        start, plain, log = torch.load(tmp_path / f"{kind}.pt")
        for name in ("sharded", "resumed")[: 2 if kind == "lora" else 1]:
            again, other, other_log = torch.load(tmp_path / f"{kind} {name}.pt")
            assert distance(other, plain, start) < 1e-5
            if name == "sharded":
                assert all(torch.equal(again[key], start[key]) for key in start)
                norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for rows in (log, other_log)]
                assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[0]) == ADAM["max_steps"]
        counts = [[torch.load(tmp_path / f"{kind}{name}.{rank}.count") for rank in (0, 1)] for name in ("", " sharded")]
        assert counts[0][0] > counts[0][1] and counts[1][0] == counts[1][1] >= counts[0][0]
    told = [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] == "process 1: OSError: the disk is gone"
