"""How noisy a configuration's gradient is: `python benchmarks/snr.py --set num_generations=12 policy='"nft"'`.

One line of JSON of what `rcgrpo diagnose --gradient` measures, for scripts that rank many configurations: the recipe,
what `--set` says otherwise, and |mean|² over the variance of one group, in groups and in seconds, with intervals.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path

from rcgrpo.cli import gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(str(files("rcgrpo") / "recipes" / "tiny.yaml")))
    parser.add_argument("--set", nargs="*", default=[], help="settings instead of the recipe's, as name=JSON")
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--draws", type=int, default=3, help="groups of each edit, from other noise")
    args = parser.parse_args()
    flags = ["--config", str(args.recipe), "--num_samples", str(args.edits), "--num_draws", str(args.draws)]
    for name, _, value in (each.partition("=") for each in args.set):
        value = json.loads(value)
        flags += [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            gradient.run([*flags, "--output_dir", folder, "--disable_tqdm", "true"])
        found = json.loads(Path(folder, "gradient.json").read_text())
    whole = {name: value for name, value in found["parts"][0].items() if name not in ("part", "variance_share")}
    print(json.dumps({"set": args.set, **whole, "seconds_per_group": found["seconds_per_group"]}))


if __name__ == "__main__":
    main()
