"""The study's harness with fake cells; nothing here loads a model."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study import __main__ as command
from benchmarks.study.fronts import compare_fronts, hypervolume
from benchmarks.study.harness import (
    Compute,
    Sizes,
    environment,
    estimate,
    finite,
    measured_rate,
    plan,
    run_cells,
    unfinished,
    units_per_edit,
    updates_for,
)
from benchmarks.study.pages import Section, difference, far_out, plot, read_conclusions, shown, write_page, write_study
from benchmarks.study.record import keep, recall, remember, restore, result_file
from benchmarks.study.summary import fill_in, of_cell, over_seeds, summarise, test_against, with_rates
from benchmarks.study.tables import TABLES, Table, Variant

from rcgrpo import RCGRPOConfig

test_against.__test__ = False  # its name is not pytest's

ARMS = ("region", "global", "global, matched")
SIZES = Sizes(steps=3, edits_per_update=2)
TABLE = Table(
    "A table",
    "A question?",
    "train",
    [Variant("base", trained=False), Variant("old", {"edit_strength": 0.3}), Variant("new", {"edit_strength": 0.6})],
    {"score": "score", "reward_per_minute": "per minute"},
    baseline="old",
    plotted=("score",),
)
ROOT = Path(__file__).resolve().parents[1]


def run(cells, workers, work="fake", report=lambda line: None):
    return run_cells(list(cells), workers, 1, f"study_cells:{work}", (), report)


def planned(work, seeds=(0, 1), table=TABLE, **kwargs):
    return plan(table, SIZES, seeds, "weights", work, **kwargs)


# Cells


def test_finished_cells_are_never_repeated_and_a_failure_stops_no_other(tmp_path):
    cells, said = planned(tmp_path), []
    failed = run(cells.values(), 3, report=said.append)
    assert failed == [cells["new", 1]] and len(said) == 6
    log = (failed[0].folder / "log.txt").read_text()
    assert "working on 1" in log and "a child wrote this" in log and "broken" in log
    assert sum("FAILED" in line for line in said) == 1
    assert unfinished(list(cells.values())) == failed
    # planned anew, as another process would: only the broken one runs again
    again = planned(tmp_path)
    assert run(again.values(), 3, report=said.append) == []
    assert len(said) == 7
    runs = {name: len((cell.folder / "runs").read_text()) for name, cell in again.items()}
    assert runs == {name: 2 if name == ("new", 1) else 1 for name in again}
    assert run(again.values(), 3, report=said.append) == [] and len(said) == 7


def test_a_cell_that_ends_without_a_result_has_failed(tmp_path):
    (cell,) = planned(tmp_path, [0], only=["old"]).values()
    assert run([cell], 1, "nothing") == [cell]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def worker_of(cell):
    """The process that works on an `endless` cell."""
    file = cell.folder / "pid"
    assert wait_until(lambda: file.exists() and file.read_text(), 300)
    return int(file.read_text())


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_interrupting_ends_the_processes(tmp_path):
    workers = []

    def interrupt(line):
        workers.append(worker_of(cells["old", 1]))
        raise KeyboardInterrupt

    cells = planned(tmp_path, only=["old"])
    with pytest.raises(KeyboardInterrupt):
        run(cells.values(), 2, "endless", interrupt)
    assert not alive(workers[0])


STUDY = """
import multiprocessing, sys
from benchmarks.study.worker import work_on
process = multiprocessing.get_context("forkserver").Process(target=work_on, args=("study_cells:endless", sys.argv[1]))
process.start()
process.join()
"""


def test_killing_the_study_ends_its_processes_and_the_next_start_goes_on(tmp_path):
    (cell,) = planned(tmp_path, [1], only=["old"]).values()
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(json.dumps(cell.spec))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(cell.folder)], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path
    )
    working = worker_of(cell)
    assert alive(working)
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert wait_until(lambda: not alive(working))
    assert run([cell], 2) == [] and unfinished([cell]) == []


def test_whole_seeds_come_first(tmp_path):
    order = [(cell.seed, cell.name) for cell in planned(tmp_path, (3, 1)).values()]
    assert order == [(seed, name) for seed in (3, 1) for name in ("base", "old", "new")]


def test_processes_inherit_their_environment_and_this_one_keeps_its_own():
    before = dict(os.environ)
    with environment(3):
        assert os.environ["OMP_NUM_THREADS"] == "3" and str(ROOT / "src") in os.environ["PYTHONPATH"]
    assert dict(os.environ) == before


def test_a_folder_is_named_by_all_that_the_result_depends_on(tmp_path):
    cell = planned(tmp_path)["old", 0]
    assert cell.folder == planned(tmp_path)["old", 0].folder
    others = [
        planned(tmp_path)["old", 1],
        planned(tmp_path)["new", 0],
        planned(tmp_path, overrides={"learning_rate": 1.0})["old", 0],
        plan(TABLE, SIZES, [0], "retrained", tmp_path)["old", 0],
        plan(TABLE, Sizes(steps=4, edits_per_update=2), [0], "weights", tmp_path)["old", 0],
        planned(tmp_path, table=replace(TABLE, survey=True))["old", 0],
        plan(TABLE, replace(SIZES, eval_from=999), [0], "weights", tmp_path)["old", 0],
    ]
    assert len({cell.folder, *(other.folder for other in others)}) == 8
    # but not by what it does not depend on
    larger = Sizes(steps=3, edits_per_update=2, survey_edits=99)
    assert plan(TABLE, larger, [0], "weights", tmp_path)["old", 0].folder == cell.folder
    # the same settings under another name, in another table, are the same cell
    renamed = Table("Another", "?", "train", [Variant("other name", {"edit_strength": 0.3})], {})
    shared = planned(tmp_path, table=renamed)["other name", 0]
    assert shared.folder == cell.folder
    assert unfinished([cell, shared]) == [shared] or unfinished([cell, shared]) == [cell]


def test_a_wrong_variant_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"only: got \['odl'\], expected some of base, old, new"):
        planned(tmp_path, only=["odl"])


def test_the_estimate_counts_what_is_left(tmp_path):
    cells = list(planned(tmp_path).values())
    total = sum(cell.units for cell in cells)
    assert estimate(cells, 0.01, 2, overhead=5.0) == pytest.approx((0.01 * total + 30) / 2)
    assert estimate(cells, 0.01, 99, overhead=0.0) == pytest.approx(0.01 * max(cell.units for cell in cells))
    assert measured_rate(cells) is None
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "result.json").write_text(json.dumps({"seconds": {"total": 7.0}}))
    assert measured_rate(cells) == pytest.approx(7 / cells[0].units)
    assert estimate(cells, 0.01, 1, overhead=0.0) == pytest.approx(0.01 * (total - cells[0].units))


def test_json_holds_no_infinity():
    assert finite({"a": [1.0, math.nan, (math.inf, "x")], "b": None}) == {"a": [1.0, None, [None, "x"]], "b": None}


# Equal compute

SETTINGS = {"num_inference_steps": 8, "num_generations": 12, "num_anchors": 4, "num_policy_steps": 4}


def test_units_of_an_edit_by_hand():
    # 12 · 8 forwards to roll out, 16 transitions forwards, and backwards as two each
    assert units_per_edit(SETTINGS) == 96 + 16 + 32
    assert units_per_edit({**SETTINGS, "solver": "heun"}) == 12 * 15 + 48
    assert units_per_edit({**SETTINGS, "beta": 0.1}) == 96 + 64
    assert units_per_edit({**SETTINGS, "num_iterations": 2}) == 48 + 48
    assert units_per_edit({**SETTINGS, "true_cfg_scale": 2.0}) == 2 * 144


@pytest.mark.parametrize("key", [key for key, table in TABLES.items() if table.kind == "train"])
def test_every_variant_may_spend_the_same(key, tmp_path):
    cells = plan(TABLES[key], Sizes(steps=20), [0], "weights", tmp_path)
    budgets = {cell.budget for cell in cells.values() if cell.trained}
    assert len(budgets) == 1
    for cell in cells.values():
        cost = 6 * units_per_edit(cell.config)
        updates = updates_for(cell.config, cell.budget, 6)
        assert not cell.trained or abs(updates * cost - cell.budget) <= cost / 2
    assert updates_for({**SETTINGS, "num_generations": 10_000}, 1.0, 6) == 1


def test_compute_is_counted_by_samples():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, hidden_states):
            return (self.layer(hidden_states),)

    model, compute = Model(), Compute()
    with compute.counting(model):
        with torch.no_grad():
            model(hidden_states=torch.ones(5, 3, 2))
        output = model(torch.ones(4, 3, 2))[0]
        assert compute.report() == {"forwards": 9, "backwards": 0, "units": 9}
        output.sum().backward()
    model(torch.ones(7, 3, 2))
    assert compute.report() == {"forwards": 9, "backwards": 4, "units": 17}


# Tables


@pytest.mark.parametrize("key", TABLES)
def test_every_variant_is_a_configuration_that_the_trainer_takes(key, tmp_path):
    for (name, _), cell in plan(TABLES[key], Sizes(), [0], "weights", tmp_path).items():
        config = {k: v for k, v in cell.config.items() if not k.startswith(("lora_", "reward_funcs"))}
        args = RCGRPOConfig(str(tmp_path), **config, use_cpu=True)
        rewards = cell.config["reward_funcs"]
        assert len(args.reward_weights or rewards) == len(args.reward_regions or rewards) == len(rewards), name


@pytest.mark.parametrize("key", TABLES)
def test_tables_name_things_that_exist(key):
    table = TABLES[key]
    names = [variant.name for variant in table.variants]
    assert len(set(names)) == len(names)
    assert table.baseline is None or table.baseline in names
    assert {name for variant in table.variants for name in variant.against} <= set(names)
    assert {
        *table.plotted,
        *(table.plane or ()),
    } <= table.metrics.keys() and table.lower_is_better <= table.metrics.keys()


# Summary


def result(score, minutes=None, reward=(0.5, 0.5), arms=("",), **values):
    values = {"cpu_minutes": minutes, **values} if minutes else values
    arm = {"per_edit": {"score": list(score), "reward": list(reward)}, "values": values}
    return {"arms": dict.fromkeys(arms, arm), "seconds": {"total": 1.0, "cpu": 0.5}}


def test_a_mean_over_seeds_by_hand():
    found = over_seeds([1.0, 2.0, 3.0, math.nan, None])
    assert (found.mean, found.seeds) == (2, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5)
    assert math.isnan(over_seeds([5.0]).half) and over_seeds([]).seeds == 0
    two = over_seeds([5.0, 5.1])
    assert (two.mean, two.seeds) == (pytest.approx(5.05), 2) and math.isnan(two.half), "two say nothing of a spread"


def test_a_paired_test_by_hand():
    results = {
        ("old", 0): result([0.0, 1.0, None]),
        ("old", 1): result([0.0, 1.0, 4.0]),
        ("old", 2): result([0.0, 1.0, 4.0]),
        ("new", 0): result([1.0, 2.0, 9.0]),
        ("new", 1): result([1.2, 2.4, 5.0]),
        ("new", 2): result([1.1, 2.1, 5.1]),
        ("new", 3): result([9.0, 9.0, 9.0]),  # a seed that the other has not finished
    }
    row, other = ("new", ""), ("old", "")
    found = test_against("score", row, other, results)
    # by seed, over edits that both have: (1 + 1) / 2, (1.2 + 1.4 + 1) / 3 and 1.1
    assert found.difference == pytest.approx(1.1)
    assert found.seeds_high - found.difference == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4)
    # by edit: 1.1, 1.17 and, of the two seeds that have it, 1.05; any mean of three of these is between
    assert 1.05 - 1e-9 <= found.edits_low < found.edits_high <= 3.5 / 3 + 1e-9
    assert found.clear
    two = test_against("score", row, other, {place: cell for place, cell in results.items() if place[1] < 2})
    assert math.isnan(two.seeds_low) and two.edits_low >= 1.0 and not two.clear, "two seeds"
    assert test_against("score", row, ("base", ""), results) is None


def test_clear_needs_seeds_and_edits():
    def against(new):
        results = {("old", s): result([0.0, 0.0, 0.0]) for s in range(3)}
        results |= {("new", s): result(values) for s, values in enumerate(new)}
        return test_against("score", ("new", ""), ("old", ""), results)

    assert against([[1.0, 1.1, 0.9], [1.0, 1.0, 1.2], [0.9, 1.0, 1.0]]).clear
    assert not against([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.1, 0.0, 0.0]]).clear, "one edit out of three"
    assert not against([[5.0, 5.1, 5.0], [-4.0, -4.1, -4.0], [1.0, 1.0, 1.0]]).clear, "the seeds disagree"
    one = test_against("score", ("new", ""), ("old", ""), {("old", 0): result([0, 0]), ("new", 0): result([1, 1])})
    assert not one.clear and math.isnan(one.seeds_low) and one.edits_low == 1


def test_values_of_a_cell_come_before_means_over_its_edits():
    arm = {"per_edit": {"score": [1.0, None, 3.0]}, "values": {"units": 7, "nothing": None}}
    assert of_cell(arm, "score") == 2 and of_cell(arm, "units") == 7
    assert math.isnan(of_cell(arm, "nothing")) and math.isnan(of_cell(arm, "unknown"))


def test_rates_are_what_training_gained_over_the_base_of_its_seed():
    results = {
        ("base", 0): result([0.0], reward=[0.5, 0.7]),
        ("new", 0): result([0.0], minutes=2.0, reward=[0.8, 0.8], units=4000),
        ("new", 1): result([0.0], minutes=2.0, reward=[0.8, 0.8]),
    }
    rated = with_rates(results)
    assert rated["new", 0]["arms"][""]["values"]["reward_per_minute"] == pytest.approx(0.1)
    assert rated["new", 0]["arms"][""]["values"]["reward_per_1000_units"] == pytest.approx(0.05)
    assert "reward_per_minute" not in rated["new", 1]["arms"][""]["values"], "its base has not finished"
    assert "reward_per_minute" not in results["new", 0]["arms"][""]["values"]


def test_arms_are_tested_against_the_arm_of_their_own_variant():
    table = Table("T", "?", "groups", TABLE.variants[1:], {"score": "score"}, baseline_arm="global")
    results = {
        (name, seed): {
            "arms": {
                arm: {"per_edit": {"score": [base + up, base + up + seed]}, "values": {}}
                for arm, up in (("region", 1.0), ("global", 0.0))
            }
        }
        for name, base in (("old", 10.0), ("new", 20.0))
        for seed in (0, 1, 2)
    }
    rows = summarise(table, results)["rows"]
    assert [(row["variant"], row["arm"]) for row in rows] == [
        ("old", "region"),
        ("old", "global"),
        ("new", "region"),
        ("new", "global"),
    ]
    assert rows[2]["against"] == ["new global"] and rows[2]["tests"][0]["score"]["difference"] == 1
    assert rows[1]["against"] == rows[1]["tests"] == []
    shown = summarise(replace(table, arms=("region",)), results)["rows"]
    assert [row["arm"] for row in shown] == ["region"] * 2 and shown[1]["tests"] == rows[2]["tests"]


def test_curves_are_averaged_point_by_point():
    table = Table("T", "?", "groups", TABLE.variants[1:2], {}, curves=("by_step",))
    arms = [{"": {"per_edit": {}, "values": {}, "curves": {"by_step": c}}} for c in ([1.0, None], [3.0, 5.0])]
    (row,) = summarise(table, {("old", seed): {"arms": arm} for seed, arm in enumerate(arms)})["rows"]
    assert [point["mean"] for point in row["curves"]["by_step"]] == [2, 5]
    assert [point["seeds"] for point in row["curves"]["by_step"]] == [2, 1]


def test_numbers_have_the_decimals_that_their_interval_deserves():
    assert shown({"mean": 0.123456, "half": 0.0123, "seeds": 3}) == "0.123 ± 0.012"
    assert shown({"mean": 26.789, "half": 0.5, "seeds": 3}) == "26.79 ± 0.50"
    assert shown({"mean": 0.123456, "half": math.nan, "seeds": 1}) == "0.1235"
    assert shown({"mean": math.nan, "half": math.nan, "seeds": 0}) == "–"
    test = {"difference": 0.1, "seeds_low": 0.08, "seeds_high": 0.12, "clear": True}
    assert difference(test) == "+0.100 ± 0.020*"
    assert difference(None) == "–"
    one = {"difference": 0.1, "seeds_low": math.nan, "seeds_high": math.nan, "edits_low": 0.05, "edits_high": 0.15}
    assert difference({**one, "clear": False}) == "+0.1 [+0.05, +0.15]"


def made(seeds=(0, 1, 2)):
    return {
        (name, seed): result([up + 0.01 * seed, up + 0.1], minutes=1.0)
        for name, up in (("base", 0.0), ("old", 0.2), ("new", 0.5))
        for seed in seeds
    }


def test_intervals_over_seeds_are_those_of_the_paired_t_test():
    draws = np.random.default_rng(0)
    before, after = draws.normal(size=(5, 30)), draws.normal(0.4, 1, (5, 30))
    results = {("old", s): result(before[s]) for s in range(5)} | {("new", s): result(after[s]) for s in range(5)}
    found = test_against("score", ("new", ""), ("old", ""), results)
    expected = stats.ttest_rel(after.mean(1), before.mean(1)).confidence_interval()
    assert (found.seeds_low, found.seeds_high) == pytest.approx((expected.low, expected.high))
    by_edit = (after - before).mean(0)
    spread = stats.norm.ppf(0.975) * by_edit.std() / 30**0.5
    assert (found.edits_low, found.edits_high) == pytest.approx(
        (by_edit.mean() - spread, by_edit.mean() + spread), abs=0.15 * spread
    )


def test_intervals_over_seeds_hold_zero_as_often_as_they_say():
    draws, held = np.random.default_rng(1), 0
    for _ in range(400):
        values = draws.normal(size=(2, 4, 2))
        results = {(n, s): result(values[i, s]) for i, n in enumerate(("old", "new")) for s in range(4)}
        pairs = [of_cell(results["new", s]["arms"][""], "score") for s in range(4)]
        others = [of_cell(results["old", s]["arms"][""], "score") for s in range(4)]
        found = over_seeds([a - b for a, b in zip(pairs, others, strict=True)])
        held += abs(found.mean) <= found.half
    assert 0.92 <= held / 400 <= 0.98


def test_a_page_says_what_was_found_and_how_to_find_it_again(tmp_path):
    page = write_page(tmp_path, Section("x", TABLE, summarise(TABLE, made()), "the command", ["a note"]))
    assert (tmp_path / "page.md").read_text() == page
    lines = [line for line in page.splitlines() if line.startswith("| new")]
    assert len(lines) == 3 and "0.555 ± 0.012" in lines[0]
    assert "+0.50 ± 0.00*" in lines[1] and "| old | +0.30 ± 0.00*" in lines[2]  # to the base, to the baseline
    assert page.index("Paired changes from the base") < page.index("Paired differences:")
    assert "`the command`" in page and "a note" in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][2]["tests"][0]["score"]["difference"] == pytest.approx(0.3)
    assert summary["rows"][2]["by_seed"]["score"] == pytest.approx([0.55, 0.555, 0.56])
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_variant_may_be_tested_against_others_than_the_baseline():
    table = replace(TABLE, variants=[*TABLE.variants[:2], replace(TABLE.variants[2], against=("base", "old"))])
    rows = summarise(table, made())["rows"]
    assert [row["against"] for row in rows] == [["old"], [], ["base", "old"]]
    to_base, to_old = rows[2]["tests"]
    assert to_base["score"]["difference"] == pytest.approx(0.5) and to_old["score"]["difference"] == pytest.approx(0.3)
    assert rows[2]["gains"]["score"] == to_base["score"] and rows[0]["gains"] == {}
    assert "reward_per_minute" in to_base and "reward_per_minute" not in rows[2]["gains"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_changes_of_two_metrics_are_drawn_against_each_other(tmp_path, seeds):
    table = replace(TABLE, metrics={"score": "score", "reward": "reward"}, plane=("reward", "score"), plotted=())
    results = made(seeds)
    assert plot(tmp_path / "plane.png", table, summarise(table, results))
    assert (tmp_path / "plane.png").stat().st_size > 1000
    without = {place: result for place, result in results.items() if place[0] != "base"}
    assert not plot(tmp_path / "nothing.png", table, summarise(table, without))
    assert not (tmp_path / "nothing.png").exists()


def test_differences_far_beyond_all_others_are_numbers_at_the_edge():
    def at(difference, half):
        ends = {"seeds_low": difference - half, "seeds_high": difference + half}
        return {"difference": difference, **ends, "edits_low": math.nan, "edits_high": math.nan}

    near = [at(-0.007, 0.002), at(0.0, 0.001), at(-0.016, 0.01), None]
    assert far_out([*near, at(-0.26, 0.03), at(0.17, 0.13)]) == {4, 5}
    assert far_out([*near, at(-0.07, 0.01)]) == set() and far_out([*near, at(-0.08, 0.01)]) == {4}
    assert far_out([at(0.0, 0.001), at(1.0, 0.1), at(1.1, 0.1)]) == set(), "they are most of what there is"
    assert far_out([]) == far_out([None]) == far_out([at(1.0, 0.1)]) == set()


def test_the_study_is_published_from_what_was_run(tmp_path, monkeypatch):
    work, docs = tmp_path / "work", tmp_path / "docs"
    monkeypatch.setattr(command, "TABLES", {"x": TABLE, "y": TABLE})
    assert command.main(["publish", "--work", str(work), "--docs", str(docs)]) == 1 and not docs.exists()

    def ran(seeds, settings):
        cells = planned(work, seeds)
        for place, cell in cells.items():
            if place != ("new", 1):
                cell.folder.mkdir(parents=True, exist_ok=True)
                (cell.folder / "result.json").write_text(json.dumps(made(seeds)[place]))
        remember(work / "x", settings, {place: cell.folder.name for place, cell in cells.items()})

    settings = {"sizes": {**vars(SIZES)}, "overrides": {}}
    ran([0], settings)
    ran([1, 2], settings)
    assert command.main(["publish", "--work", str(work), "--docs", str(docs)]) == 0
    first, page = ((docs / name).read_text() for name in ("study.md", "study/x.md"))
    assert "## x. A table" in first and "## y" not in first and "two shared cores" in first
    assert "![A table](study/x.png)" in first and "(study/x.md)" in first
    assert page.startswith("# x. A table") and "![A table](x.png)" in page and not (docs / "study" / "y.md").exists()
    assert "benchmarks.study x --seeds 0 1 2 --steps" in page and "--only" not in page
    assert "**1 of 9 cells have not finished.**" in page
    assert [row["seeds"] for row in json.loads((docs / "study" / "x.json").read_text())["rows"]] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 2],
    ]
    # what is published is enough to write every page again, and to go on from
    whole = {path: path.read_bytes() for kind in ("*.json", "*.md") for path in docs.rglob(kind)}
    shutil.rmtree(work)
    assert command.main(["publish", "--work", str(work), "--docs", str(docs)]) == 0
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert command.main(["restore", "--work", str(work), "--docs", str(docs)]) == 0
    assert [place for place, cell in planned(work, (0, 1, 2)).items() if cell.result() is None] == [("new", 1)]
    assert recall(work / "x") == recall(docs / "study" / "record" / "x")
    # another recipe or editor is another study
    ran([0], {**settings, "overrides": {"solver": "heun"}})
    command.main(["publish", "--work", str(work), "--docs", str(docs)])
    page = (docs / "study" / "x.md").read_text()
    assert "--seeds 0 --steps" in page and """--set solver='"heun"'`""" in page and "Seeds: 0." in page


def test_a_publication_keeps_results_small_and_those_of_other_tables(tmp_path):
    work, published = tmp_path / "work", tmp_path / "published"

    def ran(key, name, **result):
        remember(work / key, {"sizes": {"steps": 1}}, {("old", 0): name})
        result_file(work, name).parent.mkdir(parents=True)
        result_file(work, name).write_text(json.dumps(result))

    ran("x", "one", arms={"": {"per_edit": {"score": [0.123456789, None, 3]}}}, log_history=[1])
    keep(work, published, "xy")
    assert json.loads(result_file(published, "one").read_text()) == {
        "arms": {"": {"per_edit": {"score": [0.1234568, None, 3]}}}
    }
    shutil.rmtree(work)
    ran("y", "two", arms={})
    keep(work, published, "xy")
    assert {path.name for path in (published / "cells").iterdir()} == {"one", "two"}
    # with other settings it is another table, and nobody needs the old cell
    remember(work / "x", {"sizes": {"steps": 2}}, {("old", 0): "three"})
    keep(work, published, "xy")
    assert {path.name for path in (published / "cells").iterdir()} == {"two"}
    # what somebody has run stays theirs
    result_file(work, "two").write_text("mine")
    assert restore(published, work) == 0 and result_file(work, "two").read_text() == "mine"


def test_what_was_kept_before_a_size_was_known_is_added_to(tmp_path):
    sizes = asdict(Sizes())
    known = {name: value for name, value in sizes.items() if name != "eval_from"}
    (tmp_path / "plan.json").write_text(json.dumps({"settings": {"sizes": known}, "cells": [["old", 0, "one"]]}))
    remember(tmp_path, {"sizes": sizes}, {("new", 0): "two"})
    assert set(recall(tmp_path)["cells"]) == {("old", 0), ("new", 0)}
    remember(tmp_path, {"sizes": {**sizes, "eval_from": 1}}, {("new", 0): "three"})
    assert set(recall(tmp_path)["cells"]) == {("new", 0)}


def test_lost_numbers_of_edits_leave_the_interval_that_was_published():
    whole = made()
    before = finite(summarise(TABLE, whole))
    lost = {
        place: {"arms": {"": {"per_edit": {}, "values": {"score": of_cell(content["arms"][""], "score")}}}}
        for place, content in whole.items()
    }

    def test_of(summary, variant="new"):
        return next(row for row in summary["rows"] if row["variant"] == variant)["tests"][0]["score"]

    after = summarise(TABLE, lost)
    assert math.isnan(test_of(after)["edits_low"])
    fill_in(after, before)
    for part, value in test_of(before).items():
        assert test_of(after)[part] == pytest.approx(value)
    # not that of other seeds
    fewer = summarise(TABLE, {place: content for place, content in lost.items() if place[1] < 2})
    fill_in(fewer, before)
    assert math.isnan(test_of(fewer)["edits_low"])
    # nor that of another result
    lost["new", 2]["arms"][""]["values"]["score"] += 0.01
    changed = summarise(TABLE, lost)
    fill_in(changed, before)
    assert math.isnan(test_of(changed)["edits_low"])


def test_variants_of_the_same_seeds_share_a_command(monkeypatch):
    monkeypatch.setattr(command, "TABLES", {"x": TABLE})
    first, second, third = (variant.name for variant in TABLE.variants)
    cells = {(first, 1): "a", (first, 0): "b", (second, 0): "c", (third, 0): "d", (third, 1): "e"}
    settings = {"sizes": {**vars(Sizes()), "steps": 3}, "overrides": {}}
    both, one = command.reproduce("x", settings, cells).split(" && ")
    assert both == f"python -m benchmarks.study x --seeds 0 1 --steps 3 --only {first} {third}"
    assert one == f"python -m benchmarks.study x --seeds 0 --steps 3 --only {second}"


# Fronts


def test_an_area_by_hand():
    floor = np.array([0.0, 0.0])
    corner = np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0], [-5.0, 9.0]])  # the third is dominated, the fourth below
    assert hypervolume(corner, floor) == 3 * 1 + 1 * 1
    assert hypervolume(corner, np.array([-6.0, 0.0])) == 9 * 1 + 7 * 1 + 1 * 7
    assert hypervolume(np.array([[-1.0, 5.0]]), floor) == 0
    assert hypervolume(np.stack([corner, corner + 1]), floor).tolist() == [4, 4 * 2 + 2 * 1]
    shuffled = corner[[2, 0, 3, 1]]
    assert hypervolume(shuffled, floor) == hypervolume(corner, floor)


FRONTS = replace(
    TABLE,
    variants=[
        TABLE.variants[0],
        Variant("ours a", front="ours"),
        Variant("ours b", front="ours"),
        Variant("theirs", front="theirs"),
        Variant("nobody's", front="nobody"),  # no cell of it has finished
    ],
    metrics={"score": "score", "reward": "reward"},
    baseline=None,
    floors=[{"score": -1.0, "reward": -1.0}],
)


def front(ours=0.0, edits=40):
    noise = np.random.default_rng(0).normal(size=(2, edits))

    def cell(score, reward, scale=0.3):
        return result(score + scale * noise[0], reward=(reward + scale * noise[1]).tolist())

    cells = {
        "base": cell(0.0, 0.0, 0.0),
        "ours a": cell(2.0, 0.0),
        "ours b": cell(0.0, 2.0),
        "theirs": cell(ours, ours),
    }
    return {(name, 0): found for name, found in cells.items()}


def test_fronts_are_compared_over_edits_with_the_base_in_each():
    (far,) = compare_fronts(FRONTS, front(0.2))
    assert (far.method, far.other, far.level) == ("ours", "theirs", 0.95)
    assert far.area == pytest.approx(3 + 2, abs=0.6) and far.other_area == pytest.approx(1.2**2, abs=0.4)
    assert far.difference == pytest.approx(far.area - far.other_area) and 0 < far.low < far.difference < far.high
    (near,) = compare_fronts(FRONTS, front(5**0.5 - 1))
    assert near.low < 0 < near.high
    (worse,) = compare_fronts(FRONTS, front(-3.0))
    assert worse.other_area == 1, "not to train is open to everyone"


def test_more_comparisons_have_wider_intervals():
    table = replace(FRONTS, floors=[{"score": -1.0, "reward": -1.0}, {"reward": -1.0, "score": -1.0}])
    (alone,), (first, second) = compare_fronts(FRONTS, front(0.2)), compare_fronts(table, front(0.2))
    assert first.level == second.level == 0.975 and first.low < alone.low < alone.high < first.high
    assert compare_fronts(TABLE, made()) == []


def test_a_page_shows_its_fronts(tmp_path):
    found = Section("x", FRONTS, summarise(FRONTS, front(0.2)), "the command").text(None)
    assert "Fronts: the area" in found and "score -1 and reward -1" in found
    assert re.search(r"\| score × reward \| +ours: 5\.\d+ \| +theirs: 1\.\d+ \| \+3", found) is not None
    assert "Fronts" not in Section("x", TABLE, summarise(TABLE, made()), "the command").text(None)


def test_conclusions_belong_to_their_table(tmp_path):
    assert read_conclusions(tmp_path / "conclusions.md") == {}
    (tmp_path / "conclusions.md").write_text("ignored\n\n## a\n\nOne.\n\nTwo.\n## b. Variance\nThree.\n")
    assert read_conclusions(tmp_path / "conclusions.md") == {"a": "One.\n\nTwo.", "b": "Three."}


def test_the_first_page_has_the_answer_and_few_rows(tmp_path):
    rows = [f"row {i}" for i in range(12)]
    table = replace(TABLE, variants=[TABLE.variants[0], *(Variant(name) for name in rows)], baseline=None)
    results = {(name, s): result([0.5 + s / 10, 0.6]) for name in ("base", *rows) for s in (0, 1)}
    section = Section("x", table, summarise(table, results), "the command")
    text = section.brief("x.png", "**Yes.**\n\nBecause of this.")
    assert "**Yes.**" in text and "Because" not in text and "base" not in re.findall(r"^\| (\S+)", text, re.MULTILINE)
    assert re.findall(r"^\| (row \d+)", text, re.MULTILINE) == rows[:8] and "Changes from the base:" in text
    chosen = Section("x", replace(table, brief=("row 9", "row 2")), section.summary, "the command").brief(None)
    assert re.findall(r"^\| (row \d+)", chosen, re.MULTILINE) == ["row 9", "row 2"] and "!" not in chosen


@pytest.mark.parametrize("key", TABLES)
def test_what_the_first_page_shows_is_in_the_table(key):
    table = TABLES[key]
    labels = {
        name for variant in table.variants for name in (variant.name, *(f"{variant.name}: {arm}" for arm in ARMS))
    }
    assert set(table.brief) <= labels and set(table.brief_metrics) <= {*table.metrics} and len(table.brief) <= 8


def test_a_summary_stands_before_the_tables(tmp_path):
    sections = [Section("x", TABLE, summarise(TABLE, made()), "the command")]
    said = {"summary": "What was found.", "x": "Why.", "variants": "Who is who."}
    write_study(tmp_path, sections, "a laptop", said, "It took a day.")
    text = (tmp_path / "study.md").read_text()
    order = ["# The study", "## In short", "What was found.", "## x. ", "Why.", "## How to read it", "It took a day."]
    order += ["## The variants", "Who is who."]
    assert [text.count(part) for part in order] == [1] * len(order)
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    write_study(tmp_path, sections, "a laptop", {})
    assert "## In short" not in (tmp_path / "study.md").read_text()


# Rows


def test_rows_are_those_of_the_data_set_drawn_when_needed():
    from benchmarks.study.cell import MiniRows

    from rcgrpo import compbench_mini
    from rcgrpo.data.corruption import corrupt_dataset
    from rcgrpo.data.edits import EditRows

    whole = corrupt_dataset(compbench_mini("train", 3), "shift", 0.5, seed=4)
    ours, theirs = EditRows(MiniRows("train", 3, ("shift", 0.5), 4), "a"), EditRows(whole, "b")
    for i in (2, 0):
        mine, other = ours.edit(i), theirs.edit(i)
        assert torch.equal(mine.mask, other.mask) and mine.source.tobytes() == other.source.tobytes()
        assert mine.prompt == other.prompt and mine.columns["task"] == other.columns["task"]
        assert mine.columns["edited_image"].tobytes() == other.columns["edited_image"].tobytes()
    assert len(ours) == 3 and set(ours.rows._drawn) == {0, 2}
    with pytest.raises(IndexError, match=r"expected one of 0\.\.2"):
        ours.rows[3]


def test_held_out_edits_may_begin_where_no_choice_has_looked():
    from benchmarks.study.cell import held_out

    first, later = held_out(4), held_out(2, 2)
    assert [edit.prompt for edit in later] == [edit.prompt for edit in first[2:]]
    assert later[1].source.tobytes() == first[3].source.tobytes()
