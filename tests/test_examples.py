"""The examples run from top to bottom, and the notebooks are stored with what they show."""

import base64
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("search", "zero_shot")


@pytest.mark.parametrize("trained", [True, pytest.param(False, marks=pytest.mark.real)])
@pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning")  # frozen towers are meant to be
def test_the_library_example(
    bundle: Path, scenes: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("library").main
    if trained:
        main(str(bundle), [str(next(scenes.glob("*.jpg")))])
    else:
        main(None, [])
    printed, shown = capsys.readouterr().out.splitlines(), ("CLIP", "torch", "{", "[")
    lines = [line for line in printed if line.startswith(shown)]
    width = re.search(r"embed_dim=(\d+)", lines[0])[1]
    assert lines[1:3] == [
        f"torch.Size([1, {width}]) torch.Size([3, {width}])",
        f"torch.Size([{3 + trained}, {width}])",
    ]
    assert "'green.png'" in lines[-1 - (not trained)]
    if not trained:  # what it has learned is right
        assert lines[3] == "{'red': 1.0, 'green': 0.0, 'blue': 0.0}"
        assert lines[-2].startswith("['green.png'") and lines[-1].startswith("CLIP(image_tower='Tower'")


def test_these_are_all() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_show_is_stored(name: str) -> None:
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert len([kind for kind in kinds if kind.startswith("image/")]) == 2
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not re.search(r"Traceback|[Ww]arning|/", "".join(texts))


def execute(name: str, folder: Path, **parameters: object) -> tuple[str, list[Image.Image]]:
    """Run a notebook there, with other parameters; what it printed and showed."""
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in book.cells]
    first = tags.index(["parameters"])
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    assert all(re.search(rf"\b{key}\b.* = ", book.cells[first].source) for key in parameters)
    book.cells.insert(first + 1, nbformat.v4.new_code_cell(given))
    # tqdm's advice, in other libraries' imports, to install ipywidgets
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore:IProgress not found"):
        NotebookClient(book, timeout=100, resources={"metadata": {"path": str(folder)}}).execute()
    texts, pictures = [], []
    for output in (output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs):
        if output.output_type == "stream":
            texts.append(output.text)
        elif "image/png" in output.data or "image/jpeg" in output.data:
            raw = output.data.get("image/png") or output.data["image/jpeg"]
            pictures.append(Image.open(io.BytesIO(base64.b64decode(raw))))
        else:
            texts.append(output.data["text/plain"])
    return "\n".join(texts), pictures


@pytest.fixture(scope="module")
def searched(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Image.Image]]:
    """The search notebook with tiny towers: where it ran, what it printed and showed."""
    folder = tmp_path_factory.mktemp("examples")
    towers = {"IMAGE_TOWER": "random:test_vit", "TEXT_TOWER": f"random:{bert}"}
    return folder, *execute("search", folder, **towers, SIZE=32, SCENES=300, EPOCHS=1)


def test_search(searched: tuple[Path, str, list[Image.Image]]) -> None:
    folder, text, pictures = searched
    assert not re.search("warning|deprecated", text, re.IGNORECASE)
    assert re.search(r"^60$", text, re.MULTILINE)  # val and test are indexed
    scores = [float(score) for score in re.findall(r"^(-?\d\.\d{3})  \d{5}\.jpg$", text, re.MULTILINE)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert len(pictures) == 2
    assert pictures[0].height > pictures[1].height  # two sentences, one picture
    assert (folder / "example" / "model" / "model.safetensors").is_file()


def test_zero_shot(searched: tuple[Path, str, list[Image.Image]]) -> None:
    folder = searched[0]
    model = str(folder / "example" / "model")
    text, pictures = execute("zero_shot", folder, MODEL=model, SIZE=32, SCENES=300)
    assert not re.search("warning|deprecated", text, re.IGNORECASE)
    assert len(re.findall(r"^ *\d+\.\d%  \w+ and a \w+$", text, re.MULTILINE)) == 3
    found = re.search(r"top-1 ([\d.]+) % \(([\d.]+) to ([\d.]+)\), by chance 6\.7 %", text)
    top1, low, high = map(float, found.groups())
    assert low <= top1 <= high
    assert len(pictures) == 2


def test_both_train_in_the_same_way() -> None:
    """So that the one that is run in these tests stands for both."""
    cells = [
        [cell.source for cell in nbformat.read(EXAMPLES / f"{name}.ipynb", 4).cells if ".fit(" in cell.source]
        for name in NAMES
    ]
    assert len(cells[0]) == 1
    assert cells[0] == cells[1]
