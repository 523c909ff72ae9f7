"""What leaves the house: the trained LoRA as one file that stock diffusers loads, and the model card beside it.

Where it fits: the trainer calls `check_lora_config` before the first step, `save_lora` at every checkpoint and
`model_card` before every push; uploading itself is `transformers.Trainer`'s and huggingface_hub's work. Why:
diffusers' `load_lora_weights` cannot read PEFT's own `adapter_model.safetensors` (its keys start with `base_model.`),
and TRL's card describes a language model. Gotchas: the scale never stands in diffusers' metadata, which other programs
do not know. For FLUX.1 it is one `.alpha` for each layer, which diffusers, ComfyUI and kohya's tools read alike; where
the stock pipeline does not read `.alpha` (`FlowEditor.lora_has_alpha`) it is multiplied into the weights, which all
take as they are. So rank, scale and layers can be read from the tensors, and the same weights give the same bytes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..editors.base import FlowEditor
from ..editors.lora import LORA_FILE
from ..editors.opening import region_decoupled_class

CARD_TAGS = ("rcgrpo", "trl", "lora", "image-editing", "reinforcement-learning", "grpo")
DEFAULT_PICTURE = "samples/contact_sheet.png"
CURVES = "reward_curves.png"
EMBEDDED = "kontext-tiny"

_CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PACKAGES = ("rcgrpo", "torch", "diffusers", "transformers", "trl", "peft")

# LoraConfig's fields that decide what a loaded adapter computes ...
_SHAPING = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# ... and those that matter only for training it. Any other option is refused unless it is at its default.
_TRAINING_ONLY = {
    *("lora_dropout", "init_lora_weights", "eva_config", "inference_mode", "ephemeral_gpu_offload"),
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "peft_type", "peft_version"),
}
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_lora_config(config: PeftConfig) -> None:
    """Refuse an adapter that a stock pipeline could not reproduce from a LoRA file. Meant for before the first step.

    Args:
        config: the configuration that the model is (to be) wrapped with.

    Raises:
        ValueError: not a LoRA; an initialisation that changes the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA);
            an alpha of 0 or NaN; or an option that diffusers' LoRA format does not carry (`bias`, `modules_to_save`,
            ...).
    """
    if type(config) is not LoraConfig:  # AdaLoraConfig is a subclass
        raise ValueError(f"Got {type(config).__name__} but expected a LoraConfig: diffusers loads no other adapter.")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if not (isfinite(alpha) and alpha):
            raise ValueError(f"Got lora_alpha={alpha}, with which a LoRA does nothing. Use a positive number.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise ValueError(
            f"Got init_lora_weights={init!r}, which changes the base weights, so the LoRA would be wrong on the "
            "original base. Use True, 'gaussian', 'orthogonal' or 'eva'."
        )
    foreign = {key: value for key, value in _non_default(config).items() if key not in _SHAPING | _TRAINING_ONLY}
    if foreign:
        options = ", ".join(f"{key}={value!r}" for key, value in foreign.items())
        raise ValueError(f"Got LoraConfig({options}) but diffusers' LoRA format cannot carry it. Leave the default.")


def save_lora(
    pipeline: DiffusionPipeline, peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Write one adapter as `pytorch_lora_weights.safetensors` in diffusers' format, for `load_lora_weights(folder)`.

    The file appears whole or not at all: a crash leaves the previous one as it was. Call it on one process, where the
    weights are whole (not sharded by FSDP or ZeRO-3).

    Args:
        pipeline: the pipeline whose transformer was wrapped; its class decides the format.
        peft_model: `get_peft_model(pipeline.transformer, ...)`.
        folder: where to write; made if missing.
        adapter_name: which of the model's adapters.

    Returns:
        The path of the file.

    Raises:
        ValueError: no adapter of this name, or one that `check_lora_config` refuses.
    """
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"Got adapter_name={adapter_name!r} but the model has {sorted(peft_model.peft_config)}.")
    config = peft_model.peft_config[adapter_name]
    check_lora_config(config)

    layers = get_peft_model_state_dict(
        peft_model.get_base_model(),  # through the PeftModel the keys would start with "base_model.model."
        adapter_name=adapter_name,
        save_embedding_layers=False,  # "auto" asks the Hub for the base model's vocabulary
    )
    if _editor_class(pipeline).lora_has_alpha:
        alphas = _alphas(peft_model, layers, adapter_name)
        layers |= {f"{key}.alpha": torch.tensor(alpha) for key, alpha in alphas.items()}
    else:
        layers |= _scaled(peft_model, layers, adapter_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, unfinished = folder / LORA_FILE, folder / f"_{LORA_FILE}.tmp"  # Trainer uploads nothing that starts with _
    try:
        pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            weight_name=unfinished.name,
        )
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _editor_class(pipeline: DiffusionPipeline | str) -> type[FlowEditor]:
    """What knows the format; of a pipeline, or the name of its class."""
    return region_decoupled_class(pipeline if isinstance(pipeline, str) else type(pipeline)).editor_class


