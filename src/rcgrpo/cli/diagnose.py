"""`rcgrpo diagnose`: where a model's candidates differ, where their rewards come from, and whether a LoRA cheats."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..inputs.extras import require
from .parsing import (
    GUIDANCE,
    MINI,
    TINY,
    TRUE_CFG,
    UsageError,
    check_folder,
    free_folder,
    one_of,
    parse,
    use_embedded_model,
)

if TYPE_CHECKING:
    from ..evaluation.survey import Finding


@dataclass
class DiagnoseArguments:
    """What to diagnose on what, for `rcgrpo diagnose`."""

    gradient: bool = field(
        default=False,
        metadata={
            "help": "Measure the noise of a training configuration's gradient instead; takes the flags of `rcgrpo "
            "train`, --num_samples and --num_draws (see `rcgrpo diagnose --gradient --help`)."
        },
    )
    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of an editor."})
    lora: str | None = field(
        default=None, metadata={"help": "A LoRA to diagnose and to compare with the model: folder, file or Hub id."}
    )
    dataset: str = field(default=MINI, metadata={"help": f"{MINI} (embedded), or what `load_edit_dataset` opens."})
    split: str | None = field(
        default=None, metadata={"help": "Split to take edits from; by default test, train of a single table."}
    )
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Let rows name files outside the data set's own folder; if you trust it."},
    )
    num_samples: int = field(
        default=24, metadata={"help": "Edits, evenly spaced over the split, at least 2.", "aliases": ["--num_edits"]}
    )
    num_generations: int = field(default=8, metadata={"help": "Candidates of each edit, at least 2."})
    edit_strength: float = field(default=0.5, metadata={"help": "Perturbation inside the region, in [0, 1]."})
    keep_strength: float = field(default=0.0, metadata={"help": "Perturbation outside the region, in [0, 1]."})
    antithetic: bool = field(default=False, metadata={"help": "Mirror the second half of a group's noise."})
    mask_growth: float | None = field(
        default=None,
        metadata={"help": f"Grow the region by this share of the short side; 0.02 by default, 0 for {TINY}."},
    )
    solver: str | None = field(default=None, metadata={"help": "euler, heun, dpmpp_2m or unipc; the model's own."})
    match_tolerance: float = field(
        default=0.02, metadata={"help": "How nearly the global noise must match the diversity inside, as a share."}
    )
    reward: str | None = field(
        default=None, metadata={"help": f"The reward to split, a name or dotted path; compbench_mini on {MINI}."}
    )
    edit_reward: str | None = field(
        default=None, metadata={"help": f"A reward that sees the edit alone; region_edit on {MINI}."}
    )
    keep_reward: str = field(default="background_keep", metadata={"help": "A reward that sees the background alone."})
    held_out_reward: str = field(
        default="rcgrpo.groups.diagnostics.target_closeness",
        metadata={"help": "A reward that nothing was trained on; by default closeness to `edited_image`."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": f"Edit at resolution² pixels; 1024 by default, 64 for {TINY}."}
    )
    num_inference_steps: int = field(default=8, metadata={"help": "Steps of the ODE."})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE})
    true_cfg_scale: float | None = field(default=None, metadata={"help": TRUE_CFG})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": f"Tokens of an instruction; 512 by default, the embedded one's for {TINY}."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates at a time; all of four edits.", "aliases": ["--batch_size"]}
    )
    num_maps: int = field(default=8, metadata={"help": "Edits shown with their attention; each map costs memory."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where results go; by default a new folder rcgrpo-diagnosis.", "aliases": ["--output"]},
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo diagnose`: region-decoupled noise beside global noise, at the same strength and at equal diversity."""
    if "--gradient" in arguments:
        from . import gradient

        return gradient.run([argument for argument in arguments if argument != "--gradient"])
    (args,) = parse((DiagnoseArguments,), arguments, None, "rcgrpo diagnose")
    fill_in(args)
    require("tiny" if args.dataset == MINI else "report", "rcgrpo diagnose")
    if args.model == TINY and args.dataset == MINI:
        use_embedded_model([] if args.lora is None else [args.lora])
    from ..data.edits import EditRows
    from ..editors import open_editor
    from ..evaluation.benchmark import contenders, load_loras, switch_to
    from ..evaluation.diagnosis import BASE, GLOBAL, MATCHED, REGION, mean, write_diagnosis
    from ..evaluation.survey import JUDGES, match_strength, survey
    from ..groups.rollout import Exploration
    from ..rewards import resolve_rewards
    from .opening import check_loras, open_pipeline, sampling_settings

    folder = Path(args.output_dir)
    names = (args.reward, args.edit_reward, args.keep_reward, args.held_out_reward)
    judges = {judge: resolve_rewards(name)[0] for judge, name in zip(JUDGES, names, strict=True)}
    loras = [] if args.lora is None else [args.lora]
    check_loras(args.model, loras)
    entrants = contenders(loras)
    required = sorted({column for reward in judges.values() for column in reward.columns})
    rows = EditRows(load_rows(args), "diagnosis", required_columns=required)
    count = min(args.num_samples, len(rows))
    edits = [rows.edit(i * len(rows) // count) for i in range(count)]
    pipeline = open_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    load_loras(pipeline, entrants)
    editor = open_editor(pipeline, solver=args.solver, **sampling_settings(args))

    def explore(kind: Any, strength: float, **options: Any) -> list["Finding"]:
        exploration = Exploration(strength, args.keep_strength, args.antithetic, args.mask_growth, kind)
        return survey(
            editor,
            pipeline.transformer,
            edits,
            args.num_generations,
            exploration,
            ("diagnose", args.seed),
            options.get("judges", judges),
            options.get("depth_step"),
            options.get("num_maps", 0),
            batch_size=args.rollout_batch_size,
        )

    def inside(findings: Sequence["Finding"]) -> float:
        """Mean latent variance inside that the candidates end with."""
        return mean([f.numbers["latent_var_inside"] for f in findings])

    def diversity(strength: float) -> float:
        found = inside(explore("global", strength, judges={}))
        print(f"  global noise of strength {strength:.3f}: latent variance inside {found:.5f}")
        return found

    print(f"rcgrpo {__version__}: {args.lora or args.model} on {count} edits of {args.dataset}")
    switch_to(pipeline, entrants[-1])
    full = {"depth_step": args.num_inference_steps // 2}
    arms = {REGION: explore("region", args.edit_strength, num_maps=args.num_maps, **full)}
    arms[GLOBAL] = explore("global", args.edit_strength, **full)
    target = inside(arms[REGION])
    print(f"Matching the region's latent variance inside, {target:.5f}:")
    known = {args.edit_strength: inside(arms[GLOBAL])} if args.edit_strength else None
    match = match_strength(diversity, target, args.match_tolerance, known=known)
    arms[MATCHED] = explore("global", match.strength, **full)
    if args.lora is not None:
        switch_to(pipeline, entrants[0])
        arms[BASE] = explore("region", args.edit_strength)
    text = write_diagnosis(folder, asdict(args), arms, match, target)
    print(f"\n{text}\nWritten to {folder}: diagnostics.json, diagnostics.md and their pictures")


def fill_in(args: DiagnoseArguments) -> None:
    """The defaults that depend on model and data; refuses what cannot work.

    Raises:
        UsageError: naming the flag.
    """
    from ..data.opening import is_one_table
    from .opening import sampling_settings

    tiny, mini = args.model == TINY, args.dataset == MINI
    if args.reward is None or args.edit_reward is None:
        if not mini:
            missing = "reward" if args.reward is None else "edit_reward"
            raise UsageError(
                f"--{missing}: got none, expected one for {args.dataset}; see `rcgrpo rewards`, or name a callable"
            )
        args.reward = args.reward or "compbench_mini"
        args.edit_reward = args.edit_reward or "region_edit"
    for name in ("num_generations", "num_samples"):
        if getattr(args, name) < 2:
            raise UsageError(f"--{name}: got {getattr(args, name)}, expected at least 2, to compare")
    one_of(args, "solver", ("euler", "heun", "dpmpp_2m", "unipc"))
    if args.antithetic and args.num_generations % 2:
        raise UsageError(f"--num_generations: got {args.num_generations}, expected an even number with --antithetic")
    for name, value in sampling_settings(args).items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.mask_growth = args.mask_growth if args.mask_growth is not None else (0.0 if tiny else 0.02)
    args.split = args.split or ("train" if not mini and is_one_table(args.dataset) else "test")
    args.output_dir = args.output_dir or free_folder("rcgrpo-diagnosis")
    check_folder("output_dir", args.output_dir)


def load_rows(args: DiagnoseArguments) -> Any:
    """Rows of the split."""
    split = args.split or "test"
    if args.dataset == MINI:
        from ..data import compbench_mini

        return compbench_mini(split, args.num_samples)
    from ..data.loading import load_edit_dataset

    return load_edit_dataset(args.dataset, split=split, allow_outside=args.allow_outside)
