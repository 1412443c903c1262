"""What programs may ask the page's server: types and docstrings here are what Gradio's clients are told."""

# No `from __future__ import annotations` here: Gradio reads the types of the endpoints.

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import gradio as gr

from clip_lightning.errors import UserError
from clip_lightning.search.answers import Answers
from clip_lightning.search.index import FoundPicture

Answer = TypeVar("Answer")

MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Options of every event that asks the model: one at a time, the others wait in the queue."""


def add_endpoints(answers: Answers) -> None:
    """Add `/search`, `/search_by_image` and `/classify` to the page that is being built."""

    def search(sentence: str, k: int = 9) -> list[dict[str, Any]]:
        """The k most similar pictures: file, score (a cosine), captions, width, height, missing."""
        return _answered(lambda: [_record(each) for each in answers.search(sentence, k)])

    def search_by_image(picture: dict[str, Any], k: int = 9) -> list[dict[str, Any]]:
        """The k pictures most similar to an uploaded one (handle_file in Python)."""
        return _answered(lambda: [_record(each) for each in answers.search_by_image(uploaded(picture), k)])

    def classify(
        picture: dict[str, Any], labels: str, templates: Literal["simple", "imagenet", "none"] = "simple"
    ) -> dict[str, Any]:
        """The probability of each label, given with commas between; `reading` says softmax or sigmoid."""
        return _answered(lambda: answers.classify(uploaded(picture), labels, templates).as_dict())

    for endpoint in (search, search_by_image, classify):
        gr.api(endpoint, api_name=endpoint.__name__, **MODEL)


def reason(error: Exception) -> str:
    """One line for whoever asked; what is no mistake of theirs is told on stderr, too."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"clip-lightning app: {line}", file=sys.stderr)
    return "something went wrong; the terminal that the page was started in says what"


def _answered(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except Exception as error:
        raise gr.Error(reason(error), print_exception=False) from None


def _record(found: FoundPicture) -> dict[str, Any]:
    """Without the word `path`: Gradio's clients fetch what stands under it, and no indexed file is served."""
    record = found.as_dict()
    return {"file": record.pop("path"), **record}


def uploaded(picture: Any) -> Path:
    """The file of an upload as Gradio describes it; that it is one was checked by the guard."""
    path = picture.get("path") if isinstance(picture, Mapping) else None
    if not isinstance(path, str):
        raise UserError("expected an uploaded picture: handle_file(...) in Python")
    return Path(path)
