"""`benchmark`: what is drawn from what, what is kept on disk, and what a crash costs; on a random tiny Kontext."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, get_peft_model
from PIL import Image

from rcgrpo.cli.opening import call_defaults
from rcgrpo.cli.parsing import TINY
from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.evaluation.benchmark import (
    Contender,
    Sampling,
    contenders,
    load_loras,
    make_plan,
    open_folder,
    picture_path,
    read_records,
    rows_digest,
    run,
    sample,
    switch_to,
)
from rcgrpo.evaluation.held_out import Result, Scorer
from rcgrpo.tiny import CALL, RESOLUTION
from rcgrpo.training.hub import LORA_FILE, save_lora
from tiny_kontext import build_tiny_kontext

SAMPLING = Sampling(resolution=32, num_inference_steps=2, max_sequence_length=48)
METRICS = ("psnr", "ssim")


def write_lora(folder, seed):
    pipe = build_tiny_kontext()
    torch.manual_seed(seed)
    model = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_lora(pipe, model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / name, seed) for seed, name in enumerate(("one", "v1.5"))]


@pytest.fixture(scope="module")
def pipeline(loras):
    pipe = build_tiny_kontext()
    load_loras(pipe, contenders(loras))
    return pipe


@pytest.fixture(scope="module")
def rows():
    """Five single edits, two pairs of turns (the second turn stored first), a lone turn and two unscored tasks."""
    data = list(compbench_mini("test", 12))
    for row in data[:5]:
        row["image_path"] = f"0000000{row['image_path'][-5]}/0/00001.png"
    paths = ("turn2_add/02b72b8d_00002_t1.png", "turn1_add/02b72b8d_00002_t1.png")
    paths += ("turn1_add/02b72b8d_00002_t2.png", "turn2_add/02b72b8d_00002_t2.png", "turn2_add/001ca3cb_00003_t1.png")
    for row, path in zip(data[5:10], paths, strict=True):
        row |= {"task": "multi_turn_add", "image_path": path}
    data[10] |= {"task": "action", "mask": None}
    data[11] |= {"task": "view", "mask": None}
    return EditRows(data, "evaluation")


class Recorder:
    """A scorer that remembers what it judged."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at, self.scorer = [], fail_at, Scorer(METRICS, size=None)

    def __call__(self, results):
        self.calls.append(results)
        if len(self.calls) == self.fail_at:
            raise RuntimeError("the judge fell asleep")
        return self.scorer(results)


def evaluate(pipeline, loras, rows, folder, scorer=None, resume=False, batch_size=2, seed=0):
    plan = make_plan(rows)
    sampling = Sampling(32, 2, 3.5, 48, seed)
    earlier = open_folder(folder, {"seed": seed, "rows": rows_digest(rows, plan)}, resume)
    return run(pipeline, contenders(loras), rows, plan, sampling, scorer or Recorder(), folder, earlier, batch_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pipeline, loras, rows):
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(pipeline, loras, rows, folder)


# Plan ----------------------------------------------------------------------------------------------------------------


def test_turns_are_paired_and_the_rest_is_counted(rows):
    plan = make_plan(rows)
    assert plan.units == [(0,), (1,), (2,), (3,), (4,), (6, 5), (7, 8)]
    assert plan.not_scored == {"action": 1, "view": 1, "multi_turn_add without its other turn": 1}
    assert make_plan(rows, 3).units == [(0,), (2,), (4,)] and make_plan(rows, 99) == plan
    assert rows_digest(rows, plan) != rows_digest(rows, make_plan(rows, 3))
    with pytest.raises(ValueError, match="no rows that can be scored"):
        make_plan(EditRows([rows.rows[10]], "evaluation"))


def test_a_dataset_is_planned_like_a_list():
    data = compbench_mini("test", 4)
    both = concatenate_datasets([data, data])
    assert make_plan(EditRows(both, "evaluation")) == make_plan(EditRows(both.to_list(), "evaluation"))
    bare = data.remove_columns(["task", "image_path"])
    assert make_plan(EditRows(bare, "evaluation")).units == [(0,), (1,), (2,), (3,)]


