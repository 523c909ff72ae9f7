"""The app: what it computes, what it says, and the page itself in a real browser where there is one."""

import math
import shutil
import sys
import urllib.error
import urllib.request
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import rcgrpo.app as app
from rcgrpo.app import LoraSlot, changes_outside, compare, draw, painting_of, read_painting, table
from rcgrpo.cli.app import read_auth, run
from rcgrpo.cli.parsing import UsageError
from rcgrpo.data import compbench_mini
from rcgrpo.editors import RegionDecoupledFluxKontextPipeline
from rcgrpo.evaluation.benchmark import Sampling, contenders
from rcgrpo.training.hub import LORA_FILE, save_lora
from tiny_kontext import build_tiny_kontext

SAMPLING = Sampling(32, 2, max_sequence_length=48, seed=3)


def make_pipeline():
    pipeline = RegionDecoupledFluxKontextPipeline(**build_tiny_kontext().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_lora(folder, scale=0.3, rank=2, model=None):
    """A LoRA file whose weights are random, times `scale`."""
    pipeline = make_pipeline() if model is None else model
    wrapped = get_peft_model(pipeline.transformer, LoraConfig(r=rank, target_modules=["attn.to_q", "ff.net.0.proj"]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(scale * torch.randn_like(weight))
    return str(save_lora(pipeline, wrapped, folder))


def make_edit(size=(32, 32)):
    noise = np.random.default_rng(0).integers(60, 200, size[::-1], dtype=np.uint8)
    source = Image.fromarray(noise).convert("RGB")
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1] // 2))
    return source, mask


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


# Compare --------------------------------------------------------------------------------------------------------------


def test_base_and_lora_start_from_the_same_noise(pipeline, tmp_path):
    source, mask = make_edit()
    slot = LoraSlot(pipeline)
    entrants = slot.entrants(make_lora(tmp_path / "nothing", scale=0.0))
    base, lora = compare(pipeline, entrants, source, mask, "make it red", SAMPLING, 2).outcomes
    assert lora.name == "nothing" and all(a == b for a, b in zip(base.images, lora.images, strict=True))

    entrants = slot.entrants(make_lora(tmp_path / "something"))
    again, lora = compare(pipeline, entrants, source, mask, "make it red", SAMPLING, 2).outcomes
    assert all(a == b for a, b in zip(base.images, again.images, strict=True))
    assert all(a != b for a, b in zip(base.images, lora.images, strict=True))
    assert not torch.equal(base.attention, lora.attention)


def test_a_seed_is_one_noise_and_strength_zero_one_picture(pipeline):
    source, mask = make_edit()

    def images(seed=3, **options):
        sampling = Sampling(32, 2, max_sequence_length=48, seed=seed)
        return compare(pipeline, contenders([]), source, mask, "go", sampling, **options)

    assert images().outcomes[0].images[0] == images().outcomes[0].images[0]
    assert images().outcomes[0].images[0] != images(seed=4).outcomes[0].images[0]
    first, second = images(num_candidates=2).outcomes[0].images
    assert first != second
    first, second = images(num_candidates=2, edit_strength=0.0).outcomes[0].images
    assert first == second


def test_the_numbers_are_those_of_the_pictures(pipeline):
    source, mask = make_edit((64, 48))
    comparison = compare(pipeline, contenders([]), source, mask, "go", SAMPLING, 2)
    (outcome,) = comparison.outcomes
    assert comparison.source.size == comparison.mask.size == outcome.images[0].size
    assert comparison.source.width > comparison.source.height  # the aspect ratio is kept
    before, outside = np.asarray(comparison.source, dtype=float) / 255, np.asarray(comparison.mask) == 0
    for image, psnr, change in zip(outcome.images, outcome.background_psnr, outcome.changes, strict=True):
        error = np.asarray(image, dtype=float) / 255 - before
        assert psnr == pytest.approx(-10 * math.log10(np.mean(error[outside] ** 2)), abs=1e-3)
        np.testing.assert_allclose(change[outside], np.abs(error).max(-1)[outside], atol=1e-6)
        assert not change[~outside].any()
    assert outcome.attention.sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-4)
    region = torch.from_numpy(1.0 - outside)[None, None]
    covered = torch.nn.functional.adaptive_avg_pool2d(region, outcome.attention.shape[1:])[0, 0]
    expected = (outcome.attention * covered).sum((1, 2)) / covered.mean()
    assert outcome.density == pytest.approx(expected.tolist(), rel=1e-3)


def test_changes_are_the_largest_channel_outside_the_mask():
    source, image = Image.new("RGB", (2, 1), (10, 20, 30)), Image.new("RGB", (2, 1), (15, 20, 81))
    mask = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    np.testing.assert_allclose(changes_outside(image, source, mask), [[51 / 255, 0]], atol=1e-6)


def test_a_thin_line_survives_being_reduced(pipeline):
    source, mask = Image.new("RGB", (320, 320), "grey"), Image.new("L", (320, 320))
    mask.paste(255, (101, 0, 102, 320))
    comparison = compare(pipeline, contenders([]), source, mask, "go", SAMPLING)
    assert comparison.mask.getextrema() == (0, 255) and comparison.mask.getbbox() == (10, 0, 11, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": " "}, "instruction: got nothing"),
        ({"num_candidates": 0}, "num_candidates: got 0"),
        ({"mask": Image.new("L", (32, 32))}, "mask: got an empty mask"),
        ({"mask": Image.new("L", (16, 32), 255)}, r"mask: got \(16, 32\), expected the source's size \(32, 32\)"),
        ({"edit_strength": 1.5}, "strength"),
    ],
)
def test_what_cannot_be_compared_is_said(pipeline, change, message):
    source, mask = make_edit()
    given = {"source": source, "mask": mask, "instruction": "go", "sampling": SAMPLING, **change}
    with pytest.raises(ValueError, match=message):
        compare(pipeline, contenders([]), **given)


