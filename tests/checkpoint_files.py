"""Checkpoints made by hand, and what befalls them: for tests of whoever reads a run's folder."""

import json

import torch
from safetensors.torch import save_file

from rcgrpo.training.checkpoints import UNFINISHED, publish, seal

FILES = ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "nested/more.json"]


def write_checkpoint(folder, step):
    """A checkpoint without a seal, as other programs write it."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "nested").mkdir(parents=True)
    (checkpoint / "nested" / "more.json").write_text("{}")
    (checkpoint / "README.md").write_text("card")
    save_file({"weight": torch.ones(64)}, checkpoint / "adapter_model.safetensors")
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(64)}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def sealed(folder, step):
    """A checkpoint as the trainer writes it."""
    checkpoint = write_checkpoint(folder / UNFINISHED, step)
    seal(checkpoint, {"optimizer": "SGD"})
    return publish(checkpoint)


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(file):
    """What a file system leaves of a file whose data had not reached the disk."""
    file.write_bytes(bytes(file.stat().st_size))


def empty(file):
    file.write_bytes(b"")


def gone(file):
    file.unlink()
