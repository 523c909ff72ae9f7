"""`checks.py`, `rows.py`: what cannot work is refused before the first step, naming what to do."""

import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from PIL import Image

from rcgrpo.rewards import RewardError
from rcgrpo.rewards.calling import TookTooLong
from rcgrpo.training.checks import check_engine
from tiny_kontext import build_tiny_kontext
from tiny_training import LAYERS, brightness, last, make, rolled_out

pytestmark = pytest.mark.filterwarnings("ignore")


def nothing_for_the_unedited(images, source_images, **columns):
    pairs = enumerate(zip(images, source_images, strict=True))
    return [None if image == source else 0.1 * i for i, (image, source) in pairs]


def not_a_number_for_the_unedited(**columns):
    return [float("nan") if value is None else value for value in nothing_for_the_unedited(**columns)]


@pytest.mark.parametrize("reward", [nothing_for_the_unedited, not_a_number_for_the_unedited])
def test_no_score_of_an_unedited_source_is_no_reason_to_stop(tmp_path, data, caplog, reward):
    trainer = make(tmp_path, data, reward)
    assert any("start-up probe" in r.getMessage() for r in caplog.records) == (reward is not nothing_for_the_unedited)
    (group,) = rolled_out(trainer, data)
    assert group.advantages.any()


def needs_completion_ids(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


async def unreachable(images, log_failure, **columns):
    for i in range(len(images)):
        log_failure(i, "connect: refused")
    return [None] * len(images)


def hanging(**columns):
    time.sleep(5)


@pytest.mark.parametrize(
    ("reward", "message", "cause"),
    [
        (needs_completion_ids, "NoneType", TypeError),  # a warning has said that there are none
        (unreachable, "connect: refused", None),
        (hanging, "took over 0.2 s", TookTooLong),
        (lambda images, **columns: ["good"] * len(images), "'good', which is not a number", None),
    ],
)
def test_a_reward_that_fails_on_the_whole_probe_stops_the_run(tmp_path, data, reward, message, cause):
    with pytest.raises(RewardError, match=f"{reward.__name__}' failed on every candidate of the .*{message}") as caught:
        make(tmp_path, data, [brightness, reward], reward_timeout=0.2 if reward is hanging else None)
    assert type(caught.value.__cause__) is (cause or type(None))


@pytest.mark.parametrize("name", ["images", "masks", "log_extra", "attention_density"])
def test_columns_with_names_that_rewards_get_are_refused(tmp_path, data, held_out, name):
    rows = [dict(row) for row in data]
    bad = [*rows[:3], {**rows[3], name: 1}]
    for number, (train, held) in enumerate([(bad, None), (rows, [{**row, name: 1} for row in held_out])]):
        expected = f"{('train row 3', 'eval row 0')[number]}: got a column '{name}'.*rename the column"
        with pytest.raises(ValueError, match=expected):
            make(tmp_path, train, eval_dataset=held, check_rows=2048 if number == 0 else 0)
    turn = {"instruction": "add it", "mask": rows[0]["mask"], name: 1}
    in_turns = [{**row, "turns": [turn]} for row in rows]
    with pytest.raises(ValueError, match=f"train row 0, turn 2: got a column '{name}'"):
        make(tmp_path, in_turns, turns_column="turns")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_blocks": [0]},
            "attention_blocks.*expected the defaults, as .* without log_attention=True or one of",
        ),
        ({"attention_blocks": [4], "log_attention": True}, r"blocks: got \[4\], expected block numbers in 0..3"),
        ({"attention_words_column": "other", "log_attention": True}, "train row 0, column 'other': got .*words of"),
        ({"attention_words_column": "last", "log_attention": True}, "expected words of .* within its first 16 tokens"),
    ],
)
def test_attention_that_cannot_be_recorded_is_refused(tmp_path, data, options, message):
    data = data.map(lambda row: {"other": "nowhere", "last": row["instruction"].split()[-1]})
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data, **options)


