"""`log.py`: one line for a person, and nothing for what is not theirs to read."""

from types import SimpleNamespace

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rcgrpo.training.log import ReadableLog, readable

LOGS = {"reward": 0.5, "reward_std": 0.125, "background/psnr": 21.336, "grad_norm": "0.03", "clip_ratio/low_mean": 0.0}
LINE = "reward 0.5000  ± 0.1250  background 21.34 dB  grad 3.00e-02"


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (LOGS, f"step  7/50  {LINE}"),
        ({f"eval_{k}": v for k, v in LOGS.items() if k != "grad_norm"}, "eval  7/50  " + LINE.split("  grad")[0]),
        ({"train_runtime": 3.0}, None),
        ({}, None),
    ],
)
def test_readable(logs, line):
    assert readable(logs, 7, 50) == line


def test_callback_prints_once_and_on_the_main_process_alone(capsys):
    log = ReadableLog()
    for main in (True, False):
        state = SimpleNamespace(global_step=7, max_steps=50, is_world_process_zero=main)
        log.on_log(None, state, None, logs=LOGS)
        log.on_log(None, state, None, logs=None)
    assert capsys.readouterr().out == f"step  7/50  {LINE}\n"


def test_install_replaces_what_prints_dictionaries():
    callbacks = [ProgressCallback, PrinterCallback]
    ReadableLog.install(SimpleNamespace(remove_callback=callbacks.remove, add_callback=callbacks.append))
    assert callbacks == [ReadableLog]
