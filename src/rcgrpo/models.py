"""What is trained: the pipeline from a name or an object, its transformer with or without a LoRA, its name in cards.

Between the pipeline and the trainer. Gotcha: a diffusers model has other names for what the Trainer asks of a
transformers model, and `from_pretrained` wants objects where a YAML file has strings.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, set_seed

from .checks import naming
from .pipeline import RegionDecoupledFluxKontextPipeline
from .tiny import WEIGHTS

INDEX = "model_index.json"
HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


def load_pipeline(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> RegionDecoupledFluxKontextPipeline:
    """The pipeline of a Hub id or a folder, or the one that shares its parts with a given pipeline.

    Args:
        model: a `FluxKontextPipeline` (any subclass), a Hub id or a folder.
        init_kwargs: of `from_pretrained`, where `model` is a string; dtypes may be strings, also one for each part, and
            `quantization_config` a mapping with `PipelineQuantizationConfig`'s arguments.

    Raises:
        TypeError: `model` is none of these.
        ValueError: a name that cannot be opened, a dtype that torch does not have, or `init_kwargs` with a pipeline.
    """
    if isinstance(model, str | os.PathLike):
        kwargs = dict(init_kwargs or {})
        for key in {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs[key] = _dtype(kwargs[key], f"model_init_kwargs[{key!r}]")
        if isinstance(kwargs.get("quantization_config"), Mapping):  # from YAML
            kwargs["quantization_config"] = PipelineQuantizationConfig(**kwargs["quantization_config"])
        with naming_model(str(model), **{key: kwargs[key] for key in HUB_OPTIONS & kwargs.keys()}):
            return RegionDecoupledFluxKontextPipeline.from_pretrained(model, **kwargs)
    if init_kwargs:
        raise ValueError(
            f"model_init_kwargs: got {dict(init_kwargs)} with a pipeline that is loaded already, expected none; pass "
            "them to its from_pretrained, or name the model"
        )
    if isinstance(model, RegionDecoupledFluxKontextPipeline):
        return model
    if not all(hasattr(model, part) for part in ("transformer", "vae", "scheduler", "tokenizer_2")):
        raise TypeError(f"model: got {type(model).__name__}, expected a FluxKontextPipeline, a Hub id or a folder")
    pipe = RegionDecoupledFluxKontextPipeline(**model.components)  # `from_pipe` would cast everything to fp32
    pipe.register_to_config(_name_or_path=model.config.get("_name_or_path"))
    return pipe


@contextmanager
def naming_model(model: str, **hub: Any) -> Iterator[None]:
    """For opening a pipeline: whatever diffusers and the Hub's client raise is told as a wrong `model`.

    Args:
        model: a Hub id or a folder.
        hub: `revision` and the like, for `hf_hub_download`.

    Raises:
        ValueError: nothing there, no access, broken files; or, before anything else is fetched, another pipeline.
    """
    expected = "kontext-tiny, or a folder or Hub id of a complete FLUX.1-Kontext pipeline"
    if not Path(model).is_dir():
        expected += "; if it is one, check the network (HF_HUB_OFFLINE) and, where it is gated, `hf auth login`"
    with naming("model", model, expected):
        index = Path(model, INDEX) if Path(model).is_dir() else Path(hf_hub_download(model, INDEX, **hub))
        kind = str(json.loads(index.read_text()).get("_class_name"))
        if not kind.endswith(FluxKontextPipeline.__name__):
            raise TypeError(f"its {INDEX} says {kind}")
        yield


def _dtype(value: Any, where: str) -> Any:
    """A dtype, or one for each part of the pipeline, from what a YAML file or a command line can say."""
    if isinstance(value, Mapping):
        return {part: _dtype(each, where) for part, each in value.items()}
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: got {value!r}, expected the name of a dtype, such as bfloat16")
    return dtype


def base_model_name(pipeline: FluxKontextPipeline) -> str:
    """What to call the base in a card: its Hub id; of a folder its last part, as paths are nobody's business."""
    name = str(pipeline.config.get("_name_or_path") or "")
    if not name or not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    return "kontext-tiny" if folder == WEIGHTS.resolve() else folder.name


def trained_model(pipeline: FluxKontextPipeline, peft_config: PeftConfig | None, seed: int) -> nn.Module:
    """The pipeline's transformer, ready for the Trainer, everything else frozen.

    Args:
        pipeline: keeps its transformer, into which PEFT puts its layers.
        peft_config: of the LoRA; None trains the whole transformer.
        seed: of the LoRA's initial weights.

    Raises:
        ValueError: a VAE that tiles, a transformer with a step cache or inside PEFT, or layers that it does not have.
    """
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if part is not None:
            part.requires_grad_(False).eval()
    transformer = pipeline.transformer
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("model: the transformer has a step cache enabled; call `transformer.disable_cache()` first")

    if getattr(pipeline.vae, "use_tiling", False):
        raise ValueError("model: the VAE decodes in tiles, whose seams are learned; call `pipe.vae.disable_tiling()`")

    # The Trainer asks a transformers model for these; a diffusers model has another name for them.
    def enable(*_: Any, **__: Any) -> None:
        transformer.enable_gradient_checkpointing()

    transformer.activation_checkpointing_enable = transformer.gradient_checkpointing_enable = enable
    transformer.gradient_checkpointing_disable = transformer.disable_gradient_checkpointing
    if peft_config is None:
        return transformer.requires_grad_(True)
    if isinstance(transformer, PeftModel):
        raise ValueError("model: the pipeline's transformer is wrapped by PEFT already, expected the bare one")
    set_seed(seed)  # the LoRA's initial weights belong to the run, not to what ran before it
    try:
        wrapped = get_peft_model(transformer, peft_config)
    except ValueError as error:
        names = (name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
        endings = sorted({re.sub(r".*?([^.]+(\.\d+)?)$", r"\1", name) for name in names})
        raise ValueError(
            f"peft_config.target_modules: got {peft_config.target_modules!r}, expected names of layers in "
            f"{type(transformer).__name__}, ending in {', '.join(endings)} ({error})"
        ) from error
    public = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    wrapped.config = PreTrainedConfig(**public)
    wrapped.config._name_or_path = base_model_name(pipeline)
    return wrapped
