"""Trains every pair of an image tower and a text tower, resuming if interrupted, or scores them untrained."""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
import yaml

from clip_lightning.arguments import flat
from clip_lightning.errors import UserError
from clip_lightning.evaluation.alignment import NEIGHBORS, linear_cka, mutual_neighbors, nearest_neighbors
from clip_lightning.evaluation.predictions import spaced
from clip_lightning.experiments.compare import settings_of, short_tower
from clip_lightning.experiments.run_records import COSTS_FILE, CostRecorder, RunRecord, read_folder
from clip_lightning.files import write_json
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.reports import tables
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import json_line, note, one_line
from clip_lightning.training.cli import fit, rehearse
from clip_lightning.training.extract import Extractor

MOST_IMAGES = 6000  # to score a pair with; for larger data, a sample


class Backbones:
    """Trains the pairs of a comparison."""

    def __init__(
        self, images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None
    ) -> None:
        """Check the options of `fit`, the towers and the data before the first training."""
        rehearsal = rehearse(options)
        config = rehearsal.config["fit"]
        trainer = config.trainer
        refused = {
            "--ckpt_path": config.ckpt_path,
            "--model.init_from": config.model.init_from,
            "--trainer.devices": str(trainer.devices) not in ("auto", "1"),
            "--trainer.num_nodes": trainer.num_nodes > 1,
        }
        if given := [option for option, value in refused.items() if value]:
            start = "compare-backbones: each pair is trained from its own towers on one device"
            raise UserError(f"{start}; remove {', '.join(given)}")
        # the same command finds its folder again
        command = hashlib.sha256(json.dumps([images, texts, options, seeds]).encode()).hexdigest()[:8]
        self.folder = out or Path(trainer.default_root_dir, f"compare-{command}")
        if out is None and self.folder.exists():
            note(f"resuming the comparison in {self.folder}; set --out FOLDER to start another")
        group = group_arguments(config, self.folder.name)
        for image in images:
            ImageTower.from_name(image, config.model.towers.image_size)
        for text in texts:
            TextTower.from_name(text, config.model.towers.max_length)
        settings = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
        settings["data_digest"] = rehearsal.read_data(images[0], texts[0])
        short = tables.short_names([*images, *texts], short_tower)
        self.pairs: dict[str, tuple[Path, list[str]]] = {}  # name → folder of its runs, arguments of `fit`
        for image, text, n in product(images, texts, range(seeds)):
            seed = int(config.seed_everything) + n
            key = json.dumps([settings, image, text, seed], sort_keys=True, default=str)
            digest = hashlib.sha256(key.encode()).hexdigest()[:8]
            readable = re.sub(r"[^\w.@-]+", "_", f"{short[image]}_x_{short[text]}")[:80]
            folder = self.folder / "runs" / f"{readable}-{seed}-{digest}"
            name = f"{short[image]} × {short[text]}" + (f", seed {seed}" if seeds > 1 else "")
            arguments = [
                *options,
                "--trainer.devices=1",  # with several, each process would start the complete comparison
                f"--model.image_tower={image}",
                f"--model.text_tower={text}",
                f"--seed_everything={seed}",
                f"--trainer.default_root_dir={folder}",
                *([*group, f"--trainer.logger.name={name}"] if group else []),
            ]
            self.pairs[name] = folder, arguments
        self.records: list[RunRecord] = []  # the finished pairs
        self.failed: dict[str, str] = {}  # the reason by the name of each pair

    def train(self) -> None:
        """Train the pairs that have not finished; after Ctrl-C, the running pair has been saved."""
        recorder = CostRecorder()
        for number, (name, (folder, arguments)) in enumerate(self.pairs.items(), start=1):
            title = f"pair {number} of {len(self.pairs)}: {name}"
            note(title)
            try:
                record = read_folder(_train(folder, arguments, recorder))
            except Exception as error:  # the other pairs are still trained
                self.failed[name] = reason_of_failure(error)
                note(f"{title}: failed: {self.failed[name]}")
                continue
            self.records.append(record)
            rsum, seconds = record.values["rsum"], record.values["training_seconds"]
            note(f"{title}: finished, rsum {rsum:.1f}, {seconds:.0f} s")


