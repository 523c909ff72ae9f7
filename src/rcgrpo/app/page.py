"""The page, in Gradio (`pip install rcgrpo[app]`), which is imported when a page is made, and its server.

Where it fits: each tab is a module of its own (`edit_tab`, `compare_tab`, `run_tab`, `update_tab`); here they become
one page. Edits are made one after another, whoever asks. What a visitor sees of an error stands in `working`.
"""

from collections.abc import Sequence
from typing import Any

from ..editors import RegionDecoupledFluxKontextPipeline
from ..evaluation.benchmark import Sampling
from ..inputs.extras import require
from ..rewards.transport import is_loopback
from .compare_tab import compare_tab
from .edit_tab import edit_tab
from .run_tab import run_tab
from .studio import Explain, Studio
from .update_tab import update_tab

CSS = """
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important }
.thumbnail-item { aspect-ratio: auto !important; height: auto !important; overflow: visible !important; }
.thumbnail-item .caption-label { position: static !important; max-width: none !important; white-space: normal }
[data-testid="status-tracker"]:has(> .error) { display: none !important }
.prose table, .prose tr, .prose th, .prose td { border-color: var(--border-color-primary) !important }
#run-tabs .image-frame img { padding-top: var(--size-8) }
.status { color: var(--body-text-color-subdued) }
@media (max-width: 600px) {
  .tab-container button { padding: 0 var(--size-2) !important; font-size: var(--text-sm) !important }
  .prose th, .prose td { padding: var(--size-2) !important; font-size: var(--text-sm) }
  .numbers td { white-space: nowrap }
  .numbers th { overflow-wrap: normal; word-break: normal }
  .numbers { overflow-x: auto }
}
"""
"""Captions stand below their pictures instead of on them; an error has its one message, and no label on outputs."""


def create_app(
    pipeline: RegionDecoupledFluxKontextPipeline,
    sampling: Sampling,
    loras: Sequence[str] = (),
    embedded: bool = False,
    explain: Explain | None = None,
) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        pipeline: the base, on its device, without LoRAs.
        sampling: how to draw; the page sets the seed.
        loras: offered for choice, the first one chosen; others can be typed.
        embedded: the pipeline is the embedded editor: what it knows stands on the page, and answers an instruction
            that it does not know.
        explain: makes the picture of one update from a row's number and a LoRA; without it there is no such tab.

    Raises:
        ModuleNotFoundError: the extra `app` is missing.
    """
    require("app", "the app")
    import gradio as gr

    studio = Studio(pipeline, sampling, loras, embedded, explain)
    with gr.Blocks(title="rcgrpo", analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True) as page:
        gr.Markdown("**rcgrpo** · edit a region, compare LoRAs, look at a run", elem_id="title")
        with gr.Tab("Edit"):
            painting, instruction = edit_tab(studio)
        with gr.Tab("Compare LoRAs"):
            compare_tab(studio, painting, instruction)
        with gr.Tab("Training run"):
            run_tab(studio)
        if explain is not None:
            with gr.Tab("One update"):
                update_tab(studio)
    return page


def serve(
    page: Any, host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None, block: bool = True
) -> str:
    """Serve the page until interrupted; its address, at once if not to `block`.

    Args:
        page: from `create_app`.
        host: the address to listen on.
        port: 0 for the first free one from 7860.
        auth: user and password that the page asks for.
        block: stay until SIGINT.

    Raises:
        ValueError: an address that others can reach, without `auth`.
        OSError: the port is taken.
    """
    if auth is None and not is_loopback(host):
        raise ValueError(
            f"host: got {host!r}, which other machines can reach, without a password; set one, or listen on 127.0.0.1"
        )
    address = page.launch(
        server_name=host,
        server_port=port or None,
        auth=auth,
        share=False,
        ssr_mode=False,
        quiet=True,
        max_file_size="64mb",
        css=CSS,
        footer_links=["api"],
        prevent_thread_lock=True,
    )[1]
    print(f"rcgrpo app on {address}", flush=True)
    if block:
        page.block_thread()
    return address
