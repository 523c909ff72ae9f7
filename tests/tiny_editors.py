"""Random FLUX.2 and Qwen-Image-Edit-Plus pipelines, built in memory in seconds: the real classes, small sizes.

Where it fits: the conformance suite, with `tiny_kontext.py`. Gotchas: every byte is a token, so texts are long; both
edit 64x64 pictures as 8x8 tokens; Qwen's constants for a megapixel and for what its encoder sees are for the caller to
shrink (`SMALL_QWEN`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rcgrpo.editors import open_editor

SMALL_QWEN = {"VAE_IMAGE_SIZE": 96 * 96, "CONDITION_IMAGE_SIZE": 64 * 64}
"""For `pipeline_qwenimage_edit_plus`: references of 12x12 tokens, pictures of 2x2 for the encoder."""

_HIDDEN = 32
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

_INSTRUCTION = (
    "{{ bos_token }}{% for turn in messages %}[INST]{% for part in turn['content'] %}{{ part['text'] }}{% endfor %}"
    "[/INST]{% endfor %}"
)


def _tokenizer(marks: Sequence[str] = _MARKS, **options: Any) -> Qwen2Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab={**letters, "<|endoftext|>": len(letters)}, merges=[], additional_special_tokens=list(marks), **options
    )
    tokenizer.image_token, tokenizer.video_token, tokenizer.chat_template = "<|image_pad|>", "<|video_pad|>", _CHAT
    return tokenizer


def _lively(transformer: torch.nn.Module) -> torch.nn.Module:
    """Larger weights: torch's own initialisation lets the noise drown the picture and the prompt."""
    with torch.no_grad():
        for weight in transformer.parameters():
            if weight.ndim > 1:
                weight.mul_(2.0)
    return transformer.eval()


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def build_tiny_klein(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """A random klein pipeline on the CPU in fp32 and eval mode, the same for the same seed."""
    tokenizer = _tokenizer()
    text_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN // 2,
        intermediate_size=24,
        num_hidden_layers=27,  # the text is what stands after the 9th, the 18th and the 27th
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, vae = _flux2_parts(guidance_embeds=False)
        text_encoder = Qwen3ForCausalLM(text_config)
    return Flux2KleinPipeline(
        _scheduler(), vae.eval(), text_encoder.eval(), tokenizer, _lively(transformer), is_distilled=is_distilled
    )


def build_tiny_flux2(seed: int = 0) -> Flux2Pipeline:
    """A random FLUX.2-dev pipeline on the CPU in fp32 and eval mode, the same for the same seed."""
    tokenizer = _tokenizer(("<s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"), bos_token="<s>")
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=_INSTRUCTION)
    sizes: dict[str, Any] = dict(hidden_size=_HIDDEN // 2, intermediate_size=24, num_attention_heads=2, head_dim=8)
    text = dict(**sizes, vocab_size=len(tokenizer), num_key_value_heads=1, num_hidden_layers=30)  # 10th, 20th, 30th
    vision = dict(**sizes, num_hidden_layers=1, image_size=32, patch_size=16)
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, vae = _flux2_parts(guidance_embeds=True)
        text_encoder = Mistral3ForConditionalGeneration(config)
    return Flux2Pipeline(_scheduler(), vae.eval(), text_encoder.eval(), processor, _lively(transformer))


def _flux2_parts(guidance_embeds: bool) -> tuple[Flux2Transformer2DModel, AutoencoderKLFlux2]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,  # 4 latent channels, patched 2x2
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * _HIDDEN // 2,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.copy_(0.3 * torch.randn(16))
    vae.bn.running_var.copy_(0.5 + torch.rand(16))
    return transformer, vae


def build_tiny_qwen(seed: int = 0, zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """A random Qwen-Image-Edit-Plus pipeline on the CPU in fp32 and eval mode, the same for the same seed.

    Args:
        zero_cond_t: references are clean for the modulation, as in 2511.
    """
    tokenizer = _tokenizer()
    ids = dict(zip(_MARKS, tokenizer.convert_tokens_to_ids(list(_MARKS)), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=_HIDDEN, intermediate_size=48)
    text |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope)
    text |= dict(max_position_embeddings=4096, bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=256)
    vision = dict(depth=1, hidden_size=_HIDDEN, out_hidden_size=_HIDDEN, intermediate_size=48, num_heads=2)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,  # 4 latent channels, packed 2x2
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_HIDDEN,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.7, 0.1, 0.9, 0.2],
            latents_std=[2.8, 1.4, 0.6, 1.9],
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    return QwenImageEditPlusPipeline(
        _scheduler(), vae.eval(), text_encoder.eval(), tokenizer, processor, _lively(transformer)
    )


def with_lora(build: Callable[[], Any], **options: Any) -> tuple[Any, PeftModel]:
    """A pipeline whose LoRA is not zero, and its PeftModel."""
    pipe = build()
    targets = list(open_editor(pipe, 64, 1).lora_targets)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **options})
    model = get_peft_model(pipe.transformer, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return pipe, model
