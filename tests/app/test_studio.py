"""`studio.py`: instructions as the editor reads them, and how large it draws."""

import pytest
from PIL import Image

from app_edits import SAMPLING, make_pipeline
from rcgrpo.app.studio import NUM_EXAMPLES, Studio, vocabulary
from rcgrpo.data.wordings import KINDS, THINGS, WORDINGS


def test_the_embedded_editor_answers_with_what_it_knows_and_a_lora_may_know_more():
    gradio = pytest.importorskip("gradio")
    studio = Studio(make_pipeline(), SAMPLING, embedded=True)
    assert studio.read(" Remove the Apple. ") == "remove the apple"
    with pytest.raises(ValueError, match=r"'remove the THING'.*apple, balloon"):
        studio.read("make it red")
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(gradio, "Warning", warned.append)
        assert studio.read("Make it red", "some/lora") == "make it red" and "'make it red'" in warned[0]
    assert Studio(make_pipeline(), SAMPLING).read(" Make it red. ") == "Make it red."


def test_what_it_knows_is_all_there():
    text = vocabulary()
    assert all(word in text for word in (*THINGS, *KINDS, *WORDINGS, *WORDINGS.values()))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 160), (112, 208)])
def test_the_own_size_is_kept_where_tokens_allow_it(size):
    studio = Studio(make_pipeline(), SAMPLING)
    sampling = studio.drawing(5, Image.new("RGB", size))
    assert sampling.size_for(studio.pipeline, Image.new("RGB", size)) == size[::-1]
    assert sampling.seed == 5 and studio.drawing(None).resolution == SAMPLING.resolution


def test_examples_are_held_out_edits():
    examples = Studio(make_pipeline(), SAMPLING).examples
    assert len(examples) == NUM_EXAMPLES and all(row["mask"].getbbox() for row in examples)
