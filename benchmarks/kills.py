"""Kill training runs and go on: at every file operation of a checkpoint, and at random instants.

Where it fits: `endurance.py`. Each run is a process forked from this one, which has imported everything and holds the
embedded model, so that a run of some updates takes a second or two. A killed run is started again in its folder with
the same call, which asks for `resume_from_checkpoint=True` like a job script, and its LoRA is compared by its SHA-256
with that of a run that nobody disturbed.

Gotchas: operations are counted by Python's audit events and by the calls of torch and safetensors that write in C; a
kill is before an operation or `torn`, when part of a file has been written.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.model import load_pipeline

SMALL: dict[str, Any] = {
    "resolution": 64,
    "max_sequence_length": 20,
    "num_generations": 3,
    "num_anchors": 2,
    "num_policy_steps": 1,
    "num_inference_steps": 2,
    "policy_steps_range": [0.0, 1.0],
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = {"r": 2, "target_modules": ["attn.to_q", "attn.to_v"]}
PATIENCE_S = 300.0
WAIT_S = 15.0
"""What a launcher gives the other processes when one has died."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Job:
    """A kind of run."""

    name: str
    options: dict[str, Any]
    processes: int = 1


ONE = Job("one process", {"max_steps": 3, "save_steps": 1})
CYCLES = Job("cycles of two updates", {"max_steps": 4, "save_steps": 2, "num_iterations": 2, "epsilon": 1.0})
TWO = Job("two processes", {"max_steps": 3, "save_steps": 1}, 2)


@dataclass(frozen=True)
class Kill:
    """When to kill: at operation `at` of the checkpoint number `save`, or so many seconds after training began."""

    save: int = 0
    at: int = 0
    torn: bool = False
    seconds: float = 0.0
    rank: int = 0


class FileOperations:
    """Counts what a checkpoint does to files, and ends the process at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.saves, self.count, self.counts, self.counting = kill, 0, 0, [], False

    def install(self, trainer: RCGRPOTrainer) -> None:
        save = trainer._save_checkpoint

        def counted(*given: Any) -> None:
            self.saves, self.count, self.counting = self.saves + 1, 0, True
            save(*given)
            self.counting = False
            self.counts.append(self.count)

        trainer._save_checkpoint = counted  # type: ignore[method-assign]
        sys.addaudithook(self.heard)
        torch.save = self.watched(torch.save, 1)
        safetensors.torch.serialize_file = self.watched(safetensors.torch.serialize_file, 1)

    def heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[2], int) and given[2] & WRITING:
            fresh = isinstance(given[0], str | os.PathLike) and given[2] & os.O_TRUNC
            self.reach(lambda: Path(given[0]).write_bytes(b'{"global') if fresh else None)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self.reach()

    def watched(self, write: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A function that writes the file that is its argument number `place`."""

        def tear(*given: Any, **named: Any) -> None:
            write(*given, **named)
            os.truncate(given[place], os.path.getsize(given[place]) // 2)

        def writing(*given: Any, **named: Any) -> Any:
            self.reach(lambda: tear(*given, **named))
            return write(*given, **named)

        return writing

    def reach(self, tear: Callable[[], Any] = lambda: None) -> None:
        if not self.counting:
            return
        self.count += 1
        if self.kill and (self.saves, self.count) == (self.kill.save, self.kill.at):
            self.counting = False
            if self.kill.torn:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)


