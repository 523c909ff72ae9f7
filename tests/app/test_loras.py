"""`loras.py`: one LoRA at a time, as new as its file, and a base that stays as it was."""

import pytest
import torch

import rcgrpo.app.loras
from app_edits import SAMPLING, make_edit, make_lora, make_pipeline
from rcgrpo.app import LoraSlot, compare
from rcgrpo.evaluation.benchmark import contenders
from rcgrpo.training.hub import LORA_FILE


def test_a_lora_is_loaded_once_and_again_when_its_file_has_changed(tmp_path, monkeypatch):
    pipeline = make_pipeline()
    slot, source, mask = LoraSlot(pipeline), *make_edit()
    loads = []
    load = rcgrpo.app.loras.load_loras
    monkeypatch.setattr(rcgrpo.app.loras, "load_loras", lambda *given: (loads.append(given), load(*given)))

    def edited(lora):
        return compare(pipeline, slot.entrants(lora), source, mask, "go", SAMPLING).outcomes[-1].images[0]

    folder = make_lora(tmp_path / "run").removesuffix(LORA_FILE)
    first = edited(folder)
    assert edited(f" {folder} ") == first and len(loads) == 1
    make_lora(tmp_path / "run", scale=0.5)
    assert edited(folder) != first and len(loads) == 2
    fresh = compare(make_pipeline(), contenders([]), source, mask, "go", SAMPLING)
    assert edited("") == fresh.outcomes[0].images[0] and not pipeline.get_list_adapters()


def test_a_lora_of_another_model_is_refused_and_leaves_the_base_as_it_was(tmp_path):
    pipeline, other = make_pipeline(), make_pipeline()
    source, mask = make_edit()
    other.transformer = type(other.transformer).from_config({**other.transformer.config, "attention_head_dim": 32})
    before = compare(pipeline, contenders([]), source, mask, "go", SAMPLING).outcomes[0].images[0]
    slot = LoraSlot(pipeline)
    with pytest.raises(ValueError, match="expected one that fits this model"):
        slot.entrants(make_lora(tmp_path, model=other))
    assert compare(pipeline, slot.entrants(""), source, mask, "go", SAMPLING).outcomes[0].images[0] == before


def test_a_file_that_holds_nothing_for_the_transformer_is_no_lora(tmp_path):
    from safetensors.torch import save_file

    save_file({"unet.conv.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"lora: .*holds nothing for this model"):
        LoraSlot(make_pipeline()).entrants(str(tmp_path))


def test_two_loras_and_the_base_stand_side_by_side(tmp_path):
    pipeline = make_pipeline()
    slot, (source, mask) = LoraSlot(pipeline), make_edit()
    folders = [make_lora(tmp_path / name, scale).removesuffix(LORA_FILE) for name, scale in (("a", 0.3), ("b", 0.5))]

    def images(*loras):
        outcomes = compare(pipeline, slot.entrants(*loras), source, mask, "go", SAMPLING).outcomes
        return {outcome.name: outcome.images[0] for outcome in outcomes}

    alone = {name: image for folder in folders for name, image in images(folder).items()}
    assert images(*folders) == alone and len({image.tobytes() for image in alone.values()}) == 3
    assert list(images("", folders[1])) == ["base", "b"]
