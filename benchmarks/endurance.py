"""What a run must live through: kills, failing rewards, bad inputs. Prints three figures.

    python benchmarks/endurance.py                     # 100 kills, 1,000 faults, 200 bad inputs: some twenty minutes
    python benchmarks/endurance.py --kills 20 --faults 0 --inputs 0
    python benchmarks/endurance.py --short             # what the tests run

Right is, of every kill: the run goes on with the same call, nothing is deleted by hand, and its LoRA has the SHA-256 of
the undisturbed run; of every fault: its candidate teaches nothing, it is counted, and the run takes all its steps; of
every bad input: one line and an exit code other than 0. The exit code is 1 where anything else happened. The figures
stand in docs/reliability.md.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch: forked runs must not meet the threads of a pool that their parent had.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))


def kills(number: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """The kind of each kill, and what was wrong after it."""
    from kills import CYCLES, ONE, TWO, Kills

    runs = Kills(folder)
    two, cycles, operations = (round(number * share) for share in (0.2, 0.2, 0.4))
    plan = [
        *runs.at_operations(ONE, operations),
        *runs.at_operations(TWO, two // 2),
        *runs.at_random(TWO, two - two // 2),
        *runs.at_random(CYCLES, cycles),
        *runs.at_random(ONE, number - two - cycles - operations),
    ]
    for job, kill in plan:
        yield f"{job.name}, {'random instants' if kill.seconds else 'file operations'}", runs.survive(job, kill)


def faults(number: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """The kind of each fault that was met, and what was wrong with what became of it."""
    from faults import local, remote

    logging.getLogger("rcgrpo").setLevel(logging.CRITICAL)  # a line for each fault
    yield from local(number - number // 2, folder)
    yield from remote(number // 2, folder)


def inputs(number: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """The name of each bad command line, and what was wrong with how it was answered."""
    from bad_inputs import BAD_INPUTS, check, prepare

    prepare(folder)
    number = min(number, len(BAD_INPUTS))
    for i in range(number):
        name, argv = BAD_INPUTS[i * len(BAD_INPUTS) // number]
        yield "command lines", (wrong := check(argv, folder)) and f"{name}: {wrong}"


PARTS = {
    "kills": (kills, 100, 5, "kills -9 survived with the LoRA's SHA-256 equal"),
    "faults": (faults, 1000, 40, "reward faults counted, their candidates untaught, all steps taken"),
    "inputs": (inputs, 200, 8, "bad inputs answered in one line"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, number, _, text) in PARTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}; {number} by default, 0 for none")
    parser.add_argument("--short", action="store_true", help="a few of each")
    given = parser.parse_args()
    lines, failed = [], False
    with tempfile.TemporaryDirectory(prefix="endurance-") as temporary:
        for name, (part, number, short, text) in PARTS.items():
            asked = getattr(given, name)
            count = asked if asked is not None else short if given.short else number
            if not count:
                continue
            folder, began, kinds, wrongs = Path(temporary, name), time.monotonic(), Counter[str](), []
            folder.mkdir()
            for kind, wrong in part(count, folder):
                kinds[kind] += 1
                if wrong:
                    wrongs.append(wrong)
                    print(f"WRONG: {wrong}", flush=True)
            total = sum(kinds.values())
            spread = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
            lines.append(f"{total - len(wrongs)} of {total} {text} ({time.monotonic() - began:.0f} s; {spread})")
            failed |= bool(wrongs) or not total
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
