"""`editors/opening.py`: which editor a pipeline or a folder gets. What opens is tested in the conformance suite."""

import json

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPipeline,
)

from rcgrpo.editors import RegionDecoupledPipeline, open_editor
from rcgrpo.editors.flux2_klein import Flux2KleinEditor, RegionDecoupledFlux2KleinPipeline
from rcgrpo.editors.flux_kontext import FluxKontextEditor, RegionDecoupledFluxKontextPipeline
from rcgrpo.editors.opening import region_decoupled_class
from rcgrpo.editors.qwen_image_edit_plus import QwenImageEditPlusEditor
from rcgrpo.tiny import WEIGHTS
from tiny_editors import build_tiny_klein, build_tiny_qwen
from tiny_kontext import build_tiny_kontext


def test_the_class_of_a_pipeline_picks_its_editor():
    class Mine(FluxKontextPipeline):
        pass

    assert type(open_editor(build_tiny_kontext(), 32, 3)) is FluxKontextEditor
    assert type(open_editor(Mine(**build_tiny_kontext().components), 32, 3)) is FluxKontextEditor
    assert type(open_editor(build_tiny_klein(), 64, 3)) is Flux2KleinEditor
    assert type(open_editor(build_tiny_qwen(), resolution=64, num_inference_steps=3)) is QwenImageEditPlusEditor
    ours = RegionDecoupledPipeline.from_pipe(build_tiny_kontext())
    assert type(open_editor(ours, 32, 3)) is FluxKontextEditor
    assert region_decoupled_class("FluxKontextPipeline") is RegionDecoupledFluxKontextPipeline
    assert region_decoupled_class("RegionDecoupledFlux2KleinPipeline") is RegionDecoupledFlux2KleinPipeline


@pytest.mark.parametrize("kind", [FluxPipeline, QwenImageEditPipeline, dict, "StableDiffusionPipeline"])
def test_other_classes_are_refused(kind):
    name = kind if isinstance(kind, str) else kind.__name__
    with pytest.raises(ValueError, match=rf"model: got a {name}, expected one of FluxKontextPipeline, Flux2Klein"):
        region_decoupled_class(kind)


def test_a_folder_of_another_class_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"got a FluxPipeline, expected one of .*model_index.json should say"):
        RegionDecoupledPipeline.from_pretrained(tmp_path)


def test_a_pipeline_shares_its_parts_its_settings_and_its_name():
    given = build_tiny_klein(is_distilled=True).to(torch.bfloat16)
    given.register_to_config(_name_or_path="black-forest-labs/FLUX.2-klein-4B")
    pipe = RegionDecoupledPipeline.from_pipe(given)
    assert type(pipe) is RegionDecoupledFlux2KleinPipeline and pipe.config.is_distilled
    assert pipe.transformer is given.transformer and pipe.vae.dtype == torch.bfloat16
    assert pipe.config._name_or_path == "black-forest-labs/FLUX.2-klein-4B"
    assert RegionDecoupledPipeline.from_pipe(pipe) is pipe


def test_diffusers_own_auto_pipelines_know_ours():
    stock = build_tiny_kontext()
    ours = AutoPipelineForInpainting.from_pipe(stock)
    assert type(ours) is RegionDecoupledFluxKontextPipeline and ours.transformer is stock.transformer
    assert type(AutoPipelineForImage2Image.from_pipe(ours)) is FluxKontextPipeline
    assert type(AutoPipelineForInpainting.from_pretrained(WEIGHTS)) is RegionDecoupledFluxKontextPipeline
    inpaint = FluxKontextInpaintPipeline(**stock.components)
    back = RegionDecoupledPipeline.from_pipe(inpaint)
    assert type(back) is RegionDecoupledFluxKontextPipeline and back.vae is stock.vae
    assert type(FluxKontextInpaintPipeline.from_pipe(ours)) is FluxKontextInpaintPipeline
