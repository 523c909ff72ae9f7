"""From a pipeline, or a folder's `model_index.json`, to the editor file that knows it."""

import importlib
import os
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from .base import FlowEditor
from .region_decoupled import RegionDecoupled

_FILES = {
    "FluxKontextPipeline": "flux_kontext",
    "Flux2KleinPipeline": "flux2_klein",
    "Flux2Pipeline": "flux2_dev",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
}
"""The file of each of diffusers' classes; there its pipeline with a region is `RegionDecoupled` + the class's name."""

_HUB = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


def region_decoupled_class(names: str | type) -> Any:
    """The pipeline class with a region for a pipeline class of diffusers, any subclass, or one of their names.

    Raises:
        ValueError: there is none.
    """
    found = [names] if isinstance(names, str) else [base.__name__ for base in names.__mro__]
    for name in found:
        stock = name.removeprefix("RegionDecoupled").replace("InpaintPipeline", "Pipeline")  # which has the same parts
        if stock in _FILES:
            module = importlib.import_module(f".{_FILES[stock]}", __package__)
            return getattr(module, f"RegionDecoupled{stock}")
    raise ValueError(f"model: got a {found[0]}, expected one of {', '.join(_FILES)}")


def stock_name(pipeline: Any) -> str:
    """diffusers' own name for the class of a pipeline that has an editor, or of any subclass."""
    return region_decoupled_class(type(pipeline)).__name__.removeprefix("RegionDecoupled")


def skeleton(model: str | os.PathLike[str]) -> tuple[Any, nn.Module]:
    """The pipeline class of a Hub id or folder, and its transformer without weights, on the meta device."""
    index = cast(dict[str, Any], DiffusionPipeline.load_config(model))
    kind = region_decoupled_class(str(index.get("_class_name")))
    transformer = getattr(diffusers, index["transformer"][1])
    config = transformer.load_config(model, subfolder="transformer")
    with torch.device("meta"):
        return kind, transformer.from_config(config)


def open_editor(pipeline: Any, *args: Any, **kwargs: Any) -> FlowEditor:
    """The editor of a pipeline, by its class; arguments as in `base.FlowEditor`.

    Raises:
        ValueError: no editor knows this class, or an argument does not fit it.
    """
    return region_decoupled_class(type(pipeline)).editor_class(pipeline, *args, **kwargs)


class RegionDecoupledPipeline:
    """Opens any model that has an editor as its pipeline with a region, as diffusers' `AutoPipeline`s open theirs."""

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The pipeline of a Hub id or folder, by the class that its `model_index.json` names.

        Args:
            model: Hub id or folder.
            kwargs: as in `DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError: a class that no editor knows.
        """
        config = DiffusionPipeline.load_config(model, **{name: kwargs[name] for name in _HUB if name in kwargs})
        try:
            kind = region_decoupled_class(str(cast(dict[str, Any], config).get("_class_name")))
        except ValueError as error:
            raise ValueError(f"{error}, as its model_index.json should say ({model})") from None
        return kind.from_pretrained(model, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline) -> RegionDecoupled | Any:
        """The pipeline with a region that shares its parts with another one, in their dtypes and on their devices."""
        kind = region_decoupled_class(type(pipeline))
        if isinstance(pipeline, kind):
            return pipeline
        # `kind.from_pipe` would cast everything to fp32.
        settings = {
            name: pipeline.config[name] for name in kind._get_signature_keys(kind)[1] if name in pipeline.config
        }
        made = kind(**pipeline.components, **settings)
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return made
