"""What the study's tests do in place of a real cell; imported by the processes of cells, so it loads nothing heavy."""

import json
import os
import sys
import time
from pathlib import Path


def fake(folder: Path) -> None:
    """Write a result; the first time, one cell is broken."""
    spec = json.loads((folder / "cell.json").read_text())
    with open(folder / "runs", "a") as log:
        log.write("x")
    print("working on", spec["seed"], flush=True)
    os.system("echo a child wrote this")
    if spec["config"]["edit_strength"] == 0.6 and spec["seed"] == 1 and len((folder / "runs").read_text()) == 1:
        sys.exit("broken")
    (folder / "result.json").write_text(json.dumps({"spec": spec}))


def nothing(folder: Path) -> None:
    """End without a result."""


def endless(folder: Path) -> None:
    """The first seed ends, the others would run for a minute."""
    (folder / "pid").write_text(str(os.getpid()))
    if json.loads((folder / "cell.json").read_text())["seed"]:
        time.sleep(60)
