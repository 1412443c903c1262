"""What README.md and the documents in docs/ say can be done: commands, code, targets, links and images."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import clip_lightning
from clip_lightning.__main__ import main
from clip_lightning.commands import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    path: path.read_text(encoding="utf-8")
    for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"))
    if path.name not in ("CHANGELOG.md", "log.md", "options.md")  # history, and what `make options` writes
}
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
LIGHTNING_COMMANDS = ("fit", "validate", "test")
HAND_TO_FIT = ("sweep", "compare-backbones")  # they take its options too


def blocks(text: str, language: str) -> list[str]:
    """The content of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The words after `program`, of every line of the bash blocks that begins with it."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    found = (shlex.split(line.removeprefix("$ "), comments=True) for line in lines)
    # what comes before an assignment of a variable and behind a pipe is the shell's
    words = ([word for word in line if not re.fullmatch(r"[A-Z_]+=.*", word)] for line in found)
    return [
        line[1 : next((i for i, w in enumerate(line) if w in "|&&;>"), None)]
        for line in words
        if line[:1] == [program]
    ]


def links(text: str) -> list[str]:
    """Relative targets of Markdown's links and pictures, and of HTML's, without anchors."""
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


def imported(source: str) -> list[tuple[str, str]]:
    """(module, name) of everything that the source imports from this package."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clip_lightning")
        for alias in node.names
    ]


def test_the_readers_find_what_there_is() -> None:
    assert ["make", "quickstart"] in [["make", *words] for words in commands(README, "make")]
    assert len(commands(README, "clip-lightning")) > 10 and len(blocks(README, "python")) == 2
    assert {"docs/images/quickstart.png", "docs/results.md", "LICENSE"} <= {*links(README)}


@pytest.mark.parametrize(
    "words",
    # test_extend.py runs what extend.md says
    commands(
        "\n".join(text for path, text in DOCUMENTS.items() if path.name != "extend.md"), "clip-lightning"
    ),
    ids=" ".join,
)
def test_commands_are_understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] in LIGHTNING_COMMANDS and "--help" not in words:
        assert main([*words, "--print_config"]) == 0, capsys.readouterr().err
        return
    assert words[0] in COMMANDS or words[0] in ("--help", "--version")
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    parts = [
        word for word in words[: 2 if words[0] in ("cache", "evaluate", "data") else 1] if word[0] != "-"
    ]
    assert main([*parts, "--help"]) == 0
    if words[0] in HAND_TO_FIT:
        assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


@pytest.mark.parametrize("words", commands(README, "make"), ids=" ".join)
def test_make_has_the_targets(words: list[str]) -> None:
    for target in words:
        assert "=" in target or re.search(rf"^{re.escape(target)}:", MAKEFILE, flags=re.MULTILINE), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert [link for link in links(DOCUMENTS[document]) if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_code_compiles_and_its_names_exist(block: str) -> None:
    compile(block, "README.md", "exec")
    for module, name in imported(block):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
        if module == "clip_lightning":
            assert name in clip_lightning.__all__, f"{name} is not public"
