"""Run the main job with several seeds and write every result as one markdown table.

    python benchmarks/three_seeds.py --work runs/seeds --seeds 0 1 2 -- --max_steps 50

Seeds that have finished are not run again. What follows `--` goes to `rcgrpo train`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def run(folder: Path, seed: int, extra: list[str]) -> dict:
    """One main job; its `metrics.json` with the wall time of the whole command in minutes."""
    done = folder / "seconds.txt"
    if not done.exists():
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "rcgrpo.cli",
            "train",
            "--seed",
            str(seed),
            "--output_dir",
            str(folder),
            *extra,
        ]
        subprocess.run(command, check=True)
        done.write_text(str(time.perf_counter() - began))
    return json.loads((folder / "metrics.json").read_text()) | {"minutes": float(done.read_text()) / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, extra = parser.parse_known_args()
    extra = [argument for argument in extra if argument != "--"]
    rows = []
    for seed in arguments.seeds:
        result = run(arguments.work / f"seed-{seed}", seed, extra)
        for row in result["held_out"]:
            digits = 2 if "dB" in row["metric"] else 4
            interval = f"[{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
            cells = [f"{row[key]:.{digits}f}" for key in ("before", "after")] + [f"{row['difference']:+.{digits}f}"]
            rows.append((row["metric"], seed, row["n"], *cells, interval, f"{result['minutes']:.1f}"))
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: (order.index(row[0]), row[1]))
    header = ("metric", "seed", "n", "before", "after", "difference", "95 % interval", "minutes")
    table = [header, tuple("---" for _ in header), *rows]
    text = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table) + "\n"
    (arguments.work / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
