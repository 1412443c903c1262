"""`clip-lightning compare` and `compare-backbones`: runs side by side in a table, pictures and a page."""

from __future__ import annotations

import inspect
import json as json_format
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clip_lightning.arguments import Parser, own_words
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.experiments.compare import Comparison
    from clip_lightning.experiments.run_records import RunRecord

DEFAULT_CONFIG = "heads"
USAGE = {
    "compare": "%(prog)s RUN [RUN ...] [options]",
    "compare-backbones": "%(prog)s --image_towers NAMES --text_towers NAMES [options] [options of fit]",
}


def run(args: list[str]) -> None:
    """Run `compare` or `compare-backbones` with the words of the command line, the command first."""
    command: Callable[..., None] = compare if args[0] == "compare" else compare_backbones
    rest_name, *names = inspect.signature(command).parameters
    own, rest = own_words(args[1:], names)
    about = (inspect.getdoc(command) or "").partition("\n\nArgs")[0]
    parser = Parser(prog=f"clip-lightning {args[0]}", description=about, usage=USAGE[args[0]])
    parser.add_function_arguments(command, as_group=False, skip={rest_name})
    if command is compare:  # which hands nothing on
        parser.add_argument("runs", nargs="*", metavar="RUN", help="what to compare")
        compare(**vars(parser.parse_args([*rest, *own])))
    else:
        compare_backbones(rest, **vars(parser.parse_args(own)))


def compare(
    runs: str | list[str], out: Path | None = None, group: str | None = None, json: bool = False
) -> None:
    """Rank finished runs.

    A RUN is the folder of a run, a folder of such folders, wandb:ENTITY/PROJECT for the runs of a W&B
    project, or wandb:ENTITY/PROJECT/RUN_ID for one of them. Runs that differ in nothing but the seed are
    one row, mean and standard deviation. Runs on different data are ranked apart. Runs that were interrupted
    are ranked by what they had reached, and marked.

    Args:
        runs: what to compare.
        out: folder for the table, the pictures and the page; `runs/compare-DATE-TIME` by default.
        group: of the runs of W&B projects only those of this group.
        json: print the table as one JSON object instead.
    """
    from clip_lightning.experiments.compare import compared
    from clip_lightning.experiments.run_records import LeftOut, RunRecord, read_folders, read_wandb

    runs = [runs] if isinstance(runs, str) else runs
    if not runs:
        raise UserError("nothing to compare: give the folders of runs, or wandb:ENTITY/PROJECT")
    online = [place for place in runs if place.startswith("wandb:")]
    if group is not None and not online:
        raise UserError("--group chooses among the runs of a W&B project; give wandb:ENTITY/PROJECT")
    found = read_folders(Path(place) for place in runs if place not in online)
    for place in online:
        found += read_wandb(place, group)
    left_out = [each for each in found if isinstance(each, LeftOut)]
    for each in left_out:
        _say(f"left out {each.place}: {each.reason}")
    records = [each for each in found if isinstance(each, RunRecord)]
    if not records:
        raise UserError(f"nothing to compare: {left_out[0].place} is left out, {left_out[0].reason}")
    title = f"{len(records)} run{'s' if len(records) > 1 else ''} compared"
    comparison = compared(_measured(records), title, left_out=left_out)
    _finish(comparison, out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S"), json)


def _measured(records: Sequence[RunRecord]) -> list[RunRecord]:
    """With what a bundle tells, where it is at hand: latency, parameters, bytes of features."""
    from clip_lightning.experiments.costs import best_device, frozen_features, image_latency
    from clip_lightning.model.clip import CLIP, parameter_counts

    latencies: dict[str, dict[str, Any]] = {}
    found = []
    for record in records:
        bundle = Path(record.place, "model")
        if "image_latency_ms" not in record.values and (bundle / "model.safetensors").is_file():
            clip = CLIP.from_pretrained(bundle).to(best_device())
            tower = json_format.dumps([clip.image_tower.spec, clip.transform.as_dict()], sort_keys=True)
            if tower not in latencies:
                _say(f"measuring the latency of {record.image_tower}")
                latencies[tower] = image_latency(clip)
            # how many of them were trained, a bundle does not know
            values = {"parameters": parameter_counts(clip)["parameters"], **record.values}
            values |= frozen_features(clip, record.options)
            values["image_latency_ms"] = latencies[tower]["image_latency_ms"]
            conditions = latencies[tower]["image_latency_conditions"]
            record = replace(record, values=values, latency_conditions=conditions)
        found.append(record)
    return found


def compare_backbones(
    options: list[str],
    image_towers: str | None = None,
    text_towers: str | None = None,
    seeds: int | None = None,
    file: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Train every pair of an image tower and a text tower, and rank them.

    Every frozen tower runs over the data once; the pairs are trained on the cached features. Any option of
    `fit` may follow and is handed to every pair (--data.root FOLDER; --config NAME, `heads` by default). The
    same command again goes on: pairs that are finished are not trained again. `clip-lightning fit --help`
    lists the options of `fit`.

    Args:
        options: the words of `fit`.
        image_towers: names as in --model.image_tower, separated by commas.
        text_towers: names as in --model.text_tower, separated by commas.
        seeds: trainings of each pair, each with a seed of its own; 1 by default.
        file: YAML with these options and those of `fit`; what the command line says goes before it.
        out: folder for the runs, the table, the pictures and the page; `runs/compare-DATE-TIME` by default.
        json: print the table as one JSON object instead.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in {
            "image_towers": image_towers,
            "text_towers": text_towers,
            "seeds": seeds,
            "out": out,
        }.items()
        if value is not None
    }
    if file is not None:
        from_file, words = _read_file(file, ("image_towers", "text_towers", "seeds", "out"))
        given, options = from_file | given, [*words, *options]
    images, texts = (_names(given.get(name), name) for name in ("image_towers", "text_towers"))
    count, folder = given.get("seeds", 1), given.get("out")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"--seeds {json_format.dumps(count, default=str)}: expected 1 or more")
    if folder is not None and not isinstance(folder, str | Path):
        raise UserError(f"--out {folder}: expected the name of a folder")
    if not any(re.match(r"(--config|-c)(=|$)", word) for word in options):
        options = [f"--config={DEFAULT_CONFIG}", *options]
    _train(images, texts, options, count, None if folder is None else Path(folder), json)