class Kills:
    """Runs of the embedded model in folders of their own.

    Args:
        folder: where they go; each is removed when its run has ended well.
        seed: of the instants.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        self.folder, self.random, self.number = folder, random.Random(seed), 0
        self.pipeline = load_pipeline(str(WEIGHTS), None)
        self.rows = [dict(row) for row in compbench_mini("train", 4)]
        self.references: dict[str, tuple[str, list[int], float]] = {}

    def reference(self, job: Job) -> tuple[str, list[int], float]:
        """An undisturbed run's LoRA, the file operations of each checkpoint, and its seconds of training."""
        if job.name not in self.references:
            folder = self.fresh()
            statuses, _ = self.run(job, folder)
            if any(statuses):
                raise RuntimeError(f"the undisturbed run of {job.name} ended with {statuses}: {self.log(folder)}")
            told = json.loads((folder / "told.json").read_text())
            self.references[job.name] = (digest(folder / "run"), told["operations"], told["seconds"])
        return self.references[job.name]

    def at_operations(self, job: Job, number: int) -> list[tuple[Job, Kill]]:
        """Kills spread over all operations of the first checkpoint and of one that makes an older one go."""
        counts = self.reference(job)[1]
        every = [
            Kill(save, at, torn, rank=0)
            for save in (1, 2)
            for at in range(1, counts[save - 1] + 1)
            for torn in (False, True)
        ]
        return [(job, every[i * len(every) // number]) for i in range(number)] if number else []

    def at_random(self, job: Job, number: int) -> list[tuple[Job, Kill]]:
        """Kills at instants of the training of a run, of any of its processes."""
        if not number:
            return []
        seconds, draw = self.reference(job)[2], self.random
        ranks = [draw.randrange(job.processes) for _ in range(number)]
        return [(job, Kill(seconds=draw.uniform(0, seconds), rank=rank)) for rank in ranks]

    def survive(self, job: Job, kill: Kill) -> str | None:
        """Kill a run, start it again until it ends; says what is wrong, None if nothing is."""
        expected, folder = self.reference(job)[0], self.fresh()
        for _ in range(8):  # an instant may come after the end
            statuses, _ = self.run(job, folder, kill)
            if -signal.SIGKILL in statuses:
                break
            shutil.rmtree(folder)
            folder.mkdir()
            kill = Kill(seconds=kill.seconds * 0.7, rank=kill.rank)
        else:
            return f"{job.name}: {kill} never came"
        statuses, _ = self.run(job, folder)
        if any(statuses):
            return f"{job.name}, {kill}: the resumed run ended with {statuses}: {self.log(folder)}"
        if digest(folder / "run") != expected:
            return f"{job.name}, {kill}: the LoRA differs"
        left = sorted(p.name for p in (folder / "run").iterdir() if "tmp" in p.name)
        shutil.rmtree(folder)
        return f"{job.name}, {kill}: {left} is left" if left else None

    def fresh(self) -> Path:
        self.number += 1
        folder = self.folder / f"{self.number:04}"
        folder.mkdir(parents=True)
        return folder

    @staticmethod
    def log(folder: Path) -> str:
        return (folder / "log.txt").read_text()[-1500:]

    def run(self, job: Job, folder: Path, kill: Kill | None = None) -> tuple[list[int], float]:
        """The exit statuses of a run's processes, minus the signal's number where one ended it, and its seconds."""
        began, address = time.monotonic(), _free_port() if job.processes > 1 else None
        ready, write = os.pipe()
        children = [self._fork(job, folder, kill, rank, address, write) for rank in range(job.processes)]
        os.close(write)
        if kill is not None and kill.seconds and os.read(ready, 1):
            time.sleep(kill.seconds)
            _send(children[kill.rank], signal.SIGKILL)
        os.close(ready)
        statuses = _wait(children)
        return statuses, time.monotonic() - began

    def _fork(self, job: Job, folder: Path, kill: Kill | None, rank: int, port: int | None, ready: int) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            if port is not None:
                launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
            self._train(job, folder, kill if kill and kill.rank == rank else None, ready)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _train(self, job: Job, folder: Path, kill: Kill | None, ready: int) -> None:
        config = RCGRPOConfig(str(folder / "run"), **(SMALL | job.options))
        trainer = RCGRPOTrainer(self.pipeline, brightness, config, self.rows, peft_config=LoraConfig(**LORA))
        operations = FileOperations(kill)
        operations.install(trainer)
        os.write(ready, b".")
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=True)
        seconds = time.monotonic() - began
        trainer.save_model()
        if trainer.is_world_process_zero():
            told = {"operations": operations.counts, "seconds": seconds}
            (folder / "told.json").write_text(json.dumps(told))
        trainer.close()


def brightness(images: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [sum(image.convert("L").resize((4, 4)).getdata()) / 4080 for image in images]


def digest(folder: Path) -> str:
    """SHA-256 of the LoRA's tensors and their names."""
    weights, hashed = load_file(folder / "pytorch_lora_weights.safetensors"), hashlib.sha256()
    for name in sorted(weights):
        hashed.update(name.encode() + weights[name].numpy().tobytes())
    return hashed.hexdigest()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _send(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _wait(children: Sequence[int]) -> list[int]:
    """Exit statuses; when one process has died, the others get SIGTERM, and later SIGKILL, as from a launcher."""
    statuses: dict[int, int] = {}
    deadline, told = time.monotonic() + PATIENCE_S, False
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
        left = set(children) - statuses.keys()
        if any(statuses.values()) and not told:
            told, deadline = True, time.monotonic() + WAIT_S
            for child in left:
                _send(child, signal.SIGTERM)
        if time.monotonic() > deadline:
            for child in left:
                _send(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]
