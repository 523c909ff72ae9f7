"""`cli/train.py`: which rows are trained on and which are held out, and what is known before anything is rolled out."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from diffusers import FluxKontextPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

from checkpoint_files import write_checkpoint
from rcgrpo import RCGRPOConfig
from rcgrpo.cli import main
from rcgrpo.cli.parsing import UsageError
from rcgrpo.cli.train import ScriptArguments, fold_in, load_rows, run, settle_resume, settle_splits
from rcgrpo.data import EditRows, load_edit_dataset
from rcgrpo.editors.make_masks import MaskFolder
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.hub import LORA_FILE, save_lora


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(name="my.jsonl", names=("input_image", "instruction", "mask"), count=12):
    """Edits with pictures beside them; the last one has no mask."""
    Image.new("RGB", (16, 16)).save("source.png")
    Image.new("L", (16, 16), 255).save("mask.png")
    values = [("source.png", f"edit {i}", "mask.png" if i < count - 1 else None) for i in range(count)]
    with open(name, "w") as file:
        file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in values)
    return name


def settled(**given):
    script = ScriptArguments(**given)
    settle_splits(script)
    return script


def instructions(**given):
    """What training and the report get to see."""
    config = RCGRPOConfig("out", use_cpu=True)
    return [
        None if rows is None else [row["instruction"] for row in rows] for rows in load_rows(settled(**given), config)
    ]


def test_a_table_is_opened_as_elsewhere_and_rows_without_a_mask_are_left_out():
    train, held = instructions(dataset=write(), eval_split="", num_train_samples=20)
    assert train == [f"edit {i}" for i in range(11)] and held is None


def test_masks_that_were_made_stand_in_for_missing_ones_on_both_sides():
    config, path = RCGRPOConfig("out", use_cpu=True), write()
    made = list(load_edit_dataset(path, on_missing="full"))[11:]
    MaskFolder("masks", "by hand").fill(made, lambda row: Image.new("L", (16, 16), 255))
    train, held = load_rows(settled(dataset=path, held_out=0.4, masks="masks"), config)
    sources = {row["instruction"]: row["mask_source"] for rows in (train, held) for row in rows}
    assert sources == {f"edit {i}": "own" if i < 11 else "stored" for i in range(12)}
    with pytest.raises(UsageError, match="--masks: got masks, expected none on compbench-mini"):
        settled(masks="masks")


def test_what_is_held_out_is_reported_on_unless_said_otherwise():
    train, held = instructions(dataset=write(), held_out=0.4)
    assert train and held and sorted(train + held) == sorted(f"edit {i}" for i in range(11))
    assert settled(dataset="some/set", held_out=0.1, train_split="big").eval_split == "big:held_out"
    assert settled(dataset="some/set").eval_split == settled().eval_split == "test"


def test_columns_of_the_configuration_are_read_from_any_table():
    config = RCGRPOConfig("out", use_cpu=True, image_column="src", prompt_column="say", mask_column="region")
    rows, _ = load_rows(ScriptArguments(dataset=write(names=("src", "say", "region")), eval_split=""), config)
    edit = EditRows(rows, "train", config.image_column, config.prompt_column, config.mask_column).edit(3)
    assert edit.prompt == "edit 3" and edit.mask.min() == 1


def test_a_known_hub_id_brings_its_preset(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "rcgrpo.data.loading.open_rows", lambda name, split, *rest: seen.setdefault("rows", (rows, None))
    )
    image = Image.new("RGB", (8, 8))
    rows = Dataset.from_list([{"source_img": image, "mask_img": Image.new("RGB", (8, 8), "white"), "instruction": "x"}])
    train, _ = load_rows(ScriptArguments(dataset="osunlp/MagicBrush", eval_split=""), RCGRPOConfig("out", use_cpu=True))
    assert train[0]["mask"].getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": "my.jsonl"}, r"--eval_split: got none for my.jsonl, .* pass --held_out 0.1 .* --eval_split \"\""),
        (
            {"dataset": "a/b", "eval_split": "train"},
            "--eval_split: got 'train', expected other rows than --train_split",
        ),
        ({"dataset": "a/b", "eval_split": "train[:10%]"}, "expected other rows than --train_split train"),
        ({"dataset": "a/b", "eval_split": "held_out", "train_split": "train:held_out", "held_out": 0.1}, "other rows"),
        ({"train_split": "test"}, "--eval_split: got 'test', expected other rows than --train_split test"),
        ({"train_split": "dev"}, "--train_split: got 'dev', expected one of train, test"),
        ({"held_out": 0.1}, "--held_out: got 0.1, expected 0 on compbench-mini"),
    ],
)
def test_held_out_rows_that_would_be_trained_on_are_refused(given, said):
    write()
    with pytest.raises(UsageError, match=said):
        settled(**given)


def test_splits_that_are_apart_are_taken():
    for train, held, share in (("train", "test", 0.5), ("train[:90%]", "train[90%:]", 0), ("held_out", "train", 0.1)):
        settled(dataset="a/b", train_split=train, eval_split=held, held_out=share)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_split_that_a_table_does_not_have_is_refused(share):
    with pytest.raises(ValueError, match=r"split: got 'test' of my.jsonl, expected 'train', as one table has no other"):
        instructions(dataset=write(), held_out=share, eval_split="test")


def resume(asked, folder="out"):
    config = RCGRPOConfig(folder, use_cpu=True, resume_from_checkpoint=asked)
    return settle_resume(config), config.resume_from_checkpoint


def test_no_is_no_checkpoint_and_true_the_newest_one():
    for asked in (None, "false", "None", False):
        assert resume(asked) == (None, None)
    assert resume("true")[0] is resume(True)[0] is True  # the first call of a job script, too
    write_checkpoint(Path("out"), 5)
    assert resume("out/checkpoint-5", "new")[0] == "out/checkpoint-5"
    with pytest.raises(UsageError, match="--output_dir: out holds checkpoint-5 of an earlier run"):
        resume("false")


def test_broken_checkpoints_are_no_earlier_run(capsys):
    """Killed in the first checkpoint, either way of starting again must work."""
    (write_checkpoint(Path("out"), 5) / "trainer_state.json").write_text("{")
    Path("out/checkpoint-6").mkdir()
    assert resume("false") == (None, None) and resume("true")[0] is True
    said = capsys.readouterr().out
    assert "checkpoint-5" in said and "checkpoint-6" in said and said.count("starting anew") == 2
    with pytest.raises(
        UsageError, match=r"--resume_from_checkpoint: got 'out/checkpoint-5'.*trainer_state.json cannot"
    ):
        resume("out/checkpoint-5")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output_dir", "taken/out"], "--output_dir: got 'taken/out', expected a folder that can be written to"),
        (
            ["--resume_from_checkpoint", "gone"],
            "--resume_from_checkpoint: got 'gone', expected a whole checkpoint, but there is no such folder",
        ),
    ],
)
def test_what_cannot_be_written_or_resumed_is_known_before_anything_is_loaded(flags, said, monkeypatch):
    monkeypatch.setattr("rcgrpo.cli.train.load_rows", None)
    Path("taken").touch()
    with pytest.raises(UsageError, match=said):
        run(["--use_cpu", "true", *flags])
    assert [path.name for path in Path().iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("flags", "text", "sizes"),
    [
        (["--model", "kontext-tiny"], "", (64, 20)),
        (["--dataset", "my.jsonl", "--max_sequence_length", "16"], "", (64, 16)),
        (["--config", "job.yaml"], "model: kontext-tiny", (64, 20)),
        (["--config", "job.yaml"], "resolution: 128", (128, 20)),
        (["--config", "job.yaml", "--model", "other/model"], "", (512, 512)),
        ([], "", (64, 20)),
    ],
)
def test_the_embedded_model_is_trained_as_it_is_used(flags, text, sizes, monkeypatch):
    seen = []

    def stop(script, config):
        seen.append((config.resolution, config.max_sequence_length))
        raise UsageError("far enough")

    monkeypatch.setattr("rcgrpo.cli.opening.check_ready", lambda *given: None)  # other/model is not there
    monkeypatch.setattr("rcgrpo.cli.train.load_rows", stop)
    Path("job.yaml").write_text(text + "\nseed: 1")
    with pytest.raises(UsageError, match="far enough"):
        run(["--use_cpu", "true", "--eval_split", "", *flags])
    assert seen == [sizes]


JOB = "--max_steps 1 --num_train_samples 2 --per_device_train_batch_size 2 --num_generations 4 --num_anchors 1"


def test_without_held_out_edits_no_report_is_announced(capsys):
    run(["--eval_split", "", "--use_cpu", "true", "--output_dir", "run", *JOB.split()])
    assert "Written to run: LoRA, model card\n" in capsys.readouterr().out


def test_what_was_trained_is_on_disk_before_it_is_reported_on(monkeypatch):
    def judge(trainer, rows, description):
        if description.endswith("after"):
            raise ConnectionError("the judge has gone")
        return []

    monkeypatch.setattr("rcgrpo.evaluation.held_out.judge_held_out", judge)
    with pytest.raises(ConnectionError):
        run(
            [
                "--num_eval_samples",
                "2",
                "--use_cpu",
                "true",
                "--save_strategy",
                "no",
                "--output_dir",
                "run",
                *JOB.split(),
            ]
        )
    assert {"pytorch_lora_weights.safetensors", "README.md"} <= {path.name for path in Path("run").iterdir()}


def init_lora(folder="first", **options):
    """A LoRA for the embedded model that changes what is drawn."""
    pipeline = FluxKontextPipeline.from_pretrained(str(WEIGHTS), local_files_only=True)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["attn.to_q", "attn.to_v"]} | options
    config = LoraConfig(init_lora_weights=False, **options)
    return str(save_lora(pipeline, get_peft_model(pipeline.transformer, config), folder).parent)


def before_of(flags, monkeypatch):
    """The trainer when the report's "before" is made."""
    seen = []

    def judge(trainer, rows, description):
        seen.append(trainer)
        raise UsageError("far enough")

    monkeypatch.setattr("rcgrpo.evaluation.held_out.judge_held_out", judge)
    with pytest.raises(UsageError, match="far enough"):
        run(["--use_cpu", "true", "--output_dir", "run", "--num_eval_samples", "2", *JOB.split(), *flags])
    return seen[0]


