"""Text encoders that are loaded when something new is to be encoded, and not before.

Where it fits: between a pipeline that was loaded without them and the condition cache, whose entries are named after a
digest of their weights. Why it exists: T5-XXL takes 10 GB and half a minute to load and to hash, for nothing if all is
in the cache.

So the digest is remembered under one that needs no weights: of their files and of all that decides how these are
loaded. Files on the Hub have their digests as names; others are read. Whoever loads the encoders writes it, whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..reporting.files import write_atomically
from .cache import ConditionCache, key_of

WEIGHTS = (".safetensors", ".bin")


def files_key(root: Path, parts: Sequence[str], settings: Any) -> str | None:
    """A digest of all files in these folders and of `settings`; None where one of them holds no weights.

    Args:
        root: a pipeline's folder, or its snapshot in the Hub's cache.
        parts: names of its folders.
        settings: whatever else the loaded weights depend on, see `key_of`.
    """
    known = []
    for part in parts:
        files = sorted(path for path in (root / part).rglob("*") if path.is_file())
        if not any(path.suffix in WEIGHTS for path in files):
            return None
        known += [[path.relative_to(root).as_posix(), _content(path)] for path in files]
    return key_of([known, settings])


def _content(path: Path) -> str:
    there = path.resolve()
    if path.is_symlink() and there.parent.name == "blobs":
        return there.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LateEncoders:
    """What stands in for a pipeline's text encoders until they are needed.

    Args:
        cache: whose entries they make.
        key: from `files_key`.
        parts: their names in the pipeline.
        load: gives them, by the pipeline's names.
    """

    def __init__(
        self, cache: ConditionCache, key: str, parts: Sequence[str], load: Callable[[], Mapping[str, nn.Module]]
    ) -> None:
        self.path, self.parts, self.load = cache.folder / "encoders" / f"{key}.json", tuple(parts), load
        self.weights = self._read()
        """The digest of their weights, if it was ever taken."""

    def _read(self) -> str | None:
        try:
            return str(json.loads(self.path.read_text())["weights"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember(self, weights: str) -> None:
        """That this is their weights' digest; a folder that cannot be written to is left alone."""
        if self.weights == weights:
            return
        self.weights = weights
        try:
            with write_atomically(self.path) as part:
                part.write_text(json.dumps({"weights": weights}))
        except OSError:
            pass