# Draw -----------------------------------------------------------------------------------------------------------------


def test_maps_share_one_scale_and_the_region_is_outlined(pipeline, tmp_path):
    source, mask = make_edit()
    entrants = LoraSlot(pipeline).entrants(make_lora(tmp_path))
    comparison = compare(pipeline, entrants, source, mask, "go", SAMPLING, 2)
    drawings = draw(comparison)
    for drawing, outcome in zip(drawings, comparison.outcomes, strict=True):
        assert len(drawing.edits) == len(drawing.attention) == len(drawing.changes) == 2
        assert all(picture.size == (320, 320) for picture, _ in drawing.edits)
        assert drawing.edits[0][1] == f"background {outcome.background_psnr[0]:.2f} dB"
        picture = np.asarray(drawing.edits[0][0])
        assert tuple(picture[50, 161]) == (255, 45, 120)  # just right of the region's edge
        assert tuple(picture[50, 100]) == outcome.images[0].getpixel((10, 5))
    text = table(comparison)
    assert text.count("\n") == 3 and f"{np.mean(comparison.outcomes[0].background_psnr):.2f} dB" in text


def test_a_full_mask_has_no_background(pipeline):
    source = make_edit()[0]
    comparison = compare(pipeline, contenders([]), source, Image.new("L", source.size, 255), "go", SAMPLING)
    assert math.isnan(comparison.outcomes[0].background_psnr[0]) and "| base | – |" in table(comparison)
    assert draw(comparison)[0].edits[0][1] == "background –"


# LoRAs ----------------------------------------------------------------------------------------------------------------


def test_a_lora_is_loaded_once_and_again_when_its_file_has_changed(tmp_path, monkeypatch):
    pipeline = make_pipeline()
    slot, source, mask = LoraSlot(pipeline), *make_edit()
    loads = []
    load = app.load_loras
    monkeypatch.setattr(app, "load_loras", lambda *given: (loads.append(given), load(*given)))

    def edited(lora):
        return compare(pipeline, slot.entrants(lora), source, mask, "go", SAMPLING).outcomes[-1].images[0]

    folder = make_lora(tmp_path / "run").removesuffix(LORA_FILE)
    first = edited(folder)
    assert edited(f" {folder} ") == first and len(loads) == 1
    make_lora(tmp_path / "run", scale=0.5)
    assert edited(folder) != first and len(loads) == 2
    fresh = compare(make_pipeline(), contenders([]), source, mask, "go", SAMPLING)
    assert edited("") == fresh.outcomes[0].images[0] and not pipeline.get_list_adapters()


