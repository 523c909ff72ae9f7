"""`lora.py` and the commands that take a LoRA: what does not fit is refused before anything is loaded or written."""

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from hub_server import HubServer, Repo, run_with_hub
from rcgrpo.cli import main
from rcgrpo.editors.lora import check_lora, find_lora, load_lora
from rcgrpo.tiny import LONG_RUN
from rcgrpo.training.hub import LORA_FILE, save_lora
from tiny_kontext import build_tiny_kontext
from tiny_loras import draw, trained

LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_lora(*trained(), tmp_path_factory.mktemp("good"))


def rewritten(change, file, folder, metadata=None):
    """A LoRA whose tensors were changed in place."""
    weights = load_file(file)
    change(weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / LORA_FILE, metadata)
    return folder


def cut(file, folder):
    folder.mkdir()
    (folder / LORA_FILE).write_bytes(file.read_bytes()[:-100])
    return folder


def text(file, folder):
    folder.mkdir()
    (folder / LORA_FILE).write_text("<html>404</html>")
    return folder


def of_unet(weights):
    for key in list(weights):
        weights[key.replace("transformer.", "unet.", 1)] = weights.pop(key)


def kohya_sdxl(weights):
    weights.clear()
    weights["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"] = torch.zeros(2, 8)
    weights["lora_unet_input_blocks_4_1_proj_in.lora_up.weight"] = torch.zeros(8, 2)


def deeper(weights):
    for key in [key for key in weights if key.startswith(LAYER)]:
        weights[key.replace("blocks.0", "blocks.18")] = weights[key].clone()


def peft_keys(weights):
    for key in list(weights):
        weights[key.replace("transformer.", "base_model.model.", 1)] = weights.pop(key)


def filled(part, value):
    return lambda weights: weights[f"{LAYER}.{part}"].view(-1)[:1].fill_(value)


def both_scales(file, folder):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    return rewritten(lambda weights: None, file, folder, metadata)


def with_change(change):
    return lambda file, folder: rewritten(change, file, folder)