def _lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    modules = peft_model.get_base_model().named_modules()
    return {key: m for key, m in modules if isinstance(m, LoraLayer) and adapter_name in m.scaling}


def _scaled(peft_model: PeftModel, layers: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The second matrices times their layers' scale, so that up times down is the weights' difference itself.

    Half precision becomes fp32, as a product would not fit into it.
    """
    return {
        f"{key}.lora_B.weight": layers[f"{key}.lora_B.weight"].float() * float(layer.scaling[adapter_name])
        for key, layer in _lora_layers(peft_model, adapter_name).items()
    }


def _alphas(peft_model: PeftModel, layers: dict[str, Tensor], adapter_name: str) -> dict[str, float]:
    """What each layer's alpha has to be for readers whose scale is alpha / rank, whatever made the scale.

    diffusers takes the name of a layer for all names that end in it: FLUX's last layer is called `proj_out`, as is one
    in every single block. Where their alphas differ, the blocks' scale goes into `layers`, with alphas that are alike.
    """
    found = _lora_layers(peft_model, adapter_name)
    alphas = {key: float(layer.scaling[adapter_name]) * layer.r[adapter_name] for key, layer in found.items()}
    for short in alphas:
        for key in alphas:
            if key.endswith(f".{short}") and alphas[key] != alphas[short]:
                up = f"{key}.lora_B.weight"
                layers[up] = layers[up] * (alphas[key] / alphas[short])
                alphas[key] = alphas[short]
    return alphas


def model_card(
    *,
    model_name: str,
    hub_model_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: str | Iterable[str] = (),
    eval_dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    metric_args: Mapping[str, Mapping[str, Any]] | None = None,
    metric_table: str | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    picture: str = DEFAULT_PICTURE,
    examples: Sequence[Mapping[str, str]] = (),
    pipeline_class: str = "FluxKontextPipeline",
    transformer: str | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """The README of a trained LoRA, ready to `save(folder / "README.md")`. Asks nothing of the network.

    Local paths stay private: a base model or data set that is a folder of this machine is named by its last part in the
    text only, and so is any absolute path among the settings.

    Args:
        model_name: title of the card, and name of the model in `model-index`.
        hub_model_id: `owner/name` to load the LoRA from in the example; without it the example is for this folder.
        base_model: Hub id or folder of the base pipeline, or "kontext-tiny".
        license: licence of the *base*, which binds the adapter, as a Hub identifier; by default what the editor knows
            of this base (`FlowEditor.licenses`), "other" where it knows nothing.
        license_name: its name, where `license` is "other".
        license_link: where to read it, where `license` is "other".
        datasets: Hub ids or folders of the training data.
        eval_dataset: where `metrics` were measured; the first of `datasets` when omitted.
        metrics: numbers for `model-index`; those that are not finite are left out.
        metric_args: for some of `metrics`, what else `model-index` says of them, such as the value before training.
        metric_table: the same for people, as a markdown table.
        settings: the training settings worth reading; those that are None are left out.
        folder: the model folder, to see whether `picture` exists.
        picture: before/after sheet, as a path relative to `folder`; shown only where it exists, as `reward_curves.png`.
        examples: edits for the Hub's page of the model, each with `source` and `edited`, pictures as paths like
            `picture`, and `prompt`; those whose pictures do not exist are left out.
        pipeline_class: the stock diffusers pipeline that the LoRA is for.
        transformer: the class of the transformer, where `folder` holds one that was trained itself instead of a LoRA.
        tags: more tags than `CARD_TAGS`.

    Raises:
        ValueError: `picture` or an example's is not a relative path inside the folder.
    """

    def exists(path: str) -> bool:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"Got picture={path!r} but expected a path relative to, and inside, the model folder.")
        return folder is not None and (Path(folder) / path).is_file()

    names = [datasets] if isinstance(datasets, str) else list(datasets)
    dataset_ids = [hub_id for name in names if (hub_id := _hub_id(name))]
    eval_name = eval_dataset or next(iter(names), None)
    base_id = _hub_id(base_model)
    bound: dict[str, Any] = {"license": license or "other", "license_name": license_name, "license_link": license_link}
    if license is None and license_name is None and license_link is None:
        bound |= _editor_class(pipeline_class).licenses.get(base_model or "", {})
    widget: list[dict[str, Any]] = [
        {"src": example["source"], "prompt": example["prompt"], "output": {"url": example["edited"]}}
        for example in examples
        if all([exists(example["source"]), exists(example["edited"])])
    ]
    nothing = {"src": "input.png", "prompt": "Replace the red cup with a green apple"}
    shown: dict[str, Any] = widget[0] if widget else nothing
    root = f"https://huggingface.co/{hub_model_id}/resolve/main/" if widget and hub_model_id else ""
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_id,
        base_model_relation=("finetune" if transformer else "adapter") if base_id else None,
        pipeline_tag="image-to-image",
        **bound,
        datasets=dataset_ids or None,
        tags=[*(tag for tag in CARD_TAGS if tag != "lora" or not transformer), *tags],
        widget=widget or None,
        model_name=model_name,
        eval_results=[
            eval_result(name, value, eval_name, (metric_args or {}).get(name, {}))
            for name, value in (metrics or {}).items()
            if isfinite(value)
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_CARD_TEMPLATE),
        model_name=model_name,
        adapter=hub_model_id or ".",
        embedded=base_model == EMBEDDED,
        transformer=transformer,
        source=root + quote(shown["src"]) if root else shown["src"],
        prompt=json.dumps(shown["prompt"], ensure_ascii=False),
        base_id=base_id,
        base=base_id or (f"path/to/{_last_part(base_model)}" if base_model else "path/to/the-base-model"),
        base_name=_last_part(base_model) if base_model else None,
        datasets=[(_hub_id(name), _last_part(name)) for name in names],
        picture=picture if exists(picture) else None,
        curves=CURVES if exists(CURVES) else None,
        metric_table=metric_table,
        settings={key: _cell(value) for key, value in (settings or {}).items() if value is not None},
        pipeline_class=pipeline_class,
        versions=_versions(),
    )


def eval_result(name: str, value: float, dataset: str | None, args: Mapping[str, Any], **place: Any) -> EvalResult:
    """One number of `model-index`.

    Args:
        name: of the metric, as people read it.
        dataset: Hub id or folder, of which the last part is told; "unknown" where None.
        args: what else is known of the number.
        place: more of `EvalResult`'s fields, such as `dataset_split`.
    """
    return EvalResult(
        task_type="image-to-image",
        dataset_type=_hub_id(dataset) or "unknown",
        dataset_name=_last_part(dataset) if dataset else "unknown",
        metric_type=re.sub(r"\W+", "_", name.lower()).strip("_"),
        metric_name=name,
        metric_value=float(value),
        metric_args=dict(args) or None,
        **place,
    )


def _non_default(config: LoraConfig) -> dict[str, Any]:
    default = LoraConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != default[key]}


def _hub_id(name: str | None) -> str | None:
    """`name` if it reads as `owner/name` and is not a folder here, else None."""
    if not name or name.count("/") != 1 or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _last_part(name: str) -> str:
    return Path(name.replace("\\", "/")).name or name


def _cell(value: object) -> str:
    """A setting as one cell of a markdown table."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, list | tuple):
        value = ", ".join(map(_cell, value))
    text = _last_part(str(value)) if isinstance(value, str | Path) and Path(value).is_absolute() else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            continue
    return versions
