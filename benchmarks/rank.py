"""Does the gradient's signal-to-noise ratio foretell training? `python benchmarks/rank.py --edits 32 --draws 3`.

Measures the ratio of the study's variants (table a by default), which were all trained with the same compute: of the
whole gradient, and of what comes of it through the region's tokens and through the others. Ranks them by it, by groups
and by seconds, as what a run sees of its signal grows with the groups that its time pays for. Beside it stand the
published gains of training, and what a group's price alone would say. What is measured is kept in `--work`, so a
stopped run goes on.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from rcgrpo.cli import gradient
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.statistics import pad_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.study.tables import DATA_KEYS, TABLES, Variant, common

ROOT = Path(__file__).parents[1]
GAINS = ("edit_score", "reward", "psnr")
PARTS = ("all", "edit tokens", "keep tokens")
RESAMPLES = 2000


def measure(variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """What `rcgrpo diagnose --gradient` finds of a variant."""
    folder = args.work / f"{args.edits}x{args.draws}" / variant.name.replace(" ", "_")
    found = folder / "gradient.json"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = yaml.safe_load((ROOT / "benchmarks" / "study" / "recipe.yaml").read_text())
        recipe = {**{key: data[key] for key in DATA_KEYS}, **common(), **variant.config}
        with write_atomically(folder / "recipe.yaml") as path:
            path.write_text(yaml.safe_dump(recipe))
        size = ["--num_samples", str(args.edits), "--num_draws", str(args.draws)]
        where = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder)]
        with redirect_stdout(sys.stderr):
            gradient.run([*where, *size, "--disable_tqdm", "true"])
    return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="a", choices=sorted(TABLES))
    parser.add_argument("--only", nargs="*", help="some of its variants")
    parser.add_argument("--edits", type=int, default=32)
    parser.add_argument("--draws", type=int, default=3, help="groups of each edit, from other noise")
    parser.add_argument("--work", type=Path, default=Path("runs/rank"))
    args = parser.parse_args()
    published = json.loads((ROOT / "docs" / "study" / f"{args.table}.json").read_text())["rows"]
    trained = {row["variant"]: {name: row["means"][name]["mean"] for name in GAINS} for row in published}
    variants = [v for v in TABLES[args.table].variants if v.trained and v.name in (args.only or trained)]
    measured = [measure(variant, args) for variant in variants]
    seconds = np.array([found["seconds_per_group"] for found in measured])
    parts = [[part for name in PARTS for part in found["parts"] if part["part"] == name] for found in measured]
    gains = np.array([[trained[v.name][name] - trained["base"][name] for name in GAINS] for v in variants])
    lines = [
        [
            variant.name,
            *("{:.4f} [{:.4f}, {:.4f}]".format(part["snr"], *part["snr_95"]) for part in found),
            f"{cost:.2f}",
            *(f"{gain:+.4f}" for gain in gained[:2]),
            f"{gained[2]:+.2f}",
        ]
        for variant, found, cost, gained in zip(variants, parts, seconds, gains, strict=True)
    ]
    titles = [f"trained: {name}" for name in GAINS]
    print(pad_table([["variant", *(f"ratio: {name}" for name in PARTS), "seconds a group", *titles], *lines]))
    if len(variants) < 3:
        return
    rows = [["seconds alone", *(ranked(1 / seconds, gain) for gain in gains.T)]]
    for i, name in enumerate(PARTS):
        ratios = np.array([found[i]["snr"] for found in parts])
        widths = np.array([np.diff(found[i]["snr_95"])[0] for found in parts])
        # Ranks of ratios are no surer than the ratios: these are drawn again, as normal as their intervals are wide.
        drawn = np.random.default_rng(0).normal(ratios, widths / (2 * 1.96), (RESAMPLES, len(variants)))
        for named, scale in (("groups", np.ones_like(seconds)), ("seconds", 1 / seconds)):
            rows.append([f"{name}, by {named}", *(ranked(ratios * scale, gain, drawn * scale) for gain in gains.T)])
    print(
        f"\nSpearman over {len(variants)} variants with the trained gain: p, that chance has such ranks; in brackets,"
    )
    print(f"where it comes to as the ratios' own noise is drawn once more:\n\n{pad_table([['ratio', *titles], *rows])}")


def ranked(ratios: np.ndarray, gain: np.ndarray, drawn: np.ndarray | None = None) -> str:
    """Correlation by ranks of ratios with a gain, `[variants]`, and 95 % of those of `drawn`, `[draws, variants]`."""
    found = spearmanr(ratios, gain)
    if drawn is None:
        return f"{found.statistic:+.2f} (p {found.pvalue:.2f})"
    low, high = np.quantile([spearmanr(row, gain).statistic for row in drawn], [0.025, 0.975])
    return f"{found.statistic:+.2f} (p {found.pvalue:.2f}; [{low:+.2f}, {high:+.2f}])"


if __name__ == "__main__":
    main()
