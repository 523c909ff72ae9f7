"""`resuming.py`: the same command goes on, whatever befell the checkpoints, and a signal ends a run with one."""

import errno
import json
import logging
import os
import shutil
import signal
import threading

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import TrainerCallback

from checkpoint_files import empty, gone, half
from processes import side_by_side
from rcgrpo import RCGRPOConfig, compbench_mini
from rcgrpo.processes import stopping
from rcgrpo.training import checkpoints, resuming
from rcgrpo.training.checkpoints import UNFINISHED, by_step, fault
from tiny_training import ADAM, LAYERS, Signal, brightness, history, make, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")
SAVING = ADAM | {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run of three steps with a checkpoint after each, its folder and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, data, **SAVING)
    trainer.train()
    return folder, weights(trainer), history(trainer)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of that run's folder that may be broken."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# ------------------------------------------------------------------------------------------ what is whole


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
FILES += ["pytorch_lora_weights.safetensors", "adapter_config.json", "training_args.bin", checkpoints.SEAL]


def test_the_trainers_checkpoint_holds_no_other_files(whole):
    assert sorted(p.name for p in (whole[0] / "checkpoint-3").iterdir()) == sorted([*FILES, "README.md"])


@pytest.mark.parametrize("damage", [half, empty])
def test_the_newest_good_checkpoint_gives_the_same_bits(whole, folder, data, caplog, damage):
    for i, name in enumerate(FILES):
        damage(folder / "checkpoint-3" / name)
        if i == 0:
            half(folder / "checkpoint-2" / "optimizer.pt")
            resumed = make(folder, data, **ADAM)
            resumed.train(resume_from_checkpoint=True)
            assert same(weights(resumed), whole[1]) and history(resumed) == whole[2]
            passed = [text for text in warnings_of(caplog) if "is passed over" in text]
            assert [text.split()[1] for text in passed] == ["checkpoint-3", "checkpoint-2"]
        assert checkpoints.newest_whole(folder)[0] == folder / "checkpoint-1"
        shutil.copytree(whole[0] / "checkpoint-3", folder / "checkpoint-3", dirs_exist_ok=True)
        assert fault(folder / "checkpoint-3") is None


def test_with_nothing_good_a_run_begins(whole, folder, data, caplog):
    """As a job script's first call does, which says `True` too."""
    gone(folder / "checkpoint-1" / "trainer_state.json")
    for step in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "checkpoint-7").mkdir()
    (folder / UNFINISHED / "checkpoint-4").mkdir(parents=True)
    (folder / ".tmpAbCdEf").touch()
    resumed = make(folder, data, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1]) and history(resumed) == whole[2]
    told = "\n".join(warnings_of(caplog))
    assert "checkpoint-7" in told and "checkpoint-1" in told and "so from the start" in told
    assert sorted(p.name for p in folder.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 7)]
    assert all(fault(folder / f"checkpoint-{n}") is None for n in (1, 2, 3))


def test_a_broken_checkpoint_that_was_asked_for_is_refused(folder, data):
    half(folder / "checkpoint-3" / "trainer_state.json")
    trainer = make(folder, data, **ADAM)
    with pytest.raises(ValueError, match=r"got '.*checkpoint-3', expected a whole .*trainer_state.json.*give .*-2$"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"got 'gone', expected a whole checkpoint, but there is no such folder"):
        trainer.train(resume_from_checkpoint="gone")


