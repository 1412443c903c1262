"""What people give wrongly, end to end: the cases, what they need, and the table of docs/reliability.md.

`python tests/bad_input.py` runs them and writes the table anew; look at what it says before you keep it.
"""

# ruff: noqa: E501 (a case is a line)

from __future__ import annotations

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


# What is wrong, and the arguments; names in capitals stand for what `Place` makes.
CASES = {
    # commands and options
    "an unknown command": "train DATA",
    "a misspelt option": f"{FIT} --data.batchsize 8",
    "an abbreviated option": f"{FIT} --data.batch 8",
    "an option without its value": f"{FIT} --data.batch_size",
    "text for a number": f"{FIT} --data.batch_size many",
    "a batch of zero": f"{FIT} --data.batch_size 0",
    "workers below zero": f"{FIT} --data.num_workers -1",
    "captions per image: zero": f"{FIT} --data.captions_per_image 0",
    "a fraction above one": f"{FIT} --data.read.splits.val_fraction 1.5",
    "a crop of nothing": f"{FIT} --data.augmentation.min_scale 0",
    "a negative learning rate": f"{FIT} --model.optimizer.lr -1",
    "warm-up longer than training": f"{FIT} --model.optimizer.warmup 2",
    "label smoothing of one": f"{FIT} --model.loss InfoNCE --model.loss.label_smoothing 1",
    "an unknown loss": f"{FIT} --model.loss TripletLoss",
    "an unknown tower to freeze": f"{FIT} --model.freeze vision",
    "an impossible micro-batch": f"{FIT} --model.micro_batch_size 0",
    "a width of zero": f"{FIT} --model.heads.embed_dim 0",
    "training without an end": f"{FIT} --trainer.max_epochs -1",
    "a missing accelerator": f"{FIT} --trainer.accelerator tpu",
    "an unknown strategy": f"{FIT} --trainer.strategy warp",
    "sharding with nothing trained": f"{FIT} --trainer.strategy fsdp",
    "sharding with an automatic micro-batch": f"{FIT} --model.freeze none --model.micro_batch_size auto --trainer.strategy fsdp",
    "sharding in fp16": f"{FIT} --model.freeze none --trainer.precision 16-mixed --trainer.strategy fsdp",
    "another kind of sharding": f"{FIT} --trainer.strategy fsdp_cpu_offload",
    "an unknown precision": f"{FIT} --trainer.precision 7",
    "checkpoints every zero steps": f"{FIT} --checkpoint.every_n_steps 0",
    "activation checkpointing with batch norms": f"{FIT} --model.freeze none --model.towers.activation_checkpointing true",
    "LoRA of rank zero": f"{FIT} --model.lora.rank 0",
    # configurations
    "a missing config": f"{FIT} --config nowhere.yaml",
    "a config that is not YAML": f"{FIT} --config DIR/broken.yaml",
    "a config with an unknown key": f"{FIT} --config DIR/unknown.yaml",
    # towers
    "no tower": "fit --data.root DATA QUIET",
    "a misspelt image tower": f"{FIT} --model.image_tower random:resnet5O",
    "a misspelt text tower": f"{FIT} --model.text_tower random:bert-bse",
    "a folder that is not a text tower": f"{FIT} --model.text_tower DIR/empty",
    "a pooling that the tower lacks": f"{FIT} --model.image_tower random:test_resnet@map",
    "a missing weights file": f"{FIT} --model.image_tower test_resnet=DIR/none.safetensors",
    "texts longer than the tower accepts": f"{FIT} --model.towers.max_length 4096",
    # data
    "no data": "fit TOWERS QUIET",
    "missing data": "fit TOWERS QUIET --data.root nowhere",
    "an empty folder": "fit TOWERS QUIET --data.root DIR/empty",
    "a folder of images without captions": "fit TOWERS QUIET --data.root DIR/pictures",
    "captions without their images": "fit TOWERS QUIET --data.root DIR/no-pictures",
    "a table without an image column": "fit TOWERS QUIET --data.root DIR/columns.csv",
    "a split with an unknown name": "fit TOWERS QUIET --data.root DIR/splits.csv",
    "an image in two splits": "fit TOWERS QUIET --data.root DIR/twice.csv",
    "a table that is binary": "fit TOWERS QUIET --data.root DIR/binary.csv",
    "too few images to divide": "fit TOWERS QUIET --data.root DIR/one.csv",
    "every image broken": "fit TOWERS QUIET --data.root DIR/all-broken",
    "a layout that does not fit the data": f"{FIT} --data.read.layout flickr30k",
    "an artifact without a version": "fit TOWERS QUIET --data.root wandb:flickr8k",
    "an archive without its checksum": "fit TOWERS QUIET --data.root https://example.org/a.zip",
    "an invalid checksum": "fit TOWERS QUIET --data.root https://example.org/a.zip#sha256=12",
    "options of shards without shards": f"{FIT} --data.shards.window 4",
    "an invalid filter": "fit TOWERS QUIET --data.root SHARDS --data.shards.filters ['wide']",
    "a filter on a missing field": "fit TOWERS QUIET --data.root SHARDS --data.shards.filters ['similarity>0.3']",
    "a damaged list of shards": "fit TOWERS QUIET --data.root DIR/damaged-shards",
    "a compressed tar": "fit TOWERS QUIET --data.root DIR/shard.tar.gz",
    "a shard that was cut off": "fit TOWERS QUIET --data.root DIR/cut-shards",
    "shards with nothing to validate on": "fit TOWERS QUIET --data.root SHARDS/train",
    "shards named twice": "fit TOWERS QUIET --data.root SHARDS --data.shards.sources ['SHARDS']",
    "an unknown protocol": "fit TOWERS QUIET --data.root nope://bucket/x",
    # checkpoints and models
    "a run to resume, but there is none": f"{FIT} --ckpt_path last",
    "a missing checkpoint": f"{FIT} --ckpt_path DIR/none.ckpt",
    "a file that is not a checkpoint": f"{FIT} --ckpt_path DIR/columns.csv",
    "a checkpoint that was cut off": f"{FIT} --ckpt_path DIR/cut.ckpt",
    "a checkpoint of another model": f"{FIT} --model.heads.embed_dim 8 --ckpt_path RUN/checkpoints/last.ckpt",
    "a checkpoint of other data": "fit TOWERS QUIET --data.root OTHER --ckpt_path RUN/checkpoints/last.ckpt",
    "another batch size than the checkpoint's": f"{FIT} --data.batch_size 8 --ckpt_path RUN/checkpoints/last.ckpt",
    "an invalid model to start from": "fit QUIET --data.root DATA --model.init_from DIR/empty",
    "a bundle that was cut off": "fit QUIET --data.root DATA --model.init_from DIR/cut-bundle",
    "a bundle with another tokenizer": "evaluate retrieval DIR/mixed-bundle DATA",
    "a tower beside a bundle": f"{FIT} --model.image_tower random:test_vit --model.init_from MODEL",
    "nothing to score": "test TOWERS QUIET --data.root DATA",
    # using a model
    "a missing model": "evaluate retrieval nowhere DATA",
    "a split that the data does not have": "evaluate retrieval MODEL DATA --split dev",
    "class folders that are captions": "evaluate zero-shot MODEL DIR/empty",
    "unknown templates": "evaluate zero-shot MODEL DIR/classes --templates fancy",
    "invalid shots": "evaluate linear-probe MODEL DIR/classes --shots 0",
    "no labels": "classify MODEL DIR/pictures/a.png --labels ''",
    "a file that is not an image": "classify MODEL DIR/columns.csv --labels cat,dog",
    "a missing index": "search nowhere cat",
    "nothing to search for": "search INDEX",
    "zero results": "search INDEX cat --k 0",
    "an index that was damaged": "search DIR/cut-index cat",
    "missing images to index": "index MODEL nowhere --out DIR/new-index",
    "an index of another model": "index OTHER_MODEL DIR/pictures --out INDEX",
    "embeddings into a full folder": "embed MODEL DIR/pictures --out DIR/full",
    "an unknown format to export to": "export MODEL --to tflite --out DIR/exported",
    "no repository to export to": "export MODEL --to hub",
    "an invalid port": "app INDEX --port 99999",
    # many runs
    "missing runs to compare": "compare DIR/empty",
    "a missing sweep": "sweep nowhere.yaml --data.root DATA",
    "a sweep without parameters": "sweep DIR/sweep.yaml --data.root DATA",
    "a sweep over an unknown option": "sweep DIR/sweep-option.yaml --data.root DATA",
    "no trials": "sweep heads --data.root DATA --trials 0",
    "one tower to compare": "compare-backbones --data.root DATA --image_towers '' --text_towers x",
    "a cache to prune to less than nothing": "cache prune --keep_gb -1",
    # data commands
    "missing data to check": "data check nowhere",
    "a cleaned table over the original": "data check DATA --fix DATA/captions.csv",
    "an unknown split of shards": "data convert SHARDS/train --split dev --out DIR/new-shards",
    "shards into a folder that is full": "data convert DATA --out DIR/full",
    "shards of no pixels": "data convert DATA --out DIR/new-shards --short_side 0",
    "an invalid artifact name": "data upload DATA --artifact a/b/c/d",
}  # fmt: skip


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
            "OTHER_MODEL": str(folder / "other-model"),
            "OTHER": str(folder / "other"),
            "DATA": str(folder / "data"),
            "SHARDS": str(folder / "shards"),
            "INDEX": str(folder / "index"),
            "DIR": str(folder / "dir"),
        }
        self._make()

    def words(self, line: str) -> list[str]:
        """The words of a case's line."""
        line = line.replace("['", "\"['").replace("']", "']\"")
        return shlex.split(re.sub(rf"\b({'|'.join(self.names)})\b", lambda name: self.names[name[0]], line))

    def plain(self, text: str) -> str:
        """A message with the names in place of this machine's folders."""
        text = text.replace(str(self.folder / "runs"), "RUNS")
        for name in ("MODEL", "RUN", "OTHER_MODEL", "OTHER", "DATA", "SHARDS", "INDEX", "DIR"):
            text = text.replace(self.names[name], name)
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
        self.names = {"MODEL": str(run / "model"), "RUN": str(run)} | self.names
        shutil.rmtree(folder / "runs", ignore_errors=True)
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


