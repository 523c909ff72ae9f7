"""`cli/edit.py`: LoRAs from here and from the Hub, and no network for what is here."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import FluxKontextPipeline
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig, get_peft_model
from PIL import Image

from hub_server import HubServer, Repo, run_with_hub
from rcgrpo.cli import main
from rcgrpo.cli.edit import run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data import compbench_mini
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.hub import LORA_FILE, save_lora
from tiny_kontext import build_tiny_kontext

EDIT = ["--image", "source.png", "--instruction", "remove the apple"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save("source.png")


def write_lora(pipeline, folder):
    """A LoRA of random weights that changes what is drawn."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False)
    return save_lora(pipeline, get_peft_model(pipeline.transformer, config), folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    pipeline = FluxKontextPipeline.from_pretrained(str(WEIGHTS), local_files_only=True)
    return write_lora(pipeline, tmp_path_factory.mktemp("lora"))


def test_without_arguments_it_draws_an_edit_that_it_brings_along(capsys):
    run(["--num_inference_steps", "2", "--num_generations", "2"])
    strip = np.asarray(Image.open("edited.png"))
    assert strip.shape == (64, 3 * 64, 3)
    source, first, second = np.split(strip, 3, axis=1)
    assert np.array_equal(source, np.asarray(compbench_mini("test", 1)[0]["input_image"]))
    assert not np.array_equal(first, second) and not np.array_equal(source, first)
    assert compbench_mini("test", 1)[0]["instruction"] in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--instruction", "remove the apple"], ["--mask", "m.png"], ["--model", "a/b"]])
def test_half_an_edit_is_refused(flags):
    with pytest.raises(UsageError, match=r"^--image: got none, expected the picture to edit"):
        run(flags)


SCRIPT = """
from rcgrpo.cli import main

for name, lora in {{"base": [], "hub": ["--lora", "user/edits"], "here": ["--lora", {folder!r}]}}.items():
    main(["edit", *{edit!r}, "--num_inference_steps", "2", "--output", name + ".png", *lora])
"""


def test_a_lora_on_the_hub_works_with_the_embedded_model_and_nothing_else_is_fetched(lora):
    with HubServer() as hub:
        hub.repos["user/edits"] = Repo(files={LORA_FILE: lora.read_bytes()})
        script = SCRIPT.format(folder=str(lora.parent), edit=EDIT)
        done = run_with_hub(script, hub, HF_HUB_OFFLINE="0")  # the edits from here may ask too, and do not
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(LORA_FILE in path for _, path, status in hub.requests if status == 200)
    assert {path for _, path, _ in hub.requests if not re.match(r"(/api/models)?/user/edits\b", path)} == set()
    base, fetched, here = (np.asarray(Image.open(f"{name}.png")) for name in ("base", "hub", "here"))
    assert np.array_equal(fetched, here) and not np.array_equal(fetched, base)


@pytest.mark.parametrize(("lora", "offline"), [(None, "1"), ("here", "1"), ("user/edits", "0")])
def test_the_hub_is_out_of_bounds_unless_the_lora_is_there(lora, offline, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("here").mkdir()
    flags = [] if lora is None else ["--lora", lora]
    with pytest.raises(ValueError, match="--image: got"):
        run(["--image", "none.png", "--instruction", "remove the apple", *flags])
    assert os.environ["HF_HUB_OFFLINE"] == offline


def test_loras_that_cannot_be_used_are_refused():
    with pytest.raises(UsageError, match=r"--lora: got 'a/b/c', expected a folder or file that exists, or a Hub id"):
        run([*EDIT, "--lora", "a/b/c"])
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=r"--lora: got the folder empty, expected pytorch_lora_weights.safetensors"):
        run([*EDIT, "--lora", "empty"])
    write_lora(build_tiny_kontext(), Path("other"))
    with pytest.raises(SystemExit, match=r"rcgrpo edit: --lora: got 'other', expected one that fits this model; "):
        main(["edit", *EDIT, "--lora", "other"])


def test_the_embedded_editor_says_what_it_knows_and_a_lora_may_know_more(lora, monkeypatch, capsys):
    monkeypatch.setattr("rcgrpo.cli.edit.open_pipeline", None)  # before a model is loaded
    with pytest.raises(UsageError, match=r"--instruction: got 'make it red', .*'remove the THING'.* apple, balloon"):
        run(["--image", "source.png", "--instruction", "Make it red."])
    with pytest.raises(UsageError, match="Did you mean 'remove the apple'"):
        run(["--image", "source.png", "--instruction", "remove the appel"])
    with pytest.raises(TypeError):
        run(["--image", "source.png", "--instruction", "make it red", "--lora", str(lora)])
    assert "the embedded editor does not know 'make it red'" in capsys.readouterr().err


def draw(name, value, size=(64, 64)):
    Image.new("L", size, value).save(name)
    return ["--mask", name]


def draw_labels(name):
    image = Image.new("L", (64, 64))
    image.paste(1, (0, 0, 9, 9))
    image.paste(2, (20, 20, 40, 40))
    image.save(name)
    return ["--mask", name]


def test_masks_that_would_not_do_what_they_say_are_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("rcgrpo.cli.edit.open_pipeline", None)
    for flags, said in (
        (draw("small.png", 255, (32, 16)), r"--mask: got a mask of height × width \(16, 32\), .* \(64, 64\)"),
        (draw_labels("labels.png"), "--mask: got several values, whose brightest is 2 of 255, expected white = edit"),
        (draw("black.png", 0), "--mask: got an empty mask, expected at least one edit pixel"),
    ):
        with pytest.raises((UsageError, ValueError), match=said):
            run([*EDIT, *flags])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_inference_steps", "0"], "--num_inference_steps: got 0, expected at least 1"),
        (["--resolution", "0"], "--resolution: got 0, expected 16 to 8192 pixels"),
        (["--edit_strength", "2"], r"--edit_strength: got 2.0, expected a number in \[0, 1\]"),
        (["--output", "edited"], "--output: got 'edited', expected a picture's name, such as picture.png"),
        (["--output", "edited.txt"], "--output: got 'edited.txt', expected a picture's name"),
        (["--output", "source.png/e.png"], "--output: got 'source.png', expected a folder that can be written to"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_the_edit(flags, said):
    with pytest.raises(UsageError, match=said):
        run([*EDIT, *flags])


@pytest.mark.parametrize(
    ("flag", "here"), [("prompt", "instruction"), ("mask_image", "mask"), ("num_images_per_prompt", "num_generations")]
)
def test_what_diffusers_calls_it_is_answered_with_the_flag_of_here(flag, here):
    with pytest.raises(UsageError, match=f"unknown flag '--{flag}'; it is called --{here} here$"):
        run([*EDIT, f"--{flag}", "x"])


# What is drawn


@pytest.fixture
def called(monkeypatch):
    """What the pipeline is called with, without drawing; there is a folder of one, without weights."""
    Path("some/kontext").mkdir(parents=True)
    Path("some/kontext/model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    calls = []

    class FluxKontextPipeline:
        vae_scale_factor = 8
        image_processor = VaeImageProcessor(vae_scale_factor=16)

        def __call__(self, **call):
            calls.append(call)
            return SimpleNamespace(images=[Image.new("RGB", (call["width"], call["height"]))])

    monkeypatch.setattr("rcgrpo.cli.edit.open_pipeline", lambda *_: FluxKontextPipeline())
    return calls


@pytest.mark.parametrize(
    ("size", "flags", "expected"),
    [
        ((900, 600), ["--resolution", "64"], (64, 48)),  # 78 × 52, cut to whole tokens
        ((600, 900), ["--resolution", "256"], (208, 304)),
        ((900, 600), ["--model", "some/kontext"], (1248, 832)),
        ((900, 600), [], (64, 48)),
        ((64, 64), [], (64, 64)),
    ],
)
def test_a_picture_keeps_its_proportions(called, size, flags, expected):
    Image.new("RGB", size, (9, 9, 9)).save("wide.png")
    mask = Image.new("L", size)
    mask.paste(1, (size[0] // 2, 0, *size))  # the right half, as 0 and 1
    mask.save("mask.png")
    run(["--image", "wide.png", "--mask", "mask.png", "--instruction", "remove the apple", *flags])
    (call,) = called
    assert Image.open("edited.png").size == call["image"].size == expected
    assert (call["width"], call["height"]) == expected and call["max_area"] == expected[0] * expected[1]
    region = call["mask_image"]
    assert region.shape == expected[::-1] and region.unique().tolist() == [0, 1]
    assert region.mean().item() == pytest.approx(0.5, abs=0.02) and region[:, -1].all() and not region[:, 0].any()


def test_a_picture_may_be_edited_at_its_own_size(called):
    Image.new("RGB", (900, 600)).save("wide.png")
    edit = ["--image", "wide.png", "--instruction", "remove the apple", "--own_size"]
    run(edit)
    assert (called[0]["width"], called[0]["height"]) == (896, 592) and Image.open("edited.png").size == (900, 600)
    with pytest.raises(UsageError, match="--own_size: got true with --resolution 64, expected one of them"):
        run([*edit, "--resolution", "64"])


def test_a_region_of_one_pixel_is_not_lost_on_the_way(called):
    Image.new("RGB", (900, 600)).save("wide.png")
    mask = Image.new("L", (900, 600))
    mask.putpixel((450, 301), 255)
    mask.save("mask.png")
    run(["--image", "wide.png", "--mask", "mask.png", "--instruction", "remove the apple"])
    assert called[0]["mask_image"].sum() == 1


def test_transparent_pixels_of_the_source_are_white(called):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save("clear.png")
    run(["--image", "clear.png", "--instruction", "remove the apple"])
    drawn = called[0]["image"]
    assert drawn.getpixel((8, 8)) == (0, 0, 255) and drawn.getpixel((50, 8)) == (255, 255, 255)


def test_a_picture_too_thin_to_edit_is_refused(called):
    Image.new("RGB", (3000, 20)).save("thin.png")
    with pytest.raises(ValueError, match="resolution: got 64 for a picture of 3000×20, expected at least 16 pixels"):
        run(["--image", "thin.png", "--instruction", "remove the apple"])
