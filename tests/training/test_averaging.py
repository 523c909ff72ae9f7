"""`averaging.py`: the average of a run's weights, beside the raw ones, to the last bit."""

import pytest
import torch
from safetensors.torch import load_file

from rcgrpo.editors.lora import LORA_FILE
from rcgrpo.training.averaging import AVERAGE_FILE, WeightAverage
from tiny_training import (
    ADAM,
    brightness,
    by_number,
    history,
    make,
    on_two_processes,
    same,
    trained_step_by_step,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")

EDITS = "eval_edits"
SAVING = {**ADAM, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
EMA = {**SAVING, "ema_decay": 0.4}


def averages_of(raw, decay=0.4):
    """By the formula, after each update."""
    found = []
    for n, now in enumerate(raw, start=1):
        keep = 0.0 if n == 1 else min(decay, n / (9 + n))
        last = found[-1] if found else now
        found.append({name: keep * last[name] + (1 - keep) * value for name, value in now.items()})
    return found


def close(found, wanted, scale):
    return all(torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6 * scale) for name in wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("average")
    trainer = make(folder, data, **EMA)
    raw = trained_step_by_step(trainer)
    trainer.save_model()
    return folder, trainer, raw


def test_training_is_the_same_and_ends_with_the_average(tmp_path, data, run):
    folder, trainer, raw = run
    plain = make(tmp_path, data, **SAVING)
    assert all(same(a, b) for a, b in zip(trained_step_by_step(plain), raw, strict=True))
    assert history(plain) == history(trainer) and same(weights(plain), raw[-1])
    scale = max(float(value.abs().max()) for value in raw[-1].values())
    assert close(weights(trainer), averages_of(raw)[-1], scale) and not same(weights(trainer), raw[-1])
    assert not (tmp_path / "checkpoint-2" / AVERAGE_FILE).exists() and not (folder / AVERAGE_FILE).exists()


def test_a_checkpoint_has_the_raw_weights_and_hands_out_the_average(run):
    folder, trainer, raw = run
    for step, (now, average) in enumerate(zip(raw, averages_of(raw), strict=True), start=1):
        checkpoint = folder / f"checkpoint-{step}"
        saved = load_file(checkpoint / "adapter_model.safetensors")
        assert same(saved, {name.replace(".default", ""): value for name, value in now.items()})
        scale = max(float(value.abs().max()) for value in now.values())
        assert close(load_file(checkpoint / AVERAGE_FILE), average, scale)
    assert same(load_file(folder / "checkpoint-4" / AVERAGE_FILE), weights(trainer))
    assert (folder / "checkpoint-4" / LORA_FILE).read_bytes() == (folder / LORA_FILE).read_bytes()
    assert (folder / "checkpoint-3" / LORA_FILE).read_bytes() != (folder / LORA_FILE).read_bytes()


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_bit_by_bit(tmp_path, data, run, step):
    """At the last step nothing is left to train, and the average is the result all the same."""
    folder, trainer, _ = run
    resumed = make(tmp_path, data, **EMA)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert same(weights(resumed), weights(trainer))
    if step == 2:
        assert history(resumed, 2) == history(trainer, 2)
        last = "checkpoint-4"
        assert (tmp_path / last / AVERAGE_FILE).read_bytes() == (folder / last / AVERAGE_FILE).read_bytes()


def test_an_average_can_begin_at_a_checkpoint_without_one(tmp_path, data, caplog):
    plain = make(tmp_path / "plain", data, **{**SAVING, "max_steps": 1})
    plain.train()
    resumed = make(tmp_path / "more", data, **{**EMA, "max_steps": 2})
    raw = []
    resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))
    raw = load_file(tmp_path / "more" / "checkpoint-2" / "adapter_model.safetensors")
    assert "checkpoint-1 was written without it, so the average begins at its weights" in caplog.text
    assert same({name.replace(".default", ""): value for name, value in weights(resumed).items()}, raw)


@pytest.mark.parametrize("peft", [True, None])
def test_evaluations_see_the_average_and_the_best_one_is_the_result(tmp_path, data, peft):
    seen = {}

    def best_after_two(images, trainer_state, **columns):
        if trainers and not trainers[0].model.training:
            seen[trainer_state.global_step] = weights(trainers[0])
        return [b + 9 * (trainer_state.global_step == 2) for b in brightness(images)]

    trainers = []
    rows = [{name: row[name] for name in ("input_image", "instruction", "mask")} for row in data]
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 3, "peft": peft}
    trainers.append(make(tmp_path, rows, best_after_two, rows[:2], **{**EMA, **options}))
    raw = trained_step_by_step(trainers[0])
    averages = averages_of(raw)
    scale = max(float(value.abs().max()) for value in raw[-1].values())
    assert all(close(seen[step], averages[step - 1], scale) for step in (1, 2, 3))
    assert trainers[0].state.best_global_step == 2
    assert same(weights(trainers[0]), seen[2]) and not same(seen[2], raw[1])
    assert same(load_file(tmp_path / "checkpoint-2" / AVERAGE_FILE), seen[2])


def test_half_precision_is_averaged_in_full():
    """Steps of a thousandth around 1 vanish in bfloat16, and the average of many must not."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.999)
    for n in range(200):
        model.weight.data.fill_(1.0 if n % 2 else 1.0078125)  # neighbours
        average.update()
    (shadow,) = average.ema.shadow_params
    assert shadow.dtype == torch.float32 and abs(float(shadow) - 1.0039) < 5e-4
    with average.in_place():
        assert float(model.weight) in (1.0, 1.0078125)
    assert float(model.weight) == 1.0


WORKER = """
import sys, torch
from pathlib import Path
import tiny_training as t
from rcgrpo import compbench_mini
folder, rows = Path(sys.argv[1]), compbench_mini("train", 12, 32)
rows = [{name: row[name] for name in ("input_image", "instruction", "mask")} for row in rows]
options = {**t.ADAM, "ema_decay": 0.4, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
options |= {"eval_strategy": "steps", "eval_steps": 3, "num_eval_edits": 5, "shuffle_dataset": False}
if __name__ == "__main__":
    trainer = t.make(folder / "run", rows, t.by_number, rows, **options)
    trainer.train()
    torch.save((t.weights(trainer), trainer.state.log_history), folder / f"{trainer.args.process_index}.pt")
    trainer.close()
"""


def test_two_processes_average_and_evaluate_alike(tmp_path, data):
    status, errors = on_two_processes(tmp_path, WORKER)
    assert status == 0, errors[-2000:]
    (first, log), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert same(first, second)
    rows = [{name: row[name] for name in ("input_image", "instruction", "mask")} for row in data]
    options = {**ADAM, "ema_decay": 0.4, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "num_eval_edits": 5, "shuffle_dataset": False}
    alone = make(tmp_path / "alone", rows, by_number, rows, gradient_accumulation_steps=2, **options)
    alone.train()
    assert same(weights(alone), first)
    names = ("gradient/signal", "gradient/noise", "lora/travel", "lora/drift")
    for mine, theirs in zip(alone.state.log_history[:3], log[:3], strict=True):
        assert {name: mine.get(name) for name in names} == pytest.approx({name: theirs.get(name) for name in names})
    assert [row.get(EDITS) for row in log] == [row.get(EDITS) for row in other]
    mine, theirs = ([row[EDITS] for row in rows if EDITS in row] for rows in (alone.state.log_history, log))
    assert len(mine) == len(theirs) == 1 and mine[0]["row"] == theirs[0]["row"] and len(mine[0]["row"]) == 5
    assert mine[0]["psnr"] == pytest.approx(theirs[0]["psnr"])