# Contenders ----------------------------------------------------------------------------------------------------------


def test_names_and_files(loras, tmp_path):
    twin = shutil.copytree(loras[0], tmp_path / "one")
    file = shutil.copy(Path(loras[0]) / LORA_FILE, tmp_path / "mine.v2.safetensors")
    found = contenders([*loras, str(twin), str(file), str(twin / LORA_FILE)])
    assert [c.name for c in found] == ["base", "one", "v1.5", "one-2", "mine.v2", "one-3"]
    assert found[0].lora is None and all(c.lora.is_file() for c in found[1:])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"got the folder .*empty, expected {LORA_FILE}"):
        contenders([str(tmp_path / "empty")])
    with pytest.raises(
        ValueError, match="lora: got 'no/such/lora', expected a folder or file that exists, or a Hub id"
    ):
        contenders(["no/such/lora"])


def test_each_contender_draws_as_if_it_were_alone(pipeline, loras, rows):
    edits = [rows.edit(i) for i in range(2)]
    for contender, folder in zip(contenders(loras), [None, *loras], strict=True):
        alone = build_tiny_kontext()
        alone.set_progress_bar_config(disable=True)
        if folder:
            alone.load_lora_weights(folder)
        switch_to(pipeline, contender)
        for drawn, expected in zip(sample(pipeline, edits, SAMPLING), sample(alone, edits, SAMPLING), strict=True):
            assert drawn.tobytes() == expected.tobytes()


def test_noise_depends_on_seed_and_row_alone(pipeline, rows):
    switch_to(pipeline, Contender("base"))
    edits = [rows.edit(i) for i in range(3)]
    together = sample(pipeline, edits, SAMPLING)
    assert sample(pipeline, edits[2:], SAMPLING)[0].tobytes() == together[2].tobytes()
    other = sample(pipeline, edits[:1], Sampling(32, 2, max_sequence_length=48, seed=1))[0]
    assert other.tobytes() != together[0].tobytes()


def test_sizes_follow_the_source(pipeline, rows):
    switch_to(pipeline, Contender("base"))
    edits = [rows.edit(0), rows.edit(1), rows.edit(0)]
    edits[1] = replace(edits[1], source=edits[1].source.resize((128, 32)))
    assert [picture.size for picture in sample(pipeline, edits, SAMPLING)] == [(32, 32), (64, 16), (32, 32)]


# Run -----------------------------------------------------------------------------------------------------------------


def test_what_is_kept(whole, rows):
    folder, records = whole
    assert [r["row"] for r in records] == make_plan(rows).rows and records == read_records(folder)
    names = {"base", "one", "v1.5"}
    for record in records:
        assert record["scores"].keys() == names and all(s.keys() == {*METRICS} for s in record["scores"].values())
        edit = rows.edit(record["row"])
        for name in names:
            with Image.open(picture_path(folder, name, record["row"])) as picture:
                again = Scorer(METRICS, size=None)([Result.of(picture, edit)])
            assert {m: v[0] for m, v in again.items()} == record["scores"][name]
    assert {r["sub_task"] for r in records if r["task"] == "multi_turn_add"} == {"turn1_add", "turn2_add"}
    assert records[0]["scores"]["base"] != records[0]["scores"]["one"] != records[0]["scores"]["v1.5"]


def test_turn_two_starts_from_the_contenders_own_turn_one(whole, pipeline, loras, rows):
    folder, _ = whole
    for contender in contenders(loras)[:2]:
        switch_to(pipeline, contender)
        first, second = rows.edit(6), rows.edit(5)  # as stored, turn 2 comes first
        start = sample(pipeline, [first], SAMPLING)[0]
        expected = sample(pipeline, [replace(second, source=start)], SAMPLING)[0]
        with Image.open(picture_path(folder, contender.name, 5)) as picture:
            assert picture.tobytes() == expected.tobytes()
        assert sample(pipeline, [second], SAMPLING)[0].tobytes() != expected.tobytes()


