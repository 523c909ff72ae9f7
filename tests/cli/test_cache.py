"""`rcgrpo cache`: what training will ask for is there, and the text encoders are not loaded again."""

import io
from contextlib import redirect_stdout
from importlib.resources import files

import pytest
import torch
from peft import LoraConfig
from transformers import CLIPTextModel, T5EncoderModel

from rcgrpo import RCGRPOTrainer
from rcgrpo.cli import main
from rcgrpo.cli.parsing import parse
from rcgrpo.cli.train import ScriptArguments
from rcgrpo.data import compbench_mini
from rcgrpo.data.edits import EditRows
from rcgrpo.editors import ConditionCache, open_editor
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.config import RCGRPOConfig
from rcgrpo.training.filling import fill
from rcgrpo.training.late import load_encoders_only

RECIPE = str(files("rcgrpo") / "recipes" / "tiny-groups.yaml")
ROWS = ("--num_train_samples", "3", "--num_eval_samples", "2")


def cached(folder, *flags):
    with redirect_stdout(io.StringIO()) as said:
        main(["cache", "--config", RECIPE, *ROWS, "--conditions_cache_dir", str(folder), *flags])
    return said.getvalue()


def trained(folder, **options):
    """The LoRA after one update on the rows that are cached, and what was made for it."""
    flags = ["--config", RECIPE, "--output_dir", str(folder), "--max_steps", "1", "--use_cpu", "true"]
    flags += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    _, config = parse((ScriptArguments, RCGRPOConfig), flags, None, "rcgrpo train")
    config.per_device_train_batch_size, config.num_generations, config.num_anchors = 3, 2, 2
    config.num_inference_steps = 2
    lora = LoraConfig(r=2, target_modules=["attn.to_q"])
    rewards = ["region_edit", "background_keep"]
    trainer = RCGRPOTrainer(str(WEIGHTS), rewards, config, compbench_mini("train", 3), peft_config=lora)
    trainer.train()
    weights = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return weights, trainer


def refuse(monkeypatch):
    """From now on nobody loads or calls a text encoder."""
    for kind in (CLIPTextModel, T5EncoderModel):
        for name in ("from_pretrained", "forward"):
            monkeypatch.setattr(kind, name, lambda *_, **__: pytest.fail("a text encoder was asked for"))


def test_training_never_loads_the_text_encoders_and_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
    folder = tmp_path / "conditions"
    plain, _ = trained(tmp_path / "plain")
    said = cached(folder)
    texts, pictures = len(list(folder.glob("text-*/*"))), len(list(folder.glob("image-*/*")))
    assert f"5 edits are encoded, {texts + pictures} entries are new" in said and pictures == 5
    assert said.endswith("\nTrain with cache_conditions: true\n")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert "5 edits are encoded, 0 entries are new\n" in cached(folder)
    with monkeypatch.context() as patch:
        refuse(patch)
        kept, trainer = trained(tmp_path / "kept", cache_conditions=True, conditions_cache_dir=folder)
        assert trainer.pipeline.text_encoder is None and trainer.pipeline.text_encoder_2 is None
    assert plain.keys() == kept.keys() and all(torch.equal(weight, kept[name]) for name, weight in plain.items())
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # What is not in the cache brings them back, for everybody who draws with the pipeline afterwards.
    other = compbench_mini("test", 1)[0]
    new = trainer.editor.encode([other["input_image"]], ["something quite new"])
    stock = load_encoders_only(str(WEIGHTS), {})
    fresh = open_editor(stock, 64, 2, max_sequence_length=20).encode([other["input_image"]], ["something quite new"])
    assert all(torch.equal(tensor, fresh.text[name]) for name, tensor in new.text.items())
    assert trainer.pipeline.text_encoder_2 is not None and trainer.editor.cache.made == 1


def test_a_call_that_was_stopped_goes_on_and_nothing_half_written_counts(tmp_path):
    cached(tmp_path)
    entries = sorted(path for path in tmp_path.glob("*-*/*") if path.is_file())
    entries[0].unlink()
    entries[1].write_bytes(entries[1].read_bytes()[:100])
    entries[2].rename(entries[2].with_suffix(".part"))
    (tmp_path / "encoders" / next((tmp_path / "encoders").iterdir()).name).write_text('{"weig')
    assert "3 entries are new" in cached(tmp_path)
    assert all(path.exists() for path in entries) and len(entries[1].read_bytes()) > 100


def test_processes_share_the_work(tmp_path):
    pipeline = load_encoders_only(str(WEIGHTS), {})
    assert next(pipeline.transformer.parameters()).is_meta, "nobody needs its weights"
    rows = EditRows(compbench_mini("train", 5), "train")
    config = RCGRPOConfig(str(tmp_path / "out"), use_cpu=True)
    counts = []
    for process in range(2):
        editor = open_editor(pipeline, 64, 2, max_sequence_length=20, cache=ConditionCache(tmp_path / "shared"))
        editor.place_encoders(torch.device("cpu"))
        counts.append(fill(editor, [rows], config, process, 2))
    assert counts == [3, 2] and len(list((tmp_path / "shared").glob("image-*/*"))) == 5
    editor.cache.made = 0
    assert fill(editor, [rows], config) == 5 and editor.cache.made == 0


def test_other_files_or_settings_are_other_encoders(tmp_path):
    from rcgrpo.editors.late_encoders import LateEncoders, files_key

    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(part.encode())
    key = files_key(tmp_path, ("a", "b"), ["fp32"])
    assert key != files_key(tmp_path, ("a", "b"), ["bf16"]) and key != files_key(tmp_path, ("a",), ["fp32"])
    (tmp_path / "b" / "model.safetensors").write_bytes(b"c")
    assert key != files_key(tmp_path, ("a", "b"), ["fp32"])
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "config.json")
    assert files_key(tmp_path, ("a", "b"), ["fp32"]) is None, "no weights are here"
    late = LateEncoders(ConditionCache(tmp_path / "cache"), key, ("a",), dict)
    assert late.weights is None
    late.remember("digest")
    assert LateEncoders(ConditionCache(tmp_path / "cache"), key, ("a",), dict).weights == "digest"
