"""Transformers that come to a run wrapped, or with an adapter: taken out of wrappers, and trained on as they are.

Where it fits: `model` opens pipelines through `unwrap` and asks here what is on the transformer; `continued` makes of
a single LoRA, loaded by diffusers or by PEFT, the same `PeftModel` that a fresh one is trained in. Why: PEFT sets the
weights of an adapter back when the same layers are wrapped again, and a compiled transformer's names stand in every
saved key. Gotcha: whatever it was called, the adapter is called "default" afterwards, so that checkpoints, which PEFT
stores under the adapter's name, are found by a run that loaded it under another.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from copy import copy
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from .hub import check_lora_config

logger = logging.getLogger(__name__)

NAME = "default"
"""What the trained adapter is called."""

WAYS_OUT = (
    "to go on training it pass peft_config=None; to train a new one on top, make it part of the base first with "
    "`pipe.fuse_lora()` and `pipe.unload_lora_weights()`, of a PeftModel with `merge_and_unload()`"
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DistributedDataParallel, DataParallel and PEFT's wrappers, in any order.

    PEFT's layers stay inside it, and what was compiled is compiled in place with the same settings, blocks too: it runs
    as before, but no wrapper's name stands in its keys.
    """
    while True:
        if isinstance(module, PeftModel | PeftMixedModel):
            module = module.get_base_model()
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif _is_compiled(module):
            module = _compiled_in_place(module)
        else:
            break
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if _is_compiled(child):
                setattr(parent, name, _compiled_in_place(child))
    return module


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule)


def _compiled_in_place(module: Any) -> nn.Module:
    inner = module._orig_mod
    inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # as `nn.Module.compile` does it
    return inner


