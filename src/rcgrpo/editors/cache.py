"""What the encoders made of an instruction or a picture, kept on disk, so that they run once for each.

T5-XXL alone takes 9.5 GB of a device and works for moments of a step; with its results on disk it need not be there. An
entry's name is a digest of everything that its numbers depend on, so nothing is ever invalidated: what has changed has
another name.

Gotchas: nothing is ever deleted either. The last bits differ between libraries and kinds of devices, so these are part
of the name. Several processes may write one entry at once; each writes it whole, and all write the same.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..reporting.files import PathLike, write_atomically

logger = logging.getLogger(__name__)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def modules_digest(*modules: nn.Module) -> str:
    """SHA-256 of the modules' weights and configurations: about a second for each 1.5 GB, the transfer not counted."""
    parts = []
    for module in modules:
        weights = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        config: Any = module.config
        settings = config.to_dict() if hasattr(config, "to_dict") else config  # transformers' is no mapping
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}  # paths, versions
        parts.append([type(module).__name__, settings, tensors_digest(weights)])
    return key_of(parts)


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size}\n".encode() + image.tobytes()).hexdigest()


def surroundings(device: torch.device) -> list[str]:
    """What the last bits depend on besides weights and input: the libraries' versions and the kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [torch.__version__, transformers.__version__, diffusers.__version__, kind]


def key_of(made_from: Any) -> str:
    """SHA-256 of anything that JSON can say, or that can say what it is as text."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


class ConditionCache:
    """Named tensors on disk, each set in a safetensors file with a checksum.

    Args:
        folder: `rcgrpo/conditions` in the Hugging Face home (`HF_HOME`) by default. To clear the cache, delete it, or
            one of its subfolders: there is one for each set of encoder weights.

    Attributes:
        made: entries that were not there, or not whole.
    """

    def __init__(self, folder: PathLike | None = None) -> None:
        self.folder = Path(folder or Path(constants.HF_HOME, "rcgrpo", "conditions")).expanduser()
        self.writable, self.made = True, 0

    def get(self, kind: str, made_from: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry from disk, on the CPU, or, where there is none that is whole, from `make`, which is then kept.

        A disk that cannot be written to is warned about once, and everything is made afresh from then on.

        Args:
            kind: name of the subfolder.
            made_from: everything that the tensors depend on, see `key_of`.
            make: makes them.
        """
        path = self.folder / kind / f"{key_of(made_from)}.safetensors"
        found = self._read(path)
        if found is None:
            found = make()
            self.made += 1
            self._write(path, found)
        return found

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            if not path.exists():
                return None
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
                if (file.metadata() or {}).get("sha256") == tensors_digest(tensors):
                    return tensors
                reason = "its checksum is wrong"
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error)
        logger.warning("cached conditions %s: damaged (%s), encoded afresh", path, reason)
        return None

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if not self.writable:
            return
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with write_atomically(path) as part:
                save_file(kept, part, metadata={"sha256": tensors_digest(kept)})
        except (OSError, SafetensorError) as error:
            self.writable = False
            logger.warning("cached conditions %s: cannot be written (%s); encoding every time", path, error)
