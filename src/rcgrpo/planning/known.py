"""Configurations of the editors that recipes name, so that a plan needs neither network nor a gated model's licence.

Each as a folder of the pipeline says it: `model_index.json` under "index", then each part's `config.json`, as far as
sizes depend on it; the classes' own defaults stand for what is left out.
"""

from typing import Any

Parts = dict[str, dict[str, Any]]


def _qwen3(**sizes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    return {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, **shared, **sizes}


def _klein(distilled: bool, transformer: dict[str, Any], text_encoder: dict[str, Any]) -> Parts:
    return {
        "index": {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": distilled,
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        },
        "transformer": {"guidance_embeds": False, **transformer},
        "vae": {},
        "text_encoder": text_encoder,
    }


_KLEIN_4B = (
    {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    _qwen3(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
)
_KLEIN_9B = (
    {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    _qwen3(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
)
_QWEN_TEXT = {
    **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}

KNOWN: dict[str, Parts] = {
    "black-forest-labs/FLUX.1-Kontext-dev": {
        "index": {
            "_class_name": "FluxKontextPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
        },
        "transformer": {"guidance_embeds": True},
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            **{"latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024},
            **{"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611},
        },
        "text_encoder": {
            **{"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072},
            **{"num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408, "projection_dim": 768},
        },
        "text_encoder_2": {
            **{"model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64},
            **{"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False},
        },
    },
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(False, *_KLEIN_4B),
    "black-forest-labs/FLUX.2-klein-4B": _klein(True, *_KLEIN_4B),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(False, *_KLEIN_9B),
    "black-forest-labs/FLUX.2-klein-9B": _klein(True, *_KLEIN_9B),
    "Qwen/Qwen-Image-Edit-2511": {
        "index": {
            "_class_name": "QwenImageEditPlusPipeline",
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        },
        "transformer": {"zero_cond_t": True},
        "vae": {},
        "text_encoder": {"model_type": "qwen2_5_vl", "text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION},
    },
}

_QWEN3_VL = {
    "model_type": "qwen3_vl",
    "text_config": {key: value for key, value in _KLEIN_9B[1].items() if key != "model_type"},
    "vision_config": {
        **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        **{"patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [8, 16, 24]},
    },
}

JUDGES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-8B-Instruct": _QWEN3_VL,
    "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b": _QWEN3_VL,
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _QWEN_TEXT,
        "vision_config": _QWEN_VISION,
    },
}
"""Configurations of judges; the text parts of Qwen3-VL-8B and of Qwen3-8B are of one size."""
