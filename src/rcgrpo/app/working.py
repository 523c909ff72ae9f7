"""What a visitor hears while the editor works: every step, and one message when something goes wrong.

Gotcha: Gradio ends only handlers that yield, and a pipeline's call does not. So whoever asked to stop is noted, and the
call ends itself after its next step.
"""

import html
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..maths.metrics import first_words
from .comparing import OnStep

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The visitor pressed Cancel."""


class Stops:
    """Which visitors asked to stop, by session."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def ask(self, session: str) -> None:
        """Let this visitor's work end after its next step, or before its first."""
        self._asked.add(session)

    def forget(self, session: str) -> None:
        """New work begins."""
        self._asked.discard(session)

    @contextmanager
    def heard(self, session: str | None) -> Iterator[Callable[[], None]]:
        """Something to call between steps, which raises `Stopped` once this visitor has asked to."""

        def check() -> None:
            if session in self._asked:
                raise Stopped

        check()
        yield check


def stepwise(progress: Any, check: Callable[[], None], contenders: int, edits: int = 1) -> Callable[[int], OnStep]:
    """For each edit what `compare` calls after a step: it moves the page's progress, and may stop.

    Args:
        progress: a `gradio.Progress`.
        check: raises `Stopped`.
        contenders: of each edit.
        edits: how many there are.
    """
    seen: dict[str, None] = {}

    def of(edit: int) -> OnStep:
        seen.clear()

        def on_step(name: str, done: int, steps: int) -> None:
            seen.setdefault(name)
            before = (edit * contenders + len(seen) - 1) * steps
            which = f"edit {edit + 1} of {edits}, " if edits > 1 else ""
            progress((before + done, edits * contenders * steps), desc=f"{which}{name}, step {done} of {steps}")
            check()

        return on_step

    return of


@contextmanager
def told() -> Iterator[None]:
    """Whatever goes wrong inside becomes one message on the page; `Stopped` ends the block without one.

    Raises:
        gradio.Error: with what a `ValueError` says, and of any other error its first words; what nobody foresaw is
            logged with its trace.
    """
    import gradio as gr

    try:
        yield
    except Stopped:
        pass
    except gr.Error:
        raise
    except torch.OutOfMemoryError as error:
        text = "The GPU's memory is full; ask for fewer candidates, or start with a smaller --resolution."
        raise _message(text) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise _message(str(error)) from error
    except Exception as error:
        logger.exception("the app could not do what was asked")
        raise _message(first_words(error)) from error


def _message(text: str) -> Exception:
    """It stays as long as it takes to read."""
    import gradio as gr

    return gr.Error(html.escape(text, quote=False), duration=10 + len(text) / 20, print_exception=False)


@dataclass(frozen=True)
class Controls:
    """A button that begins work, one that cancels it, and where its progress stands."""

    begin: Any
    cancel: Any
    status: Any

    @classmethod
    def laid_out(cls, label: str, name: str, stoppable: bool = True) -> "Controls":
        """The three of them, called `name`, `name-cancel` and `name-status`; no Cancel for what has no steps."""
        import gradio as gr

        with gr.Row():
            begin = gr.Button(label, variant="primary", elem_id=name, scale=3, min_width=120)
            cancel = gr.Button(
                "Cancel", elem_id=f"{name}-cancel", scale=1, min_width=80, interactive=False, visible=stoppable
            )
        return cls(begin, cancel, gr.HTML(elem_id=f"{name}-status", elem_classes="status", min_height=48))

    def wire(
        self,
        stops: Stops,
        events: Sequence[Any],
        work: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
    ) -> None:
        """Let events begin the work, whose outputs the status comes after, and let Cancel end it."""
        import gradio as gr

        aside: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        def begin(request: gr.Request) -> tuple[Any, Any, str]:
            stops.forget(request.session_hash or "")
            return gr.Button(interactive=False), gr.Button(interactive=True), ""

        def end() -> tuple[Any, Any]:
            return gr.Button(interactive=True), gr.Button(interactive=False)

        def cancel(request: gr.Request) -> Any:
            stops.ask(request.session_hash or "")
            return gr.Button(interactive=False)

        begun = gr.on(events, begin, None, [self.begin, self.cancel, self.status], **aside)
        done = begun.then(
            work,
            list(inputs),
            [*outputs, self.status],
            show_progress="full",
            show_progress_on=self.status,
            api_name=api_name,
            concurrency_limit=1,
            concurrency_id="editor",  # one after another, whoever asks
        )
        for over in (done.success, done.failure):
            over(end, None, [self.begin, self.cancel], **aside)
        self.cancel.click(cancel, None, self.cancel, **aside)
