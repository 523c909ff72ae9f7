"""Does the gradient's signal-to-noise ratio foretell training? `python benchmarks/rank.py --edits 32 --draws 3`.

Measures the ratio of the study's variants (table a by default), which were all trained with the same compute, and ranks
them by it: by groups, and by seconds, as what a run sees of its signal grows with the groups that its time pays for.
Beside it stand the published gains of training. What is measured is kept in `--work`, so a stopped run goes on.
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
    lines, ratios, widths, seconds, gains = [], [], [], [], []
    for variant in variants:
        found = measure(variant, args)
        whole = found["parts"][0]
        low, high = whole["snr_95"]
        ratios.append(whole["snr"])
        widths.append(high - low)
        seconds.append(found["seconds_per_group"])
        gains.append([trained[variant.name][name] - trained["base"][name] for name in GAINS])
        lines.append(
            [
                variant.name,
                f"{whole['snr']:.4f} [{low:.4f}, {high:.4f}]",
                f"{seconds[-1]:.2f}",
                f"{1000 * whole['snr'] / seconds[-1]:.2f}",
                *(f"{gain:+.4f}" for gain in gains[-1][:2]),
                f"{gains[-1][2]:+.2f}",
            ]
        )
    head = ["variant", "ratio of a group", "seconds a group", "ratio of 1,000 s", *(f"trained: {n}" for n in GAINS)]
    print(pad_table([head, *lines]))
    if len(variants) < 3:
        return
    # Ranks of ratios are no surer than the ratios are: these are drawn again, as normal as their intervals are wide.
    drawn = np.random.default_rng(0).normal(ratios, np.array(widths) / (2 * 1.96), (RESAMPLES, len(variants)))
    for named, scale in (("groups", np.ones(len(variants))), ("seconds", 1 / np.array(seconds))):
        ranks = []
        for name, gain in zip(GAINS, np.array(gains).T, strict=True):
            rank = spearmanr(ratios * scale, gain)
            low, high = np.quantile([spearmanr(row * scale, gain).statistic for row in drawn], [0.025, 0.975])
            ranks.append(f"{name} {rank.statistic:+.2f} (p {rank.pvalue:.2f}; [{low:+.2f}, {high:+.2f}])")
        print(f"Spearman over {len(variants)} variants, ratio by {named} with the trained gain: {', '.join(ranks)}")
    print("p: of such ranks by chance. Brackets: where the ranks come to as the ratios' own noise is drawn again.")


if __name__ == "__main__":
    main()
