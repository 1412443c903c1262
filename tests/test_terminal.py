"""Names and captions cannot control the terminal or imitate messages."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from clip_lightning.commands.search import search
from clip_lightning.search.index import FoundImage, ImageIndex
from clip_lightning.terminal import one_line, printable

HARMFUL = "a\x1b[2J\x9b2J\nclip-lightning: error"
SHOWN = "a\ufffd[2J\ufffd2J clip-lightning: error"


def test_control_characters_are_replaced() -> None:
    assert one_line(HARMFUL) == SHOWN
    assert printable("a\nb\tc\x07") == "a\nb\tc\ufffd"
    assert printable("\ud83d") == "?"


def test_search_prints_harmless_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = FoundImage(Path(HARMFUL), 0.5, (HARMFUL,), 1, 1, missing=True)
    index = MagicMock(search=lambda queries, k: [[image]])
    monkeypatch.setattr(ImageIndex, "load", lambda *_: index)
    search(tmp_path, HARMFUL)
    assert capsys.readouterr().out == f"0.500  {SHOWN} (missing)  {SHOWN}\n"
