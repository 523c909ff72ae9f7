"""`benchmarks/gpu.py` on a CPU, in its small form: every cell but those that need a GPU."""

import pytest
from benchmarks import gpu

from rcgrpo.planning.cards import card_here


def test_small_shapes_go_through(capsys):
    rows = gpu.main(["--tiny"])
    assert [row[:3] for row in rows] == [
        ["FLUX.1-Kontext", "64²", "checkpointing"],
        ["FLUX.2-klein-4B", "64²", "attention recorded"],
    ]
    for row in rows:
        cells = dict(zip(gpu.HEAD[3:], row[3:], strict=True))
        assert all(float(cells[name]) > 0 for name in cells if name.endswith(", s"))
        assert all(float(cells[name].split("(")[1].rstrip(")")) < 1 for name in cells if "GB" in name)
        if card_here() is None:
            assert [cells[name].split(" (")[0] for name in cells if "GB" in name] == [gpu.NOT] * 3
    assert capsys.readouterr().out.count("| FLUX") == 2


def test_the_page_has_its_table():
    text = gpu.PAGE.read_text()
    table = text[text.index(gpu.BEGIN) : text.index(gpu.END)].splitlines()
    head = next(line for line in table if line.startswith("| model"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == gpu.HEAD
    assert sum(line.startswith("| FLUX") for line in table) == len(gpu.cases(tiny=False))


@pytest.mark.skipif(card_here() is not None, reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(SystemExit, match="found no GPU; run it on one, or with --tiny"):
        gpu.main([])
