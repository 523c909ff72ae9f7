"""`results` and `gallery`: from records to tables and to a page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rcgrpo.data import EditRows, compbench_mini
from rcgrpo.evaluation.benchmark import make_plan, picture_path
from rcgrpo.evaluation.compbench import PUBLISHED, sub_task
from rcgrpo.evaluation.results import result_tables, summarise, worst_first, write_results

NAMES, METRICS = ("base", "mine"), ("lc_i", "psnr", "lpips")


def record(row, task, path, base, mine):
    scores = {name: dict(zip(METRICS, values, strict=True)) for name, values in zip(NAMES, (base, mine), strict=True)}
    place = {"id": f"{row:05d}", "row": row, "task": task, "sub_task": sub_task(task, path), "image_path": path}
    return {**place, "instruction": "make <b>it</b> & so", "scores": scores}


RECORDS = [
    record(0, "add", "00000000/0/00001.png", (0.1, 20.0, 0.5), (0.2, 21.0, 0.4)),
    record(1, "add", "00000000/0/00002.png", (0.3, 22.0, 0.3), (0.2, 25.0, 0.2)),
    record(2, "remove", "00000001/0/00001.png", (0.8, None, 0.1), (0.6, 30.0, 0.2)),
    record(3, "multi_turn_add", "turn1_add/00000002_1_t1.png", (0.5, 10.0, 0.1), (None, 11.0, 0.1)),
    record(4, "multi_turn_add", "turn2_add/00000002_1_t1.png", (0.4, 10.0, 0.1), (0.4, 12.0, 0.1)),
]


def test_macro_means_and_paired_differences_by_hand():
    categories, sub_tasks = summarise(RECORDS, NAMES, METRICS)
    assert [(s.name, s.sub_tasks, s.n) for s in categories] == [
        ("Local", ("add", "remove"), 3),
        ("Multi-turn, turn 1", ("turn1_add",), 1),
        ("Multi-turn, turn 2", ("turn2_add",), 1),
    ]
    assert [s.name for s in sub_tasks] == ["add", "remove", "turn1_add", "turn2_add"]
    base, mine, difference = categories[0].standings
    assert (base.name, mine.name, difference.name) == ("base", "mine", "mine − base")
    assert base.estimates["lc_i"].mean == pytest.approx((0.2 + 0.8) / 2)
    assert mine.estimates["lc_i"].mean == pytest.approx((0.2 + 0.6) / 2)
    assert difference.estimates["lc_i"].mean == pytest.approx((0.0 - 0.2) / 2)
    assert (base.estimates["psnr"].mean, base.estimates["psnr"].n) == (21, 2)
    assert (difference.estimates["psnr"].mean, difference.estimates["psnr"].n) == (2, 2)  # pairs only
    turn_one = categories[1].standings
    assert turn_one[0].estimates["lc_i"].mean == 0.5 and turn_one[1].estimates["lc_i"].n == 0
    # A single video has nothing to draw from; edit by edit the two additions differ.
    assert np.isnan(sub_tasks[0].standings[0].estimates["psnr"].low)
    by_edit = summarise(RECORDS, NAMES, METRICS, by_video=False)[1][0].standings[0].estimates["psnr"]
    assert (by_edit.low, by_edit.high) == (20, 22)


def test_tables_show_what_others_published_beside_compbench_alone():
    sections = summarise(RECORDS, NAMES, METRICS, by_video=False)
    tables = result_tables(*sections, published=True)
    local = [line[0] for line in tables[0].lines]
    assert local[:4] == ["", "base", "mine", "mine − base"]
    assert [name.split(":")[0] for name in local[4:]] == list(PUBLISHED["Local"])
    assert all("published in arXiv 2505.12200, not measured here" in name for name in local[4:])
    assert tables[0].lines[4][1:] == ["0.821", "25.613", "0.050"]
    assert tables[0].lines[0][1:] == ["LC-I ↑", "background PSNR (dB) ↑", "background LPIPS ↓"]
    assert tables[0].lines[3][2] == "+2.00 [+1.00, +3.00]" and tables[1].lines[2][1] == "–"
    assert len(tables[1].lines) == 4 and tables[-1].title == "Sub-tasks"
    assert len(result_tables(*sections, published=False)[0].lines) == 4


def test_worst_first():
    assert [r["row"] for r in worst_first(RECORDS, "mine", METRICS)] == [0, 1, 4, 2, 3]
    assert [r["row"] for r in worst_first(RECORDS, "base", ("lpips",))][:2] == [0, 1]


class Page(HTMLParser):
    """Every tag's attributes, and the texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def written(tmp_path):
    rows = EditRows(compbench_mini("test", 6), "evaluation")
    for r in RECORDS:
        for shade, name in enumerate(NAMES):
            path = picture_path(tmp_path, name, r["row"])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (90 * shade, r["row"], 0)).save(path)
    failed = {**RECORDS[0], "id": "00005", "row": 5, "error": "evaluation row 5: no mask"}
    del failed["scores"]
    settings = {"model": "kontext-tiny", "dataset": "a<b"}
    arguments = (rows, make_plan(rows), NAMES, METRICS, settings)
    text = write_results(tmp_path, [*RECORDS, failed], *arguments, by_video=False, num_pictures=4)
    return tmp_path, text, arguments


def test_files(written):
    folder, text, arguments = written
    assert (folder / "results.md").read_text() == text
    assert "Not scored: unreadable (1)." in text and "### Local (add, remove): 3 edits" in text
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert results["contenders"] == list(NAMES) and results["unreadable"] == {"00005": "evaluation row 5: no mask"}
    local = results["categories"][0]["standings"][2]
    assert local["difference"] and local["estimates"]["psnr"]["mean"] == 2
    assert results["intervals"] == {"confidence": 0.95, "resampled": "edits"}
    with pytest.raises(ValueError, match=r"none of 1 rows could be read, expected at least one.* no mask"):
        write_results(folder, [{"id": "0", "error": "no mask"}], *arguments)


def test_the_page_stands_alone(written):
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    sources = [image["src"] for image in page.all("img")]
    assert len(sources) == 4 * 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert [image["alt"] for image in page.all("img")][:5] == ["source", "region", "base", "mine", "target"]
    assert not re.search(r"https?://|<link|@import|url\(", text) and all("src" not in s for s in page.all("script"))
    assert "make <b>it</b> & so " in page.texts and not page.all("b") and "a<b" in text.replace("&lt;", "<")
    assert any("the 4 worst of mine are shown" in piece for piece in page.texts)


def test_the_pages_cards_are_sorted_and_carry_what_they_sort_by(written):
    page = Page((written[0] / "report.html").read_text())
    options = [o for o in page.all("option") if "data-sign" in o]
    assert len(options) == 3 * len(METRICS) and [o["data-sign"] for o in options[:3]] == ["1", "1", "-1"]
    chosen = [int(o["value"]) for o in options if "selected" in o]
    assert chosen == [3]  # mine: LC-I
    cards = [json.loads(card["data-values"]) for card in page.all("article")]
    assert [values[3] for values in cards] == [0.2, 0.2, 0.4, 0.6]
    assert cards[0] == pytest.approx([0.1, 20, 0.5, 0.2, 21, 0.4, 0.1, 1, -0.1])
    assert cards[3][7] is None  # no difference without a pair
    assert [card["data-group"] for card in page.all("article")] == ["add", "add", "turn2_add", "remove"]
