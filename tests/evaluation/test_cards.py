"""`cards`: what the Hub reads of an evaluation."""

import json

from huggingface_hub import ModelCard, metadata_load

from rcgrpo.evaluation.cards import write_cards
from rcgrpo.training.hub import model_card


def estimates(lc_i, psnr, low=None, high=None):
    return {
        "lc_i": {"mean": lc_i, "low": low, "high": high, "n": 4},
        "psnr": {"mean": psnr, "low": low, "high": high, "n": 3},
    }


RESULTS = {
    "settings": {"dataset": "BohanJia/CompBench", "splits": ["train:held_out", "multi_turn:held_out"]},
    "contenders": ["base", "mine"],
    "metrics": {"lc_i": {"label": "LC-I"}, "psnr": {"label": "background PSNR (dB)"}},
    "categories": [
        {
            "name": "Local",
            "standings": [
                {"name": "base", "estimates": estimates(0.5, 20.0)},
                {"name": "mine", "estimates": estimates(0.7, None)},
                {"name": "mine − base", "estimates": estimates(0.2, None, low=0.1, high=0.3)},
            ],
        }
    ],
    "intervals": {"confidence": 0.95},
}


def evaluated(folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    lora = folder / "mine" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir(exist_ok=True)
    return {"base": None, "mine": lora}


def test_a_loras_card_says_where_what_was_measured_against_what(tmp_path):
    assert write_cards(tmp_path, evaluated(tmp_path)) == []
    assert [path.name for path in (tmp_path / "cards").iterdir()] == ["mine.md"]
    (model,) = metadata_load(tmp_path / "cards" / "mine.md")["model-index"]
    (result,) = model["results"]
    assert model["name"] == "mine" and result["task"] == {"type": "image-to-image"}
    assert result["dataset"] == {
        "name": "CompBench",
        "type": "BohanJia/CompBench",
        "config": "Local",
        "split": "train:held_out multi_turn:held_out",
    }
    (metric,) = result["metrics"]  # the one without a value is left out
    assert (metric["type"], metric["name"], metric["value"]) == ("lc_i", "LC-I", 0.7)
    assert metric["args"] == {"base": 0.5, "difference": 0.2, "low": 0.1, "high": 0.3, "n": 4, "confidence": 0.95}


def test_the_card_beside_a_lora_keeps_what_is_not_measured_again(tmp_path):
    loras = evaluated(tmp_path)
    readme = loras["mine"].parent / "README.md"
    model_card(model_name="my LoRA", metrics={"reward": 0.25}, eval_dataset="compbench-mini").save(readme)
    before = ModelCard.load(readme)
    for _ in range(2):
        assert write_cards(tmp_path, loras, update=True) == [readme]
    after = ModelCard.load(readme)
    assert after.text == before.text and after.data.model_name == "my LoRA" and after.data.tags == before.data.tags
    found = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in after.data.eval_results}
    assert found == {("compbench-mini", "reward"): 0.25, ("CompBench", "lc_i"): 0.7}
    assert len(after.data.eval_results) == 2
