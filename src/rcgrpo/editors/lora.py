"""LoRA files of any origin: found, read, held against a transformer, loaded. None that does not fit is half used.

Where it fits: whatever takes a LoRA (`rcgrpo edit`, `evaluate`, `diagnose`, `app`, `train --init_lora`) takes it
through here; `hub` writes them. Why: diffusers skips layers that it cannot place with a warning, takes NaN as it comes,
and may leave half an adapter on the transformer when it fails. Reading itself, with the formats of other trainers, is
diffusers' work.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from ..maths.metrics import first_words
from ..tiny import LORAS

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
PEFT_FILE = "adapter_model.safetensors"
"""What PEFT writes beside our file; diffusers cannot read it."""

PATIENCE = 1.5
"""Seconds in which the Hub must answer at all; its client would try for most of a minute, twice."""


def find_lora(lora: str | Path, where: str = "lora") -> Path:
    """The LoRA's file; from the Hub it is downloaded, or taken from its cache where the Hub does not answer.

    Args:
        lora: a file; a folder or a Hub id with `pytorch_lora_weights.safetensors`, or with one other LoRA file; or
            "kontext-tiny-long", the embedded editor's own.
        where: what to call it in errors.

    Raises:
        ValueError: there is none, or several, or it cannot be had, within two seconds where there is no network.
    """
    path = Path(lora) if Path(lora).exists() else LORAS.get(str(lora), Path(lora))
    if path.is_file():
        return path
    if path.is_dir():
        name = _one_of(file.name for file in path.iterdir() if file.is_file())
        if name is None:
            raise ValueError(f"{where}: got the folder {lora}, expected {LORA_FILE} in it; name the file itself")
        return path / name
    try:
        away = "" if constants.HF_HUB_OFFLINE else _hub_is_away(str(lora))
        try:
            return Path(hf_hub_download(str(lora), LORA_FILE, local_files_only=bool(away)))
        except EntryNotFoundError:
            if away:
                raise ConnectionError(f"{constants.ENDPOINT} does not answer: {away}") from None
            name = _one_of(HfApi().list_repo_files(str(lora)))
            if name is None:
                raise
            return Path(hf_hub_download(str(lora), name))
    except Exception as error:  # the client has a dozen kinds
        raise ValueError(
            f"{where}: got {str(lora)!r}, expected a folder or file that exists, or a Hub id whose repository holds "
            f"{LORA_FILE} ({first_words(error)})"
        ) from error


def _hub_is_away(repository: str) -> str:
    """Why the Hub cannot be asked for a repository; nothing if it answers, whatever it says."""
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            get_session().head(f"{constants.ENDPOINT}/{repository}", timeout=PATIENCE)
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()  # looking up a name has no time limit of its own
    try:
        answer.result(PATIENCE)
    except TimeoutError:
        return f"nothing within {PATIENCE} s"
    except Exception as error:
        return first_words(error)
    return ""


def _one_of(names: Iterable[str]) -> str | None:
    """The LoRA among a folder's files, if it is clear which one that is."""
    files = [name for name in names if name.endswith(".safetensors") and name != PEFT_FILE]
    return LORA_FILE if LORA_FILE in files else files[0] if len(files) == 1 else None


def check_lora(lora: str | Path, kind: Any, transformer: nn.Module | None = None, where: str = "lora") -> Path:
    """Refuse a LoRA that cannot be read, that holds NaN or infinity, or that is for another model.

    Args:
        lora: as in `find_lora`.
        kind: the pipeline class that is to load it; each reads formats of its own.
        transformer: what it is for, also on the meta device, or with adapters; None checks the file alone.
        where: what to call it in errors.

    Returns:
        The file.

    Raises:
        ValueError: naming the LoRA and what is wrong with it.
    """
    file = find_lora(lora, where)
    got = f"{where}: got {str(lora)!r}, expected"
    try:
        weights, *alphas, metadata = kind.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=file.suffix == ".safetensors",  # else diffusers looks for another file when this one fails
            local_files_only=True,
            return_alphas=True,  # where it has any
            return_lora_metadata=True,
        )
    except Exception as error:  # diffusers, safetensors and the converters of other formats each have their own
        hint = f"; {PEFT_FILE} is PEFT's own, take {LORA_FILE} beside it" if file.name == PEFT_FILE else ""
        raise ValueError(f"{got} a whole LoRA file that diffusers can read ({first_words(error)}){hint}") from error
    scales = {key: alpha for found in alphas for key, alpha in (found or {}).items()}
    if scales and metadata:
        raise ValueError(f"{got} its scale once, and it stands in the tensors `.alpha` and in the metadata")
    for key, tensor in {**weights, **scales}.items():
        if isinstance(tensor, Tensor) and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{got} finite numbers, and it holds NaN or infinity in {key}; take an earlier checkpoint")
    layers = {key.removeprefix("transformer."): w for key, w in weights.items() if key.startswith("transformer.")}
    strangers = [key for key in weights if not key.startswith(("transformer.", "text_encoder."))]
    if not layers or strangers:
        what = f"{len(strangers)} of its {len(weights)} weights, such as {strangers[0]}," if strangers else "it"
        raise ValueError(f"{got} a LoRA for this model's transformer; {what} holds nothing for this model")
    if transformer is not None and (misfit := _misfit(layers, transformer)):
        raise ValueError(f"{got} one that fits this model; {misfit}")
    return file


def _misfit(layers: dict[str, Tensor], transformer: nn.Module) -> str | None:
    """In what a LoRA differs from the transformer's layers, without "transformer." before their names."""
    modules = dict(transformer.named_modules())
    ranks: dict[str, dict[str, int]] = {}
    unknown = []
    for key, weight in layers.items():
        name, _, part = key.partition(".lora")
        module: Any = modules.get(name)
        if not part or not hasattr(module, "in_features"):
            unknown.append(key)
            continue
        down, up = part.startswith(("_A", ".down", "_down")), part.startswith(("_B", ".up", "_up"))
        expected = module.in_features if down else module.out_features
        if (down or up) and weight.shape[-1 if down else 0] != expected:
            side = "reads" if down else "writes"
            return f"{name} {side} {expected} numbers, and the LoRA has {tuple(weight.shape)} for it"
        if (down or up) and weight.ndim > 1:
            ranks.setdefault(name, {})["down" if down else "up"] = weight.shape[0 if down else 1]
    if unknown:
        return f"the model has no layer for {len(unknown)} of the LoRA's {len(layers)} weights, such as {unknown[0]}"
    for name, of in ranks.items():
        if len(of) < 2 or of["down"] != of["up"]:
            return f"the LoRA's two matrices for {name} do not belong together, their ranks are {of}"
    return None


def load_lora(pipeline: Any, lora: str | Path, adapter_name: str, where: str = "lora") -> None:
    """Load a LoRA, all of it, under a name; one that does not fit leaves the pipeline as it was.

    Raises:
        ValueError: as `check_lora`.
    """
    file = check_lora(lora, type(pipeline), pipeline.transformer, where)
    try:
        pipeline.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=adapter_name, local_files_only=True
        )
    except Exception as error:
        with suppress(Exception):
            pipeline.delete_adapters(adapter_name)
        raise ValueError(
            f"{where}: got {str(lora)!r}, expected one that fits this model ({first_words(error)})"
        ) from error
