"""What training takes on the GPU that is here: seconds, gigabytes, share of its peak, beside what `rcgrpo plan` says.

    python benchmarks/gpu.py            # under 8 minutes on one H200; writes the table of docs/performance.md
    python benchmarks/gpu.py --tiny     # a few small blocks, on a CPU too: shows that it works, and writes nothing

FLUX.1-Kontext and FLUX.2-klein-4B with random weights of true size, so nothing is downloaded and what is drawn means
nothing. Each case is a run of the real trainer with a LoRA of rank 32: two updates, the first of which warms up (and
compiles). An update is one edit of 4 candidates in 4 steps and 4 transitions; the table has seconds of a forward, a
decoded picture and a transition, from which any update's can be added up. A case that does not fit says so, and the
others go on; `--limit` seconds after the start no other case begins. The text encoders stay away, as with
`cache_conditions`. Gigabytes are the most that was allocated in a phase, of both updates.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.groups.policies import make_policy
from rcgrpo.planning.cards import card_here
from rcgrpo.planning.measuring import Update
from rcgrpo.planning.model import Shape
from rcgrpo.planning.plan import GB, Plan, Planner, Run
from rcgrpo.reporting.statistics import pad_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.random_editors import KLEIN, KONTEXT, parts_of, random_pipeline, without_text_encoders

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/gpu.py writes from here -->", "<!-- to here -->"
CANDIDATES, STEPS, ANCHORS, POLICY_STEPS = 4, 4, 2, 2
HEAD = ["model", "size", "", "forward of 4, s", "of peak", "picture, s", "transition, s", "of peak"]
HEAD += ["rollout, GB (plan)", "decode, GB (plan)", "update, GB (plan)"]
NOT = "not measured"


@dataclass(frozen=True)
class Case:
    """One run: a model at a resolution, and what it does otherwise than the others."""

    model: str
    resolution: int
    what: str = "checkpointing"

    @property
    def options(self) -> dict[str, Any]:
        """Of the configuration."""
        changed = {
            "no checkpointing": {"gradient_checkpointing": False},
            "attention recorded": {"log_attention": True},
            "compiled": {"torch_compile": True},
        }
        return {"resolution": self.resolution, **changed.get(self.what, {})}

    @property
    def row(self) -> list[str]:
        """The table's first cells."""
        return [self.model.split("/")[1].removesuffix("-dev"), f"{self.resolution}²", self.what]


def cases(tiny: bool) -> list[Case]:
    """In the order in which they count."""
    if tiny:
        return [Case(KONTEXT, 64), Case(KLEIN, 64, "attention recorded")]
    extra = [Case(KONTEXT, 512, what) for what in ("no checkpointing", "attention recorded", "compiled")]
    plain = [Case(model, size) for model in (KONTEXT, KLEIN) for size in (512, 1024)]
    return [*plain, *extra, Case(KLEIN, 512, "no checkpointing"), Case(KONTEXT, 1024, "no checkpointing")]


class Phases(TrainerCallback):
    """Seconds of the last update and most bytes of all, by phase; a phase within another is not counted to it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu, self._stack, self._since = device.type == "cuda", [""], 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)

    def _turn(self) -> None:
        phase, most = self._stack[-1], 0
        if self._gpu:
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self.bytes[phase] = max(self.bytes[phase], most)
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def watch(self, owner: Any, method: str, name: str) -> None:
        """A method of an object is a phase."""
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        setattr(owner, method, watched)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turn()
        self.seconds.clear()


def by_number(images: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that takes no time."""
    return [float(i % CANDIDATES) for i in range(len(images))]


def run(case: Case, tiny: bool, device: torch.device, folder: str) -> tuple[Phases, Plan]:
    """What was measured, and what was planned."""
    parts = parts_of(case.model, tiny)
    args = RCGRPOConfig(
        folder,
        num_inference_steps=STEPS,
        num_generations=CANDIDATES,
        num_anchors=ANCHORS,
        num_policy_steps=POLICY_STEPS,
        policy_steps_range=[0.0, 1.0],
        train_micro_batch_size=1,
        per_device_train_batch_size=1,
        max_sequence_length=32 if tiny else 512,
        max_steps=2,
        bf16=not tiny,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        check_rows=2,
        **case.options,
    )
    rank, phases, pipeline = 2 if tiny else 32, Phases(device), random_pipeline(parts, device)
    with without_text_encoders(parts):
        targets = list(type(pipeline).editor_class.lora_targets)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        rows = compbench_mini("train", 2)
        trainer = RCGRPOTrainer(pipeline, by_number, args, rows, peft_config=lora, callbacks=[phases])
        for owner, method, name in (
            (trainer.editor, "encode", "encode"),
            (trainer.editor, "decode", "decode"),
            (trainer, "make_groups", "rollout"),
            (trainer, "_prepare_inputs", "waiting"),
            (trainer, "training_step", "update"),
        ):
            phases.watch(owner, method, name)
        trainer.train()
    update = Update(
        make_policy(args, []).loss,
        rank,
        tuple(targets),
        CANDIDATES,
        1,
        bool(case.options.get("gradient_checkpointing", True)),
    )
    wanted = Run(
        Shape(case.resolution, max_sequence_length=args.max_sequence_length),
        update,
        edits=1,
        candidates=CANDIDATES,
        stages=STEPS,
        transitions=ANCHORS * POLICY_STEPS,
        rollout_batch_size=CANDIDATES,
        train_micro_batch_size=1,
        cache_conditions=True,
    )
    return phases, Planner(parts).plan(wanted, card_here())


def as_row(case: Case, phases: Phases, plan: Plan) -> list[str]:
    """A line of the table."""
    peak = plan.card.flops if plan.card is not None else None
    planned = {phase.name: phase for phase in plan.phases}
    counts = {"rollout": STEPS, "decode": CANDIDATES, "update": ANCHORS * POLICY_STEPS}
    cells = list(case.row)
    for name, number in counts.items():
        seconds = phases.seconds[name]
        cells.append(f"{seconds / number:.3g}")
        if name != "decode":
            cells.append(NOT if peak is None else f"{planned[name].flop / seconds / peak:.2f}")
    for name in counts:
        most = phases.bytes[name]
        cells.append(
            f"{most / GB:.1f} ({planned[name].bytes / GB:.1f})" if most else f"{NOT} ({planned[name].bytes / GB:.1f})"
        )
    return cells


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small blocks; on a CPU where there is no GPU")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no other case begins")
    options = parser.parse_args(argv)
    began, gpu = time.perf_counter(), torch.cuda.is_available()
    if not gpu and not options.tiny:
        raise SystemExit("gpu.py: found no GPU; run it on one, or with --tiny")
    rows = []
    for case in cases(options.tiny):
        row = [*case.row, *[NOT] * (len(HEAD) - 3)]
        if time.perf_counter() - began < options.limit:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row = as_row(case, *run(case, options.tiny, torch.device("cuda" if gpu else "cpu"), folder))
            except torch.cuda.OutOfMemoryError:
                row = [*case.row, *["does not fit"] * (len(HEAD) - 3)]
            if gpu:
                torch.cuda.empty_cache()
        rows.append(row)
        print("  ".join(row), flush=True)
    card = card_here()
    told = f"{card.name if card else 'a CPU'}; torch {torch.__version__}; {time.perf_counter() - began:.0f} s\n\n"
    table = told + pad_table([HEAD, *rows], left=(0, 1, 2))
    if options.tiny:
        print(table)
    else:
        text = PAGE.read_text()
        PAGE.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}\n{text[text.index(END) :]}")
    return rows


if __name__ == "__main__":
    main()
