"""A random FLUX.1-Kontext pipeline, built in memory in milliseconds: the real classes, small sizes, no download.

Where it fits: every test that needs a pipeline but no result. Why: diffusers' own dummy components download their
tokenizers. Gotchas: the weights are random, so nothing it draws means anything; both tokenizers spell letter by letter,
so prompts that differ only after `TINY_CALL["max_sequence_length"]` letters differ for CLIP alone; one token of the
transformer covers 4x4 pixels, a 32x32 image is 8x8 tokens.
"""

import string
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TINY_CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "max_area": 32 * 32,
    "_auto_resize": False,
    "max_sequence_length": 48,
    "num_inference_steps": 3,
}
"""Arguments that keep `FluxKontextPipeline.__call__` at 32x32 pixels and three steps."""

_LETTERS = [chr(code) for code in range(33, 127)]
_HIDDEN = 32


def _clip_tokenizer() -> CLIPTokenizer:
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -3.0) for letter in ["▁", *string.printable.strip()]]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def build_tiny_kontext(seed: int = 0, guidance_embeds: bool = False) -> FluxKontextPipeline:
    """A random Kontext pipeline on the CPU in fp32 and eval mode, the same for the same seed.

    The global random state is left as it was.

    Args:
        seed: seed of all weights.
        guidance_embeds: whether the transformer is distilled for guidance, as FLUX.1-Kontext-dev is.
    """
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,  # CLIP pools the state at this token
        pad_token_id=clip_tokenizer.pad_token_id,
        hidden_size=_HIDDEN,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=_HIDDEN,
    )
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer), d_model=_HIDDEN, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,  # 4 latent channels, packed 2x2
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_HIDDEN,
            pooled_projection_dim=_HIDDEN,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
        with torch.no_grad():
            for weight in transformer.parameters():
                if weight.ndim > 1:
                    weight.mul_(2.0)  # torch's own initialisation lets the noise drown the image and the prompt
        text_encoder, text_encoder_2 = CLIPTextModel(clip_config), T5EncoderModel(t5_config)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


def encode_one_by_one(pipe: FluxKontextPipeline) -> FluxKontextPipeline:
    """Let a pipeline's own call encode as `editor.encode` does, each prompt and picture by itself, to compare bits.

    On some CPUs the encoders round a batch of two differently from its halves.
    """
    encode = type(pipe).encode_prompt

    def each(
        prompt: str | Sequence[str], prompt_2: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        seconds = prompt_2 if isinstance(prompt_2, list) else [prompt_2] * len(prompts)
        found = [encode(pipe, prompt=p, prompt_2=q, **kwargs) for p, q in zip(prompts, seconds, strict=True)]
        embeds, pooled, token_ids = zip(*found, strict=True)
        return torch.cat(embeds), torch.cat(pooled), token_ids[0]

    pipe.vae.enable_slicing()
    pipe.encode_prompt = each
    return pipe


def in_own_memory(pipeline: FluxKontextPipeline) -> FluxKontextPipeline:
    """The pipeline with every weight copied to memory that torch aligned.

    What `from_pretrained` opens may start anywhere in a file's memory, and some CPUs round matrix products of such
    weights otherwise in the last bit. The weights themselves are the same bits.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for weight in (*component.parameters(), *component.buffers()):
                weight.data = weight.data.clone()
    return pipeline
