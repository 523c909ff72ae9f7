"""`survey.py`: every edit measured, explorations compared at equal diversity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from random_edits import edit_of
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.evaluation.survey import depth_variance, judge, match_strength, survey
from rcgrpo.groups.diagnostics import (
    target_closeness,
    variance,
)
from rcgrpo.groups.rollout import Exploration, make_groups
from rcgrpo.rewards import resolve_rewards
from tiny_kontext import build_tiny_kontext


@pytest.fixture(scope="module")
def editor():
    return FluxKontextEditor(build_tiny_kontext(), 32, 3, max_sequence_length=48)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 0.99), st.floats(0.5, 3))
def test_match_strength_finds_what_it_is_asked_for(strength, power):
    def measure(value):
        return value**power

    found = match_strength(measure, measure(strength), tolerance=0.02, max_evaluations=40)
    assert found.reached == measure(found.strength)
    assert abs(found.reached - measure(strength)) <= 0.02 * measure(strength)


def test_match_strength_says_when_even_full_noise_falls_short_and_never_overspends():
    calls = []

    def measure(strength):
        calls.append(strength)
        return strength**2

    assert match_strength(measure, 1.5) == (1.0, 1.0, 1)
    calls.clear()
    found = match_strength(measure, 1e-7, tolerance=0, max_evaluations=5)
    assert found.evaluations == len(calls) == 5
    assert abs(found.strength - 1e-7**0.5) == min(abs(strength - 1e-7**0.5) for strength in calls)


def test_match_strength_follows_the_power_law_from_what_is_known():
    calls = []

    def measure(strength):
        calls.append(strength)
        return 0.02 * strength**1.5

    known = {0.5: measure(0.5)}
    calls.clear()
    found = match_strength(measure, measure(0.4), known=known)
    assert found.evaluations == len(calls) - 1 <= 2 and found.strength == pytest.approx(0.4, rel=0.02)
    calls.clear()
    assert match_strength(measure, known[0.5] * 1.01, known=known) == (0.5, known[0.5], 0) and not calls
    # what is known falls short of the target, and so does full strength
    assert match_strength(measure, 0.03, known=known)[:2] == (1.0, 0.02)


def test_hidden_states_vary_where_the_noise_does(editor):
    model = editor.pipeline.transformer
    (group,) = make_groups(editor, model, [edit_of(0)], 3, Exploration(0.9), ("key",))
    found = depth_variance(editor, model, group, 0)
    assert found.inside.shape == found.outside.shape == (5,)  # the embedder, two double and two single blocks
    assert float(found.outside[0]) == pytest.approx(0, abs=1e-10) and (found.inside > 0).all()
    assert (found.outside[1:] > 0).all(), "attention carries the difference outside"
    assert not model.x_embedder._forward_hooks
    embedded = model.x_embedder(group.trajectory[0])
    expected = embedded.var(0).mean(-1)[group.region == 1].mean() / embedded.square().mean()
    torch.testing.assert_close(found.inside[0], expected.detach())
    (same,) = make_groups(editor, model, [edit_of(0)], 3, Exploration(0.0), ("key",))
    torch.testing.assert_close(depth_variance(editor, model, same, 1).inside, torch.zeros(5), rtol=0, atol=1e-9)


def test_survey_measures_every_edit_and_explorations_share_their_draws(editor):
    def half(images, **columns):
        return [float(np.asarray(image).mean()) for image in images]

    judges = dict(zip(("reward", "edit", "keep", "held_out"), [resolve_rewards(half)[0]] * 3, strict=False))
    judges["held_out"] = resolve_rewards(target_closeness)[0]
    edits, model = [edit_of(0), edit_of(1), edit_of(2)], editor.pipeline.transformer
    found = survey(
        editor, model, edits, 3, Exploration(0.9), ("key",), judges, depth_step=1, num_maps=1, edits_at_once=2
    )
    assert [finding.edit.row for finding in found] == [0, 1, 2]
    assert [finding.attention_map is None for finding in found] == [False, True, True]
    for finding in found:
        (group,) = make_groups(editor, model, [finding.edit], 3, Exploration(0.9), ("key",))
        scores = judge(group, judges)
        torch.testing.assert_close(finding.scores["reward"], scores["reward"], rtol=0, atol=0.2)
        assert finding.numbers["reward_var"] == pytest.approx(variance(finding.scores["reward"]))
        assert finding.numbers["edit_spearman"] == pytest.approx(1, abs=1e-5)
        assert finding.numbers["held_out"] == pytest.approx(float(scores["held_out"].mean()), abs=1e-3)
        assert 0 < finding.numbers["attention_mass"] < 1
        assert finding.steps.inside.shape == finding.sigmas.shape == (4,)
        assert float(finding.steps.outside[0]) == 0 < float(finding.steps.outside[-1])
        assert finding.depth.inside.shape == (5,)
    wide = survey(editor, model, edits[:1], 3, Exploration(0.9, kind="global"), ("key",), {})
    torch.testing.assert_close(wide[0].steps.inside[0], found[0].steps.inside[0])
    assert "reward" not in wide[0].numbers and wide[0].depth is None
