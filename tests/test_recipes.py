"""Every recipe that ships parses strictly and asks for nothing that cannot be had."""

import re
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from rcgrpo.cli.parsing import MINI, UsageError, parse
from rcgrpo.cli.train import ScriptArguments
from rcgrpo.data.loading import parse_split
from rcgrpo.data.presets import find_preset
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.editors.flux2_klein import Flux2KleinEditor
from rcgrpo.editors.qwen_image_edit_plus import QwenImageEditPlusEditor
from rcgrpo.rewards import resolve_rewards
from rcgrpo.training.config import RCGRPOConfig


def klein(**sizes):
    return partial(Flux2Transformer2DModel, guidance_embeds=False, **sizes)


MODELS = {  # diffusers' defaults are FLUX.1-dev's and Qwen-Image's
    "flux": (partial(FluxTransformer2DModel, guidance_embeds=True), FluxKontextEditor, 24),
    "klein-4b": (
        klein(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
        Flux2KleinEditor,
        7.8,
    ),
    "klein-9b": (
        klein(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
        Flux2KleinEditor,
        18.2,
    ),
    "qwen-edit-2511": (QwenImageTransformer2DModel, QwenImageEditPlusEditor, 41),
}
"""The real transformers, their editors, and gigabytes in bf16."""

SIZES = ["flux-24gb", "flux-48gb", "flux-80gb", "flux-8x80gb", "klein-4b-24gb", "klein-9b-80gb", "qwen-edit-2511-80gb"]
RECIPES = sorted(Path(str(files("rcgrpo") / "recipes")).glob("*.yaml"))


def read(path, *flags):
    given = ["--config", str(path), "--output_dir", "out", *flags]
    return parse((ScriptArguments, RCGRPOConfig), given, None, "rcgrpo train")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_every_key_arrives(path):
    script, config = read(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        if key != "report_to":  # transformers turns its "none" into an empty list
            assert getattr(script if hasattr(script, key) else config, key) == value, key
    assert len(resolve_rewards(script.reward_funcs)) == len(config.reward_weights)
    assert config.num_policy_steps <= len(config.policy_step_indices)
    if script.dataset != MINI:
        assert find_preset(None, script.dataset).name == "compbench"
        assert parse_split(script.train_split, script.held_out) == ("train", False)
        assert parse_split(script.eval_split, script.held_out) == ("train", True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_misspelt_key_is_an_error(path, tmp_path):
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text().replace("num_anchors:", "num_anchor:"))
    with pytest.raises(UsageError, match=r"unknown key 'num_anchor'.*num_anchors"):
        read(wrong)


def header(path):
    return " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#")


def test_the_sizes_are_there_and_say_that_nothing_was_measured():
    names = {path.stem for path in RECIPES}
    assert names >= {"tiny", "tiny-groups", "tiny-long", *SIZES}
    for path in RECIPES:
        if not path.stem.startswith("tiny"):
            assert "It was not run where this was written" in header(path)
            assert "Memory and time are counted, not measured on a GPU" in header(path)


@pytest.mark.parametrize("recipe", SIZES)
def test_a_large_recipe_follows_the_study(recipe):
    """What held on the embedded editor (docs/study.md), at the data's own size, with an end that can be seen coming."""
    path = next(path for path in RECIPES if path.stem == recipe)
    script, config = read(path)
    assert config.num_inference_steps <= 4 and config.num_inference_steps_eval in (28, 40, 50)
    assert config.reward_regions == ["edit", "keep"] and config.keep_strength > 0
    assert config.multi_objective_aggregation == "normalize_then_sum" and config.distance_space == "clean"
    assert config.resolution == 640 and config.model_init_kwargs["torch_dtype"]["vae"] == "float32"
    assert 1 <= config.beta * config.beta_keep <= 5 and config.adam_epsilon == 1e-12
    assert config.eval_on_start and config.stop_on_regression and config.ema_decay and config.cache_conditions
    assert str(config.eval_strategy.value) == "steps" and config.num_eval_edits <= script.num_eval_samples
    assert all(reward.required for reward in resolve_rewards("editscore"))
    served = "with EditScore on a server" in header(path)
    assert script.judge_on_server == served == ("export RCGRPO_JUDGE_URL=" in header(path))
    gated = script.model.startswith("black-forest-labs") and not script.model.endswith("4B")
    assert (f"accept their terms at https://huggingface.co/{script.model}" in header(path)) == gated


def test_the_quantised_base_is_what_diffusers_takes():
    _, config = read(next(path for path in RECIPES if path.stem == "flux-24gb"))
    quantization = PipelineQuantizationConfig(**config.model_init_kwargs["quantization_config"])
    assert quantization.components_to_quantize == ["transformer"]
    assert config.cache_conditions, "T5 in bf16 fits only while there are no activations"


@pytest.mark.parametrize("recipe", SIZES)
def test_the_real_transformer_has_the_lora_targets_and_the_size_that_the_header_names(recipe):
    make, editor, size = MODELS[recipe.rpartition("-")[0]]
    with torch.device("meta"):
        transformer = make()
    gigabytes = 2 * sum(weight.numel() for weight in transformer.parameters()) / 1e9
    assert gigabytes == pytest.approx(size, rel=0.02)
    path = next(path for path in RECIPES if path.stem == recipe)
    found = re.search(r"GB that stay: transformer ([\d.]+),", header(path))
    assert float(found[1]) == pytest.approx(size * (0.28 if recipe == "flux-24gb" else 1), rel=0.03)
    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    config = LoraConfig(target_modules=list(editor.lora_targets))
    assert not [target for target in editor.lora_targets if target[:6] != "single" and not has(layers, target)]
    blocks = [name for name in layers if "transformer_blocks." in name and ".norm" not in name and "_mod." not in name]
    assert [name for name in blocks if not check_target_module_exists(config, name)] == []


def has(layers, target):
    return any(name.endswith(f".{target}") or name == target for name in layers)
