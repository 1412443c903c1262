"""Run the notebooks of examples/ and store what they show, without progress bars: `make notebooks`."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent

if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's advice to install ipywidgets
    with TemporaryDirectory() as folder:
        for file in sorted(EXAMPLES.glob("*.ipynb")):
            book = nbformat.read(file, as_version=4)
            NotebookClient(book, timeout=1800, resources={"metadata": {"path": folder}}).execute()
            for cell in book.cells:
                cell.metadata.pop("execution", None)  # times
                if cell.cell_type == "code":
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            nbformat.write(book, file)