def _train(folder: Path, arguments: list[str], recorder: CostRecorder) -> Path:
    """Return the pair's finished run in a folder of runs, after resuming or starting it if necessary."""
    resumed: list[str] = []
    for run in RunFolder.runs(folder):
        if (run.path / COSTS_FILE).is_file():
            return run.path
        if run.last.is_file():
            resumed = [f"--ckpt_path={run.last}"]  # of the newest run
    # the result that `fit` prints is in the run's folder, too
    finished = fit([*arguments, *resumed], [recorder])
    write_json(finished / COSTS_FILE, recorder.costs)
    return finished


def group_arguments(config: Any, name: str) -> list[str]:
    """Return the arguments that put runs into one W&B group, by default `name`; none without W&B."""
    logger = config.trainer.logger
    if str(getattr(logger, "class_path", "")).rpartition(".")[2] not in ("RunLogger", "WandbLogger"):
        return []
    return [f"--trainer.logger.group={getattr(logger.init_args, 'group', None) or name}"]


def reason_of_failure(error: Exception) -> str:
    """Return why a run failed in one line, and print the traceback if the user did not cause it."""
    if isinstance(error, UserError):
        return one_line(str(error))
    traceback.print_exc()
    return f"{type(error).__name__}: {one_line(str(error))}"


def score_pairs(images: list[str], texts: list[str], options: list[str]) -> dict[str, Any]:
    """Return JSON values with the scores of all pairs, the best first, which need no training.

    Each tower runs once over the train split. An image is compared with its first caption.
    """
    rehearsal = rehearse(options)
    limits = rehearsal.config["fit"].model.towers
    image_towers = {name: ImageTower.from_name(name, limits.image_size).freeze() for name in images}
    text_towers = {name: TextTower.from_name(name, limits.max_length).freeze() for name in texts}
    rehearsal.read_data(images[0], texts[0])
    data: Any = rehearsal.datamodule
    if data.cache is None:
        raise UserError("--score needs the feature cache; remove --data.cache off")
    seen: dict[str, torch.Tensor] = {}
    split, extractor = data.images("train"), Extractor.of_trainer(data.cache, rehearsal.trainer)
    chosen = [split[row] for row in spaced(len(split), MOST_IMAGES).tolist()]
    for name, tower in image_towers.items():
        features = extractor.image_features(tower, chosen, 0, data.augmentation, f"images, {name}")
        seen[name] = features.rows(range(len(chosen)))
    readable = ~torch.stack([features.isnan().any(1) for features in seen.values()]).any(0)
    if (count := int(readable.sum())) <= NEIGHBORS:
        raise UserError(f"--score: {data.root} has {count} readable training images; give more (and no tars)")
    captions = [caption for image in chosen for caption in image.captions]  # all, as `fit` caches them
    *firsts, _ = accumulate((len(image.captions) for image in chosen), initial=0)
    for name, text_tower in text_towers.items():
        seen[name] = extractor.text_features(text_tower, captions, f"captions, {name}").rows(firsts)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    seen = {name: features[readable] for name, features in seen.items()}
    neighbors = {name: nearest_neighbors(features) for name, features in seen.items()}
    for image, text in product(images, texts):
        mutual = mutual_neighbors(neighbors[image], neighbors[text])
        cka = linear_cka(seen[image], seen[text])
        rows.append({"image_tower": image, "text_tower": text, "mutual_neighbors": mutual, "cka": cka})
    seconds = (time.perf_counter() - start) / len(rows)
    rows.sort(key=lambda row: -row["mutual_neighbors"])
    return {"images": count, "seconds_per_pair": round(seconds, 3), "rows": rows}


def report_scores(record: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Print the scores, and write them to `scores.md`, `.csv` and `.json` in the folder, if there is one."""
    rows = record["rows"]
    columns = [tables.column(n, [row[n] for row in rows], is_text=n.endswith("_tower")) for n in rows[0]]
    if as_json:
        print(json_line(record))
    else:
        tables.print_table(columns, len(columns))
        print("{images:,} images, {seconds_per_pair:.1f} s per pair on cached features".format_map(record))
    if out is not None:
        table = tables.markdown_table(columns) + "\n"
        tables.write_tables(out, "scores", table, tables.csv_of_records(rows), record)
