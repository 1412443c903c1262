"""What people give wrongly, end to end: the table of docs/reliability.md, and what its commands need.

To add a case, add a row with an empty last cell. `python tests/bad_input.py` runs all commands and writes the
last cells again; look at what they say before you keep them.
"""

import contextlib
import gzip
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

DOC = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- bad input: begin -->", "<!-- bad input: end -->"
FIT = "fit TOWERS --data.root DATA QUIET"


class Place:
    """Everything that the cases name, in one folder."""

    def __init__(self, folder: Path) -> None:
        from conftest import write_bert

        self.folder = folder
        self.bert = write_bert(folder / "bert")
        self.names = {
            "TOWERS": f"--model.image_tower random:test_resnet --model.text_tower random:{self.bert} "
            "--model.heads.embed_dim 16 --model.towers.image_size 32",
            "QUIET": "--trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false "
            f"--trainer.max_epochs 1 --trainer.default_root_dir {folder / 'runs'} --data.num_workers 0 "
            "--predictions.queries 0 --data.batch_size 4",
            "MODEL": str(folder / "run" / "model"),  # before RUN, with which it begins
        }
        for name in ("RUN", "OTHER_MODEL", "OTHER", "DATA", "SHARDS", "INDEX", "DIR"):
            self.names[name] = str(folder / name.lower().replace("_", "-"))
        self._make()

    def words(self, line: str) -> list[str]:
        """The words of a case's line."""
        line = line.replace("['", "\"['").replace("']", "']\"")
        return shlex.split(re.sub(rf"\b({'|'.join(self.names)})\b", lambda name: self.names[name[0]], line))

    def plain(self, text: str) -> str:
        """A message with the names in place of this machine's folders."""
        text = text.replace(str(self.folder / "runs"), "RUNS")
        for name, value in self.names.items():
            text = text.replace(value, name)
        text = text.replace(str(self.bert), "BERT").replace(str(self.folder), "PLACE")
        text = re.sub(r"\b\d{8}-\d{6}-[0-9a-f]{4}\b", "ID", text)
        return re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)

    def run(self, line: str) -> tuple[int, str]:
        """Status and stderr of a command, in this process."""
        from clip_lightning.__main__ import main

        if hasattr(self, "ready"):
            shutil.rmtree(self.folder / "runs", ignore_errors=True)  # no case sees what another has left
        err, out = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                status = main(self.words(line))
            except Exception as error:
                return 0, f"Traceback of {type(error).__name__}: {' '.join(str(error).split())}"
        return status, err.getvalue()

    def _make(self) -> None:
        from PIL import Image

        from clip_lightning.data.scenes import write_scenes

        folder = self.folder
        for name, seed in (("data", 0), ("other", 1)):
            write_scenes(folder / name, count=40, size=32, seed=seed)
        self._ok(FIT)
        (run,) = (folder / "runs").iterdir()
        run = run.rename(folder / "run")
        self._ok(f"{FIT} --seed_everything 1")
        (other,) = (folder / "runs").iterdir()
        (other / "model").rename(folder / "other-model")
        shutil.rmtree(folder / "runs")
        here = folder / "dir"
        for name in "empty pictures no-pictures all-broken/images full classes/cat classes/dog".split():
            (here / name).mkdir(parents=True)
        (here / "full" / "mine").write_text("keep")
        for name in ("pictures/a.png", "pictures/b.png", "classes/cat/a.png", "classes/dog/b.png"):
            Image.new("RGB", (32, 32), "red" if "a." in name else "blue").save(here / name)
        tables = {
            "no-pictures/captions.csv": "image,caption\na.png,A\nb.png,B\n",
            "all-broken/captions.csv": "image,caption\n" + "".join(f"images/{n}.png,A\n" for n in range(40)),
            "columns.csv": "picture_of,sentence\na,b\n",
            "splits.csv": "image,caption,split\npictures/a.png,A,training\n",
            "twice.csv": "image,caption,split\npictures/a.png,A,train\npictures/a.png,B,val\n",
            "one.csv": "image,caption\npictures/a.png,A\n",
            "broken.yaml": "model: [unclosed\n",
            "unknown.yaml": "model:\n  image_twoer: x\n",
            "sweep.yaml": "method: random\nmetric: {name: val/rsum, goal: maximize}\n",
            "sweep-option.yaml": "method: random\nmetric: {name: val/rsum, goal: maximize}\n"
            "parameters: {model.embed_dims: {values: [8, 16]}}\n",
        }
        for name, content in tables.items():
            (here / name).write_text(content)
        for number in range(40):
            (here / "all-broken" / "images" / f"{number}.png").write_bytes(b"no picture %d" % number)
        (here / "binary.csv").write_bytes(bytes(range(256)) * 4)
        last = run / "checkpoints" / "last.ckpt"
        (here / "cut.ckpt").write_bytes(last.read_bytes()[:-1000])
        for name, file in (("cut-bundle", "model.safetensors"), ("mixed-bundle", "tokenizer.json")):
            shutil.copytree(run / "model", here / name)
            content = (here / name / file).read_bytes()
            cut = content[:-1000] if name == "cut-bundle" else content.replace(b"red", b"rad")
            (here / name / file).write_bytes(cut)
        self._ok("data convert DATA --out SHARDS --num_workers 1")
        for name in ("damaged-shards", "cut-shards"):
            shutil.copytree(folder / "shards", here / name)
        (here / "damaged-shards" / "shards.json").write_text("{")
        shard = here / "cut-shards" / "train" / "00000.tar"
        shard.write_bytes(shard.read_bytes()[:-10])
        (here / "shard.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
        self._ok("index MODEL DIR/pictures --out INDEX")
        shutil.copytree(folder / "index", here / "cut-index")
        for file in (here / "cut-index").glob("*.npy"):
            file.write_bytes(file.read_bytes()[:-8])
        self.ready = True

    def _ok(self, line: str) -> None:
        status, said = self.run(line)
        assert status == 0, f"{line}: {said}"


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """A place, with caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": f"{folder}/cache", "WANDB_MODE": "offline"}
        with mock.patch.dict(os.environ, cache), contextlib.chdir(folder):
            yield Place(Path(folder))


def documented() -> dict[str, tuple[str, str]]:
    """The table: what is given → the command, and the line that the user sees."""
    text = DOC.read_text()
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()
    cells = [re.split(r"(?<!\\)\|", row) for row in rows if row.startswith("| ")][1:]
    plain = [[cell.strip().strip("`").replace("\\|", "|") for cell in row[1:4]] for row in cells]
    return {what: (command, line) for what, command, line in plain}


def shown(line: str) -> str:
    """A line as the table has it."""
    return " ".join(line.removeprefix("clip-lightning: error: ").split()).replace("`", "'")


def main() -> None:
    rows = ["", "| given | command | what the user sees |", "|---|---|---|"]
    with place() as where:
        for what, (command, _) in documented().items():
            status, said = where.run(command)
            last = (said.splitlines() or [""])[-1]
            wrong = status == 0 or "Traceback" in said or not last.startswith("clip-lightning: error: ")
            line = shown(where.plain(last))
            print("WRONG" if wrong else "", what, status, line, sep="\t", flush=True)
            command, line = (cell.replace("|", "\\|") for cell in (command, line))
            rows.append(f"| {what} | `{command}` | `{line}` |")
    text = DOC.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOC.write_text("\n".join([head, *rows[1:], tail]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
