"""What works without the extras, and the line that each of them is missed with."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import rcgrpo
from rcgrpo.data.masks import difference_mask, feather_mask
from rcgrpo.evaluation.diagnosis import small_multiples
from rcgrpo.evaluation.held_out import Scorer
from rcgrpo.inputs.extras import EXTRAS, missing, require
from rcgrpo.maths.regions import corrupt
from rcgrpo.reporting.curves import plot_curves
from rcgrpo.reporting.sheets import heatmap
from rcgrpo.rewards import resolve_rewards
from rcgrpo.rewards.region_scorer import RegionScorer, load_network, split_mask
from rcgrpo.rewards.server import create_app

ROOT = Path(__file__).parents[2]
GREY, HALF = Image.new("RGB", (8, 8), "grey"), Image.new("L", (8, 8))
HALF.paste(255, (0, 0, 4, 8))

PLAIN = """
import sys, warnings
from importlib.metadata import Distribution, PackageNotFoundError

sys.modules |= dict.fromkeys(sys.argv[2:])  # importing any of these raises ModuleNotFoundError
installed = Distribution.from_name

def found(name):
    if name.lower().replace("-", "_") in sys.argv[2:]:
        raise PackageNotFoundError(name)
    return installed(name)

Distribution.from_name = found  # torchmetrics asks here
warnings.simplefilter("ignore")
from rcgrpo import RCGRPOTrainer, RegionDecoupledFluxKontextPipeline, compbench_mini
from tiny_kontext import TINY_CALL, build_tiny_kontext
from tiny_training import brightness, make, same, weights
from rcgrpo.evaluation.held_out import Scorer, judge_held_out
from rcgrpo.rewards import RewardError

data = compbench_mini("train", 4, 32)
trainer = make(sys.argv[1], data, [brightness, "background_ssim"], max_steps=1)
start = weights(trainer)
trainer.train()
assert not same(weights(trainer), start)
scores = judge_held_out(trainer, trainer.train_dataset, "held-out", maps=False)[0].scores
assert "background SSIM" in scores and "edit score" not in scores, scores
trainer.save_model()
row = data[0]
call = dict(prompt=row["instruction"], image=row["input_image"], mask_image=row["mask"], num_images_per_prompt=2)
assert len(trainer.pipeline(**call, **TINY_CALL).images) == 2
try:
    make(sys.argv[1] + "/2", data, "compbench_mini")
except ModuleNotFoundError as error:
    print(error)
from rcgrpo.cli import main
serve = ["rewards", "serve", "--reward_funcs", "background_l1"]
for command in (["train"], ["diagnose"], ["evaluate"], ["app"], serve):
    try:
        main(command)
    except SystemExit as error:
        print(error)
"""


def hide(monkeypatch, extra):
    for name in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, name, None)


def line(extra, names=None):
    packages = ", ".join(names or EXTRAS[extra])
    return re.escape(f": got no package {packages}, expected the extra {extra!r}; pip install 'rcgrpo[{extra}]'") + "$"


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("masks", lambda: corrupt(HALF, "grow", 0.5)),
        ("masks", lambda: difference_mask(GREY, GREY)),
        ("masks", lambda: feather_mask(HALF, 0.1)),
        ("report", lambda: plot_curves([{"step": 1, "reward": 1.0}], "curves.png")),
        ("report", lambda: heatmap(np.ones((2, 2)), GREY)),
        ("report", lambda: small_multiples(1)),
        ("serve", lambda: create_app(resolve_rewards("background_l1"))),
        ("tiny", lambda: load_network.__wrapped__()),
        ("tiny", lambda: split_mask(HALF, 2)),
        ("tiny", lambda: RegionScorer().lp_t([GREY], [HALF], ["an apple"])),
        ("tiny", lambda: Scorer(["edit_score"])),
    ],
)
def test_what_needs_an_extra_names_it(monkeypatch, extra, use):
    load_network.cache_clear()
    hide(monkeypatch, extra)
    with pytest.raises(ModuleNotFoundError, match=line(extra)):
        use()
    load_network.cache_clear()


def test_what_is_there_is_not_missed(monkeypatch):
    assert missing("masks") == [] and require("masks", "anything") is None
    monkeypatch.setitem(sys.modules, "timm", None)
    assert missing("tiny") == ["timm"] and missing("masks") == []
    with pytest.raises(ModuleNotFoundError, match="^the judge" + line("tiny", ["timm"])) as caught:
        require("tiny", "the judge")
    assert caught.value.name == "timm"


def test_extras_bring_what_they_are_said_to_bring_and_nobody_else_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def packages(extra):
        found = [Requirement(text) for text in project["optional-dependencies"][extra]]
        others = [packages(inner) for each in found if each.name == "rcgrpo" for inner in each.extras]
        return {each.name.replace("-", "_") for each in found if each.name != "rcgrpo"}.union(*others)

    core = {Requirement(text).name.replace("-", "_") for text in project["dependencies"]}
    for extra, brought in EXTRAS.items():
        assert packages(extra) == set(brought) and not core & set(brought)


def test_a_user_of_another_editor_needs_none_of_them(tmp_path):
    absent = sorted({name for names in EXTRAS.values() for name in names} | {"lpips", "pycocotools", "skimage"})
    environment = {**os.environ, "PYTHONPATH": f"{Path(rcgrpo.__file__).parents[1]}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "run", *absent], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = [text for text in done.stdout.splitlines() if "got no package" in text]
    wanted = ["tiny", "tiny", "tiny", "tiny", "app", "serve"]
    assert len(said) == len(wanted), done.stdout
    for text, extra in zip(said, wanted, strict=True):
        assert re.search(line(extra), text)
