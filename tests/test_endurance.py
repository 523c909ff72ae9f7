"""`benchmarks/endurance.py`, in its short form: kills, failing rewards, bad inputs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "endurance.py"


def test_a_few_of_each_are_lived_through():
    done = subprocess.run([sys.executable, SCRIPT, "--short"], capture_output=True, text=True, timeout=1500)
    figures = done.stdout.splitlines()[-3:]
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    for line, what in zip(figures, ("kills", "reward faults", "bad inputs"), strict=True):
        right, of, total = line.split()[:3]
        assert what in line and of == "of" and right == total and int(total) >= 5
