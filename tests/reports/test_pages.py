"""The page takes any text and any image, needs no other file, and shows which answer is right."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from PIL import Image

from clip_lightning.evaluation.predictions import Answer, Query
from clip_lightning.reports.pages import write_page
from clip_lightning.reports.plots import Plot

STRANGE = ("", "<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語 \0 \ud83d", "كلب على الشاطئ", "x" * 10_000)


def strange_queries(folder: Path) -> tuple[list[Query], list[Query]]:
    """Every strange text as a caption, and all of them found for an image."""
    image = folder / "<b>&.png"
    Image.new("RGB", (60, 40), (200, 0, 40)).save(image)
    found = (Answer(image, 0.5, False), Answer(folder / "gone.png", 0.25, False))
    captions = [Query(n, text, (image,), 30, 40, found) for n, text in enumerate(STRANGE)]
    right = tuple(Answer(text, 0.5, n == 1) for n, text in enumerate(STRANGE))
    missed = tuple(Answer(text, 0.5, False) for text in STRANGE)
    return captions, [
        Query(7, image, STRANGE[:2], 2, 40, right),
        Query(8, folder / "gone.png", STRANGE[1:2], 30, 40, missed),
    ]


def text_of(html: str) -> str:
    """The text outside of tags; the values of attributes are escaped, so that a tag ends at the first >."""
    return unescape(re.sub("<[^>]*>", "", html))


def written(
    folder: Path, epoch: int, captions: list[Query], images: list[Query], ranks: Any = ({}, {}), **rest: Any
) -> str:
    """Write the page, and return it."""
    queries = {"text_to_image": captions, "image_to_text": images}
    content = {"epoch": epoch, "queries": queries, "history": dict(zip(queries, ranks, strict=True))}
    write_page(folder / "p.html", **content, **rest)
    return (folder / "p.html").read_text(encoding="utf-8")


def test_page_stands_alone_and_is_escaped(tmp_path: Path) -> None:
    sentences, pictures = strange_queries(tmp_path)
    ranks = {0: {"1": 57}, 1: {"1": 12, "9": 1}, 2: {"1": 30}}, {1: {"7": 5}, 2: {"7": 2}}
    rest = {"plots": [Plot(b"png", "mean <0.5> & more")], "misses": sentences[1:2]}
    html = written(tmp_path, 2, sentences, pictures, ranks, **rest)
    text = text_of(html)
    assert "<script" not in html
    assert text.count("<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語") == 1 + 2 + 1 + 1
    assert text.count("كلب على الشاطئ") == 3
    assert "epoch 0: 57 → 1: 12 → 2: 30" in text
    assert "epoch 1: 5 → 2: 2" in text
    assert "mean <0.5> & more." in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    anchors = [source.removeprefix("#") for source in sources if not source.startswith("data:image/")]
    assert len(sources) - len(anchors) == (4 + 1) * 3 + 2 + 1
    assert anchors == ["split", "captions", "images", "misses"]  # nothing is fetched from elsewhere
    assert all(f'id="{anchor}"' in html for anchor in anchors)


def test_right_captions_are_marked_and_missed_ones_shown(tmp_path: Path) -> None:
    _, pictures = strange_queries(tmp_path)
    html = written(tmp_path, 0, [], pictures)
    assert html.count('<li class="right">') == html.count("0.500 ✓") == 1
    assert html.count('<li class="own muted">') == 1  # of the second picture only
    assert "No queries" in html
    assert 'id="split"' not in html and 'href="#misses"' not in html


def test_long_histories_are_thinned(tmp_path: Path) -> None:
    sentences, _ = strange_queries(tmp_path)
    history = {epoch: {"0": 100 - epoch} for epoch in range(100)}
    text = text_of(written(tmp_path, 99, sentences[:1], [], (history, {})))
    (moves,) = re.findall("epoch 0: 100.*", text)
    assert moves.count("→") == 7 and moves.rstrip().endswith("99: 1")
