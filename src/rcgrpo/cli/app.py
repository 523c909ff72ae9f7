"""`rcgrpo app`: a page to paint a region and compare base and LoRA."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..inputs.extras import require
from .parsing import GUIDANCE, STEPS, TINY, TRUE_CFG, UsageError, parse, use_embedded_model

AUTH_VARIABLE = "RCGRPO_APP_AUTH"


@dataclass
class AppArguments:
    """What to show, and to whom, for `rcgrpo app`."""

    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of an editor."})
    lora: list[str] = field(
        default_factory=list, metadata={"help": "LoRAs to choose from: folders, files or Hub ids; others can be typed."}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": f"Address to listen on; other than this machine's own, it takes {AUTH_VARIABLE}."},
    )
    port: int = field(default=7860, metadata={"help": "0 for the first free one from 7860."})
    auth_variable: str = field(
        default=AUTH_VARIABLE, metadata={"help": "Environment variable that holds `user:password`."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": f"Edit at resolution² pixels; 1024 by default, 64 for {TINY}."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": STEPS})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE})
    true_cfg_scale: float | None = field(default=None, metadata={"help": TRUE_CFG})


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo app`: load the model, serve the page until interrupted."""
    (args,) = parse((AppArguments,), arguments, None, "rcgrpo app")
    from ..rewards.transport import is_loopback

    auth = read_auth(args.auth_variable)
    if auth is None and not is_loopback(args.host):
        raise UsageError(
            f"--host: got {args.host!r}, which other machines can reach; set {args.auth_variable}=user:password in the "
            "environment, or listen on 127.0.0.1"
        )
    tiny = args.model == TINY
    if tiny:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # a LoRA may come from the Hub all the same
        use_embedded_model()
    from ..evaluation.benchmark import Sampling, contenders

    contenders(args.lora)  # refuses what is not there before anybody chooses it
    require("app", "the app")  # known before a large model is loaded
    from ..app import create_app, serve
    from .opening import open_pipeline, sampling_settings

    pipeline = open_pipeline(args.model)
    sampling = Sampling(**sampling_settings(args))
    try:
        serve(create_app(pipeline, sampling, args.lora, tiny, explained if tiny else None), args.host, args.port, auth)
    except OSError as error:
        raise UsageError(f"--port: got {args.port}, expected a free one, or 0 to find it ({error})") from error


def explained(edit: int, lora: str) -> Path:
    """A fresh folder in which `rcgrpo explain` has written what it draws of the embedded editor."""
    from .explain import run as explain

    folder = tempfile.mkdtemp(prefix="rcgrpo-update-")
    explain(["--edit", str(edit), "--output_dir", folder, *(["--lora", lora] if lora else [])])
    return Path(folder)


def read_auth(variable: str) -> tuple[str, str] | None:
    """User and password from the environment, if they are there.

    Raises:
        UsageError: something else than `user:password`.
    """
    given = os.environ.get(variable)
    if not given:
        return None
    user, colon, password = given.partition(":")
    if not (user and colon and password):
        raise UsageError(f"{variable}: got no `user:password`, expected both, with a colon between them")
    return user, password
