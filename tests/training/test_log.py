"""`log.py`: one line for a person, and nothing for what is not theirs to read."""

from types import SimpleNamespace

import pytest
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from rcgrpo.training.log import ReadableLines, ReadableLog, make_readable, readable

LOGS = {"reward": 0.5, "reward_std": 0.125, "background/psnr": 21.336, "grad_norm": "0.03", "clip_ratio/low_mean": 0.0}
LINE = "reward 0.5000  ± 0.1250  background 21.34 dB  grad 3.00e-02"


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (LOGS, f"step  7/50  {LINE}"),
        ({f"eval_{k}": v for k, v in LOGS.items() if k != "grad_norm"}, "eval  7/50  " + LINE.split("  grad")[0]),
        ({"eval_near_runtime": 2.0, "eval_near_reward": 0.5}, "eval near  7/50  reward 0.5000"),
        ({"train_runtime": 3.0}, None),
        ({}, None),
    ],
)
def test_readable(logs, line):
    assert readable(logs, 7, 50) == line


@pytest.mark.parametrize("log", [ReadableLog(), ReadableLines()])
def test_callback_prints_once_and_on_the_main_process_alone(log, capsys):
    for main in (True, False):
        state = SimpleNamespace(global_step=7, max_steps=50, is_world_process_zero=main)
        log.on_log(None, state, None, logs=LOGS)
        log.on_log(None, state, None, logs=None)
    assert capsys.readouterr().out == f"step  7/50  {LINE}\n"


class Trainer:
    """What holds callbacks."""

    def __init__(self, *callbacks, disable_tqdm=False):
        self.callbacks, self.args = list(callbacks), SimpleNamespace(disable_tqdm=disable_tqdm)

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def remove_callback(self, kind):
        self.callbacks = [callback for callback in self.callbacks if callback is not kind]


def test_what_prints_dictionaries_is_replaced():
    trainer = Trainer(ProgressCallback, PrinterCallback)
    make_readable(trainer, [EarlyStoppingCallback(1)])
    assert trainer.callbacks == [ReadableLog]
    trainer = Trainer(PrinterCallback, disable_tqdm=True)
    make_readable(trainer, ())
    assert trainer.callbacks == [ReadableLines]


def test_a_progress_callback_of_the_users_own_stays():
    class Mine(ProgressCallback):
        pass

    for given in (Mine, Mine()):
        trainer = Trainer(given, ProgressCallback)
        make_readable(trainer, [given])
        assert trainer.callbacks == [given, ProgressCallback]
