"""A page to play with: an image's features with the denoiser off and on, in a browser.

    timm-dvt app                                            # http://127.0.0.1:7860
    timm-dvt app --model vit_base_patch14_dinov2.lvd142m_dvt --port 8000

An upload's file is deleted as soon as it is read; of what was computed, the last comparisons stay in memory. The only
module that imports Gradio (extra `app`).
"""

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from timm_dvt.errors import UserError
from timm_dvt.variants import DEFAULT_MODEL
from timm_dvt.viewer import page, pairs
from timm_dvt.viewer.examples import EXAMPLES
from timm_dvt.viewer.studio import Studio
from timm_dvt.viewer.uploads import MAX_PIXELS, MEGABYTES, SUFFIXES, Uploads

INSTALL = 'pip install "gradio>=6.31,<7" pi-heif'  # what the extra app holds

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    from timm_dvt.viewer.guard import Guard, check_address, names_of
except ModuleNotFoundError as e:
    raise UserError(f"the page needs Gradio, and {e.name} is not installed; run: {INSTALL}") from e

LIMITS = f"Your image (up to {MEGABYTES} MB and {MAX_PIXELS / 1e6:.0f} megapixels)"
Shown = tuple[str, str]  # the key of the comparison on the page, and its image's name
WAITING = 30  # visitors in the queue
CLUSTERS = (2, 10)
# Gradio's settings of an event. Models compute one at a time; what is only drawn does not wait for them, and of two
# visitors the one whose comparison is computed already gets it while the other's is.
HEAVY: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 2,
    "api_visibility": "private",
    "show_progress": "minimal",  # the place in the queue: what is drawn meanwhile must be seen
}
LIGHT: dict[str, Any] = {
    "concurrency_id": "drawing",
    "concurrency_limit": 2,
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}