def test_a_lora_of_another_model_is_refused_and_leaves_the_base_as_it_was(tmp_path):
    pipeline, other = make_pipeline(), make_pipeline()
    source, mask = make_edit()
    other.transformer = type(other.transformer).from_config({**other.transformer.config, "attention_head_dim": 32})
    before = compare(pipeline, contenders([]), source, mask, "go", SAMPLING).outcomes[0].images[0]
    slot = LoraSlot(pipeline)
    with pytest.raises(ValueError, match="expected one that fits this model"):
        slot.entrants(make_lora(tmp_path, model=other))
    assert compare(pipeline, slot.entrants(""), source, mask, "go", SAMPLING).outcomes[0].images[0] == before


def test_a_file_that_holds_nothing_for_the_transformer_is_no_lora(tmp_path):
    from safetensors.torch import save_file

    save_file({"unet.conv.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"lora: .*holds nothing for this model"):
        LoraSlot(make_pipeline()).entrants(str(tmp_path))


# The page -------------------------------------------------------------------------------------------------------------


def test_a_painting_gives_back_what_was_painted():
    source, mask = make_edit((40, 30))
    given, found = read_painting(painting_of(source, mask))
    assert given == source and found.tobytes() == mask.tobytes()


def test_every_layer_counts_and_faint_paint_does_not():
    layers = [Image.new("RGBA", (20, 10), (255, 0, 0, 0)) for _ in range(3)]
    layers[0].putpixel((1, 2), (255, 0, 0, 255))
    layers[1].putpixel((5, 2), (255, 0, 0, 153))
    layers[2].putpixel((7, 2), (255, 0, 0, 30))
    _, mask = read_painting({"background": Image.new("RGB", (20, 10)), "layers": layers})
    assert np.argwhere(np.asarray(mask)).tolist() == [[2, 1], [2, 5]]


def test_what_is_transparent_in_an_upload_is_white():
    upload = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    upload.paste((0, 0, 255, 255), (0, 0, 5, 10))
    layer = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    source, _ = read_painting({"background": upload, "layers": [layer]})
    assert source.getpixel((1, 1)) == (0, 0, 255) and source.getpixel((9, 9)) == (255, 255, 255)


def test_a_mask_of_0_and_1_is_compared_as_one_of_0_and_255(pipeline):
    source, mask = make_edit((48, 24))
    ones = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8))
    clear = source.convert("RGBA")
    clear.putalpha(mask)
    first, second = (compare(pipeline, contenders([]), source, m, "x", SAMPLING) for m in (mask, ones))
    assert first.mask.tobytes() == second.mask.tobytes() and np.asarray(first.mask).any()
    assert first.outcomes[0].images[0].tobytes() == second.outcomes[0].images[0].tobytes()
    shown = np.asarray(compare(pipeline, contenders([]), clear, mask, "x", SAMPLING).source)
    assert (shown[-1, -1] == 255).all()


@pytest.mark.parametrize(
    ("painting", "message"),
    [
        (None, "picture: got none"),
        ({"background": None, "layers": []}, "picture: got none"),
        ({"background": Image.new("RGB", (4, 4)), "layers": []}, "mask: got nothing painted"),
        ({"background": Image.new("RGB", (4, 4)), "layers": [Image.new("RGBA", (4, 4))]}, "mask: got nothing painted"),
    ],
)
def test_a_painting_without_picture_or_paint_is_said(painting, message):
    with pytest.raises(ValueError, match=message):
        read_painting(painting)


def test_without_gradio_the_extra_is_named(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"rcgrpo\[app\]"):
        app.create_app(pipeline, SAMPLING)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rcgrpo\[app\]"):
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
        patch.setattr(app, "compare", lambda *given, **named: made.append(compare(*given, **named)) or made[-1])
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
