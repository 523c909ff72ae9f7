"""`model.py`: what may be given as a model, and what it is called. Wrapping is tested through the trainer."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers import QuantoConfig
from diffusers.quantizers import PipelineQuantizationConfig

from rcgrpo.editors import RegionDecoupledFluxKontextPipeline
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training import model
from rcgrpo.training.model import base_model_name, load_pipeline, trained_model, with_quantization
from tiny_kontext import build_tiny_kontext


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "my-kontext"
    build_tiny_kontext().save_pretrained(folder)
    return folder


def test_a_folder_opens_with_dtypes_as_yaml_says_them(folder):
    pipe = load_pipeline(str(folder), {"torch_dtype": "bfloat16"})
    assert type(pipe) is RegionDecoupledFluxKontextPipeline
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder_2.dtype} == {torch.bfloat16}
    mixed = load_pipeline(folder, {"torch_dtype": {"transformer": "bfloat16", "default": "float32"}})
    assert mixed.transformer.dtype == torch.bfloat16 and mixed.vae.dtype == torch.float32
    assert base_model_name(mixed) == "my-kontext"


@pytest.mark.parametrize("given", ["float-16", "nn", 16, {"vae": "half precision"}])
def test_refuses_what_is_no_dtype(folder, given):
    with pytest.raises(ValueError, match=r"model_init_kwargs\['torch_dtype'\]: got .*expected the name of a dtype"):
        load_pipeline(folder, {"torch_dtype": given})


def test_a_pipeline_shares_its_parts_and_its_name():
    given = build_tiny_kontext()
    given.register_to_config(_name_or_path="black-forest-labs/FLUX.1-Kontext-dev")
    pipe = load_pipeline(given)
    assert pipe.transformer is given.transformer and base_model_name(pipe) == "black-forest-labs/FLUX.1-Kontext-dev"
    assert load_pipeline(pipe) is pipe


def test_refuses_arguments_of_loading_for_a_pipeline_and_a_vae_that_tiles():
    given = build_tiny_kontext()
    with pytest.raises(ValueError, match=r"model_init_kwargs: got .*loaded already, expected none"):
        load_pipeline(given, {"torch_dtype": "bfloat16"})
    given.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"the VAE decodes in tiles.*disable_tiling\(\)"):
        trained_model(given, None, 0)


@pytest.mark.parametrize(
    ("path", "name"),
    [(None, ""), (str(WEIGHTS), "kontext-tiny"), (f"{WEIGHTS}/.", "kontext-tiny"), ("owner/editor", "owner/editor")],
)
def test_the_name_of_a_base_is_one_to_publish(path, name):
    assert base_model_name(SimpleNamespace(config={"_name_or_path": path})) == name


def test_one_parts_quantization_is_the_transformers(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(model.RegionDecoupledPipeline, "from_pretrained", lambda name, **kwargs: seen.update(kwargs))
    part = QuantoConfig(weights_dtype="int8")
    load_pipeline(folder, with_quantization({"torch_dtype": "bfloat16"}, part))
    assert seen["quantization_config"].quant_mapping == {"transformer": part} and seen["torch_dtype"] is torch.bfloat16
    whole = PipelineQuantizationConfig(quant_mapping={"vae": part})
    load_pipeline(folder, {"quantization_config": whole})
    assert seen["quantization_config"] is whole
    assert with_quantization(None, None) is None
    with pytest.raises(ValueError, match="quantization_config: got one beside model_init_kwargs"):
        with_quantization({"quantization_config": whole}, part)


def test_transformers_own_bitsandbytes_becomes_diffusers(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(model.RegionDecoupledPipeline, "from_pretrained", lambda name, **kwargs: seen.update(kwargs))
    monkeypatch.setattr(diffusers.BitsAndBytesConfig, "post_init", lambda self: None)  # asks which version there is
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)
    given = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    load_pipeline(folder, {"quantization_config": given})
    made = seen["quantization_config"].quant_mapping["transformer"]
    assert type(made) is diffusers.BitsAndBytesConfig and made.load_in_4bit and made.bnb_4bit_quant_type == "nf4"
    assert made.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_quantization_whose_package_is_missing_names_it(folder, monkeypatch):
    monkeypatch.setattr(model, "find_spec", lambda package: None)
    given = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}}
    with pytest.raises(
        ValueError, match=r"^quantization_config: got the backend 'bitsandbytes_4bit'.*pip install bits"
    ):
        load_pipeline(folder, {"quantization_config": given})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("load_in_4bit", "it is called quantization_config here"),
        ("torch_dytpe", "the nearest known one is torch_dtype"),
    ],
)
def test_an_argument_that_diffusers_would_ignore_is_refused(folder, key, said):
    with pytest.raises(ValueError, match=f"^model_init_kwargs: got '{key}', expected arguments.*{said}"):
        load_pipeline(folder, {key: True})


def test_a_part_may_be_given(folder):
    vae = build_tiny_kontext().vae
    assert load_pipeline(folder, {"vae": vae, "low_cpu_mem_usage": True}).vae is vae
