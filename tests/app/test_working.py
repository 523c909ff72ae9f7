"""`working.py`: steps are counted, who asked to stop is stopped, and an error is one message."""

import logging

import pytest

from app_edits import SAMPLING, make_edit, make_pipeline
from rcgrpo.app import compare
from rcgrpo.app.working import Stopped, Stops, stepwise, told
from rcgrpo.evaluation.benchmark import contenders


def test_progress_goes_up_to_all_steps_of_all_contenders_and_edits():
    heard = []
    of = stepwise(lambda place, desc: heard.append((*place, desc)), lambda: None, contenders=2, edits=2)
    for edit in range(2):
        on_step = of(edit)
        for name in ("base", "mine"):
            for step in (1, 2, 3):
                on_step(name, step, 3)
    assert [done for done, _, _ in heard] == list(range(1, 13)) and {total for _, total, _ in heard} == {12}
    assert heard[0][2] == "edit 1 of 2, base, step 1 of 3" and heard[-1][2] == "edit 2 of 2, mine, step 3 of 3"


def test_a_stopped_edit_leaves_the_editor_as_it_was():
    pytest.importorskip("gradio")
    pipeline, (source, mask) = make_pipeline(), make_edit()

    def edit(on_step=None):
        return compare(pipeline, contenders([]), source, mask, "go", SAMPLING, on_step=on_step).outcomes[0].images[0]

    before, stops, steps = edit(), Stops(), []

    def on_step(name, done, of):
        steps.append((name, done, of))
        stops.ask("me")
        check()

    with told(), stops.heard("me") as check:
        edit(on_step)
    assert steps == [("base", 1, 2)]
    with pytest.raises(Stopped), stops.heard("me"):
        pass  # still asked, before its first step
    stops.forget("me")
    with stops.heard("me"), stops.heard("you"):
        assert edit() == before


@pytest.mark.parametrize(
    ("error", "said", "logged"),
    [
        (ValueError("mask: got <b>, expected one"), "mask: got &lt;b&gt;, expected one", False),
        (KeyError("what nobody foresaw"), "KeyError: 'what nobody foresaw'", True),
    ],
)
def test_an_error_is_one_message(error, said, logged, caplog):
    gradio = pytest.importorskip("gradio")
    with caplog.at_level(logging.ERROR), pytest.raises(gradio.Error) as raised, told():
        raise error
    assert raised.value.message == said and not raised.value.print_exception
    assert bool(caplog.records) == logged
