"""The study's harness with fake cells; nothing here loads a model."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study.harness import (
    Compute,
    Sizes,
    estimate,
    finite,
    measured_rate,
    plan,
    run_cells,
    unfinished,
    units_per_edit,
    updates_for,
)
from benchmarks.study.pages import difference, shown, write_page
from benchmarks.study.summary import of_cell, over_seeds, summarise, test_against, with_rates
from benchmarks.study.tables import TABLES, Table, Variant

from rcgrpo import RCGRPOConfig

test_against.__test__ = False  # its name is not pytest's

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
FAKE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
spec = json.loads((folder / "cell.json").read_text())
with open(folder / "runs", "a") as log:
    log.write("x")
print("working on", spec["seed"])
if spec["config"]["edit_strength"] == 0.6 and spec["seed"] == 1 and len((folder / "runs").read_text()) == 1:
    sys.exit("broken")
(folder / "result.json").write_text(json.dumps({"spec": spec}))
"""


def fake_command(folder):
    return [sys.executable, "-c", FAKE, str(folder)]


def planned(work, seeds=(0, 1), table=TABLE, **kwargs):
    return plan(table, SIZES, seeds, "weights", work, **kwargs)


# Cells


def test_finished_cells_are_never_repeated_and_a_failure_stops_no_other(tmp_path):
    cells, said = planned(tmp_path), []
    failed = run_cells(list(cells.values()), 3, 1, fake_command, said.append)
    assert failed == [cells["new", 1]] and len(said) == 6
    assert "broken" in (failed[0].folder / "log.txt").read_text()
    assert sum("FAILED" in line for line in said) == 1
    assert unfinished(list(cells.values())) == failed
    # planned anew, as another process would: only the broken one runs again
    again = planned(tmp_path)
    assert run_cells(list(again.values()), 3, 1, fake_command, said.append) == []
    assert len(said) == 7
    runs = {name: len((cell.folder / "runs").read_text()) for name, cell in again.items()}
    assert runs == {name: 2 if name == ("new", 1) else 1 for name in again}
    assert run_cells(list(again.values()), 3, 1, fake_command, said.append) == [] and len(said) == 7


def test_a_cell_that_ends_without_a_result_has_failed(tmp_path):
    (cell,) = planned(tmp_path, [0], only=["old"]).values()
    assert run_cells([cell], 1, 1, lambda folder: [sys.executable, "-c", ""], lambda line: None) == [cell]


def test_interrupting_ends_the_processes(tmp_path):
    def command(folder):
        first = json.loads((folder / "cell.json").read_text())["seed"] == 0
        return [sys.executable, "-c", "" if first else "import time; time.sleep(60)"]

    def interrupt(line):
        raise KeyboardInterrupt

    cells = planned(tmp_path, only=["old"])
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_cells(list(cells.values()), 2, 1, command, interrupt)
    assert time.perf_counter() - began < 30


def test_a_folder_is_named_by_all_that_the_result_depends_on(tmp_path):
    cell = planned(tmp_path)["old", 0]
    assert cell.folder == planned(tmp_path)["old", 0].folder
    others = [
        planned(tmp_path)["old", 1],
        planned(tmp_path)["new", 0],
        planned(tmp_path, overrides={"learning_rate": 1.0})["old", 0],
        plan(TABLE, SIZES, [0], "retrained", tmp_path)["old", 0],
        plan(TABLE, Sizes(steps=4, edits_per_update=2), [0], "weights", tmp_path)["old", 0],
    ]
    assert len({cell.folder, *(other.folder for other in others)}) == 6
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
    assert set(table.plotted) <= table.metrics.keys() and table.lower_is_better <= table.metrics.keys()


# Summary


def result(score, minutes=None, reward=(0.5, 0.5), arms=("",), **values):
    values = {"minutes": minutes, **values} if minutes else values
    arm = {"per_edit": {"score": list(score), "reward": list(reward)}, "values": values}
    return {"arms": dict.fromkeys(arms, arm), "seconds": {"total": 1.0}}


