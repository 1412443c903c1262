"""Names and captions from data do not steer the terminal, nor pass for lines of our own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clip_lightning.commands import search as commands
from clip_lightning.terminal import one_line, printable

HARMFUL = "a\x1b[2J\x9b2J\nclip-lightning: error"
SHOWN = "a\ufffd[2J\ufffd2J clip-lightning: error"


def test_what_steers_a_terminal_is_replaced() -> None:
    assert one_line(HARMFUL) == SHOWN
    assert printable("a\nb\tc\x07") == "a\nb\tc\ufffd"
    assert printable("\ud83d") == "?"


def test_search_prints_names_that_way(capsys: pytest.CaptureFixture[str]) -> None:
    found = SimpleNamespace(score=0.5, path=HARMFUL, captions=(HARMFUL,), missing=True)
    commands._show([HARMFUL, "b"], [[found], []])
    assert capsys.readouterr().out == f"{SHOWN}\n0.500  {SHOWN} (missing)  {SHOWN}\nb\n"
