"""A random editor with a LoRA that is not zero, and what a pipeline draws with it."""

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tiny_kontext import TINY_CALL, build_tiny_kontext

TARGETS = ["attn.to_q", "attn.to_out.0", "ff.net.0.proj", "proj_mlp"]


def draw(pipeline, seed=0):
    pipeline.set_progress_bar_config(disable=True)
    source = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    generator = torch.Generator().manual_seed(seed)
    return pipeline(image=source, prompt="make it red", generator=generator, output_type="pt", **TINY_CALL).images


def trained(**options):
    """A pipeline whose LoRA is not zero, and its PeftModel."""
    pipeline = build_tiny_kontext()
    config = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | options))
    model = get_peft_model(pipeline.transformer, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return pipeline, model
