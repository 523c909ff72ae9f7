"""`rcgrpo evaluate`: its defaults, its answers, and the whole command in miniature."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from processes import on_processes
from rcgrpo.cli import evaluate
from rcgrpo.cli.evaluate import COMPBENCH, EvaluateArguments, fill_in, gather_repeated, load_rows
from rcgrpo.cli.opening import sampling_settings
from rcgrpo.cli.parsing import UsageError, parse, use_embedded_model
from rcgrpo.data import EditRows, compbench_mini


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def settled(*arguments):
    (args,) = parse((EvaluateArguments,), gather_repeated(arguments, "--lora"), None, "rcgrpo evaluate")
    fill_in(args)
    return args


def test_defaults_follow_model_and_data():
    tiny = settled()
    sampling = sampling_settings(tiny)
    assert (sampling["resolution"], sampling["num_inference_steps"], sampling["max_sequence_length"]) == (64, 8, 20)
    assert (
        tiny.metrics == ["psnr", "ssim", "lp_t", "lp_i", "edit_score", "correct", "closeness"]
        and tiny.metric_size is None
    )
    assert (tiny.splits, tiny.intervals_by, tiny.output_dir) == (["test"], "edit", "rcgrpo-evaluation")
    real = settled("--model", "black-forest-labs/FLUX.1-Kontext-dev", "--dataset", COMPBENCH)
    assert real.metrics == ["lc_t", "lc_i", "psnr", "ssim", "lpips"] and real.metric_size == 512
    assert (real.splits, real.intervals_by) == (["train", "multi_turn"], "video")
    kept = settled("--dataset", COMPBENCH, "--held_out", "0.1", "--metric_size", "256", "--metrics", "psnr", "ssim")
    assert kept.splits == ["train:held_out", "multi_turn:held_out"]
    assert (kept.metric_size, kept.metrics) == (256, ["psnr", "ssim"])
    Path("own.jsonl").write_text("{}\n")
    assert settled("--dataset", "own.jsonl").splits == ["train"]
    Path("rcgrpo-evaluation").mkdir()
    assert settled().output_dir == "rcgrpo-evaluation-2"


def test_loras_may_be_repeated_or_listed():
    for given in (["--lora", "a", "--lora", "b"], ["--lora", "a", "b"], ["--lora=a", "--seed", "3", "--lora=b"]):
        assert settled(*given).lora == ["a", "b"]
    Path("x").mkdir()
    Path("x/settings.json").write_text("{}")
    assert settled("--lora", "a", "--resume", "--output_dir", "x", "--lora", "b").lora == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "mse"], "--metrics: got 'mse', expected some of lc_t lc_i psnr"),
        (["--resume"], "--resume: got no --output_dir"),
        (["--resume", "--output_dir", "typo"], "--resume: got --output_dir typo, expected the folder of an earlier"),
        (["--output_dir", __file__], "--output_dir: got .*, expected a folder that can be written to .*Not a dir"),
        (["--num_samples", "0"], "--num_samples: got 0, expected at least 1"),
        (["--resolution", "0"], "--resolution: got 0, expected 16 to 8192 pixels"),
        (["--intervals_by", "frame"], "--intervals_by: got 'frame', expected one of video, edit"),
        (["--held_out", "0.1"], "--held_out: got 0.1, expected 0 on compbench-mini"),
        (["--lroa", "x"], "the nearest known one is --lora"),
        (["--splits", "validation"], "--splits: got validation, expected test or train"),
    ],
)
def test_typing_errors(arguments, said):
    with pytest.raises(UsageError, match=said):
        evaluate.run(arguments)
    assert not list(Path().iterdir())


def test_a_missing_clip_stops_it_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"CLIP: got .*nowhere.*Metrics that need neither: psnr"):
        evaluate.run(["--metrics", "lc_t", "psnr", "--clip_model", str(tmp_path / "nowhere"), "--num_samples", "2"])
    assert not list(Path().iterdir())


def write_split(folder, name, rows):
    features = compbench_mini("test", 1).features
    Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


@pytest.fixture
def compbench_like(tmp_path):
    """A folder with CompBench's two splits: one row without a mask, and one pair of turns."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    data = list(compbench_mini("test", 6))
    data[1] |= {"task": "action", "mask": None, "image_path": "00000.png"}
    write_split(folder, "train", data[:4])
    for turn, row in enumerate(data[4:], start=1):
        row |= {"task": "multi_turn_add", "image_path": f"turn{turn}_add/02b72b8d_00002_t1.png"}
    write_split(folder, "multi_turn", data[4:])
    return str(folder)


