"""The page: a tab to search, one for labels, one for the run that made the model.

Nothing on it comes from another machine, and no indexed picture is served as a file: thumbnails are part of
the answers.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2
from PIL import Image, ImageOps

from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.search.answers import MOST_FOUND, Answers
from clip_lightning.search.endpoints import MODEL, add_endpoints, reason, uploaded
from clip_lightning.search.index import FoundPicture
from clip_lightning.search.run_record import RunRecord

CSS = Path(__file__).with_name("page.css")
THEME = gr.themes.Base(
    primary_hue="green",
    neutral_hue="zinc",
    font=["system-ui", "sans-serif"],  # a name that Gradio knows would be fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
    radius_size="lg",
).set(
    # Gradio's own are too faint to read
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
SIDE = 320
QUEUE = 200  # requests that wait; more are told that the queue is full

_READINGS = {
    "softmax": "softmax: one of the labels is taken to be right, and the probabilities add up to 100 %",
    "sigmoid": "sigmoid: each label is judged by itself, and the probabilities need not add up to 100 %",
}
_ASK = "Type a sentence and press Enter, or drop a picture: the most similar ones appear here."
_ASK_LABELS = "Drop a picture and type some labels: the probability of each appears here."
# Values come as they were sent: Gradio itself would open an upload.
_HIDDEN: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "minimal",
    "preprocess": False,
    **MODEL,
}
Upload = dict[str, Any] | None

_pieces: Any = (
    jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    .get_template("page.html.j2")
    .module
)


def build_page(answers: Answers, run: RunRecord | None) -> gr.Blocks:
    """The page with its endpoints, not yet served; uploads are forgotten after an hour."""
    manifest = answers.index.manifest
    title = f"Search {len(answers.index):,} pictures"
    about = f"{Path(manifest.source).name} · model {_short_name(manifest.model)}"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.HTML(_pieces.heading(title, about))
        with gr.Tabs():
            with gr.Tab("Search"):
                _search_tab(answers)
            with gr.Tab("Zero-shot"):
                _labels_tab(answers)
            if run is not None:
                with gr.Tab("Run"):
                    gr.HTML(_run(run))
        add_endpoints(answers)
    return page.queue(max_size=QUEUE, api_open=False)


def _search_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            sentence = gr.Textbox(
                label="Sentence", placeholder="a dog running on grass", autofocus=True, submit_btn="Search"
            )
            most = min(MOST_FOUND, len(answers.index))
            k = gr.Slider(1, max(most, 2), min(12, most), step=1, label="Pictures to show")
        with gr.Column(scale=1, min_width=240):
            picture = _upload("Picture", 170)
    found = gr.HTML(_pieces.note(_ASK))

    def find(words: str, upload: Upload, count: int) -> str:
        return _told(lambda: _found(answers, words, upload, int(count)))

    # one of the two asks at a time, and the other is cleared
    sentence.submit(
        lambda words, count: (find(words, None, count), None), [sentence, k], [found, picture], **_HIDDEN
    )
    picture.input(
        lambda upload, count: (find("", upload, count), ""), [picture, k], [found, sentence], **_HIDDEN
    )
    picture.clear(lambda: _pieces.note(_ASK), None, found, **_HIDDEN)
    k.release(find, [sentence, picture, k], found, **_HIDDEN)


def _found(answers: Answers, words: str, upload: Upload, count: int) -> str:
    if upload is not None:
        return _grid(answers, "this picture", answers.search_by_image(uploaded(upload), count))
    if not words.strip():
        return str(_pieces.note(_ASK))
    return _grid(answers, f"“{_cut(words)}”", answers.search(words, count))


def _labels_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            picture = _upload("Picture", 240)
            labels = gr.Textbox(
                label="Labels, with commas between", placeholder="a dog, a cat, a boat", lines=2
            )
            templates = gr.Radio(
                [("a photo of a …", "simple"), ("many sentences", "imagenet"), ("as they are", "none")],
                value="simple",
                label="Labels are put into",
            )
        with gr.Column(scale=3, min_width=280):
            shares = gr.HTML(_pieces.note(_ASK_LABELS))

    def judge(upload: Upload, names: str, chosen: str) -> str:
        return _told(lambda: _judged(answers, upload, names, chosen))

    given: list[Any] = [picture, labels, templates]
    for event in (picture.input, picture.clear, labels.change, templates.change):
        event(judge, given, shares, trigger_mode="always_last", **_HIDDEN)


def _judged(answers: Answers, upload: Upload, names: str, chosen: str) -> str:
    if upload is None or not names.strip(" ,\n"):
        return str(_pieces.note(_ASK_LABELS))
    found = answers.classify(uploaded(upload), names, chosen)
    return str(_pieces.bars(_READINGS[found.reading], found.by_label))


def _upload(label: str, height: int) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=height,
        buttons=[],
        placeholder="Drop a picture here, or click",
    )


def _told(ask: Callable[[], str]) -> str:
    """The answer as HTML, or one line that says why there is none."""
    try:
        return ask()
    except Exception as error:
        return str(_pieces.note(reason(error), "error"))


def _grid(answers: Answers, asked: str, found: Sequence[FoundPicture]) -> str:
    total = f"{len(found)} of {len(answers.index):,} pictures"
    summary = f"{total}, most similar to {asked}, with the cosine of each"
    return str(_pieces.grid(summary, [_tile(each) for each in found]))


def _tile(found: FoundPicture) -> dict[str, Any]:
    words = found.captions[0] if found.captions else found.path.name
    title = "\n".join([found.path.name, *found.captions])
    return {
        "picture": thumbnail(found.path),
        "score": found.score,
        "words": _cut(words, 300),
        "title": _cut(title, 1000),
    }


def _run(record: RunRecord) -> str:
    """Recalls as a table, the rest as it is."""
    others = {name: _figure(value) for name, value in record.metrics.items()}
    recalls = []
    for direction in ("text_to_image", "image_to_text"):
        at = {f"R@{k}": others.pop(f"{direction}_R@{k}", "") for k in (1, 5, 10)}
        if any(at.values()):
            recalls.append((direction.replace("_to_", " → "), at))
    return str(_pieces.run(record, recalls, others))


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _short_name(model: str | None) -> str:
    """Without the machine's own folders: `RUN/model`, a hub id."""
    return "without a name" if model is None else "/".join(Path(model).parts[-2:])


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


@lru_cache(512)
def thumbnail(path: Path) -> str | None:
    """The middle square of a picture as a data URL; None when it cannot be read."""
    try:
        image = Image.fromarray(decode_image(path).permute(1, 2, 0).numpy())
    except BrokenImage:
        return None
    buffer = BytesIO()
    ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
