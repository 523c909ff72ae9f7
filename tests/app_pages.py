"""What the app's tests show: a served page, and the folder of a run."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import rcgrpo.app as app
import rcgrpo.app.edit_tab
from app_edits import SAMPLING, make_lora, make_pipeline
from rcgrpo.app import compare
from rcgrpo.training.hub import LORA_FILE


@contextmanager
def serving(folder, sampling=SAMPLING, **options):
    """The page on a free port: its address, two LoRAs, and a list of the comparisons that the tab *Edit* has made."""
    made = []
    loras = [make_lora(folder / name, scale).removesuffix(f"/{LORA_FILE}") for name, scale in (("a", 0.3), ("b", 0.6))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patch.setattr(
            rcgrpo.app.edit_tab, "compare", lambda *given, **named: made.append(compare(*given, **named)) or made[-1]
        )
        page = app.create_app(make_pipeline(), sampling, loras, **options)
        yield SimpleNamespace(url=app.serve(page, port=0, block=False), loras=loras, made=made)
        page.close()


def make_run(folder, steps=(2, 4), finished=False):
    history = [{"step": step, "reward": float(step), "rewards/closeness/mean": 0.5} for step in range(1, 5)]
    edits = {"row": [0, 1], "task": ["add", "add"], "correct": [100.0, 0.0]}
    history += [{"step": step, "eval_reward": 1.0, "eval_edits": edits} for step in steps]
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        state = {"global_step": step, "max_steps": 4, "log_history": [row for row in history if row["step"] <= step]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    completions = folder / "completions"
    completions.mkdir()
    for name, step in [("completions", 10), ("completions", 9), ("eval_completions", 4)]:
        table = pyarrow.table({"step": [step] * 2, "candidate": [0, 1], "reward": [0.25, None]})
        pyarrow.parquet.write_table(table, completions / f"{name}_{step:05d}.parquet")
    Image.new("RGB", (8, 8)).save(completions / "completions_00009.jpg")
    if finished:
        Image.new("RGB", (8, 8)).save(folder / "reward_curves.png")
        (folder / "samples").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "samples" / "changed_most.png")
        (folder / "metrics.md").write_text("| metric |\n|---|\n")
    return folder
