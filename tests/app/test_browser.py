"""The page in a real browser, where there is one, as a visitor uses it."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import rcgrpo.app as app
from app_edits import make_edit
from app_pages import make_run, serving
from rcgrpo.data import compbench_mini
from rcgrpo.data.wordings import THINGS
from rcgrpo.evaluation.benchmark import Sampling


def one_message(page, text):
    """There is one toast, it says this, and nothing else on the page is marked as an error."""
    page.get_by_text(text).wait_for()
    assert page.locator(".toast-body").count() == 1
    assert not page.locator("[data-testid='status-tracker'] .error:visible").count()
    assert "Traceback" not in page.locator("body").inner_text()
    page.locator(".toast-close").click()


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def has_paint(page, across=0.5, down=0.5):
    """Whether there is paint at this place of the canvas."""
    canvas = page.locator("#painting canvas").last.bounding_box()
    x, y = canvas["x"] + across * canvas["width"], canvas["y"] + down * canvas["height"]
    shown = Image.open(BytesIO(page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1}))).convert("RGB")
    red, green, _ = shown.getpixel((0, 0))
    return red - green > 60


def until(page, done, again=lambda: None):
    """Wait for what no element tells."""
    for _ in range(60):
        again()
        page.wait_for_timeout(250)
        if done():
            return
    raise AssertionError("it did not come")


def stroke(page):
    """A short one in the middle of the canvas."""
    canvas = page.locator("#painting canvas").last.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y, steps=5)
    page.mouse.up()


def test_a_picture_is_painted_edited_compared_and_taken_home(served, open_page, tmp_path):
    page = open_page(served.url)
    page.click("#edit")
    one_message(page, "picture: got none, expected one")
    assert not page.locator("#numbers table").count()

    make_edit((64, 48))[0].save(tmp_path / "picture.png")
    page.locator("#painting input[type=file]").first.set_input_files(tmp_path / "picture.png")
    page.get_by_label("Color").wait_for()  # the brush is ready
    until(page, lambda: has_paint(page), lambda: stroke(page))  # the picture may still be on its way
    page.locator("#instruction textarea").fill("make it red")
    before = len(served.made)
    page.click("#edit")
    page.locator("#edit-status").get_by_text("Done in").wait_for()
    made = served.made[before]
    assert [outcome.name for outcome in made.outcomes] == ["base", "a"]
    painted = np.asarray(made.mask) > 0
    assert painted[painted.shape[0] // 2, painted.shape[1] // 2] and painted.mean() < 0.2  # the brush fits 64 pixels
    for outcome in made.outcomes:
        assert f"{np.mean(outcome.background_psnr):.2f} dB" in page.locator("#numbers").inner_text()
    assert page.locator("#edits .gallery-item img, #edits .thumbnail-item img").count() == 4

    open_tab(page, "Before/after")
    page.locator("#slider img").nth(1).wait_for()
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        taken = Image.open(BytesIO(archive.read("a-2.png")))
    assert taken.tobytes() == made.outcomes[1].images[1].tobytes()


def test_the_keyboard_alone_does_it(served, open_page, tmp_path):
    page = open_page(served.url)
    instruction = compbench_mini("test", 2, app.EXAMPLE_SIDE)[1]["instruction"]
    page.locator("#examples button.thumbnail-item").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("text => document.querySelector('#instruction textarea').value == text", arg=instruction)
    for size in (64, app.EXAMPLE_SIDE):
        Image.new("L", (size, size), 255).save(tmp_path / f"{size}.png")
    page.get_by_text("More", exact=True).click()
    for name, message in [("64.png", "the region's file: got"), (f"{app.EXAMPLE_SIDE}.png", None)]:
        with page.expect_file_chooser() as chooser:
            page.locator("#mask-file").focus()
            page.keyboard.press("Enter")
        chooser.value.set_files(tmp_path / name)
        if message:
            one_message(page, message)
    page.locator("#painting").scroll_into_view_if_needed()
    until(page, lambda: all(has_paint(page, *place) for place in ((0.4, 0.3), (0.6, 0.3), (0.5, 0.7))))
    before = len(served.made)
    page.locator("#instruction textarea").focus()
    page.keyboard.press("Enter")
    page.locator("#edit-status").get_by_text("Done in").wait_for()
    assert len(served.made) == before + 1 and np.asarray(served.made[-1].mask).all()


def test_steps_are_shown_and_an_edit_can_be_cancelled(open_page, tmp_path):
    pytest.importorskip("gradio")
    with serving(tmp_path, Sampling(32, 1000, max_sequence_length=48), embedded=True) as served:
        page = open_page(served.url)
        page.get_by_text("What the embedded editor knows").click()
        text = page.locator("#vocabulary").inner_text()
        assert all(thing in text for thing in THINGS)
        page.locator("#examples button.thumbnail-item").nth(1).click()
        page.wait_for_function("document.querySelector('#instruction textarea').value")
        page.locator("#lora input").fill("")
        page.locator("#lora input").blur()
        page.locator("#instruction textarea").fill("make it shine")
        page.click("#edit")
        one_message(page, "expected one that the embedded editor knows: 'add a THING in the PLACE'")
        page.locator("#instruction textarea").fill("remove the tree")
        page.click("#edit")
        page.locator("#edit-status").get_by_text("of 1000").wait_for()
        page.click("#edit-cancel")
        page.locator("#edit-status").get_by_text("Cancelled.").wait_for()
        page.wait_for_function("!document.querySelector('#edit').disabled")
        assert not served.made


def test_two_loras_are_compared_on_the_same_edits(served, open_page):
    page = open_page(served.url)
    open_tab(page, "Compare LoRAs")
    page.locator("#count input[type=number]").fill("2")
    page.locator("#count input[type=number]").blur()
    page.click("#compare")
    page.locator("#compare-status").get_by_text("2 edits").wait_for()
    text = page.locator("#compare-numbers").inner_text()
    assert "background PSNR" in text and "From a to b" in text
    captions = page.locator("#compared .caption-label").all_inner_texts()
    assert [caption.split(":")[0] for caption in captions][1:4] == ["base", "a", "b"] and len(captions) == 8


def test_a_run_is_shown_and_a_folder_that_is_none_is_said(served, open_page, tmp_path):
    page = open_page(served.url)
    open_tab(page, "Training run")

    def open_run(folder):
        page.locator("#run-folder input").fill(str(folder))
        page.keyboard.press("Enter")
        page.click("#run-open")

    open_run(tmp_path)
    one_message(page, "expected the output_dir of a training run")
    open_run(make_run(tmp_path / "run", finished=True))
    page.locator("#run-summary").get_by_text("update 4 of 4").wait_for()
    open_tab(page, "Learning curve")
    open_tab(page, "Candidates")
    page.locator("#run-step").get_by_text("Step 10, 2 candidates").wait_for()
    page.get_by_label("evaluation").check()
    page.locator("#run-step").get_by_text("Step 4, 2 candidates").wait_for()


@pytest.mark.parametrize("tab", ["Edit", "Compare LoRAs", "Training run"])
def test_nothing_is_wider_than_a_small_screen(served, open_page, tab):
    page = open_page(served.url, width=390)
    open_tab(page, tab)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
