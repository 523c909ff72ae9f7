"""How commands open a model: the embedded one as it was trained, any other one as FLUX.1-Kontext-dev should run."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from torch import nn

from ..editors.lora import check_lora
from ..tiny import CALL, RESOLUTION, WEIGHTS
from ..training.model import naming_model
from .parsing import TINY, UsageError

Pipeline = TypeVar("Pipeline", bound=FluxKontextPipeline)


def call_defaults(model: str) -> dict[str, int]:
    """`resolution`, `num_inference_steps` and `max_sequence_length` where a flag does not say otherwise."""
    if model == TINY:
        return {"resolution": RESOLUTION} | {
            name: CALL[name] for name in ("num_inference_steps", "max_sequence_length")
        }
    return {"resolution": 1024, "num_inference_steps": 28, "max_sequence_length": 512}


def open_pipeline(kind: type[Pipeline], model: str) -> Pipeline:
    """A pipeline of this class on the GPU, or on the CPU where there is none; fp32 if embedded, else bfloat16.

    Args:
        kind: `FluxKontextPipeline` or a subclass.
        model: "kontext-tiny", or a Hub id or folder.

    Raises:
        ValueError: it cannot be opened, or is another kind of model.
    """
    name, dtype = (str(WEIGHTS), torch.float32) if model == TINY else (model, torch.bfloat16)
    with naming_model(name):
        pipeline = kind.from_pretrained(name, dtype=dtype)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def check_loras(model: str, loras: Sequence[str], flag: str = "--lora") -> None:
    """Refuse LoRAs that cannot be read or do not fit, before a large model is loaded and anything is written.

    Args:
        model: "kontext-tiny", or a Hub id or folder.
        loras: folders, files or Hub ids.
        flag: that named them.

    Raises:
        UsageError: naming the flag, the LoRA and what is wrong with it.
    """
    skeleton = _skeleton(model) if loras else None
    for lora in loras:
        try:
            check_lora(lora, skeleton, flag)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _skeleton(model: str) -> nn.Module | None:
    """The model's transformer without its weights; None where opening the model itself will say what is wrong."""
    try:
        config = FluxTransformer2DModel.load_config(str(WEIGHTS) if model == TINY else model, subfolder="transformer")
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(config)
    except Exception:
        return None
