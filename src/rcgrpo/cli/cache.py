"""`rcgrpo cache`: encode what a run of `rcgrpo train` will ask for, once and before it."""

from collections.abc import Sequence

from .parsing import TINY, given, parse, use_embedded_model
from .train import ScriptArguments, fill_in, load_rows, settle_splits


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo cache`: fill the condition cache; the flags are those of `rcgrpo train`.

    Only what encodes is loaded. Started by `accelerate launch`, each process takes its share; what an earlier call
    made is read and kept.
    """
    from ..training.config import RCGRPOConfig

    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", "unused"]
    filling = [*arguments, "--cache_conditions", "true"]
    script, config = parse((ScriptArguments, RCGRPOConfig), filling, None, "rcgrpo cache")
    settle_splits(script)
    if script.model == TINY:
        use_embedded_model()
        fill_in(config, given(arguments))

    from .opening import check_ready

    check_ready(script.model)

    from accelerate.state import PartialState

    from ..tiny import WEIGHTS
    from ..training.filling import fill
    from ..training.late import late_encoders, load_encoders_only
    from ..training.rooms import editor_of, exploration_of
    from ..training.rows import make_rows

    exploration = exploration_of(config)
    sets = [
        rows
        for dataset, name in zip(load_rows(script, config), ("train", "eval"), strict=True)
        if (rows := make_rows(dataset, name, config, [], exploration)) is not None
    ]
    model = str(WEIGHTS) if script.model == TINY else script.model
    kwargs = config.model_init_kwargs
    late = late_encoders(model, config, kwargs)  # type: ignore[arg-type]
    editor = editor_of(load_encoders_only(model, kwargs), config, late)  # type: ignore[arg-type]
    state = PartialState(cpu=config.use_cpu)
    editor.place_encoders(state.device)
    edits = fill(editor, sets, config, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if editor.cache is not None:
        print(f"{editor.cache.folder}: {edits} edits are encoded, {editor.cache.made} entries are new")
    if state.is_main_process:
        print("Train with cache_conditions: true")