def documented() -> dict[str, str]:
    """What the table says: case → line."""
    text = DOC.read_text()
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()
    cells = [re.split(r"(?<!\\)\|", row) for row in rows if row.startswith("| ")][1:]
    return {row[1].strip(): row[3].strip().strip("`").replace("\\|", "|") for row in cells}


def shown(line: str) -> str:
    """A line as the table has it."""
    return " ".join(line.removeprefix("clip-lightning: error: ").split()).replace("`", "'")


def write(lines: dict[str, str]) -> None:
    """Put the table into the page."""
    text = DOC.read_text()
    rows = ["", "| given | command | what the user sees |", "|---|---|---|"]
    for what, line in lines.items():
        command, line = (cell.replace("|", "\\|") for cell in (CASES[what], line))
        rows.append(f"| {what} | `{command}` | `{line}` |")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOC.write_text("\n".join([head + rows[0], *rows[1:], tail]))


def main() -> None:
    lines: dict[str, str] = {}
    with place() as where:
        for what, arguments in CASES.items():
            status, said = where.run(arguments)
            last = (said.splitlines() or [""])[-1]
            wrong = status == 0 or "Traceback" in said or not last.startswith("clip-lightning: error: ")
            lines[what] = shown(where.plain(last))
            print("WRONG" if wrong else "", what, status, lines[what], sep="\t", flush=True)
    write(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