def test_turn_two_is_compared_with_the_data_sets_own_source(pipeline, loras, rows, tmp_path):
    recorder = Recorder()
    evaluate(pipeline, loras[:1], rows, tmp_path / "run", recorder, batch_size=9)
    judged = recorder.calls[0]
    assert len(judged) == 9 and len(recorder.calls) == 2
    assert judged[-1].source.tobytes() == rows.edit(8).source.tobytes()


@pytest.mark.parametrize("crash_at", [1, 5, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(whole, pipeline, loras, rows, tmp_path, crash_at):
    folder, records = whole
    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="fell asleep"):
        evaluate(pipeline, loras, rows, broken, Recorder(fail_at=crash_at))
    batches_done = (crash_at - 1) // 3
    assert read_records(broken) == records[: 2 * batches_done]  # at most one batch is lost
    recorder = Recorder()
    assert evaluate(pipeline, loras, rows, broken, recorder, resume=True) == records
    assert len(recorder.calls) == 3 * (4 - batches_done)
    for name in ("samples.jsonl", *(str(p.relative_to(folder)) for p in (folder / "images").rglob("*.png"))):
        assert (broken / name).read_bytes() == (folder / name).read_bytes(), name
    assert len(list((broken / "images").rglob("*.png"))) == 27


def test_a_torn_line_and_half_a_batch_are_done_again(whole, pipeline, loras, rows, tmp_path):
    folder, records = whole
    torn = shutil.copytree(folder, tmp_path / "torn")
    lines = (torn / "samples.jsonl").read_text().splitlines(keepends=True)
    (torn / "samples.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    recorder = Recorder()
    assert evaluate(pipeline, loras, rows, torn, recorder, resume=True) == records
    assert len(recorder.calls) == 3 * 3
    assert (torn / "samples.jsonl").read_text() == "".join(lines)
    done = Recorder()
    assert evaluate(pipeline, loras, rows, torn, done, resume=True) == records and not done.calls


def test_other_settings_are_refused_by_name(whole, pipeline, loras, rows):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"resume: .*with other settings \(seed: then 0, now 7\)"):
        evaluate(pipeline, loras, rows, folder, resume=True, seed=7)
    with pytest.raises(ValueError, match=r"output_dir: .* holds an earlier evaluation"):
        evaluate(pipeline, loras, rows, folder)
    assert json.loads((folder / "settings.json").read_text())["seed"] == 0


def test_a_row_that_cannot_be_read_costs_only_itself(pipeline, rows, tmp_path):
    data = [dict(rows.rows[i]) for i in range(9)]
    data[1]["mask"] = Image.new("L", (64, 64))
    data[6]["input_image"] = b"no picture"  # turn 1, so that turn 2 has nothing to start from
    records = evaluate(pipeline, [], EditRows(data, "evaluation"), tmp_path / "run")
    assert [r["row"] for r in records if "error" in r] == [1, 6, 5]
    assert "evaluation row 1, column 'mask': got an empty mask" in records[1]["error"]
    assert all("evaluation row 6, column 'input_image'" in r["error"] for r in records if r["row"] in (5, 6))
    assert sum("scores" in r for r in records) == 6


def test_the_embedded_editor_is_called_as_it_was_trained():
    sampling = Sampling(RESOLUTION, CALL["num_inference_steps"], 3.5, CALL["max_sequence_length"])
    editor = sampling.editor(build_tiny_kontext())
    assert editor.call_arguments(RESOLUTION, RESOLUTION) == CALL | {"guidance_scale": 3.5}
    assert Sampling(**call_defaults(TINY)).editor(build_tiny_kontext()).call_arguments(
        RESOLUTION, RESOLUTION
    ) == CALL | {"guidance_scale": 3.5}
