import subprocess
import sys
from pathlib import Path

import pytest

from rcgrpo.tiny import WEIGHTS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not beside the tests")


def run(code: str | list[str], folder: Path) -> str:
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else code)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_custom_reward_trains_the_embedded_editor(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "custom_reward.py")
    run([script, "--tiny", "--max_steps", "1", "--output_dir", str(tmp_path / "out")], tmp_path)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000


def test_the_readme_example_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = next(block for block in readme.split("```python\n")[1:] if "RCGRPOTrainer(" in block).split("```")[0]
    run(code.replace("max_steps=2", "max_steps=1, per_device_train_batch_size=2, num_generations=4"), tmp_path)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_the_embedded_editor_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
