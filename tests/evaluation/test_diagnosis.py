"""`diagnosis.py`: which changes are alarms, and a folder that is written whole."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from random_edits import edit_of
from rcgrpo.cli import diagnose
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.evaluation import diagnosis
from rcgrpo.evaluation.survey import match_strength, survey
from rcgrpo.groups.rollout import Exploration
from rcgrpo.reporting.statistics import PairedDifference
from rcgrpo.rewards import resolve_rewards
from tiny_kontext import build_tiny_kontext


@pytest.fixture(scope="module")
def editor():
    return FluxKontextEditor(build_tiny_kontext(), 32, 3, max_sequence_length=48)


def difference(metric, before, after, clear=True):
    change = after - before
    low, high = (change - 1e-9, change + 1e-9) if clear else (-1.0, 1.0)
    return PairedDifference(metric, before, after, change, low, high, 9)


def test_alarms_go_off_for_clear_changes_only():
    hacked = [difference("reward", 0.5, 0.6), difference("held-out reward", 0.5, 0.45)]
    assert "is being hacked" in diagnosis.alarms(hacked)[0]
    assert not diagnosis.alarms([hacked[0], difference("held-out reward", 0.5, 0.45, clear=False)])
    assert not diagnosis.alarms([hacked[0], difference("held-out reward", 0.5, 0.498)]), "less than 1 % is no matter"
    assert "falls by 10.0%" in diagnosis.alarms([hacked[0], difference("held-out reward", -0.5, -0.55)])[0]
    assert not diagnosis.alarms([difference("reward", 0.6, 0.5), hacked[1]])
    (grid,) = diagnosis.alarms([difference("edge density", 0.1, 0.13)])
    assert "+30%" in grid and "grids" in grid
    (blur,) = diagnosis.alarms([difference("edge density", 0.1, 0.08)])
    assert "blur" in blur
    assert not diagnosis.alarms([difference("edge density", 0.1, 0.105)])
    assert "alike" in diagnosis.alarms([difference("diversity inside", 0.1, 0.05)])[0]


def test_more_variance_of_the_edit_reward_is_better_and_of_the_whole_reward_neither():
    def findings(variance):
        numbers = {"reward_var": variance, "edit_reward_var": variance, "keep_reward_var": variance}
        return [SimpleNamespace(numbers=numbers)] * 6

    rows = diagnosis.paired(findings(2.0), findings(1.0), ("reward_var", "edit_reward_var", "keep_reward_var"))
    lines = diagnosis.difference_table(rows).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["↓", "↓ worse", "↓ better"]


def test_diagnosis_is_written_whole(editor, tmp_path):
    def half(images, **columns):
        return [float(np.asarray(image).mean()) for image in images]

    judges = dict.fromkeys(("reward", "edit", "keep", "held_out"), resolve_rewards(half)[0])
    edits = [edit_of(0), edit_of(1)]
    settings = asdict(diagnose.DiagnoseArguments(num_generations=3))

    def found(kind, **options):
        explored = Exploration(0.9, kind=kind)
        return survey(editor, editor.pipeline.transformer, edits, 3, explored, ("key",), judges, **options)

    arms = {
        diagnosis.REGION: found("region", depth_step=1, num_maps=2),
        diagnosis.GLOBAL: found("global", depth_step=1),
        diagnosis.MATCHED: found("global", depth_step=1),
        diagnosis.BASE: found("region"),
    }
    match = match_strength(lambda strength: strength, 0.5)
    text = diagnosis.write_diagnosis(tmp_path, settings, arms, match, 0.5)
    assert (tmp_path / "diagnostics.md").read_text() == text and "No alarm." in text
    content = json.loads((tmp_path / "diagnostics.json").read_text())
    assert content["match"]["strength"] == pytest.approx(0.5, rel=0.02) and content["match"]["within_tolerance"]
    region = content["arms"]["region"]
    assert region["by_step"]["outside"][0] == 0 and len(region["by_block"]["inside"]) == 5
    mean = np.mean([f.numbers["leakage"] for f in arms["region"]])
    assert region["numbers"]["leakage"]["mean"] == pytest.approx(mean)
    split = region["reward_variance"]
    assert split["edit"] + split["keep"] + split["rest"] == pytest.approx(split["total"])
    for name in ("leakage", "reward_variance", "attention"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 100
    assert not list(tmp_path.glob(".*"))
