"""The tab *Training run*: what a run's folder holds, finished or in progress."""

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from .runs import FIGURES, Run, read_run
from .studio import Studio
from .working import told


def run_tab(studio: Studio) -> None:
    """Lay the tab out, inside a `gradio.Tab`."""
    import gradio as gr

    aside: dict[str, Any] = {"show_progress": "hidden"}
    folders = [lora for lora in studio.loras if Path(lora).is_dir()]
    folder = gr.Dropdown(
        folders,
        value=folders[0] if folders else None,
        allow_custom_value=True,
        label="The run's output_dir",
        elem_id="run-folder",
    )
    button = gr.Button("Open", variant="primary", elem_id="run-open")
    summary = gr.Markdown("A run's folder is read as it is; open it again to see what is new.", elem_id="run-summary")
    run = gr.State()
    figures = {}
    with gr.Tabs(visible=False, elem_id="run-tabs") as tabs:
        for title in FIGURES:
            with gr.Tab(title, visible=False) as tab:
                image = gr.Image(label=title, show_label=False, buttons=["download", "fullscreen"], interactive=False)
            figures[title] = (tab, image)
        with gr.Tab("Candidates", visible=False) as candidates_tab:
            with gr.Row():
                kind = gr.Radio([], label="Of", elem_id="run-kind", min_width=200)
                place = gr.Slider(1, 2, 1, step=1, label="Record", elem_id="run-place", min_width=200)
            said = gr.Markdown(elem_id="run-step")
            picture = gr.Image(
                label="Candidates", show_label=False, buttons=["download", "fullscreen"], interactive=False
            )
            table = gr.Dataframe(interactive=False, show_label=False, max_height=400, elem_id="run-table")
        with gr.Tab("Table", visible=False) as metrics_tab:
            metrics = gr.Markdown(elem_id="run-metrics", elem_classes="numbers")

    def record(run: Run | None, kind: str | None, place: int) -> list[Any]:
        """The place-th record of a kind."""
        if run is None or kind not in run.candidates:
            return [gr.skip()] * 3
        records = run.candidates[kind]
        chosen = records[min(int(place), len(records)) - 1]
        names, rows = chosen.rows()  # the step stands above the table
        return [
            f"**Step {chosen.step}**, {len(rows)} candidates",
            gr.Image(None if chosen.picture is None else _opened(chosen.picture), visible=chosen.picture is not None),
            {"headers": names[1:], "data": [[_short(value) for value in row[1:]] for row in rows]},
        ]

    def places(run: Run | None, kind: str | None) -> Any:
        """The slider over the records of a kind; the newest one first."""
        count = len(run.candidates[kind]) if run is not None and kind in run.candidates else 1
        return gr.Slider(1, max(count, 2), count, step=1, label=f"Record, of {count}", interactive=count > 1)

    def open_run(folder: str | None) -> list[Any]:
        with told():
            found = read_run(folder or "", Path(tempfile.mkdtemp(dir=picture.GRADIO_CACHE)))
            first = next(iter(found.candidates), None)
            shown: list[Any] = []
            for title in figures:
                file = found.figures.get(title)
                shown += [gr.Tab(visible=file is not None), None if file is None else _opened(file)]
            return [
                found,
                summarised(found),
                gr.Tabs(visible=True, selected=None),
                *shown,
                gr.Tab(visible=bool(found.candidates)),
                gr.Radio(list(found.candidates), value=first),
                places(found, first),
                *record(found, first, len(found.candidates[first]) if first else 1),
                gr.Tab(visible=bool(found.metrics)),
                found.metrics,
            ]
        raise AssertionError("told() raises")

    outputs = [
        run,
        summary,
        tabs,
        *(part for parts in figures.values() for part in parts),
        candidates_tab,
        kind,
        place,
        said,
        picture,
        table,
        metrics_tab,
        metrics,
    ]
    gr.on([button.click, folder.select], open_run, folder, outputs, api_name="run", show_progress_on=summary)
    kind.input(places, [run, kind], place, **aside).then(record, [run, kind, place], [said, picture, table], **aside)
    place.change(record, [run, kind, place], [said, picture, table], **aside)


def summarised(run: Run) -> str:
    """How far a run is, and how it began and stands."""
    rows = [row for row in run.log_history if "reward" in row]
    said = [f"**{run.folder.name}**"]
    if run.step:
        said.append(f"checkpoint at update {run.step} of {run.max_steps}")
    if rows:
        said.append(f"reward {rows[0]['reward']:.3f} at first, {rows[-1]['reward']:.3f} at last")
    said += [f"candidates of {len(records)} steps ({kind})" for kind, records in run.candidates.items()]
    return " · ".join(said)


def _opened(file: Path) -> Image.Image:
    """Gradio shows files of some folders only; a run may be anywhere."""
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