def _train(
    images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None, json: bool
) -> None:
    from clip_lightning.experiments.backbones import Backbones
    from clip_lightning.experiments.compare import compared

    backbones = Backbones(images, texts, options, seeds, out)
    try:
        backbones.train()
    finally:  # after Ctrl-C too
        if backbones.records or backbones.failed:
            title = f"{len(images)} image towers × {len(texts)} text towers"
            _finish(compared(backbones.records, title, failed=backbones.failed), backbones.folder, json)
    if backbones.failed:
        _say(f"{len(backbones.failed)} of {len(backbones.pairs)} pairs failed; the same command tries again")
        sys.exit(1)


def _read_file(file: Path, own: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Our options in a YAML file, and those of `fit` as words."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--file {file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--file {file}: expected options and their values, got {content!r}")
    if wrong := [name for name in content if not isinstance(name, str)]:
        raise UserError(f"--file {file}: expected names of options, got {wrong[0]!r}")
    configs = content.pop("config", None) or []
    configs = [configs] if isinstance(configs, str) else configs
    if not _are_names(configs):
        raise UserError(f"--file {file}, config: expected a name or a list of names, got {configs!r}")
    rest = {name: value for name, value in content.items() if name not in own}
    words = [f"--config={name}" for name in configs] + _words(rest)
    return {name: content[name] for name in own if content.get(name) is not None}, words


def _words(options: dict[str, Any], prefix: str = "--") -> list[str]:
    """Options of `fit`, nested or dotted, as words; a class with its arguments is one value."""
    words = []
    for name, value in options.items():
        if isinstance(value, dict) and "class_path" not in value:
            words += _words(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json_format.dumps(value, default=str)  # a date
            words.append(f"{prefix}{name}={text}")
    return words


def _names(given: Any, option: str) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given or []
    names = list(dict.fromkeys(map(str.strip, names))) if _are_names(names) else []
    if not names or not all(names):
        example = "pypi:efficientnet-lite0,resnet18" if option == "image_towers" else "pypi:minilm-l6"
        raise UserError(f"--{option}: expected names separated by commas, for example {example}")
    return names


def _are_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def _finish(comparison: Comparison, out: Path, json: bool) -> None:
    """Write everything, warn, and print the table."""
    from rich.console import Console

    from clip_lightning.experiments.pages import write_comparison
    from clip_lightning.experiments.run_records import make_folder
    from clip_lightning.experiments.terminal import print_tables

    write_comparison(comparison, make_folder(out))
    for warning in comparison.warnings:
        _say(f"WARNING: {warning}")
    if json:
        record = comparison.as_dict() | {"folder": str(out)}
        print(json_format.dumps(record, ensure_ascii=False, default=str))
        return
    print_tables(comparison, Console(markup=False, highlight=False))
    print(f"comparison: {out / 'index.html'}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