def broken_picture(rows):
    features = datasets.Features({**rows.features, "input_image": datasets.Image()})
    listed = [dict(rows[i]) for i in range(4)]
    listed[2]["input_image"] = {"bytes": b"not a picture", "path": None}
    return datasets.Dataset.from_list(listed, features=features)


def with_mask(rows, mask):
    listed = [dict(rows[i]) for i in range(4)]
    listed[1]["mask"] = mask
    return listed


def test_rows_are_checked_without_growing_their_masks(tmp_path, data, monkeypatch):
    """At full size that took longer than the training of 12-megapixel pictures."""
    monkeypatch.setattr("rcgrpo.groups.rollout.grow", None)
    trainer = make(tmp_path, data, mask_growth=0.02)
    with pytest.raises(TypeError):
        trainer.exploration.masks(trainer.train_dataset.edit(0))


BAD = {
    "mask of another size": (
        ValueError,
        r"train row 1, column 'mask': got .*\(16, 32\).*\(32, 32\).*resize",
        dict(change=lambda rows: with_mask(rows, Image.new("L", (32, 16), 255))),
    ),
    "empty mask": (
        ValueError,
        "train row 1, column 'mask': got an empty mask.*255 = edit",
        dict(change=lambda rows: with_mask(rows, Image.new("L", (32, 32)))),
    ),
    "mask of labels": (
        ValueError,
        "train row 1, column 'mask': got several values, whose brightest is 7 of 255.*'nonzero'",
        dict(change=lambda rows: with_mask(rows, Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32) % 8))),
    ),
    "mask that vanishes": (
        ValueError,
        r"train row 1: got a region that vanishes at the edit's height × width \(16, 16\).*raise `resolution`",
        dict(change=lambda rows: with_mask(rows, np.eye(1, 1024, 990).reshape(32, 32)), resolution=16),
    ),
    "no mask": (
        ValueError,
        "train row 1, column 'mask': got None.*drop the row",
        dict(change=lambda rows: with_mask(rows, None)),
    ),
    "no mask column": (
        ValueError,
        "mask_column: .*no column 'mask'.*'caption'.*rename",
        dict(change=lambda rows: rows.remove_columns("mask")),
    ),
    "no column for a reward": (
        ValueError,
        "columns .*'task'.*expected also 'caption'.*leave the reward out",
        dict(change=lambda rows: rows.remove_columns("caption"), reward="compbench_mini"),
    ),
    "broken picture": (
        ValueError,
        "train row 2, column 'input_image': got 13 bytes.*fix or drop",
        dict(change=broken_picture),
    ),
    "no rows": (ValueError, "train_dataset: got no rows", dict(change=lambda rows: [])),
    "no dataset": (ValueError, "train_dataset: got None, expected rows", dict(change=lambda rows: None)),
    "stream": (
        TypeError,
        "train_dataset: got IterableDataset.*turn a streaming dataset into",
        dict(change=lambda rows: rows.to_iterable_dataset()),
    ),
    "several evaluations": (
        TypeError,
        r"train_dataset: got a dictionary of \['easy', 'hard'\], expected one set",
        dict(change=lambda rows: {"easy": rows, "hard": rows}),
    ),
    "an empty evaluation of several": (
        ValueError,
        "eval_hard_dataset: got no rows",
        dict(eval_dataset={"hard": []}),
    ),
    "too few rows": (
        ValueError,
        "train_dataset: got 12 rows, expected at least .* 16 edits .*lower one",
        dict(gradient_accumulation_steps=8),
    ),
    "no such layer": (
        ValueError,
        r"peft_config.target_modules: got \{'q_proj'\}, expected .* to_q,",
        dict(peft=LoraConfig(target_modules=["q_proj"])),
    ),
    "dropout": (
        ValueError,
        "peft_config.lora_dropout: got 0.1, expected 0",
        dict(peft=LoraConfig(target_modules=LAYERS, lora_dropout=0.1)),
    ),
    "KL without base": (ValueError, "beta: got 0.1 without peft_config, expected LoRA", dict(peft=None, beta=0.1)),
    "unknown reward": (
        ValueError,
        "reward_funcs: got 'compbench_mimi'.*did you mean 'compbench_mini'",
        dict(reward="compbench_mimi"),
    ),
    "weights": (ValueError, "reward_weights: got 2 weights, expected 1, one for each", dict(reward_weights=[1.0, 2.0])),
    "no rewards": (ValueError, "reward_funcs: got an empty list", dict(reward=[])),
    "scores for one too many": (
        RewardError,
        "'one_more' returned 3 scores, expected 2.*None where",
        dict(reward=lambda images, **columns: [0.0] * (len(images) + 1)),
    ),
    "no editor": (
        TypeError,
        "model: got a Linear, expected one of FluxKontextPipeline, .*, a Hub id or a folder",
        dict(pipe=torch.nn.Linear(1, 1)),
    ),
}
BAD["scores for one too many"][2]["reward"].__name__ = "one_more"


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, data, case):
    error, message, given = BAD[case]
    given = {"pipe": None, **given}
    if case == "no editor":
        given["pipe"].set_progress_bar_config = lambda disable: None
    change = given.pop("change", lambda rows: rows)
    with pytest.raises(error, match=message):
        make(tmp_path, change(data), **given)


