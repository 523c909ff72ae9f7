"""What the app's tests edit: a random editor of 32 x 32 pixels, LoRAs for it, a picture with a mask."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from rcgrpo.editors import RegionDecoupledFluxKontextPipeline
from rcgrpo.evaluation.benchmark import Sampling
from rcgrpo.training.hub import save_lora
from tiny_kontext import build_tiny_kontext

SAMPLING = Sampling(32, 2, max_sequence_length=48, seed=3)


def make_pipeline():
    pipeline = RegionDecoupledFluxKontextPipeline(**build_tiny_kontext().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_lora(folder, scale=0.3, rank=2, model=None):
    """A LoRA file whose weights are random, times `scale`."""
    pipeline = make_pipeline() if model is None else model
    wrapped = get_peft_model(pipeline.transformer, LoraConfig(r=rank, target_modules=["attn.to_q", "ff.net.0.proj"]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(scale * torch.randn_like(weight))
    return str(save_lora(pipeline, wrapped, folder))


def make_edit(size=(32, 32)):
    noise = np.random.default_rng(0).integers(60, 200, size[::-1], dtype=np.uint8)
    source = Image.fromarray(noise).convert("RGB")
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1] // 2))
    return source, mask
