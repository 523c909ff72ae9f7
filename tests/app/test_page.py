"""`page.py`: what it says, and the page itself in a real browser where there is one."""

import shutil
import sys
import urllib.error
import urllib.request
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import rcgrpo.app as app
import rcgrpo.app.page
from app_edits import SAMPLING, make_edit, make_lora, make_pipeline
from rcgrpo.app import compare, painting_of, table
from rcgrpo.cli.app import read_auth, run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data import compbench_mini
from rcgrpo.evaluation.benchmark import contenders
from rcgrpo.training.hub import LORA_FILE


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


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page on a free port: its address, a LoRA, and a list of the comparisons that it has made."""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'rcgrpo[app]'")
    folder = tmp_path_factory.mktemp("app")
    made = []
    lora = make_lora(folder / "trained").removesuffix(f"/{LORA_FILE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patch.setattr(
            rcgrpo.app.page, "compare", lambda *given, **named: made.append(compare(*given, **named)) or made[-1]
        )
        page = app.create_app(make_pipeline(), SAMPLING, [lora])
        yield SimpleNamespace(url=app.serve(page, port=0, block=False), lora=lora, made=made, page=page)
        page.close()


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

    *pictures, numbers = caller.predict(editor, "make it red", served.lora, 2, 0.5, 3, api_name="/edit")
    assert [len(gallery) for gallery in pictures] == [2] * 6
    made = served.made[-1]
    assert [outcome.name for outcome in made.outcomes] == ["base", "trained"]
    assert made.source == source and made.mask.tobytes() == mask.tobytes() and numbers == table(made)
    expected = compare(make_pipeline(), contenders([]), source, mask, "make it red", SAMPLING, 2)
    assert made.outcomes[0].images == expected.outcomes[0].images

    for given, message in [
        ((editor, "", "", 1, 0.5, 0), "instruction: got nothing"),
        ((editor, "go", str(tmp_path), 1, 0.5, 0), "lora: got the folder"),
        (({**editor, "layers": []}, "go", "", 1, 0.5, 0), "mask: got nothing painted"),
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


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the test drives a browser through Playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as drivers:
        try:
            browser = drivers.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium that Playwright can start ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


def test_in_a_browser(served, browser, tmp_path):
    source = make_edit((96, 64))[0]
    source.save(tmp_path / "picture.png")
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    broken = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(served.url)

    page.click("#edit")
    page.get_by_text("picture: got none, expected one").wait_for()
    assert not page.locator("#numbers table").count()

    page.locator("#painting input[type=file]").first.set_input_files(tmp_path / "picture.png")
    page.get_by_label("Color").wait_for()  # the brush is ready
    for _ in range(40):  # the grey picture may still be on its way to the canvas
        canvas = page.locator("#painting canvas").last.bounding_box()
        x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
        page.mouse.move(x - 10, y)
        page.mouse.down()
        page.mouse.move(x + 10, y, steps=5)
        page.mouse.up()
        page.wait_for_timeout(250)
        shown = Image.open(BytesIO(page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1}))).convert("RGB")
        red, green, _ = shown.getpixel((0, 0))
        if red - green > 60:
            break
    page.locator("#instruction textarea").fill("make it red")
    before = len(served.made)
    page.click("#edit")
    page.locator("#numbers table").wait_for()
    page.wait_for_function("[...document.querySelectorAll('.gallery-item img')].filter(i => i.naturalWidth).length > 6")

    made = served.made[before]
    assert [outcome.name for outcome in made.outcomes] == ["base", "trained"]
    size = np.array(made.mask.size)
    painted = np.asarray(made.mask) > 0
    assert painted[size[1] // 2, size[0] // 2] and 0.01 < painted.mean() < 0.6
    assert not painted[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    for outcome in made.outcomes:
        assert f"{np.mean(outcome.background_psnr):.2f} dB" in page.locator("#numbers").inner_text()

    instruction = compbench_mini("test", 2, app.EXAMPLE_SIDE)[1]["instruction"]
    page.locator("#examples .thumbnail-item").nth(1).click()
    page.wait_for_function("text => document.querySelector('#instruction textarea').value == text", arg=instruction)
    page.click("#edit")
    page.wait_for_function(f"!document.querySelector('#numbers').innerText.includes('{psnr(made)}')")
    assert np.asarray(served.made[-1].mask).any() and served.made[-1].source != made.source
    assert not broken


def psnr(comparison):
    return f"{np.mean(comparison.outcomes[0].background_psnr):.2f} dB"