def serve(model: str | None = None, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: the variant that is chosen first, or local-dir:FOLDER or hf-hub:REPO; default `DEFAULT_MODEL`.
        port: default the first free one from 7860.

    Raises:
        UserError: the model cannot be loaded, or the address cannot be used.
    """
    check_address(host, port)
    print("loading the model, and showing it the first example ...", flush=True)
    studio = Studio(model or DEFAULT_MODEL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C, so that the folder below is removed
    folders = (tempfile.TemporaryDirectory(prefix=f"timm_dvt_{name}_") for name in ("app", "gradio"))
    with next(folders) as folder, next(folders) as other:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio writes uploads; read when blocks are made, not on import
        gr.routes.DEFAULT_TEMP_DIR = other  # but this was, and Gradio makes a folder in it that it leaves behind
        uploads = Uploads(Path(folder))
        threading.Thread(target=uploads.keep_clean, daemon=True).start()
        blocks = build(studio, uploads)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                run_history=False,
                allowed_paths=[],
                max_file_size=f"{MEGABYTES}mb",
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                state_session_capacity=256,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=f":root {{ --dvt-scale: {page.gradient()}; }}\n{_asset('app.css')}",
                app_kwargs={
                    "routes": [Route("/dvt/{key}/{name}", download(studio))],
                    "middleware": [Middleware(Guard, uploads, names_of(host), lambda: busy(blocks, studio))],
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                },
            )
        except OSError as e:
            where = f"{host}:{port or '7860 or above'}"
            raise UserError(f"cannot serve on {where}: it is in use, or not an address of this machine") from e
        print(f"the page is at {address} (end it with Ctrl+C)", flush=True)
        blocks.block_thread()


def build(studio: Studio, uploads: Uploads) -> gr.Blocks:
    """The page over a studio, the first comparison drawn already."""
    first, count = studio.find(studio.first_comparison), pairs.CLUSTERS
    title = next(iter(EXAMPLES))
    start = _parts(studio.first_comparison, title, first, count)
    with gr.Blocks(title="timm-dvt", analytics_enabled=False, fill_width=True) as blocks:
        shown, patch = gr.State(start.pop(0)), gr.State(start.pop(0))
        gr.HTML(page.intro(), js_on_load=None)
        with gr.Row():
            upload = gr.File(label=LIMITS, file_types=["image", *SUFFIXES], height=130, elem_id="upload")
            _read_by(upload, _path)  # Gradio's own reading leaves an empty file for each upload
            with gr.Column():
                variant = gr.Dropdown(studio.names, value=studio.first, label="Variant", elem_id="variant")
                with gr.Row(elem_classes="dvt-examples"):
                    examples = [gr.Button(f"Example: {name}", size="sm", min_width=120) for name in EXAMPLES]
        notice = gr.HTML(js_on_load=_asset("notice.js").replace("MEGABYTES", MEGABYTES), elem_id="notice")
        overview = gr.HTML(start.pop(0), js_on_load=_asset("app.js"), elem_id="overview")
        alike = gr.HTML(start.pop(0), js_on_load=_asset("app.js"), elem_id="alike")
        with gr.Row(elem_classes="dvt-groups"):
            with gr.Column(scale=1, min_width=240):
                gr.HTML(page.heading("groups", "Patches with alike features, found by k-means in both maps together."))
                clusters = gr.Slider(*CLUSTERS, count, step=1, label="Number of groups", elem_id="clusters")
                _read_by(clusters, _count)  # Gradio's own fails at an emptied field
            with gr.Column(scale=2, min_width=320):
                groups = gr.HTML(start.pop(0), js_on_load=None, elem_id="groups")
        rest = gr.HTML(start.pop(0), js_on_load=None, elem_id="rest")
        files = gr.HTML(start.pop(0), js_on_load=None, elem_id="files")

    everything = [notice, variant, shown, patch, overview, alike, groups, rest, files]

    def show(take: Callable[[], Image.Image], title: str, old: Shown, name: str, count: int) -> Iterator[list[Any]]:
        """What `everything` becomes, as it comes; after a failure the comparison and variant of before."""

        taken: list[Image.Image] = []

        def parts() -> Iterator[list[Any]]:
            image = take()
            taken.append(image)
            yield _meanwhile(page.pending(image))
            for step in studio.steps(image, name):
                if not isinstance(step, str):
                    yield _meanwhile(page.pending(image, step))
                    continue
                yield ["", gr.skip(), *_parts(step, title, studio.find(step), count)]

        def before() -> list[Any]:
            if not taken:  # nothing was drawn yet
                return [gr.skip()] * 8
            comparison = studio.find(old[0])
            return [comparison.model, *[gr.skip()] * 2, page.overview(comparison), *[gr.skip()] * 4]

        yield from _with_notice(parts, before)

    def uploaded(path: str, name: str, count: int, old: Shown) -> Iterator[list[Any]]:
        for parts in show(lambda: uploads.take(path), Path(path).stem, old, name, count):
            yield [None, *parts]  # None: the field is free for the next file

    def changed(old: Shown, name: str, count: int) -> Iterator[list[Any]]:
        try:
            same = studio.find(old[0]).model == name
        except UserError:  # which is told below
            same = False
        if same:  # a list that was opened and closed sends an event too
            yield [gr.skip()] * len(everything)
        else:
            yield from show(lambda: studio.find(old[0]).original, old[1], old, name, count)

    def example(title: str) -> Callable[[Shown, str, int], Iterator[list[Any]]]:
        def shown_by(old: Shown, name: str, count: int) -> Iterator[list[Any]]:  # no lambda: Gradio asks for `yield`
            yield from show(EXAMPLES[title], title, old, name, count)

        return shown_by

    def chosen(old: Shown, count: int, event: gr.EventData) -> Iterator[list[Any]]:
        def parts() -> Iterator[list[Any]]:
            comparison = studio.find(old[0])
            at = comparison.clamped(event.row, event.column)
            yield ["", at, page.alike(comparison, at), page.downloads(*old, comparison.model, at, count)]

        yield from _with_notice(parts, lambda: [gr.skip()] * 3)

    def counted(old: Shown, at: tuple[int, int], count: int) -> Iterator[list[Any]]:
        def parts() -> Iterator[list[Any]]:
            comparison = studio.find(old[0])
            yield ["", page.groups(comparison, count), page.downloads(*old, comparison.model, at, count)]

        yield from _with_notice(parts, lambda: [gr.skip()] * 2)

    with blocks:
        upload.upload(
            uploaded, [upload, variant, clusters, shown], [upload, *everything], show_progress_on=overview, **HEAVY
        )
        variant.input(changed, [shown, variant, clusters], everything, show_progress_on=overview, **HEAVY)
        for title, button in zip(EXAMPLES, examples):
            button.click(example(title), [shown, variant, clusters], everything, show_progress_on=overview, **HEAVY)
        alike.select(chosen, [shown, clusters], [notice, patch, alike, files], **LIGHT)
        clusters.input(counted, [shown, patch, clusters], [notice, groups, files], **LIGHT)
    return blocks.queue(max_size=WAITING)


def _parts(key: str, title: str, comparison: page.Comparison, count: int) -> list[Any]:
    """What a new comparison changes: its key and name, the patch chosen, and the parts of the page."""
    at = pairs.center(comparison.off)
    parts = [page.overview(comparison), page.alike(comparison, at), page.groups(comparison, count)]
    files = page.downloads(key, title, comparison.model, at, count)
    return [(key, title), at, *parts, page.rest(comparison), files]


def _meanwhile(overview: str) -> list[Any]:
    return ["", *[gr.skip()] * 3, overview, *[gr.skip()] * 4]


def busy(blocks: gr.Blocks, studio: Studio) -> str:
    """What a visitor is told for whom the queue has no place; nothing while it has."""
    waiting = len(blocks._queue)
    if waiting < WAITING:
        return ""
    minutes = max(1, round(waiting * studio.seconds / 60))
    return f"{waiting} visitors are waiting, about {minutes} minute{'s' * (minutes > 1)} in all. Try again after that."


def _count(asked: Any) -> int:
    """The number of groups nearest to what was asked for; an emptied field asks for none."""
    return round(min(max(asked, CLUSTERS[0]), CLUSTERS[1])) if isinstance(asked, (int, float)) else pairs.CLUSTERS


def _with_notice(make: Callable[[], Iterator[list[Any]]], before: Callable[[], list[Any]]) -> Iterator[list[Any]]:
    """An event's outputs, no notice first; or what is wrong, and all else as it was."""
    try:
        yield from make()
        return
    except UserError as e:
        message = page.sentence(e)
    except Exception as e:  # whatever it is, a visitor reads what to do, and who serves the page where it came from
        traceback.print_exc(file=sys.stderr)
        message = page.unforeseen(e)
    try:
        rest = before()
    except UserError:  # no longer kept
        rest = [gr.skip()] * 8
    yield [page.notice(message), *rest]


def _read_by(field: Any, read: Callable[[Any], Any]) -> None:
    """Have what a browser sends for a field read by a function of ours. To subclass makes Gradio write a file."""
    field.preprocess = read


def _path(payload: Any) -> str:
    """Where an upload lies: Gradio has made sure that it is in the folder for them."""
    return payload.path if payload else ""


def _asset(name: str) -> str:
    return (resources.files("timm_dvt") / "assets" / name).read_text(encoding="utf-8")


def download(studio: Studio) -> Callable[[Request], Response]:
    """The route that serves `page.KINDS` of a comparison, made in memory when they are asked for."""

    def answer(request: Request) -> Response:
        name, asked = request.path_params["name"], request.query_params
        row, column, count = (
            int(t) if (t := asked.get(k, ""))[:4].isdecimal() and len(t) < 5 else None
            for k in ("row", "column", "clusters")
        )
        try:
            comparison = studio.find(request.path_params["key"])
        except UserError as e:
            return PlainTextResponse(page.sentence(e), 404)
        if name not in page.KINDS:
            return PlainTextResponse("There is no such file.", 404)
        count = _count(count)
        # No name here: the page's link has it, so that what one visitor calls an image reaches no other.
        headers = {"Content-Disposition": "attachment", "Cache-Control": "no-store"}
        content = page.file(comparison, name, comparison.clamped(row, column), count)
        return Response(content, media_type="application/octet-stream", headers=headers)

    return answer
