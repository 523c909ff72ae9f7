"""Small random networks for CompBench's metrics, in files as users have them: they test the wiring, never a result."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tiny_kontext import _clip_tokenizer

SIDE = 32


def write_tiny_clip(folder: Path) -> str:
    """A folder that `Clip` loads: random weights, 32-pixel pictures, a tokenizer of single letters."""
    tokenizer = _clip_tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "max_position_embeddings": 20,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for weight in model.parameters():
            weight.data += 0.3 * torch.randn_like(weight)  # or else all pictures look alike to it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return str(folder)


def write_random_squeezenet(file: Path) -> str:
    """A state dict as torchvision names it, for `load_lpips`."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    return str(file)
