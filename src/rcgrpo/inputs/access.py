"""Files of a Hub id or a folder: the first that is fetched tells whether the rest can be had."""

from pathlib import Path
from typing import Any

from .ranges import naming


def fetch(field: str, repository: str, file: str, expected: str, **hub: Any) -> Path:
    """One small file, from the folder, the Hub's cache or the Hub.

    Args:
        field: that named the repository, for messages.
        repository: a Hub id or a folder.
        file: its name there.
        expected: what the repository should have been.
        hub: `revision` and the like, for `hf_hub_download`.

    Raises:
        ValueError: it is gated and this account has no access, and how to get it; there is no such file; no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    with naming(field, repository, expected):
        if (folder := Path(repository)).is_dir():
            (folder / file).stat()
            return folder / file
        try:
            return Path(hf_hub_download(repository, file, **hub))
        except GatedRepoError as error:
            gated = error
    raise ValueError(
        f"{field}: got {repository!r}, whose weights are gated, expected an account that may read them: accept the "
        f"terms at https://huggingface.co/{repository}, then `hf auth login` as that account, or set HF_TOKEN"
    ) from gated
