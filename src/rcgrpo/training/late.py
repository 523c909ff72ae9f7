"""Text encoders that a run may do without: known by their files, loaded when something new is to be encoded after all.

Where it fits: between a run's configuration and `editors.late_encoders`. Used by the trainer and by `rcgrpo cache`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import nn

from ..editors import ConditionCache
from ..editors.late_encoders import LateEncoders, files_key
from ..editors.opening import region_decoupled_class, skeleton
from .config import RCGRPOConfig
from .model import HUB_OPTIONS, INDEX, load_pipeline, naming_model


def late_encoders(model: Any, args: RCGRPOConfig, init_kwargs: Mapping[str, Any] | None) -> LateEncoders | None:
    """What knows a model's text encoders without loading them.

    None without a cache, for a pipeline that is loaded already, and while the encoders' files are not here.

    Args:
        model, init_kwargs: as in `load_pipeline`.

    Raises:
        ValueError: as `load_pipeline`.
    """
    if not args.cache_conditions or not isinstance(model, str | os.PathLike):
        return None
    kwargs = dict(init_kwargs or {})
    hub = {key: kwargs[key] for key in HUB_OPTIONS & kwargs.keys()}
    with naming_model(str(model), **hub) as index:
        parts = region_decoupled_class(str(index["_class_name"])).editor_class.encoders
        root = Path(model) if Path(model).is_dir() else Path(hf_hub_download(str(model), INDEX, **hub)).parent
    settings = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
    versions = [torch.__version__, transformers.__version__, diffusers.__version__]
    key = files_key(root, parts, [settings, versions])
    if key is None:
        return None

    def load() -> Mapping[str, nn.Module]:
        pipeline = load_pipeline(model, {**_without_transformer(kwargs), "transformer": None, "vae": None})
        return {part: getattr(pipeline, part) for part in parts}

    return LateEncoders(ConditionCache(args.conditions_cache_dir), key, parts, load)


def without_encoders(init_kwargs: Mapping[str, Any] | None, late: LateEncoders | None) -> dict[str, Any] | None:
    """`init_kwargs` of `load_pipeline` that leave the text encoders out, if the cache knows them already."""
    if late is None or late.weights is None:
        return None if init_kwargs is None else dict(init_kwargs)
    return {**(init_kwargs or {}), **dict.fromkeys(late.parts)}


def load_encoders_only(model: str, init_kwargs: Mapping[str, Any] | None) -> Any:
    """The pipeline with all that encodes, its transformer without weights; see `load_pipeline`."""
    with naming_model(model):
        transformer = skeleton(model)[1]
    return load_pipeline(model, {**_without_transformer(init_kwargs or {}), "transformer": transformer})


def _without_transformer(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without its quantisation, which diffusers would want to find a part for."""
    kwargs = dict(init_kwargs)
    asked = kwargs.get("quantization_config")
    if isinstance(asked, Mapping) and asked.get("components_to_quantize"):
        named = asked["components_to_quantize"]
        left = [part for part in ([named] if isinstance(named, str) else named) if part != "transformer"]
        kwargs["quantization_config"] = {**asked, "components_to_quantize": left}
        if not left:
            del kwargs["quantization_config"]
    return kwargs
