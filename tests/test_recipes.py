"""Every recipe that ships parses strictly and asks for nothing that cannot be had."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

from rcgrpo.cli.parsing import MINI, UsageError, parse
from rcgrpo.cli.train import LORA_TARGETS, ScriptArguments
from rcgrpo.config import RCGRPOConfig
from rcgrpo.data.loading import parse_split
from rcgrpo.data.presets import find_preset
from rcgrpo.rewards import resolve_rewards

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


def test_the_sizes_are_there_and_say_that_nothing_was_measured():
    names = {path.stem for path in RECIPES}
    assert names >= {"tiny", "tiny-gradient", "flux-24gb", "flux-48gb", "flux-80gb", "flux-8x80gb"}
    for path in RECIPES:
        comments = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#")
        if not path.stem.startswith("tiny"):
            assert "was not run where this was written" in comments and "added up, not measured" in comments


def test_the_quantised_base_is_what_diffusers_takes():
    _, config = read(next(path for path in RECIPES if path.stem == "flux-24gb"))
    quantization = PipelineQuantizationConfig(**config.model_init_kwargs["quantization_config"])
    assert quantization.components_to_quantize == ["transformer"]
    assert config.cache_conditions, "T5 in bf16 fits only while there are no activations"


def test_the_lora_targets_are_layers_of_the_12_b_model():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # diffusers' defaults are FLUX.1-dev's
    assert 11.8e9 < sum(weight.numel() for weight in transformer.parameters()) < 12e9
    linear = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    for target in LORA_TARGETS:
        assert any(name.endswith(f".{target}") or name == target for name in linear), target
