"""Every command takes every editor, by its folder's `model_index.json`."""

import json
from pathlib import Path

import pytest
from diffusers import AutoPipelineForImage2Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from huggingface_hub import ModelCard
from PIL import Image

from rcgrpo.app import compare
from rcgrpo.cli import main
from rcgrpo.cli.opening import call_defaults, open_pipeline
from rcgrpo.evaluation.benchmark import Sampling, contenders
from rcgrpo.training.hub import save_lora
from tiny_editors import SMALL_QWEN, build_tiny_klein, build_tiny_qwen, with_lora
from tiny_kontext import build_tiny_kontext

pytestmark = pytest.mark.filterwarnings("ignore")

BUILD = {"kontext": build_tiny_kontext, "klein": build_tiny_klein, "qwen": build_tiny_qwen}
SIZE = ["--resolution", "64", "--num_inference_steps", "2", "--max_sequence_length", "96"]
TRAIN = [
    *("--use_cpu", "--bf16", "false", "--num_train_samples", "4", "--num_eval_samples", "1", "--max_steps", "2"),
    *("--num_generations", "2", "--num_anchors", "1", "--num_policy_steps", "1"),
    *("--per_device_train_batch_size", "1", "--learning_rate", "1", "--optim", "sgd", "--report_to", "none"),
    *("--reward_funcs", "compbench_mini", "--log_completions", "false", "--save_strategy", "no"),
]
LORA = ["--lora_r", "2", "--lora_alpha", "4"]
DIAGNOSE = ["--num_samples", "2", "--num_generations", "2", "--match_tolerance", "1", "--num_maps", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in SMALL_QWEN.items():
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, value)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save("source.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    mask.save("mask.png")


@pytest.mark.parametrize("name", BUILD)
def test_commands_take_every_editor(name, capsys):
    pipe = BUILD[name]()
    pipe.save_pretrained(name)
    stock = type(pipe).__name__
    main(["train", "--model", name, "--output_dir", "trained", *SIZE, *TRAIN, *LORA])
    assert f"Use it: pipe = {stock}.from_pretrained" in capsys.readouterr().out
    assert f"{stock}.from_pretrained" in ModelCard.load("trained/README.md").text
    settings = json.loads(Path("trained/metrics.json").read_text())["settings"]
    assert "attn.to_q" in settings["script"]["lora_target_modules"]

    edit = ["--image", "source.png", "--instruction", "make it red", "--mask", "mask.png", *SIZE[:4]]
    main(["edit", "--model", name, *edit])
    main(["edit", "--model", name, *edit, "--lora", "trained", "--output", "with.png"])
    base, trained = (Image.open(path) for path in ("edited.png", "with.png"))
    assert base.size == trained.size == (64, 64) and base.tobytes() != trained.tobytes()

    small = ["--num_samples", "2", "--metrics", "psnr", "--output_dir", "evaluation", *SIZE]
    main(["evaluate", "--model", name, "--lora", "trained", *small])
    scores = [json.loads(line)["scores"] for line in Path("evaluation/samples.jsonl").read_text().splitlines()]
    assert len(scores) == 2 and all(row.keys() == {"base", "trained"} for row in scores)
    assert all(row["base"] != row["trained"] for row in scores)

    main(["diagnose", "--model", name, "--lora", "trained", "--output", "diagnosis", *DIAGNOSE, *SIZE])
    assert json.loads(Path("diagnosis/diagnostics.json").read_text())["settings"]["model"] == name

    main(["explain", "--model", name, "--lora", "trained", "--output_dir", "update", *SIZE, *TRAIN])
    assert 0 < json.loads(Path("update/update.json").read_text())["moved_inside"] < 1

    draws = ["--every_row", "--num_samples", "2", "--resolution", "64", "--num_draws", "1"]
    main(["data", "masks", "compbench-mini", "--method", "velocity", "--model", name, "--output", "masks", *draws])
    skipped = Path("masks/skipped.log")  # where the instruction moved the velocity nowhere in particular
    count = len(skipped.read_text().splitlines()) if skipped.exists() else 0
    assert len(list(Path("masks").rglob("*.png"))) + count == 2

    sampling = Sampling(**call_defaults(name) | {"resolution": 64, "num_inference_steps": 2})
    source, mask = (Image.open(path) for path in ("source.png", "mask.png"))
    shown = compare(open_pipeline(name), contenders([]), source, mask, "make it red", sampling)  # of `rcgrpo app`
    assert shown.outcomes[0].images[0].size == (64, 64) and shown.outcomes[0].density[0] > 0

    auto = AutoPipelineForImage2Image.from_pretrained(name)
    assert type(auto) is type(pipe)


def evaluated(model, *flags):
    """The settings and each contender's picture of one edit."""
    size = ["--resolution", "64", "--max_sequence_length", "96", "--num_samples", "1", "--metrics", "psnr"]
    main(["evaluate", "--model", model, "--output_dir", f"evaluation-{model}", *size, *flags])
    folder = Path(f"evaluation-{model}")
    pictures = {path.parent.name: Image.open(path).tobytes() for path in folder.glob("images/*/*.png")}
    return json.loads((folder / "settings.json").read_text()), pictures


def test_what_was_trained_on_the_base_is_drawn_with_by_the_distilled_model():
    save_lora(*with_lora(build_tiny_klein), "trained")
    build_tiny_klein(seed=1, is_distilled=True).save_pretrained("distilled")
    settings, pictures = evaluated("distilled", "--lora", "trained")
    assert settings["model"] == "distilled" and settings["contenders"].keys() == {"base", "trained"}
    assert (settings["sampling"]["num_inference_steps"], settings["sampling"]["guidance_scale"]) == (4, 1)
    assert pictures["base"] != pictures["trained"]


def test_a_few_step_lora_becomes_part_of_the_model_that_a_trained_one_is_drawn_with():
    save_lora(*with_lora(build_tiny_kontext, target_modules=["attn.to_q"]), "few-steps")
    pipe = build_tiny_kontext()
    pipe.load_lora_weights("few-steps")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained("fused")
    save_lora(*with_lora(build_tiny_kontext), "trained")
    _, pictures = evaluated("fused", "--lora", "trained", "--num_inference_steps", "2")
    build_tiny_kontext().save_pretrained("plain")
    _, plain = evaluated("plain", "--lora", "trained", "--num_inference_steps", "2")
    assert len({*pictures.values(), *plain.values()}) == 4


def index(name, **more):
    Path(name).mkdir()
    Path(name, "model_index.json").write_text(json.dumps({"_class_name": name, **more}))
    return name


@pytest.mark.parametrize(
    ("name", "more", "steps", "guidance", "true_cfg"),
    [
        ("FluxKontextPipeline", {}, 28, 3.5, 1.0),
        ("Flux2KleinPipeline", {"is_distilled": True}, 4, 1.0, 1.0),
        ("Flux2KleinPipeline", {}, 50, 4.0, 1.0),
        ("Flux2Pipeline", {}, 50, 4.0, 1.0),
        ("QwenImageEditPlusPipeline", {}, 40, None, 4.0),
    ],
)
def test_models_are_drawn_with_as_their_makers_do(name, more, steps, guidance, true_cfg):
    usual = call_defaults(index(name, **more))
    found = usual["num_inference_steps"], usual["guidance_scale"], usual["true_cfg_scale"]
    assert found == (steps, guidance, true_cfg) and usual["resolution"] == 1024


def test_a_model_without_an_editor_is_refused_by_the_class_that_it_names():
    with pytest.raises(SystemExit, match=r"model: got .*StableDiffusionPipeline.*FluxKontextPipeline"):
        main(["evaluate", "--model", index("StableDiffusionPipeline"), "--num_samples", "1"])
