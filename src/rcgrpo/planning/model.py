"""An editor's own code on a model of a few blocks without contents: what a call of it takes.

Where it fits: between the configurations (`known`, a folder, the Hub) and `measuring`, which runs these calls on one
and two blocks of each kind.
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn

from ..editors import Conditions
from ..editors.base import FlowEditor
from ..editors.opening import open_editor, region_decoupled_class
from ..training.model import naming_model
from ..training.precision import computes_in_bf16, round_lora
from .known import KNOWN, Parts

BLOCKS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
"""Keys of a transformer's configuration that count its blocks, and the lists that hold these."""

_INSTRUCTION = 64  # tokens of template and instruction, where texts are not padded
_PICTURE_TOKENS = 384 * 384 // 28**2  # of the source, where the text encoder sees it


def read_parts(model: str) -> Parts:
    """The configurations of a pipeline, of its Hub id or folder; weights are not touched.

    Raises:
        ValueError: there is no such model, or none that has an editor.
    """
    if model in KNOWN:
        return KNOWN[model]
    with naming_model(model) as index:
        parts = {"index": index}
        for part, kind in index.items():
            if isinstance(kind, list) and (part in ("transformer", "vae") or part.startswith("text_encoder")):
                name = Path(part, "config.json")
                path = Path(model, name) if Path(model).is_dir() else Path(hf_hub_download(model, str(name)))
                parts[part] = json.loads(path.read_text())
        return parts


def block_counts(parts: Parts) -> dict[str, int]:
    """How many blocks of each kind the transformer has, by the key that says it."""
    made: Any = getattr(diffusers, parts["index"]["transformer"][1])
    usual = inspect.signature(made.__init__).parameters
    return {key: parts["transformer"].get(key, usual[key].default) for key in BLOCKS if key in usual}


def text_encoders(parts: Parts) -> dict[str, nn.Module]:
    """On the meta device."""
    made = {}
    for part, config in parts.items():
        if part.startswith("text_encoder"):
            settings = {key: value for key, value in config.items() if key != "model_type"}
            with torch.device("meta"):
                kind: Any = getattr(transformers, parts["index"][part][1])
                made[part] = kind(transformers.AutoConfig.for_model(config["model_type"], **settings))
    return made


@dataclass(frozen=True)
class Shape:
    """What a call's memory and FLOP depend on besides the model.

    Args:
        resolution, batch, guidance_scale, true_cfg_scale, batch_guidance, max_sequence_length: as in the configuration.
        dtype, text_dtype, vae_dtype: of the transformer, of the text (and so of what the model is asked in), the VAE.
        autocast: whether a model that is not in bf16 itself runs under autocast, as with `bf16`.
    """

    resolution: int
    batch: int = 1
    guidance_scale: float | None = None
    true_cfg_scale: float = 1.0
    batch_guidance: bool = False
    max_sequence_length: int = 512
    dtype: torch.dtype = torch.bfloat16
    text_dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    autocast: bool = True


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it floating-point tensors are made in another dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_editor(parts: Parts, blocks: Mapping[str, int], shape: Shape) -> FlowEditor:
    """The editor of a pipeline with so many blocks; its text encoders and tokenizers are not there."""
    index = parts["index"]
    kind = region_decoupled_class(str(index["_class_name"]))
    modules, settings = kind._get_signature_keys(kind)
    components: dict[str, Any] = dict.fromkeys(modules)
    for part, changed, dtype in (("transformer", blocks, shape.dtype), ("vae", {}, shape.vae_dtype)):
        config = {key: value for key, value in parts[part].items() if not key.startswith("_")} | dict(changed)
        with default_dtype(dtype), torch.device("meta"):
            components[part] = getattr(diffusers, index[part][1]).from_config(config).requires_grad_(False).eval()
    pipeline = kind(**components, **{key: index[key] for key in settings if key in index})
    return open_editor(
        pipeline,
        shape.resolution,
        1,
        shape.guidance_scale,
        shape.max_sequence_length,
        None,
        shape.true_cfg_scale,
        batch_guidance=shape.batch_guidance,
    )


def size_of(editor: FlowEditor) -> tuple[int, int]:
    """The (height, width) at which a square picture is edited."""
    side = editor.resolution
    return editor.size_for(Image.new("RGB", (side, side)))


def make_conditions(editor: FlowEditor, shape: Shape) -> Conditions:
    """Of a batch of square pictures."""
    config, batch, dtype = editor.pipeline.transformer.config, shape.batch, shape.text_dtype
    size = size_of(editor)
    reference = editor.reference_size(*size)
    length = _INSTRUCTION + _PICTURE_TOKENS if editor.sees_pictures else shape.max_sequence_length

    def text() -> dict[str, Tensor]:
        made = {"prompt_embeds": torch.zeros(batch, length, config.joint_attention_dim, dtype=dtype)}
        if "pooled_projection_dim" in config:
            made["pooled_prompt_embeds"] = torch.zeros(batch, config.pooled_projection_dim, dtype=dtype)
        return made | {"prompt_embeds_mask": torch.ones(batch, length, dtype=torch.bool)}

    def latents(height: int, width: int) -> Tensor:
        rows, columns = editor.grid_for(height, width)
        return torch.zeros(batch, rows * columns, editor.channels, dtype=dtype)

    return Conditions(
        text(),
        torch.ones(batch, length),
        latents(*size),
        *size,
        text() if editor.cfg_scale > 1 else {},
        None if reference == size else latents(*reference),
        None if reference == size else editor.grid_for(*reference),
    )


def add_lora(editor: FlowEditor, rank: int, targets: Sequence[str] | None) -> PeftModel:
    """As `rcgrpo train` puts it on."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets or editor.lora_targets))
    model: Any = get_peft_model(editor.pipeline.transformer, config)
    if computes_in_bf16(model):
        round_lora(model)
    return model


def without_meta(*modules: nn.Module) -> None:
    """Bring modules of the meta device to the CPU, within `without_contents`; a LoRA with the gradients that earlier
    micro-batches have left."""
    for module in (each for model in modules for each in model.modules()):
        for name, weight in module._parameters.items():
            if weight is not None:
                made = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype), weight.requires_grad)
                made.grad = torch.zeros_like(made) if weight.requires_grad else None
                module._parameters[name] = made
        for kept in (module._buffers, vars(module)):  # some keep tensors as plain attributes
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    kept[name] = torch.zeros(value.shape, dtype=value.dtype)
