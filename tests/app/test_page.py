"""`page.py`: what it says, and what a client gets."""

import sys
import urllib.error
import urllib.request
import zipfile

import pytest
from PIL import Image

import rcgrpo.app as app
from app_edits import SAMPLING, make_edit, make_pipeline
from app_pages import serving
from rcgrpo.app import compare, painting_of, table
from rcgrpo.cli.app import explained, read_auth, run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.evaluation.benchmark import contenders


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"rcgrpo\[app\]"):
        app.create_app(make_pipeline(), SAMPLING)
    with pytest.raises(ModuleNotFoundError, match=r"rcgrpo\[app\]"):
        run([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999999"], "--port: got 99999999, expected 0 to 65535"),
        (["--num_inference_steps", "0"], "--num_inference_steps: got 0, expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_model_is_loaded(flags, message):
    with pytest.raises(UsageError, match=message):
        run(flags)


def test_other_machines_are_not_let_in_without_a_password(monkeypatch):
    monkeypatch.delenv("RCGRPO_APP_AUTH", raising=False)
    with pytest.raises(UsageError, match=r"--host: got '0.0.0.0'.*RCGRPO_APP_AUTH=user:password"):
        run(["--host", "0.0.0.0"])
    with pytest.raises(ValueError, match=r"host: got '192\.168\.1\.5'"):
        app.serve(None, "192.168.1.5")
    monkeypatch.setenv("RCGRPO_APP_AUTH", "me:a:b")
    assert read_auth("RCGRPO_APP_AUTH") == ("me", "a:b")
    for wrong in ("me", "me:", ":secret"):
        monkeypatch.setenv("RCGRPO_APP_AUTH", wrong)
        with pytest.raises(UsageError, match="got no `user:password`") as raised:
            read_auth("RCGRPO_APP_AUTH")
        assert "secret" not in str(raised.value)


def test_a_client_gets_pictures_and_numbers_and_errors_as_messages(served, tmp_path):
    client = pytest.importorskip("gradio_client")
    source, mask = make_edit()
    painted = painting_of(source, mask)
    files = {"background": source, "layer": painted["layers"][0]}
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.png")
    background, layer = (client.handle_file(str(tmp_path / f"{name}.png")) for name in files)
    editor = {"background": background, "layers": [layer], "composite": None}
    caller = client.Client(served.url, verbose=False)

    edits, attention, changes, numbers, slider, packed, *_ = caller.predict(
        editor, "make it red", served.loras[0], 2, 0.5, 3, False, api_name="/edit"
    )
    assert [len(gallery) for gallery in (edits, attention, changes)] == [4] * 3 and len(slider) == 2
    made = served.made[-1]
    assert [outcome.name for outcome in made.outcomes] == ["base", "a"]
    assert made.source == source and made.mask.tobytes() == mask.tobytes() and numbers == table(made)
    expected = compare(make_pipeline(), contenders([]), source, mask, "make it red", SAMPLING, 2)
    assert made.outcomes[0].images == expected.outcomes[0].images
    with zipfile.ZipFile(packed) as archive:
        assert {"source.png", "base-1.png", "a-2.png", "edit.json"} < set(archive.namelist())
    caller.predict(editor, "make it red", "", 1, 0.5, 3, True, api_name="/edit")
    assert served.made[-1].source.size == source.size

    for given, message in [
        ((editor, "", "", 1, 0.5, 0, False), "instruction: got nothing"),
        ((editor, "go", str(tmp_path), 1, 0.5, 0, False), "lora: got the folder"),
        (({**editor, "layers": []}, "go", "", 1, 0.5, 0, False), "mask: got nothing painted"),
    ]:
        with pytest.raises(client.exceptions.AppError, match=message) as raised:
            caller.predict(*given, api_name="/edit")
        assert "Traceback" not in str(raised.value)


def test_with_a_password_a_stranger_sees_nothing():
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks(analytics_enabled=False) as page:
        gradio.Markdown("nothing for strangers")
    address = app.serve(page, port=0, auth=("me", "secret"), block=False)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}config")
    page.close()


def test_an_update_is_explained_where_that_can_be_had(tmp_path):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    asked = []

    def explain(edit, lora):
        asked.append((edit, lora))
        if edit > 9:
            raise ValueError(f"--edit: got {edit}, expected 0 to 9")
        Image.new("RGB", (40, 20), "red").save(tmp_path / "update.png")
        (tmp_path / "update.md").write_text("# One update")
        return tmp_path

    with serving(tmp_path, explain=explain) as served:
        caller = client.Client(served.url, verbose=False)
        picture, text, *_ = caller.predict(3, " some/lora ", api_name="/explain")
        assert asked == [(3, "some/lora")] and text == "# One update"
        with Image.open(picture["value"] if isinstance(picture, dict) else picture) as drawn:
            assert drawn.size == (40, 20)
        with pytest.raises(client.exceptions.AppError, match="--edit: got 10"):
            caller.predict(10, "", api_name="/explain")


def test_the_command_explains_with_the_embedded_recipe(monkeypatch):
    given = []
    monkeypatch.setattr("rcgrpo.cli.explain.run", given.append)
    folder = explained(2, "some/lora")
    assert given == [["--edit", "2", "--output_dir", str(folder), "--lora", "some/lora"]] and folder.is_dir()
    assert "--lora" not in (explained(0, ""), given)[1][-1]