def engine(processes=1, plugin=None):
    return SimpleNamespace(
        num_processes=processes, state=SimpleNamespace(**({f"{plugin}_plugin": 1} if plugin else {}))
    )


@pytest.mark.parametrize(
    ("accelerator", "options", "goes_on", "rows", "message"),
    [
        (engine(2, "fsdp"), {}, False, None, "fsdp: got an engine .* expected shard_model=True"),
        (engine(2, "deepspeed"), {}, False, None, "deepspeed: got an engine .* as FSDP2 and ZeRO-3 do"),
        (engine(1), {"shard_model": True}, False, None, "shard_model: got True on one process, expected several"),
        (engine(2), {"shard_model": True, "beta": 0.1}, True, None, "shard_model: got True with beta=0.1 and a LoRA"),
        (
            engine(2),
            {"shard_model": True},
            False,
            [0],
            "shard_model: got 1 rows in eval_dataset, expected one for each",
        ),
    ],
)
def test_refuses_engines_that_split_the_work_otherwise(accelerator, options, goes_on, rows, message):
    args = SimpleNamespace(**({"n_gpu": 0, "shard_model": False, "beta": 0.0} | options))
    with pytest.raises(ValueError, match=message) as refused:
        check_engine(accelerator, args, goes_on, [rows])
    assert "\n" not in str(refused.value)
    check_engine(engine(2), SimpleNamespace(n_gpu=0, shard_model=True, beta=0.1), False, [[0, 1], None])


def test_refuses_a_step_cache(tmp_path, data):
    pipe = build_tiny_kontext()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"model: the transformer has a step cache enabled.*disable_cache"):
        make(tmp_path, data, pipe=pipe)


def test_evaluate_refuses_what_start_up_refuses(tmp_path, data, held_out):
    trainer = make(tmp_path, data)
    with pytest.raises(ValueError, match="eval_easy_dataset has no column 'mask'"):
        trainer.evaluate({"easy": held_out.remove_columns("mask")})
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate(held_out.remove_columns("mask"))


def test_full_masks_are_only_a_warning(tmp_path, data, caplog):
    trainer = make(tmp_path, with_mask(data, Image.new("L", (32, 32), 255)), max_steps=1)
    (warning,) = [r.getMessage() for r in caplog.records if "covers the whole picture" in r.getMessage()]
    assert warning.startswith("train_dataset: 1 of the checked rows")
    trainer.train()
    assert last(trainer, "grad_norm")[0] > 0
