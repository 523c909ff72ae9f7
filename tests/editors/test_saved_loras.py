"""A saved LoRA of each editor is the same function for the stock pipeline and for readers of `.alpha` alone."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from rcgrpo.editors.lora import LORA_FILE, check_lora, load_lora
from rcgrpo.training.adapters import continued, describe
from rcgrpo.training.hub import save_lora
from tiny_editors import build_tiny_klein, build_tiny_qwen, with_lora
from tiny_kontext import build_tiny_kontext

BUILD = {"kontext": build_tiny_kontext, "klein": build_tiny_klein, "qwen": build_tiny_qwen}
OPTIONS = {
    "alpha": {"lora_alpha": 6},
    "odd": {"r": 3, "lora_alpha": 1},
    "rslora": {"r": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"attn.to_k": 3}, "alpha_pattern": {"attn.to_q": 1, "attn.to_k": 7}},
    "dora": {"use_dora": True},
}


def outputs(transformer):
    """What each layer with a LoRA makes of one input."""
    found = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            inputs = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(2))
            found[name] = layer(inputs).detach()
    return found


def close(left, right):
    assert left.keys() == right.keys() and len(left) > 10
    return all(torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-5) for name in left)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BUILD)
def test_the_stock_pipeline_loads_the_trained_function(name, options, tmp_path):
    pipe, model = with_lora(BUILD[name], **OPTIONS[options])
    save_lora(pipe, model, tmp_path)
    fresh = BUILD[name]()
    fresh.load_lora_weights(tmp_path)
    assert close(outputs(fresh.transformer), outputs(pipe.transformer))


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "dora"])
@pytest.mark.parametrize("name", BUILD)
def test_a_reader_of_alpha_alone_finds_the_same_difference(name, options, tmp_path):
    pipe, model = with_lora(BUILD[name], **OPTIONS[options])
    weights = load_file(save_lora(pipe, model, tmp_path))
    layers = {key: layer for key, layer in pipe.transformer.named_modules() if isinstance(layer, LoraLayer)}
    for key, layer in layers.items():
        down, up = (weights.pop(f"transformer.{key}.lora_{side}.weight") for side in "AB")
        alpha = weights.pop(f"transformer.{key}.alpha", torch.tensor(len(down)))
        torch.testing.assert_close(alpha / len(down) * up @ down, layer.get_delta_weight("default"))
    assert not weights, "keys that it does not know"


@pytest.mark.parametrize("name", BUILD)
def test_going_on_from_a_saved_lora_starts_at_the_function_that_was_saved(name, tmp_path):
    pipe, model = with_lora(BUILD[name])
    file = save_lora(pipe, model, tmp_path / "first")
    fresh = BUILD[name]()
    load_lora(fresh, tmp_path / "first", "default")
    assert describe(fresh.transformer, [])["lora_alpha"] == (6 if name == "kontext" else 2)
    again = continued(fresh.transformer)
    assert close(outputs(fresh.transformer), outputs(pipe.transformer))
    assert save_lora(fresh, again, tmp_path / "second").read_bytes() == file.read_bytes()


def test_half_precision_does_not_round_the_scale_away(tmp_path):
    pipe, model = with_lora(build_tiny_klein, lora_alpha=3)
    weights = load_file(save_lora(pipe, model.to(torch.bfloat16), tmp_path))
    for name, own in model.named_parameters():
        if "lora_B" in name:
            key = name.replace("base_model.model", "transformer").replace(".default", "")
            assert torch.equal(weights.pop(key), own.float() * 1.5)
    assert not [key for key in weights if "lora_B" in key]


@pytest.mark.parametrize("name", ["klein", "qwen"])
def test_a_lora_that_the_stock_pipeline_would_not_load_is_refused(name, tmp_path):
    """With `.alpha`, klein's loader raises, and Qwen's finds no layer for anything."""
    pipe, model = with_lora(BUILD[name])
    weights = load_file(save_lora(pipe, model, tmp_path))
    downs = [key for key in weights if key.endswith("lora_A.weight")]
    weights |= {key.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for key in downs}
    save_file(weights, tmp_path / LORA_FILE)
    fresh = BUILD[name]()
    with pytest.raises(ValueError, match=r"^lora: got .*, expected .* fits this model; the model has no layer for"):
        check_lora(tmp_path, type(fresh), fresh.transformer)


def test_a_lora_of_another_editor_is_refused(tmp_path):
    save_lora(*with_lora(build_tiny_klein), tmp_path)
    for build in (build_tiny_kontext, build_tiny_qwen):
        with pytest.raises(ValueError, match="expected one that fits this model"):
            load_lora(build(), tmp_path, "x")
