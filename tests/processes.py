"""Run a script or a module on several processes of this machine, as a launcher does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def on_processes(number, *command):
    """The exit status and the errors of a script with its arguments, or of `-m` and a module with its arguments."""
    drop = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    try:
        launched = subprocess.Popen(
            [*launcher, *map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        pytest.skip(f"the launcher cannot start: {error}")
    with launched:
        try:
            _, errors = launched.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            launched.terminate()  # not killed, as its workers would stay behind
            raise
    if "RendezvousConnectionError" in errors or "failed to listen" in errors:
        pytest.skip("the launcher cannot open a local port")
    return launched.returncode, errors
