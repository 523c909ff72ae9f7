"""The parts of Kontext-tiny before training: tokenizers of the data set's words, autoencoder, encoders, transformer."""

import string
from itertools import pairwise
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from rcgrpo.data.mini import KINDS, OBJECTS
from rcgrpo.data.scenes import PLACES

SIZE = 64
TEXT_LENGTH = 20  # the longest instruction has 16 words


def build_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Word-level tokenizers over the data set's instructions; other words fall back to letters."""
    words = sorted(
        {word for text in [*PLACES, *KINDS, *(thing.name for thing in OBJECTS)] for word in text.split()}
        | {"a", "an", "add", "and", "in", "remove", "replace", "the", "with"}
    )
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in words), *letters]
    t5 = T5TokenizerFast(
        vocab=[
            (piece, 0.0 if i < 3 else -1.0 - 9.0 * (len(piece) == 1)) for i, piece in enumerate(dict.fromkeys(pieces))
        ],
        extra_ids=0,
        model_max_length=TEXT_LENGTH,
    )
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            # Byte-pair encoding applies the oldest rule first; where none applies, this word gets a new one.
            pairs = list(pairwise(symbols))
            best = min(range(len(pairs)), key=lambda i: merges.get(pairs[i], len(merges)))
            merges.setdefault(pairs[best], len(merges))
            symbols[best : best + 2] = ["".join(pairs[best])]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    clip = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=list(merges),
        model_max_length=TEXT_LENGTH,
    )
    return clip, t5


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIZE,
    )


def build_editor() -> dict[str, Any]:
    """Every part of a `FluxKontextPipeline` but the autoencoder."""
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=64,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {
        "tokenizer": clip_tokenizer,
        "tokenizer_2": t5_tokenizer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "transformer": transformer,
        "scheduler": scheduler,
    }
