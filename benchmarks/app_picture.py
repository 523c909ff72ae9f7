"""Take the picture of docs/app.md: an example edited in the app by the embedded editor, with and without a LoRA.

pip install 'rcgrpo[app]' playwright && playwright install chromium      (or any Chromium on the PATH)
python benchmarks/app_picture.py rcgrpo-output --example 2
"""

import argparse
import shutil
from pathlib import Path

from rcgrpo import RegionDecoupledFluxKontextPipeline
from rcgrpo.app import create_app, serve
from rcgrpo.evaluation.benchmark import Sampling
from rcgrpo.tiny import CALL, RESOLUTION, WEIGHTS

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "app.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="folder, file or Hub id of a LoRA for the embedded editor")
    parser.add_argument("--example", type=int, default=0, help="which of the page's examples, from 0")
    parser.add_argument("--output", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    pipeline = RegionDecoupledFluxKontextPipeline.from_pretrained(WEIGHTS)
    sampling = Sampling(RESOLUTION, CALL["num_inference_steps"], max_sequence_length=CALL["max_sequence_length"])
    app = create_app(pipeline, sampling, [arguments.lora])
    address = serve(app, port=0, block=False)
    with sync_playwright() as drivers:
        found = next(filter(None, map(shutil.which, CHROMIUM)), None)
        browser = drivers.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(300_000)
        page.goto(address)
        page.locator("#examples .thumbnail-item").nth(arguments.example).click()
        page.wait_for_function("document.querySelector('#instruction textarea').value")
        page.wait_for_timeout(2000)  # the region is painted after the picture
        page.click("#edit")
        page.locator("#numbers table").wait_for()
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        page.wait_for_timeout(2000)
        page.screenshot(path=arguments.output, full_page=True)
        browser.close()
    app.close()
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
