"""What is trained: the pipeline from a name or an object, its transformer with or without a LoRA, its name in cards.

Between the pipeline and the trainer. Gotcha: a diffusers model has other names for what the Trainer asks of a
transformers model, and `from_pretrained` wants objects where a YAML file has strings.
"""

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate.utils import TorchDynamoPlugin
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, set_seed

from ..editors import RegionDecoupledPipeline
from ..editors.opening import region_decoupled_class
from ..inputs.access import fetch
from ..inputs.hints import hint
from ..inputs.ranges import naming
from ..tiny import WEIGHTS
from .adapters import WAYS_OUT, adapters_of, continued, unwrap

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
LOADING = HUB_OPTIONS | {
    *("dtype", "torch_dtype", "variant", "quantization_config", "device_map", "max_memory", "low_cpu_mem_usage"),
    *("use_safetensors", "disable_mmap", "use_flashpack", "offload_folder", "offload_state_dict", "proxies"),
}
"""What `DiffusionPipeline.from_pretrained` reads itself, but for ONNX and code from the Hub; parts besides."""


def load_pipeline(model: Any, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """The pipeline of a Hub id or a folder, or the one that shares its parts with a given pipeline.

    Args:
        model: a pipeline of a class that has an editor (any subclass), a Hub id or a folder of one. Its transformer is
            taken out of what it is wrapped in (`adapters.unwrap`), whose names would stand in everything that is saved.
        init_kwargs: of `from_pretrained`, where `model` is a string; dtypes may be strings, also one for each part, and
            `quantization_config` a mapping with `PipelineQuantizationConfig`'s arguments, or the transformer's own
            configuration, such as a `BitsAndBytesConfig`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: a name that cannot be opened, a dtype that torch does not have, an argument that nobody reads, a
            quantization whose package is missing, or `init_kwargs` with a pipeline.
    """
    if isinstance(model, str | os.PathLike):
        kwargs = dict(init_kwargs or {})
        for key in {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs[key] = _dtype(kwargs[key], f"model_init_kwargs[{key!r}]")
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _quantization(kwargs["quantization_config"])
        hub = {key: kwargs[key] for key in HUB_OPTIONS & kwargs.keys()}
        with naming_model(str(model), **hub) as index:
            known = LOADING | inspect.signature(region_decoupled_class(index["_class_name"]).__init__).parameters.keys()
        for key in kwargs.keys() - known:  # which diffusers would ignore
            said = hint(key, known)
            raise ValueError(
                f"model_init_kwargs: got {key!r}, expected arguments of from_pretrained" + (f"; {said}" if said else "")
            )
        with naming_model(str(model), **hub):
            return RegionDecoupledPipeline.from_pretrained(model, **kwargs)
    if init_kwargs:
        raise ValueError(
            f"model_init_kwargs: got {dict(init_kwargs)} with a pipeline that is loaded already, expected none; pass "
            "them to its from_pretrained, or name the model"
        )
    try:
        pipe: Any = RegionDecoupledPipeline.from_pipe(model)
    except ValueError as error:
        raise TypeError(f"{error}, a Hub id or a folder") from None
    transformer = unwrap(pipe.transformer)
    if transformer is not pipe.transformer:
        pipe.transformer = transformer
    return pipe


def with_quantization(init_kwargs: Any, config: Any) -> dict[str, Any] | None:
    """`model_init_kwargs` and the trainer's `quantization_config` in one.

    Raises:
        ValueError: both say how to quantize.
    """
    if config is None:
        return init_kwargs
    if "quantization_config" in (init_kwargs or {}):
        raise ValueError(
            "quantization_config: got one beside model_init_kwargs['quantization_config'], expected it in one place"
        )
    return {**(init_kwargs or {}), "quantization_config": config}


@contextmanager
def naming_model(model: str, **hub: Any) -> Iterator[dict[str, Any]]:
    """For opening a pipeline: whatever diffusers and the Hub's client raise is told as a wrong `model`.

    Yields its `model_index.json`.

    Args:
        model: a Hub id or a folder.
        hub: `revision` and the like, for `hf_hub_download`.

    Raises:
        ValueError: nothing there, broken files; or, before anything else is fetched, no access or another pipeline.
    """
    kinds = "FLUX.1-Kontext, FLUX.2 or Qwen-Image-Edit-Plus"
    expected = f"kontext-tiny, or a folder or Hub id of a complete {kinds} pipeline"
    if not Path(model).is_dir():
        expected += "; if it is one, check the network (HF_HUB_OFFLINE) and, where it is gated, `hf auth login`"
    index = fetch("model", model, INDEX, expected, **hub)
    with naming("model", model, expected):
        read = json.loads(index.read_text())
        region_decoupled_class(str(read.get("_class_name")))
        yield read


def _quantization(config: Any) -> PipelineQuantizationConfig:
    """How to quantize the pipeline's parts, of a mapping from YAML; of one part's configuration, its transformer."""
    if isinstance(config, PipelineQuantizationConfig):
        return config
    if isinstance(config, Mapping):
        package = str(config.get("quant_backend")).split("_")[0]
        if package in ("bitsandbytes", "torchao", "gguf") and find_spec(package) is None:
            raise ValueError(
                f"quantization_config: got the backend {config['quant_backend']!r}, expected the package "
                f"{package} that it takes; pip install {package}"
            )
        return PipelineQuantizationConfig(**config)
    if isinstance(config, transformers.BitsAndBytesConfig):  # which TRL's users have at hand
        names = inspect.signature(diffusers.BitsAndBytesConfig).parameters
        config = diffusers.BitsAndBytesConfig(**{key: v for key, v in config.to_dict().items() if key in names})
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def _dtype(value: Any, where: str) -> Any:
    """A dtype, or one for each part of the pipeline, from what a YAML file or a command line can say."""
    if isinstance(value, Mapping):
        return {part: _dtype(each, where) for part, each in value.items()}
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: got {value!r}, expected the name of a dtype, such as bfloat16")
    return dtype


def base_model_name(pipeline: DiffusionPipeline) -> str:
    """What to call the base in a card: its Hub id; of a folder its last part, as paths are nobody's business."""
    name = str(pipeline.config.get("_name_or_path") or "")
    if not name or not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    return "kontext-tiny" if folder == WEIGHTS.resolve() else folder.name


def trained_model(pipeline: Any, peft_config: PeftConfig | None, seed: int) -> nn.Module:
    """The pipeline's transformer, ready for the Trainer, everything else frozen.

    Args:
        pipeline: keeps its transformer, into which PEFT puts its layers.
        peft_config: of a new LoRA; None goes on training the one that is on the transformer, and without one trains
            the whole transformer.
        seed: of the LoRA's initial weights.

    Raises:
        ValueError: a VAE that tiles, a transformer with a step cache, layers that it does not have, an adapter where a
            new one is to be trained, one that `adapters.continued` refuses, or one on a text encoder.
    """
    transformer = pipeline.transformer
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and part is not transformer:
            part.requires_grad_(False).eval()
            if adapters_of(part):
                raise ValueError(
                    f"model: got the adapters {', '.join(adapters_of(part))} on {name}, which the trained LoRA would "
                    f'not hold; make it part of the base with `pipe.fuse_lora(components=["{name}"])` and '
                    "`pipe.unload_lora_weights()`, or load a LoRA without it"
                )
    transformer = pipeline.transformer
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not transformer:
            part.requires_grad_(False).eval()
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("model: the transformer has a step cache enabled; call `transformer.disable_cache()` first")

    if getattr(pipeline.vae, "use_tiling", False):
        raise ValueError("model: the VAE decodes in tiles, whose seams are learned; call `pipe.vae.disable_tiling()`")

    # The Trainer asks a transformers model for these; a diffusers model has another name for them.
    def enable(*_: Any, **__: Any) -> None:
        transformer.enable_gradient_checkpointing()

    transformer.activation_checkpointing_enable = transformer.gradient_checkpointing_enable = enable
    transformer.gradient_checkpointing_disable = transformer.disable_gradient_checkpointing
    there = adapters_of(transformer)
    if peft_config is None and not there:
        return transformer.requires_grad_(True)
    if peft_config is None:
        wrapped = continued(transformer)
    elif there:
        raise ValueError(
            f"peft_config: got one for a transformer with the adapter {', '.join(there)}, expected one or the other; "
            f"{WAYS_OUT}"
        )
    else:
        wrapped = _with_new_lora(transformer, peft_config, seed)
    if wrapped.peft_config["default"].use_dora:  # type: ignore[union-attr]
        logger.warning(
            "peft_config.use_dora: only diffusers and PEFT read DoRA's magnitudes from the saved file; other programs, "
            "such as ComfyUI, would draw something else with it"
        )
    public = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    wrapped.config = PreTrainedConfig(**public)
    wrapped.config._name_or_path = base_model_name(pipeline)
    return wrapped


def compile_blocks(transformer: Any, accelerator: Any, args: Any) -> None:
    """Compile each kind of block once, with the LoRA in it, in place of accelerate's compilation of the whole model.

    Args:
        accelerator: the Trainer's, which is kept from compiling.
        args: with `torch_compile_backend` and `torch_compile_mode`.
    """
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    transformer.compile_repeated_blocks(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def _with_new_lora(transformer: nn.Module, peft_config: PeftConfig, seed: int) -> PeftModel:
    if hasattr(transformer, "peft_config"):  # left by an adapter that was merged and removed
        del transformer.peft_config
    set_seed(seed)  # the LoRA's initial weights belong to the run, not to what ran before it
    try:
        return get_peft_model(transformer, peft_config)  # type: ignore[arg-type, return-value]
    except ValueError as error:
        names = (name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
        endings = sorted({re.sub(r".*?([^.]+(\.\d+)?)$", r"\1", name) for name in names})
        raise ValueError(
            f"peft_config.target_modules: got {peft_config.target_modules!r}, expected names of layers in "
            f"{type(transformer).__name__}, ending in {', '.join(endings)} ({error})"
        ) from error
