"""Run a script or a module on several processes of this machine, as a launcher does."""

import os
import socket
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
            _, errors = launched.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            launched.terminate()  # not killed, as its workers would stay behind
            raise
    if "RendezvousConnectionError" in errors or "failed to listen" in errors:
        pytest.skip("the launcher cannot open a local port")
    return launched.returncode, errors


def side_by_side(number, *command):
    """The exit status and the errors of each process of a launch without a launcher, which would sum them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    path = {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(number):
        env = os.environ | {k: str(v) for k, v in {**launch, **path, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes))
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]
