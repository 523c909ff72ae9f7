"""Take the pictures of docs/app.md: an example edited with and without a LoRA, and candidates of a run.

pip install 'rcgrpo[app]' playwright && playwright install chromium      (or any Chromium on the PATH)
python benchmarks/app_picture.py rcgrpo-output --example 1
python benchmarks/app_picture.py rcgrpo-output --run rcgrpo-output       (with --log_completions true)
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from rcgrpo import RegionDecoupledFluxKontextPipeline
from rcgrpo.app import create_app, serve
from rcgrpo.evaluation.benchmark import Sampling
from rcgrpo.tiny import CALL, RESOLUTION, WEIGHTS

IMAGES = Path(__file__).parent.parent / "docs" / "images"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="folder, file or Hub id of a LoRA for the embedded editor")
    parser.add_argument("--example", type=int, default=0, help="which of the page's examples, from 0")
    parser.add_argument("--run", help="take the picture of this run's candidates instead")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--output", type=Path, help="docs/images/app.png, or app_run.jpg with --run")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    pipeline = RegionDecoupledFluxKontextPipeline.from_pretrained(WEIGHTS)
    sampling = Sampling(RESOLUTION, CALL["num_inference_steps"], max_sequence_length=CALL["max_sequence_length"])
    app = create_app(pipeline, sampling, [arguments.lora], embedded=True)
    address = serve(app, port=0, block=False)
    output = arguments.output or IMAGES / ("app_run.jpg" if arguments.run else "app.png")
    with sync_playwright() as drivers:
        found = next(filter(None, map(shutil.which, CHROMIUM)), None)
        browser = drivers.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": arguments.width, "height": 900})
        page.set_default_timeout(300_000)
        page.goto(address)
        if arguments.run:
            show_run(page, arguments.run)
        else:
            edit_example(page, arguments.example)
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        page.wait_for_timeout(2000)
        page.screenshot(path=output.with_suffix(".whole.png"), full_page=True)
        browser.close()
    app.close()
    with Image.open(output.with_suffix(".whole.png")) as taken:
        picture = taken.convert("RGB")
    output.with_suffix(".whole.png").unlink()
    if output.suffix == ".png":
        picture.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
    else:
        picture.thumbnail((1024, picture.height), Image.Resampling.LANCZOS)
        picture.save(output, quality=80, optimize=True)
    print(f"Written: {output}")


def edit_example(page: Any, number: int) -> None:
    page.locator("#examples .thumbnail-item").nth(number).click()
    page.wait_for_function("document.querySelector('#instruction textarea').value")
    page.wait_for_timeout(2000)  # the region is painted after the picture
    page.click("#edit")
    page.locator("#numbers table").wait_for()


def show_run(page: Any, folder: str) -> None:
    page.get_by_role("tab", name="Training run").click()
    page.locator("#run-folder input").fill(folder)
    page.keyboard.press("Enter")
    page.click("#run-open")
    page.locator("#run-summary").get_by_text("candidates of").wait_for()
    page.get_by_role("tab", name="Candidates").last.click()
    page.locator("#run-step").get_by_text("Step").wait_for()


if __name__ == "__main__":
    main()
