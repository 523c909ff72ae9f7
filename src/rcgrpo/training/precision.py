"""In what a transformer computes: a bf16 base in bf16, without autocast, its LoRA's fp32 weights rounded on the way in.

Where it fits: between the model that is trained and the Trainer, whose accelerator would put autocast around it. Why:
autocast widens every norm and casts every layer's input back, and PEFT widens the LoRA's input, which doubles what
elementwise operations read and write; and stock pipelines draw in plain bf16, so this is the model that is used later.
Rollout and update call the same module, so a first update's ratio is 1 as ever.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from .adapters import NAME


class RoundedLinear(nn.Linear):
    """Weights in fp32, for the optimizer, and products in the input's dtype; gradients come back in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`'s."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


def computes_in_bf16(model: nn.Module) -> bool:
    """Whether all that is stored of the base is in bf16, or in a form of fewer bits that is unpacked into it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stored = {weight.dtype for name, weight in base.named_parameters() if f".{NAME}." not in name}
    whole = {dtype for dtype in stored if dtype.is_floating_point and dtype.itemsize > 1}
    return whole == {torch.bfloat16}


def round_lora(model: nn.Module) -> None:
    """Let a model's LoRA layers compute in the dtype of what they are given; DoRA's, which read the base, stay."""
    for layer in (each for each in model.modules() if isinstance(each, LoraLayer)):
        parts: list[Any] = [holder[NAME] for holder in (layer.lora_A, layer.lora_B) if NAME in holder]
        if layer.lora_variant or not parts or any(type(part) is not nn.Linear for part in parts):
            continue
        layer.cast_input_dtype_enabled = False
        for part in parts:
            part.__class__ = RoundedLinear