def adapters_of(module: nn.Module) -> list[str]:
    """The names of all adapters whose layers are in a module."""
    layers = (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def describe(transformer: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """The LoRA on a transformer in the words of the command line: `lora_r`, `lora_alpha`, `lora_target_modules`.

    Ranks and alphas that differ between layers come as lists. The layers are `names`, as they were given, where these
    mean the same ones, else their own names.
    """
    layers = {key: layer for key, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    (name,) = adapters_of(transformer)
    ranks = sorted({layer.r[name] for layer in layers.values()})
    alphas = sorted({_number(layer.lora_alpha[name]) for layer in layers.values()})
    config = LoraConfig(target_modules=list(names))
    return {
        "lora_r": ranks[0] if len(ranks) == 1 else ranks,
        "lora_alpha": alphas[0] if len(alphas) == 1 else alphas,
        "lora_target_modules": list(names) if _means(config, transformer, layers) else sorted(layers),
    }


def _means(config: LoraConfig, transformer: nn.Module, layers: Mapping[str, LoraLayer]) -> bool:
    """Whether a configuration's names are those of just these layers."""
    inside = tuple(f"{key}." for key in layers)
    linear = (key for key, module in transformer.named_modules() if isinstance(module, nn.Linear))
    candidates = {*layers, *(key for key in linear if not key.startswith(inside))}
    return {key for key in candidates if check_target_module_exists(config, key)} == layers.keys()


def continued(transformer: nn.Module) -> PeftModel:
    """The transformer as a `PeftModel` that trains the one LoRA on it: its weights, rank, alpha and layers as they are.

    A weight that was given to it (`set_adapters("a", 0.5)`) becomes part of its alpha; dropout is switched off.

    Args:
        transformer: unwrapped, with the layers of a LoRA; they are kept, and called "default" from then on.

    Raises:
        ValueError: several adapters, another kind than LoRA, or one that is merged, switched off, or weighted
            differently from layer to layer.
    """
    names = adapters_of(transformer)
    if len(names) > 1:
        raise ValueError(
            f"model: got the adapters {', '.join(names)} on the transformer, expected one to go on training; leave one "
            "with `pipe.delete_adapters([...])`, or make some part of the base with `pipe.fuse_lora(adapter_names="
            "[...])` and `pipe.delete_adapters([...])`"
        )
    (name,) = names
    config: Any = transformer.peft_config[name]  # type: ignore[index, union-attr]
    try:
        check_lora_config(config)
    except ValueError as error:
        raise ValueError(f"model: the adapter {name!r} on the transformer cannot be trained on. {error}") from error
    layers = {key: layer for key, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    weight = _weight(layers, name)
    if config.lora_dropout:
        logger.warning(
            "model: the adapter %r has lora_dropout=%s, which is switched off: it makes the update see another policy "
            "than the rollout",
            name,
            config.lora_dropout,
        )
    config = _settled(config, transformer, layers, name, weight)
    for layer in layers.values():
        _rename(layer, name)
    del transformer.peft_config
    # A wrapper that touches no layer: PEFT would initialise them anew.
    wrapped = PeftModel(transformer, LoraConfig(target_modules=DUMMY_TARGET_MODULES), NAME)  # type: ignore[arg-type]
    wrapped.peft_config[NAME] = config
    wrapped.base_model.set_adapter(NAME)
    wrapped.requires_grad_(False)
    for layer in layers.values():
        for holder in (getattr(layer, attribute) for attribute in layer.adapter_layer_names):
            if NAME in holder:
                holder[NAME].requires_grad_(True)
    return wrapped


def _weight(layers: Mapping[str, LoraLayer], name: str) -> float:
    """By what the adapter's scale was multiplied, the same in all layers."""
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            f"model: the adapter {name!r} is merged into the transformer and still on it; take it back out with "
            "`pipe.unfuse_lora()` (of a PeftModel `unmerge_adapter()`) to go on training it, or remove it with "
            "`pipe.unload_lora_weights()` (`merge_and_unload()`) to train on what it was merged into"
        )
    weights = set()
    for layer in layers.values():
        off = layer.disable_adapters or name not in layer.active_adapters
        own = layer.lora_alpha[name] / (layer.r[name] ** 0.5 if layer.use_rslora.get(name) else layer.r[name])
        weights.add(0.0 if off else round(float(layer.scaling[name]) / float(own), 6))
    if weights == {0.0}:
        raise ValueError(
            f"model: the adapter {name!r} on the transformer is switched off; switch it on with `pipe.enable_lora()` "
            f"and `pipe.set_adapters({name!r})` to go on training it, or remove it with `pipe.unload_lora_weights()`"
        )
    if len(weights) > 1:
        raise ValueError(
            f"model: the adapter {name!r} has weights {', '.join(map(str, sorted(weights)))} in different layers, "
            f"expected one; set it with `pipe.set_adapters({name!r}, 1.0)`"
        )
    return weights.pop()


def _settled(
    config: LoraConfig, transformer: nn.Module, layers: Mapping[str, LoraLayer], name: str, weight: float
) -> LoraConfig:
    """The adapter's configuration as PEFT can store it and read it back: plain numbers, and names of these layers only.

    diffusers leaves tensors in it, and `proj_out` alone among its names for FLUX's last layer means every block's too.
    """
    config = copy(config)
    config.lora_dropout, config.inference_mode, config.base_model_name_or_path = 0.0, False, None
    for layer in layers.values():
        layer.lora_alpha[name] = _number(layer.lora_alpha[name] * weight)
        layer.scaling[name] = float(layer.scaling[name])
        layer.lora_dropout[name] = nn.Identity()
    config.lora_alpha = _number(config.lora_alpha * weight)
    for common, pattern, values in (("r", "rank_pattern", "r"), ("lora_alpha", "alpha_pattern", "lora_alpha")):
        if getattr(config, pattern):
            of_layers = {key: getattr(layer, values)[name] for key, layer in layers.items()}
            setattr(config, common, Counter(of_layers.values()).most_common(1)[0][0])
            exact = {f"^{re.escape(k)}": v for k, v in of_layers.items() if v != getattr(config, common)}
            setattr(config, pattern, exact)
    if not _means(config, transformer, layers):
        config.target_modules = "|".join(map(re.escape, sorted(layers)))  # a regular expression, of whole names
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _number(value: Any) -> int | float:
    """A tensor or number as Python's own, whole where it is."""
    value = float(value)
    return int(value) if value.is_integer() else value


def _rename(layer: LoraLayer, name: str) -> None:
    for attribute, holder in [*vars(layer).items(), *layer.named_children()]:
        if not attribute.startswith("_") and hasattr(holder, "pop") and hasattr(holder, "keys") and name in holder:
            holder[NAME] = holder.pop(name)


class StartingPoint:
    """A model with the weights that it had when this was made, while it trains on: a reference for a run that goes on.

    Args:
        model: what is trained; copies of its trainable weights are kept, on their device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def of(self, model: nn.Module) -> Callable[..., Any]:
        """To be called as the model is, without gradient; `model` may be wrapped by now."""
        weights: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            own = re.sub(r"^((module|_orig_mod)\.)+", "", name)
            if own in self._weights:
                weights[name] = self._weights[own] = self._weights[own].to(parameter.device)

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, weights, args, kwargs)

        return call
