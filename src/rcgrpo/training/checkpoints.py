"""Checkpoints on disk: which are whole, how one appears at once, and what is left of one that did not.

Where it fits: `resuming.ResumingTrainer` writes and resumes through these functions, and the command line asks them
before it loads anything. Why: a run is killed at any instant, also within a write, and the same command must go on
afterwards.

A checkpoint is written in `FOLDER/_checkpoint.tmp`, sealed with the SHA-256 of each of its files, flushed to the disk,
and then renamed: `FOLDER/checkpoint-N` is whole or not there. One that goes is renamed first, too. Gotchas: a name that
starts with _ is never uploaded by transformers' Trainer; checkpoints without a seal, of other writers, are opened
instead, which finds what is cut off but not what was changed.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

UNFINISHED = "_checkpoint.tmp"
SEAL = "checkpoint.json"
_FREE = {"README.md", SEAL}
"""A card may be edited where it lies; nothing is resumed from it."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def by_step(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The folders `checkpoint-N` in a run's folder, whole or not, by step from the first to the last."""
    found = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in Path(folder).glob("*-*")}
    return dict(sorted((int(n), path) for n, path in found.items() if n.isdecimal() and path.is_dir()))


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """The updates that a checkpoint has behind it.

    Raises:
        OSError, ValueError, KeyError, TypeError: its state cannot be read.
    """
    return int(json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"])


def read_seal(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What `seal` wrote; empty without a seal."""
    file = Path(checkpoint, SEAL)
    return dict(json.loads(file.read_text())) if file.exists() else {}


def fault(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where all of it can be read."""
    name, folder = TRAINER_STATE_NAME, Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        step_of(folder)
        name = SEAL
        sealed = read_seal(folder)
        for name, digest in sealed["files"].items() if sealed else ():
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
        return None if sealed else _unsealed_fault(folder)
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read ({_one_line(error)})"


def newest_whole(folder: str | os.PathLike[str]) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint of which all can be read, and the newer ones that were passed over, with their faults."""
    passed: dict[str, str] = {}
    for path in reversed(by_step(folder).values()):
        wrong = fault(path)
        if wrong is None:
            return path, passed
        passed[path.name] = wrong
    return None, passed


def require_whole(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that cannot be gone on from.

    Raises:
        ValueError: saying what is wrong with it and which one beside it is whole.
    """
    wrong = fault(checkpoint)
    if wrong is not None:
        parent = Path(checkpoint).parent
        other = newest_whole(parent)[0]
        instead = f"give {other}" if other else "there is no whole one beside it: train from the start"
        raise ValueError(
            f"resume_from_checkpoint: got {str(checkpoint)!r}, expected a whole checkpoint, but {wrong}; {instead}"
        )


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Take away what killed writers left in a run's folder; a checkpoint that only lacked its name gets it."""
    unfinished = Path(folder, UNFINISHED)
    for path in by_step(unfinished).values():
        target = Path(folder, path.name)
        if (path / SEAL).exists() and not target.exists() and fault(path) is None:
            path.rename(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    # safetensors writes under a name of this kind before it renames; `save_lora` under the second.
    for pattern in (".tmp??????", "_*.tmp"):
        for file in Path(folder).glob(pattern):
            if file.is_file() and re.fullmatch(r"\.tmp\w{6}|_\w+\.safetensors\.tmp", file.name):
                with suppress(OSError):
                    file.unlink()


def seal(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """List a checkpoint's files with their SHA-256, and flush everything to the disk.

    Args:
        facts: further entries of the seal, for `read_seal`.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in _FREE)
    listed = {path.relative_to(checkpoint).as_posix(): _digest(path, flush=True) for path in files}
    with open(checkpoint / SEAL, "w") as out:
        json.dump({**facts, "files": listed}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def publish(checkpoint: Path) -> Path:
    """Give a sealed checkpoint in `FOLDER/_checkpoint.tmp` its place in FOLDER; an older one there makes way."""
    folder = checkpoint.parent.parent
    target = folder / checkpoint.name
    if target.exists():
        target.rename(checkpoint.parent / "replaced")
    checkpoint.rename(target)
    if os.name == "posix":  # the names, too
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return target


def rotate(folder: Path, limit: int | None, keep: Collection[str]) -> None:
    """Delete the oldest checkpoints beyond `limit`, but none of the names in `keep`; None or 0 is no limit."""
    if not limit or limit < 0:
        return
    oldest_first = sorted(by_step(folder).values(), key=lambda path: path.stat().st_mtime_ns)
    others = [path for path in oldest_first if path.name not in keep]
    aside = folder / UNFINISHED
    for path in others[: max(0, len(oldest_first) - max(limit, len(keep)))]:
        aside.mkdir(exist_ok=True)
        path.rename(aside / f"old-{path.name}")  # not a checkpoint any more, however far the deletion comes
    shutil.rmtree(aside, ignore_errors=True)


def _digest(file: Path, flush: bool = False) -> str:
    with open(file, "r+b" if flush else "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
        if flush:
            os.fsync(opened.fileno())
    return digest


def _unsealed_fault(folder: Path) -> str | None:
    weights = [path for path in folder.rglob("*.safetensors") if not path.name.startswith((".", "_"))]
    if not weights:
        return "it has no weights"
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({_one_line(error)})"
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            return f"{path.name} cannot be read ({_one_line(error)})"
        if broken is not None:
            return f"{path.name} is broken in {broken}"
    return None


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
