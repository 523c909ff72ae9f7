"""What the command line says when something goes wrong: one line, an exit code, and where the trace is.

Three kinds. What the library refuses by itself has said all. What it refuses because another library raised is told
with that library's words; RCGRPO_TRACEBACK=1 shows where they come from. Anything else was not foreseen, so its trace
is kept in a file: a run of hours is not repeated to see it.
"""

import linecache
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..inputs.ranges import lacking, one_line

PACKAGE = Path(__file__).parents[1]

REMEDIES = {
    "GPU memory": "expected room for the model and a batch; lower --resolution, --rollout_batch_size, "
    "--train_micro_batch_size or --batch_size, or set --gradient_checkpointing true",
    "memory": "expected room for the model and a batch; lower --resolution, sizes and counts, or use a larger machine",
    "disk": "expected room for what is written; free some, or name another place with --output_dir",
}


@contextmanager
def told_in_one_line(program: str) -> Iterator[None]:
    """End the process with one line for whatever is raised inside; 130 for Ctrl-C, 141 for a closed pipe, else 1.

    With the variable RCGRPO_TRACEBACK set, exceptions pass.
    """
    try:
        yield
        sys.stdout.flush()  # a pipe that was closed is known here, not when the interpreter is gone
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if os.environ.get("RCGRPO_TRACEBACK"):
            raise
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("RCGRPO_TRACEBACK"):
            raise
        sys.exit(f"{program}: {explain(error)}")


def explain(error: Exception) -> str:
    """One line: what was wrong with what, and what to do."""
    said = one_line(error)
    if (lack := lacking(error)) is not None:
        return f"{lack}: got too little ({type(error).__name__}: {said}), {REMEDIES[lack]}"
    if _refused_here(error):
        return f"{said} (RCGRPO_TRACEBACK=1 shows where this comes from)" if error.__cause__ else said
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        said = f"{error.filename}: {error.strerror}"
    elif isinstance(error, ImportError):
        said = f"{said}; install what is missing"
    return f"{type(error).__name__}: {said} ({_keep_trace(error)})"


def _refused_here(error: Exception) -> bool:
    """Whether a line of this package raised it on purpose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return Path(frame.filename).is_relative_to(PACKAGE) and line.startswith("raise ")


def _keep_trace(error: Exception) -> str:
    """Write the trace to a file; what to do with it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="rcgrpo-", suffix=".trace", delete=False) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return "RCGRPO_TRACEBACK=1 shows where this comes from; report it if it is no mistake of yours"
    return f"if it is no mistake of yours, report it with its trace, {file.name}"