def test_a_mean_over_seeds_by_hand():
    found = over_seeds([1.0, 2.0, 3.0, math.nan, None])
    assert (found.mean, found.seeds) == (2, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5)
    assert math.isnan(over_seeds([5.0]).half) and over_seeds([]).seeds == 0


def test_a_paired_test_by_hand():
    results = {
        ("old", 0): result([0.0, 1.0, None]),
        ("old", 1): result([0.0, 1.0, 4.0]),
        ("new", 0): result([1.0, 2.0, 9.0]),
        ("new", 1): result([1.2, 2.4, 5.0]),
        ("new", 2): result([9.0, 9.0, 9.0]),  # a seed that the other has not finished
    }
    row, other = ("new", ""), ("old", "")
    found = test_against("score", row, other, results)
    # by seed, over edits that both have: (1 + 1) / 2 and (1.2 + 1.4 + 1) / 3
    assert found.difference == pytest.approx(1.1)
    assert found.seeds_high - found.difference == pytest.approx(12.7062 * 0.1, rel=1e-4)
    # by edit: 1.1, 1.2 and, of the one seed that has it, 1; any mean of three of these is between
    assert 1.0 <= found.edits_low < found.edits_high <= 1.2 + 1e-9
    assert not found.clear, "two seeds that far apart are not clear"
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


def test_reward_per_minute_is_what_training_gained_over_the_base_of_its_seed():
    results = {
        ("base", 0): result([0.0], reward=[0.5, 0.7]),
        ("new", 0): result([0.0], minutes=2.0, reward=[0.8, 0.8]),
        ("new", 1): result([0.0], minutes=2.0, reward=[0.8, 0.8]),
    }
    rated = with_rates(results)
    assert rated["new", 0]["arms"][""]["values"]["reward_per_minute"] == pytest.approx(0.1)
    assert "reward_per_minute" not in rated["new", 1]["arms"][""]["values"], "its base has not finished"
    assert "reward_per_minute" not in results["new", 0]["arms"][""]["values"]


def test_arms_are_tested_against_the_arm_of_their_own_variant():
    table = Table("T", "?", "variance", TABLE.variants[1:], {"score": "score"}, baseline_arm="global")
    results = {
        (name, seed): {
            "arms": {
                arm: {"per_edit": {"score": [base + up, base + up + seed]}, "values": {}}
                for arm, up in (("region", 1.0), ("global", 0.0))
            }
        }
        for name, base in (("old", 10.0), ("new", 20.0))
        for seed in (0, 1)
    }
    rows = summarise(table, results)["rows"]
    assert [(row["variant"], row["arm"]) for row in rows] == [
        ("old", "region"),
        ("old", "global"),
        ("new", "region"),
        ("new", "global"),
    ]
    assert rows[2]["against"] == "new global" and rows[2]["tests"]["score"]["difference"] == 1
    assert rows[1]["against"] is None and rows[1]["tests"] == {}


def test_curves_are_averaged_point_by_point():
    table = Table("T", "?", "leakage", TABLE.variants[1:2], {}, curves=("by_step",))
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


def test_a_page_says_what_was_found_and_how_to_find_it_again(tmp_path):
    results = {
        (name, seed): result([up + 0.01 * seed, up + 0.1], minutes=1.0)
        for name, up in (("base", 0.0), ("old", 0.2), ("new", 0.5))
        for seed in (0, 1, 2)
    }
    page = write_page(tmp_path, TABLE, summarise(TABLE, results), "the command", ["a note"])
    assert (tmp_path / "page.md").read_text() == page
    lines = [line for line in page.splitlines() if line.startswith("| new")]
    assert len(lines) == 2 and "0.555 ± 0.012" in lines[0] and "+0.30 ± 0.00*" in lines[1]
    assert "`the command`" in page and "a note" in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][2]["tests"]["score"]["difference"] == pytest.approx(0.3)
    assert (tmp_path / "plot.png").stat().st_size > 1000
