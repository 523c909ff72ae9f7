"""`rcgrpo data build-tux`: edits with photographic objects, from Debian's Tux Paint packages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .parsing import UsageError, parse


@dataclass
class BuildTuxArguments:
    """The photographic pack, for `rcgrpo data build-tux`. Its pictures are GPL-2."""

    output_dir: str = field(
        default="tux-edits",
        metadata={"help": "The folder to make, for `datasets.load_dataset`.", "aliases": ["--output"]},
    )
    size: int = field(default=128, metadata={"help": "Side of the square pictures: 64, 128 or 256 pixels."})
    num_train: int = field(default=2048, metadata={"help": "Rows of the training split."})
    num_test: int = field(default=256, metadata={"help": "Rows of each of the two held-out splits."})
    seed: int = field(default=0, metadata={"help": "Another seed is another data set."})
    stamps_folder: str | None = field(
        default=None,
        metadata={"help": "PNG cut-outs with captions; by default the package's, installed or downloaded."},
    )
    backgrounds_folder: str | None = field(
        default=None, metadata={"help": "JPEG photographs; by default the package's, installed or downloaded."}
    )
    download: bool = field(
        default=False, metadata={"help": "Fetch missing packages with apt-get (169 MB, no root, kept in the cache)."}
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo data build-tux`: edits with photographic objects, from Debian's Tux Paint packages."""
    (args,) = parse((BuildTuxArguments,), arguments, None, "rcgrpo data build-tux")
    from ..data.tux import build_tux

    options = {name: value for name, value in vars(args).items() if name != "output_dir"}
    try:
        folder = build_tux(args.output_dir, **options)
    except (OSError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    print(f"Written: {folder} (open it with `datasets.load_dataset({str(folder)!r})`)")