@pytest.mark.parametrize("options", [{}, {"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_a_finished_run_does_nothing(whole, folder, data, caplog, options):
    """Also one that counts in epochs, of six updates here, or that is to have had fewer steps."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    resumed = make(folder, data, **(SAVING | options))
    result = resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1]) and history(resumed) == whole[2]
    assert result.global_step == resumed.state.global_step == 3
    assert "has all 3 steps behind it: nothing is left to train" in warnings_of(caplog)[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    longer = make(folder, data, **(SAVING | {"max_steps": 4}))
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


# ------------------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"r": 2}, r"peft_config.r: got 2, expected 4 as in .*checkpoint-3; set it back"),
        ({"lora_alpha": 4}, r"peft_config.lora_alpha: got 4, expected 8"),
        ({"target_modules": LAYERS[:2]}, r"peft_config.target_modules: got \['to_q', 'to_v'\], expected \['to_k', "),
        ({"use_rslora": True}, r"peft_config.use_rslora: got True, expected False"),
        (None, "peft_config: got none, expected a LoRA as in"),
    ],
)
def test_another_lora_is_refused_in_one_line(folder, data, lora, said):
    config = lora and LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | lora))
    trainer = make(folder, data, peft=config, **ADAM)
    with pytest.raises(ValueError, match=said) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("optim", "ours"), [("sgd", "torch.optim.SGD"), ("adafactor", r"transformers\S*.Adafactor")])
def test_another_optimizer_is_refused_in_one_line(folder, data, optim, ours):
    trainer = make(folder, data, **(ADAM | {"optim": optim, "max_steps": 4}))
    with pytest.raises(ValueError, match=rf"optim: got {ours}, expected torch.optim.AdamW, whose state ") as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


def test_weights_alone_go_on_with_a_warning_at_their_learning_rate(tmp_path, data, caplog):
    trainer = make(tmp_path, data, save_only_model=True, **(SAVING | {"save_total_limit": 1}))
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    trainer = make(tmp_path, data, save_only_model=True, **(SAVING | {"max_steps": 2}))
    trainer.train()
    resumed = make(tmp_path, data, **ADAM)
    resumed.train(resume_from_checkpoint=True)
    assert any("no optimizer state (save_only_model)" in text for text in warnings_of(caplog))
    assert [row["learning_rate"] for row in resumed.state.log_history if "loss" in row][2] == rates[2] > 0


# ------------------------------------------------------------------------------------------ writing


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_space_for_a_zip(*_, **__):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("torch.save", no_space_for_a_zip),
        ("safetensors.torch.save_file", no_space_for_tensors),
        ("transformers.TrainerState.save_to_json", no_space),
        ("rcgrpo.training.checkpoints.seal", no_space),
        ("rcgrpo.training.checkpoints.publish", no_space),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, data, monkeypatch, where, error, whole):
    class FillUp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(where, error)

    trainer = make(tmp_path, data, callbacks=[FillUp()], **(SAVING | {"save_total_limit": 1}))
    with pytest.raises(
        checkpoints.CheckpointError, match=r"checkpoint-2: could not be written in .*as they were"
    ) as told:
        trainer.train()
    assert "\n" not in str(told.value) and isinstance(told.value, OSError)
    assert os.listdir(tmp_path) == ["checkpoint-1"] and fault(tmp_path / "checkpoint-1") is None
    monkeypatch.undo()
    resumed = make(tmp_path, data, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1])


def test_the_best_checkpoint_is_known_by_its_own_name(tmp_path, data):
    def best_after_two(images, trainer_state, **columns):
        return [b + 9 * (trainer_state.global_step == 2) for b in brightness(images)]

    held_out = compbench_mini("test", 3, 32)
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward"}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "max_steps": 4}
    trainer = make(tmp_path, data, best_after_two, held_out, **(SAVING | options))
    kept = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.append((list(by_step(tmp_path)), state.best_model_checkpoint))
            written = json.loads((tmp_path / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
            assert written["best_model_checkpoint"] == state.best_model_checkpoint
            assert written["best_global_step"] == state.best_global_step

    trainer.add_callback(Look())
    trainer.train()
    one, two = (str(tmp_path / f"checkpoint-{n}") for n in (1, 2))
    assert kept == [([1], one), ([2], two), ([2, 3], two), ([2, 4], two)]


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "kind", "event"),
    [
        (signal.SIGTERM, SystemExit, "on_step_begin"),
        (signal.SIGINT, KeyboardInterrupt, "on_step_begin"),
        (signal.SIGINT, SystemExit, "on_pre_optimizer_step"),
        (signal.SIGTERM, SystemExit, "on_save"),
    ],
)
def test_a_signal_ends_a_run_after_the_update_with_a_checkpoint(
    tmp_path, data, whole, number, kind, event, capsys, monkeypatch
):
    """The same bits afterwards, and the same log."""
    monkeypatch.setattr(resuming, "leave_in_time", lambda code: None)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    options = SAVING if event == "on_save" else ADAM
    trainer = make(tmp_path, data, callbacks=[Signal(1, number, event)], **options)
    with pytest.raises(kind) as stop:
        trainer.train()
    step = 1 if event == "on_save" else 2
    assert stop.value.code == 128 + number and list(by_step(tmp_path))[-1] == step
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    name = signal.Signals(number).name
    (line,) = [text for text in capsys.readouterr().err.splitlines() if name in text]
    assert line.startswith(f"{name}: stopped after step {step}; checkpoint-{step} in {tmp_path} has it; go on with")
    resumed = make(tmp_path, data, **ADAM)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1]) and history(resumed) == whole[2]


def test_a_stop_at_the_end_of_a_run_is_a_stop(tmp_path, data, whole, monkeypatch):
    monkeypatch.setattr(resuming, "leave_in_time", lambda code: None)
    trainer = make(tmp_path, data, callbacks=[Signal(3, event="on_train_end")], **ADAM)
    with pytest.raises(SystemExit):
        trainer.train()
    again = make(tmp_path, data, **ADAM)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), whole[1])


@pytest.mark.parametrize("step", [0, 2])
def test_in_the_middle_of_a_cycle_the_cycle_is_finished(tmp_path, data, caplog, monkeypatch, step):
    monkeypatch.setattr(resuming, "leave_in_time", lambda code: None)
    options = ADAM | {"num_iterations": 2, "max_steps": 6}
    reference = make(tmp_path / "whole", data, **options)
    reference.train()
    with pytest.raises(SystemExit):
        make(tmp_path, data, callbacks=[Signal(step)], **options).train()
    assert list(by_step(tmp_path)) == [step + 2] and not any("middle of a cycle" in t for t in warnings_of(caplog))
    resumed = make(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(reference)) and history(resumed) == history(reference)


class Hanging:
    """A reward that never answers from the second update on, while signals come."""

    def __init__(self, *seconds, step=1):
        self.released, self.seconds, self.step = threading.Event(), seconds, step

    def __call__(self, images, trainer_state, **columns):
        if trainer_state.global_step == self.step and self.seconds:
            for after in self.seconds:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()
            self.seconds = ()
            self.released.wait(60)
        return brightness(images)


@pytest.mark.parametrize(("seconds", "grace"), [((0.1,), 0.3), ((0.1, 0.5), 60.0)])
def test_a_hanging_reward_does_not_hold_a_run(tmp_path, data, whole, seconds, grace, monkeypatch, capsys):
    """After a while, or at a second signal, the last whole update is saved."""
    left = []
    monkeypatch.setattr(resuming, "leave_in_time", left.append)
    monkeypatch.setattr(stopping, "GRACE_SECONDS", grace)
    monkeypatch.setattr(stopping, "SAME_SECONDS", 0.2)
    reward = Hanging(*seconds)
    trainer = make(tmp_path, data, reward, **ADAM)
    try:
        with pytest.raises(SystemExit) as stop:
            trainer.train()
    finally:
        reward.released.set()
    assert stop.value.code == 143 and left == [143] and list(by_step(tmp_path)) == [1]
    assert "SIGTERM: stopped after step 1; checkpoint-1 in" in capsys.readouterr().err
    resumed = make(tmp_path, data, **ADAM)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1])


def test_before_the_first_update_there_is_nothing_to_save(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(resuming, "leave_in_time", lambda code: None)
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.1)
    reward = Hanging(step=0)
    trainer = make(tmp_path, data, reward, **ADAM)
    reward.seconds = (0.1,)  # not at start-up
    try:
        with pytest.raises(SystemExit):
            trainer.train()
    finally:
        reward.released.set()
    assert "SIGTERM: stopped after step 0; there is no checkpoint yet" in capsys.readouterr().err
    assert not by_step(tmp_path)


def test_a_second_signal_spares_the_optimizer_and_the_writing(tmp_path, data, whole, monkeypatch):
    """Between the two every process is in the middle of something that would be half done."""
    monkeypatch.setattr(resuming, "leave_in_time", lambda code: None)
    monkeypatch.setattr(stopping, "SAME_SECONDS", -1.0)
    seal, sent = checkpoints.seal, []

    def twice(*given):
        sent.extend(signal.raise_signal(signal.SIGTERM) for _ in range(2))
        seal(*given)

    trainer = make(tmp_path, data, callbacks=[Signal(1, event="on_pre_optimizer_step")] * 2, **ADAM)
    monkeypatch.setattr(checkpoints, "seal", twice)
    with pytest.raises(SystemExit):
        trainer.train()
    assert len(sent) == 2 and list(by_step(tmp_path)) == [2] and fault(tmp_path / "checkpoint-2") is None
    monkeypatch.undo()
    resumed = make(tmp_path, data, **ADAM)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), whole[1])


def test_a_notebook_gets_its_keyboard_interrupt(tmp_path, data, monkeypatch):
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt) as stop:
        make(tmp_path, data, callbacks=[Signal(0, signal.SIGINT)], **ADAM).train()
    assert not isinstance(stop.value, SystemExit) and list(by_step(tmp_path)) == [1]


def test_the_users_handlers_and_other_threads_are_left_alone(tmp_path, data):
    got = []
    previous = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        trainer = make(tmp_path, data, callbacks=[Signal(0)], **ADAM)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert got == [1] and trainer.state.global_step == 3
    trainer = make(tmp_path, data, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.state.global_step == 1 and torch.isfinite(torch.tensor(history(trainer)[0]["loss"]))


# ------------------------------------------------------------------------------------------ several processes

WORKER = """
import sys
from pathlib import Path
import torch
import tiny_training as t
from rcgrpo import compbench_mini
from rcgrpo.processes import stopping
stopping.GRACE_SECONDS = stopping.HANG_SECONDS = 600.0  # on a busy machine an update takes long
folder, data = Path(sys.argv[1]), compbench_mini("train", 12, 32)
options = t.ADAM | {"per_device_train_batch_size": 1, "use_cpu": False}
if sys.argv[2] == "stop":
    whole = t.make(folder / "whole", data, **options)
    whole.train()
    torch.save(t.weights(whole), folder / f"whole{whole.args.process_index}.pt")
trainer = t.make(folder / "run", data, **options)
assert trainer.accelerator.num_processes == 2
if sys.argv[2] == "stop" and trainer.args.process_index == 1:
    trainer.add_callback(t.Signal(1))
trainer.train(resume_from_checkpoint=True)
torch.save(t.weights(trainer), folder / f"resumed{trainer.args.process_index}.pt")
trainer.close()
"""


def test_two_processes_without_a_gpu_are_one_run_and_stop_together(tmp_path, data):
    """The signal comes to one of them. Two processes give one's bits with accumulation, as a mean of two is exact."""
    (tmp_path / "worker.py").write_text(WORKER)
    stopped = side_by_side(2, tmp_path / "worker.py", tmp_path, "stop")
    assert [status for status, _ in stopped] == [143, 143], stopped
    assert stopped[0][1].count("SIGTERM: stopped after step 2") == 1 and "SIGTERM" not in stopped[1][1]
    assert not any("Traceback" in errors for _, errors in stopped)
    (checkpoint,) = by_step(tmp_path / "run").values()
    assert fault(checkpoint) is None and len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    ended = side_by_side(2, tmp_path / "worker.py", tmp_path, "go on")
    assert [status for status, _ in ended] == [0, 0], ended
    first, *others = (torch.load(tmp_path / f"{name}{rank}.pt") for name in ("whole", "resumed") for rank in (0, 1))
    assert all(same(first, other) for other in others)
    alone = make(tmp_path / "alone", data, **(ADAM | {"per_device_train_batch_size": 1}), gradient_accumulation_steps=2)
    alone.train()
    assert same(weights(alone), first)


def test_a_launch_that_would_be_two_runs_is_refused(tmp_path, monkeypatch):
    """On a machine whose accelerator has no process group, such as Apple's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(ValueError, match=r"WORLD_SIZE: got 2 processes .* expected the 1 of .*; pass use_cpu=True"):
        RCGRPOConfig(str(tmp_path), bf16=False)
