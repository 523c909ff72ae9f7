"""The examples as a reader runs them: each in a process of its own, or after one another as their README says."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hub_server import HubServer, run_with_hub
from rcgrpo.editors.lora import LORA_FILE
from rcgrpo.tiny import WEIGHTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")


def run(code: str | list[str], folder: Path) -> str:
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else code)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_custom_reward_trains_the_embedded_editor(tmp_path: Path) -> None:
    script = str(EXAMPLES / "custom_reward.py")
    run([script, "--tiny", "--max_steps", "1", "--output_dir", str(tmp_path / "out")], tmp_path)
    assert (tmp_path / "out" / LORA_FILE).stat().st_size > 10_000


TRAIN_EVALUATE_USE = """
import runpy, sys

def example(name, *arguments):  # one process for the three, as most of their time would go into imports
    sys.argv = [name, "--tiny", *arguments]
    runpy.run_path({examples!r} + "/" + name, run_name="__main__")

out = {folder!r}
example("train_compbench.py", "--output_dir", out + "/lora", "--max_steps", "1", "--hub_model_id", "user/kontext")
example("evaluate_compbench.py", out + "/lora", "--output_dir", out + "/evaluation", "--num_samples", "3")
example("use_lora_from_hub.py", "user/kontext", "--output", out + "/from_hub.png")
example("use_lora_from_hub.py", out + "/lora", "--output", out + "/from_folder.png")
"""


@pytest.fixture(scope="module")
def compbench(tmp_path_factory):
    """The folder that the three examples left behind, and the Hub that they talked to."""
    folder = tmp_path_factory.mktemp("compbench")
    with HubServer(lfs=True) as hub:
        done = run_with_hub(TRAIN_EVALUATE_USE.format(examples=str(EXAMPLES), folder=str(folder)), hub)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, hub


def test_what_train_compbench_trained_is_on_the_hub(compbench) -> None:
    folder, hub = compbench
    local, pushed = (folder / "lora" / LORA_FILE).read_bytes(), hub.files["user/kontext"]
    assert len(local) > 10_000 and hashlib.sha256(pushed[LORA_FILE]).digest() == hashlib.sha256(local).digest()
    assert "compbench-mini" in pushed["README.md"].decode()


def test_evaluate_compbench_compares_it_with_the_base(compbench) -> None:
    folder, _ = compbench
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["contenders"] == ["base", "lora"] and not results["unreadable"]
    records = [json.loads(line) for line in (folder / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert record["scores"]["base"]["psnr"] != record["scores"]["lora"]["psnr"] > 10


def test_the_lora_from_the_hub_draws_what_the_one_in_the_folder_draws(compbench) -> None:
    folder, hub = compbench
    from_hub, from_folder = (Image.open(folder / f"from_{place}.png") for place in ("hub", "folder"))
    assert from_hub.tobytes() == from_folder.tobytes() and from_hub.size == (128, 64)
    base, edited = (from_hub.crop((x, 0, x + 64, 64)) for x in (0, 64))
    assert base.tobytes() != edited.tobytes()
    assert any(method == "GET" and LORA_FILE in path and status == 200 for method, path, status in hub.requests)


def test_the_12_b_path_of_train_compbench_asks_for_what_exists(monkeypatch, tmp_path: Path) -> None:
    """Everything up to the weights: the settings, the rewards and the data's options, without loading anything."""
    import rcgrpo
    from rcgrpo.data.loading import parse_split

    asked = {}

    class Recorder:
        def __init__(self, **given):
            asked.update(given)

        def __getattr__(self, name):
            return lambda *args, **kwargs: asked.setdefault(name, kwargs)

    def load(name, **options):
        asked["data"] = name, options
        return []

    monkeypatch.delenv("RCGRPO_JUDGE_URL", raising=False)
    monkeypatch.setattr(rcgrpo, "RCGRPOTrainer", Recorder, raising=False)
    monkeypatch.setattr(rcgrpo, "load_edit_dataset", load, raising=False)
    monkeypatch.setattr(sys, "argv", ["train_compbench.py", "--output_dir", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / "train_compbench.py"), run_name="__main__")

    name, options = asked["data"]
    assert name == "BohanJia/CompBench" and options["held_out"] == 0.1
    assert parse_split(options["split"], options["held_out"]) == ("train", False)
    assert asked["model"] == "black-forest-labs/FLUX.1-Kontext-dev"
    names = [reward.name for reward in rcgrpo.rewards.resolve_rewards(asked["reward_funcs"])]
    assert names == ["editscore", "background_ssim"] and len(asked["args"].reward_weights) == 2
    assert asked["train"] and "save_model" in asked and "push_to_hub" not in asked


def test_the_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if f"]({path.name})" not in text] == []


def test_the_readme_example_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = next(block for block in readme.split("```python\n")[1:] if "RCGRPOTrainer(" in block).split("```")[0]
    run(code.replace("max_steps=2", "max_steps=1, per_device_train_batch_size=2, num_generations=4"), tmp_path)
    assert (tmp_path / "out" / LORA_FILE).exists()


def test_the_embedded_editor_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