BAD = {
    "truncated": (cut, "a whole LoRA file that diffusers can read"),
    "no safetensors": (text, "a whole LoRA file that diffusers can read"),
    "NaN": (with_change(filled("lora_B.weight", torch.nan)), f"NaN or infinity in {LAYER}.lora_B.weight"),
    "infinite": (with_change(filled("lora_A.weight", torch.inf)), f"NaN or infinity in {LAYER}.lora_A.weight"),
    "alpha NaN": (with_change(filled("alpha", torch.nan)), f"NaN or infinity in {LAYER}.alpha"),
    "empty": (with_change(lambda weights: weights.clear()), "holds nothing for this model|can read"),
    "a U-Net's": (with_change(of_unet), r"20 of its 20 weights, such as unet\..* holds nothing for this model"),
    "kohya, SDXL": (with_change(kohya_sdxl), "holds nothing for this model|can read"),
    "deeper": (with_change(deeper), "no layer for 2 of the LoRA's 22 weights, such as transformer_blocks.18"),
    "PEFT's keys": (with_change(peft_keys), "can read"),
    "wider": (
        with_change(lambda w: w.update({f"{LAYER}.lora_A.weight": torch.zeros(2, 48)})),
        r"transformer_blocks.0.attn.to_q reads 32 numbers, and the LoRA has \(2, 48\) for it",
    ),
    "taller": (
        with_change(lambda w: w.update({f"{LAYER}.lora_B.weight": torch.zeros(48, 2)})),
        r"transformer_blocks.0.attn.to_q writes 32 numbers, and the LoRA has \(48, 2\) for it",
    ),
    "half": (with_change(lambda w: w.pop(f"{LAYER}.lora_B.weight")), "two matrices for .* do not belong together"),
    "two ranks": (
        with_change(lambda w: w.update({f"{LAYER}.lora_B.weight": torch.zeros(32, 3)})),
        "do not belong together, their ranks are {'down': 2, 'up': 3}",
    ),
    "a norm's": (
        with_change(lambda w: w.update({"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)})),
        "no layer for 1 of the LoRA's",
    ),
    "two scales": (both_scales, "its scale once, and it stands in the tensors `.alpha` and in the metadata"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_leaves_the_pipeline_as_it_was(case, good, tmp_path):
    make, said = BAD[case]
    folder, pipe = make(good, tmp_path / "bad"), build_tiny_kontext()
    with pytest.raises(ValueError, match=f"^--lora: got '.*bad', expected .*({said})") as refused:
        load_lora(pipe, str(folder), "x", "--lora")
    assert "\n" not in str(refused.value) and not pipe.get_list_adapters()
    with torch.device("meta"):
        skeleton = type(pipe.transformer).from_config(pipe.transformer.config)
    with pytest.raises(ValueError, match=said):
        check_lora(folder, type(pipe), skeleton)


def test_a_good_one_is_loaded_beside_another_and_draws_as_trained(good, tmp_path):
    pipe = build_tiny_kontext()
    load_lora(pipe, good.parent, "a")
    load_lora(pipe, good, "b")
    pipe.set_adapters("b")
    assert torch.equal(draw(pipe), draw(trained()[0]))
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    old = tmp_path / "old"  # as earlier versions of this package wrote it
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    rewritten(lambda w: [w.pop(key) for key in list(w) if key.endswith("alpha")], good, old, None)
    targets = {key.removeprefix("transformer.").rsplit(".lora_")[0] for key in load_file(old / LORA_FILE)}
    metadata = {"r": 2, "lora_alpha": 6, "target_modules": sorted(targets)}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in metadata.items()})}
    save_file(load_file(old / LORA_FILE), old / LORA_FILE, metadata)
    pipe = build_tiny_kontext()
    load_lora(pipe, old, "old")
    assert torch.equal(draw(pipe), draw(trained()[0]))


def test_the_file_is_found_under_another_name_if_it_is_the_only_one(good, tmp_path):
    assert find_lora(good) == find_lora(good.parent) == good
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=f"got the folder .*, expected {LORA_FILE} in it"):
        find_lora(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    assert find_lora(tmp_path).name == "mine.safetensors"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ValueError, match=f"got the folder .*, expected {LORA_FILE} in it; name the file itself"):
        find_lora(tmp_path)
    with pytest.raises(ValueError, match=r"got '.*adapter_model.safetensors', .* is PEFT's own"):
        check_lora(tmp_path / "adapter_model.safetensors", FluxKontextPipeline)


def test_the_embedded_one_has_a_name_which_a_folder_may_have_too(good, tmp_path, monkeypatch):
    assert find_lora("kontext-tiny-long") == LONG_RUN / LORA_FILE
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kontext-tiny-long").symlink_to(good.parent)
    assert find_lora("kontext-tiny-long").resolve() == good.resolve()


def test_on_the_hub_too(good):
    script = """
from rcgrpo.editors.lora import find_lora
print(find_lora("user/edits").name)
try:
    find_lora("user/two")
except ValueError as error:
    print(error)
"""
    with HubServer() as hub:
        hub.repos["user/edits"] = Repo(files={"mine.safetensors": good.read_bytes(), "README.md": b""})
        hub.repos["user/two"] = Repo(files={"a.safetensors": b"", "b.safetensors": b""})
        done = run_with_hub(script, hub)
    assert done.stdout.splitlines()[0] == "mine.safetensors", done.stderr
    assert "got 'user/two', expected a folder or file that exists, or a Hub id" in done.stdout


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_without_a_network_it_is_said_within_two_seconds(monkeypatch, silent):
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if silent:
            hub.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"got 'nobody/nothing', expected .* does not answer"):
            find_lora("nobody/nothing")
        assert time.monotonic() - start < 2


# Commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, good):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.new("RGB", (64, 64)).save("source.png")
    text(good, Path("text"))
    return good.parent


COMMANDS = {
    "edit": ["--image", "source.png", "--instruction", "remove the apple", "--output", "out/edited.png", "--lora"],
    "evaluate": ["--num_samples", "2", "--output_dir", "out", "--lora"],
    "diagnose": ["--num_edits", "2", "--output", "out", "--lora"],
    "train": ["--use_cpu", "true", "--output_dir", "out", "--init_lora"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_in_one_line_before_anything_is_loaded_or_written(command, elsewhere, monkeypatch):
    monkeypatch.setattr("rcgrpo.cli.opening.open_pipeline", None)
    monkeypatch.setattr("rcgrpo.cli.edit.open_pipeline", None)
    flag, before = COMMANDS[command][-1], sorted(Path().rglob("*"))
    for lora, said in (
        (str(elsewhere), "expected one that fits this model; "),  # it is for the random model of the tests
        ("text", "expected a whole LoRA file"),
        ("no/such/lora", "expected a folder or file that exists, or a Hub id"),
    ):
        with pytest.raises(SystemExit, match=f"^rcgrpo {command}: {flag}: got '[^\n]*', {said}[^\n]*$"):
            main([command, *COMMANDS[command], lora])
    assert sorted(Path().rglob("*")) == before


def test_a_model_that_cannot_be_opened_is_the_models_fault(elsewhere):
    with pytest.raises((SystemExit, OSError)) as refused:
        main(["edit", *COMMANDS["edit"], str(elsewhere), "--model", "nowhere"])
    assert "--lora" not in str(refused.value)