def test_a_run_goes_on_from_a_lora_which_is_part_of_before(monkeypatch):
    folder = init_lora(alpha_pattern={"attn.to_v": 3})
    stock = FluxKontextPipeline.from_pretrained(str(WEIGHTS), local_files_only=True)
    stock.load_lora_weights(folder)
    named = ["--lora_target_modules", "attn.to_q", "attn.to_v", "--lora_r", "3"]
    for flags in ([], named, ["--model_init_kwargs", '{"torch_dtype": "float32"}']):
        trainer = before_of(["--init_lora", folder, *flags], monkeypatch)
        layer, own = (p.transformer.transformer_blocks[0].attn.to_v for p in (stock, trainer.pipeline))
        assert torch.equal(own.get_delta_weight("default"), layer.get_delta_weight("default_0"))
        config = trainer.model.peft_config["default"]
        assert config.r == 3 and {p.shape[0] for n, p in trainer.model.named_parameters() if "lora_A" in n} == {3}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_r", "8"], "--lora_r: got 8, expected 3, which --init_lora first has; leave it out, or set it"),
        (["--lora_alpha", "16"], "--lora_alpha: got 16, expected 6, which --init_lora first has"),
        (["--lora_target_modules", "proj_out"], r"--lora_target_modules: got \['proj_out'\], expected .*to_q"),
        (["--config", "job.yaml"], "--lora_r: got 4, expected 3"),
    ],
)
def test_another_rank_alpha_or_layers_than_the_loras_are_refused(flags, said):
    init_lora()
    Path("job.yaml").write_text("lora_r: 4\n")
    with pytest.raises(UsageError, match=said):
        run(["--use_cpu", "true", "--output_dir", "run", *JOB.split(), "--init_lora", "first", *flags])
    assert not Path("run").exists()


