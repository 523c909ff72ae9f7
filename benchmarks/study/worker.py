"""What a cell's process does around its work: a log of its own, and an end when the study has ended.

Only the standard library, because every process imports it.
"""

import importlib
import multiprocessing
import os
import threading
from pathlib import Path


def work_on(work: str, folder: str) -> None:
    """Call `module:function` with the folder; all output, C libraries' too, goes to the folder's `log.txt`."""
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=end_with_study, daemon=True).start()
    module, _, function = work.partition(":")
    getattr(importlib.import_module(module), function)(Path(folder))


def end_with_study() -> None:
    """End this process when the study's has ended, even if it was killed, so that no cell is worked on twice."""
    study = multiprocessing.parent_process()
    assert study is not None, "cells are worked on in processes of `run_cells`"
    study.join()
    os._exit(1)
