"""A small random Qwen2.5-VL with its processor, built in memory: the real classes, 264 tokens, 40 thousand weights.

Where it fits: tests of `LocalJudge`. What it says means nothing; how it is asked, sampled and read is what is tested.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

MARKS = (
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_judge(seed: int = 0, width: int = 32, layers: int = 1, pixels: int = 56 * 56) -> tuple[Any, Any]:
    """Model and processor; every byte is a token.

    Args:
        width: a multiple of 32, of language model and vision tower.
        layers: of each.
        pixels: that a picture has at most.
    """
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        additional_special_tokens=list(MARKS),
        pad_token="<|end|>",
        eos_token="<|im_end|>",
        padding_side="left",
    )
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width // 2)
    heads = dict(num_attention_heads=width // 16, num_key_value_heads=width // 16, num_hidden_layers=layers)
    stops = dict(bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|end|>"])
    tower = dict(hidden_size=width, intermediate_size=2 * width, num_heads=width // 16, out_hidden_size=width)
    config = Qwen2_5_VLConfig(
        text_config={**text, **heads, **stops, "max_position_embeddings": 4096, "rope_parameters": rope},
        vision_config={**tower, "depth": layers, "fullatt_block_indexes": [layers - 1]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["<|im_end|>"], ids["<|end|>"]
    return model.eval(), processor