def test_a_run_that_went_on_ends_with_a_lora_of_the_same_shape():
    folder = init_lora()
    run(
        [
            "--eval_split",
            "",
            "--use_cpu",
            "true",
            "--output_dir",
            "run",
            "--warmup_steps",
            "0",
            "--init_lora",
            folder,
            *JOB.split(),
        ]
    )
    first, second = (load_file(Path(name, LORA_FILE)) for name in (folder, "run"))
    assert {k: w.shape for k, w in first.items()} == {k: w.shape for k, w in second.items()}
    assert all(torch.equal(w, second[k]) for k, w in first.items() if k.endswith(".alpha"))
    assert any(not torch.equal(w, second[k]) for k, w in first.items())


def test_the_same_command_goes_on_after_a_stop_and_ends(monkeypatch, capsys, caplog):
    """A job script's, from its first call to one too many."""
    monkeypatch.setattr("rcgrpo.training.resuming.leave_in_time", lambda code: None)
    Path("preempted.py").write_text(
        "import os, signal\n"
        "def reward(images, trainer_state, **columns):\n"
        "    if trainer_state.global_step == 1 and not os.path.exists('sent'):\n"
        "        open('sent', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(image.getpixel((0, 0))[0]) for image in images]\n"
    )
    flags = "--model kontext-tiny --reward_funcs preempted.reward --use_cpu true --output_dir run"
    job = ["train", *JOB.split(), *flags.split(), "--max_steps", "3", "--eval_split", ""]
    job += ["--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit) as stop:
        main(job)
    told = capsys.readouterr().err
    assert stop.value.code == 143 and "SIGTERM: stopped after step 2; checkpoint-2 in run has it" in told
    for _ in range(2):
        main(job)
        assert "Written to run: LoRA, model card\n" in capsys.readouterr().out
    assert "checkpoint-3 has all 3 steps behind it: nothing is left to train" in caplog.text


@pytest.mark.parametrize(
    ("short", "kwargs"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        (
            {"load_in_4bit": True},
            {
                "quantization_config": {
                    "quant_backend": "bitsandbytes_4bit",
                    "quant_kwargs": {
                        "load_in_4bit": True,
                        "bnb_4bit_quant_type": "nf4",
                        "bnb_4bit_compute_dtype": "bfloat16",
                    },
                    "components_to_quantize": ["transformer"],
                }
            },
        ),
        (
            {"load_in_8bit": True},
            {
                "quantization_config": {
                    "quant_backend": "bitsandbytes_8bit",
                    "quant_kwargs": {"load_in_8bit": True},
                    "components_to_quantize": ["transformer"],
                }
            },
        ),
    ],
)
def test_trls_short_flags_of_a_model(short, kwargs):
    config = SimpleNamespace(model_init_kwargs=None)
    fold_in(ScriptArguments(**short), config)
    assert config.model_init_kwargs == kwargs
    config = SimpleNamespace(model_init_kwargs={"revision": "main"})
    fold_in(ScriptArguments(**short), config)
    assert config.model_init_kwargs == {"revision": "main", **(kwargs or {})}


@pytest.mark.parametrize(
    ("short", "given", "said"),
    [
        ({"dtype": "bfloat16"}, {"torch_dtype": "float32"}, "got torch_dtype beside --dtype"),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "got torch_dtype beside --dtype"),
        ({"load_in_4bit": True}, {"quantization_config": {}}, "got quantization_config beside"),
        ({"load_in_4bit": True, "load_in_8bit": True}, None, "expected one of them"),
        ({"load_in_4bit": True, "use_peft": False}, None, "what is quantized stays frozen"),
        ({"init_lora": "mine", "use_peft": False}, None, "to go on training that LoRA"),
    ],
)
def test_short_flags_that_say_two_things_are_refused(short, given, said):
    with pytest.raises(UsageError, match=said):
        fold_in(ScriptArguments(**short), SimpleNamespace(model_init_kwargs=given))


def test_without_peft_the_whole_transformer_is_trained(capsys):
    few = ["--max_steps", "1", "--num_train_samples", "24", "--eval_split", "", "--num_generations", "4"]
    few += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    few += ["--beta", "0", "--beta_keep", "1"]  # there is no base left to be held to
    main(["train", "--use_peft", "false", "--output_dir", "run", "--optim", "sgd", *few])
    assert (Path("run") / "transformer" / "config.json").is_file() and not (Path("run") / LORA_FILE).exists()
    said = capsys.readouterr().out
    assert "Written to run: transformer, model card" in said and "load_lora_weights" not in said
