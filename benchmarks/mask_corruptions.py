"""Draw the family of mask corruptions on two held-out edits of CompBench-mini.

    python benchmarks/mask_corruptions.py [docs/images/mask_corruptions.png]

One row per kind, severity from left to right. What the mask calls "edit" is bright and framed in pink.
"""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance

from rcgrpo import compbench_mini
from rcgrpo.maths.regions import CORRUPTIONS, corrupt
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.sheets import contact_sheet, outline

SIZE = 128
SEVERITIES = (0, 0.25, 0.5, 0.75, 1)
ROWS = (0, 4)


def show(picture: Image.Image, mask: Image.Image) -> Image.Image:
    kept = ImageEnhance.Brightness(picture).enhance(0.35)
    return outline(Image.composite(picture, kept, mask), mask)


def sheet(number: int, row: dict[str, Any]) -> Image.Image:
    columns = {
        f"severity {severity:g}": [
            show(
                row["edited_image"],
                Image.fromarray((corrupt(row["mask"], kind, severity, key=("figure", number)) * 255).byte().numpy()),
            )
            for kind in CORRUPTIONS
        ]
        for severity in SEVERITIES
    }
    return contact_sheet(columns, list(CORRUPTIONS), cell=96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/images/mask_corruptions.png"))
    output = parser.parse_args().output
    dataset = compbench_mini("test", max(ROWS) + 1, SIZE)
    sheets = [sheet(row, dataset[row]) for row in ROWS]
    figure = Image.new("RGB", (sum(s.width for s in sheets), sheets[0].height), "white")
    for number, picture in enumerate(sheets):
        figure.paste(picture, (number * sheets[0].width, 0))
    with write_atomically(output) as part:
        figure.save(part, optimize=True)


if __name__ == "__main__":
    main()