def test_splits_are_read_one_after_another(compbench_like):
    rows = EditRows(load_rows(settled("--dataset", compbench_like, "--splits", "train", "multi_turn")), "evaluation")
    assert len(rows) == 6
    first, last = rows.edit(0), rows.edit(5)
    assert first.columns["task"] == "add" and first.columns["edited_image"].size == (64, 64)
    assert last.columns["image_path"] == "turn2_add/02b72b8d_00002_t1.png" and last.mask.max() == 1


def test_the_command_on_a_benchmark_in_a_folder(compbench_like, capsys):
    call = ["--dataset", compbench_like, "--splits", "train", "multi_turn", "--metrics", "psnr", "--metric_size", "96"]
    call += ["--num_inference_steps", "1", "--output_dir", "out"]
    evaluate.run(call)
    results = json.loads(Path("out/results.json").read_text())
    assert results["not_scored"] == {"action": 1}
    assert {s["name"] for s in results["sub_tasks"]} >= {"add", "turn1_add", "turn2_add"}
    shown = capsys.readouterr().out
    assert "Not scored: action (1)." in shown and "published" not in shown
    assert len(Path("out/samples.jsonl").read_text().splitlines()) == 5
    before = Path("out/samples.jsonl").read_bytes()
    evaluate.run([*call, "--resume"])
    assert Path("out/samples.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"resume: .*seed.*: 0.*now"):
        evaluate.run([*call, "--resume", "--seed", "1"])
    with pytest.raises(ValueError, match="output_dir: out holds an earlier evaluation"):
        evaluate.run(call)


def test_the_command_without_arguments_in_miniature(capsys):
    evaluate.run(["--num_samples", "2", "--num_inference_steps", "1", "--metrics", "psnr", "ssim"])
    folder = Path("rcgrpo-evaluation")
    assert {p.name for p in folder.iterdir()} == {
        *("images", "report.html", "results.json", "results.md", "samples.jsonl", "settings.json")
    }
    assert "background SSIM" in capsys.readouterr().out
    assert len(list((folder / "images" / "base").glob("*.png"))) == 2


def test_two_processes_evaluate_what_one_does():
    """Also where they go on with what a crash left of two."""
    job = [
        "--num_samples",
        "5",
        "--num_inference_steps",
        "1",
        "--metrics",
        "psnr",
        "ssim",
        "--batch_size",
        "1",
        "--output_dir",
    ]
    assert on_processes(1, "-m", "rcgrpo.cli", "evaluate", *job, "one")[0] == 0
    for again in ([], ["--resume"]):
        status, errors = on_processes(2, "-m", "rcgrpo.cli", "evaluate", *job, "two", *again)
        assert status == 0, errors[-3000:]
        one, two = Path("one"), Path("two")
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
        for name in ("settings.json", "results.json"):
            assert (two / name).read_bytes() == (one / name).read_bytes()
        lines = [(folder / "samples.jsonl").read_text().splitlines() for folder in (one, two)]
        assert lines[0] == lines[1] and len(lines[0]) == 5
        for picture in sorted((one / "images" / "base").iterdir()):
            assert (two / "images" / "base" / picture.name).read_bytes() == picture.read_bytes()
        # The second process had done two rows, the first one, and each was writing another line.
        (two / "samples.jsonl").write_text(f"{lines[0][0]}\n{lines[0][2][:20]}")
        (two / "samples-1.jsonl").write_text(f"{lines[0][1]}\n{lines[0][3]}\n{lines[0][4][:30]}")
        (two / "results.json").unlink()


@pytest.mark.parametrize(("loras", "offline"), [([], "1"), (["."], "1"), ([".", "user/edits"], "0")])
def test_the_embedded_model_asks_the_network_for_nothing_but_a_lora(loras, offline, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    use_embedded_model(loras)
    assert os.environ["HF_HUB_OFFLINE"] == offline
