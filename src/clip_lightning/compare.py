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

from clip_lightning.arguments import Parser
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.tracking.compare import Comparison
    from clip_lightning.tracking.run_records import RunRecord

DEFAULT_CONFIG = "heads"
TERMINAL = {
    "rsum": "rsum",
    "text_to_image_R@1": "t→i R@1",
    "image_to_text_R@1": "i→t R@1",
    "image_latency_ms": "latency, ms",
}
"""Values that a terminal has room for."""


def run(args: list[str]) -> None:
    """Run `compare` or `compare-backbones` with the words of the command line, the command first."""
    command: Callable[..., None] = compare if args[0] == "compare" else compare_backbones
    rest_name, *names = inspect.signature(command).parameters
    own, rest = _divided(args[1:], names)
    if command is compare:  # which hands nothing on
        own += [word for word in rest if word.startswith("-")]
        rest = [word for word in rest if not word.startswith("-")]
    about = (inspect.getdoc(command) or "").partition("\n\nArgs")[0]
    parser = Parser(prog=f"clip-lightning {args[0]}", description=about)
    parser.add_function_arguments(command, as_group=False, skip={rest_name})
    command(rest, **vars(parser.parse_args(own)))


def _divided(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are options of these names, with their values, and the others."""
    own, rest, left = [], [], iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            own.append(word)
        elif word == "--json":
            own.append("--json=true")
        elif name.startswith("--") and name[2:] in names:
            value = [] if equals else [next(left, None)]
            own += [word, *(text for text in value if text is not None)]
        else:
            rest.append(word)
    return own, rest


def compare(runs: list[str], out: Path | None = None, group: str | None = None, json: bool = False) -> None:
    """Rank finished runs: clip-lightning compare RUN [RUN ...] [options].

    A RUN is the folder of a run, a folder of such folders, wandb:ENTITY/PROJECT for the runs of a W&B
    project, or wandb:ENTITY/PROJECT/RUN_ID for one of them. Runs that differ in nothing but the seed are
    one row, mean and standard deviation. Runs on different data are ranked apart.

    Args:
        runs: what to compare.
        out: folder for the table, the pictures and the page; `runs/compare-DATE-TIME` by default.
        group: of the runs of W&B projects only those of this group.
        json: print the table as one JSON object instead.
    """
    from clip_lightning.tracking.compare import compared
    from clip_lightning.tracking.run_records import LeftOut, RunRecord, read_folders, read_wandb

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
    """With the latency and the parameters of those whose bundle is at hand and that do not have them."""
    from clip_lightning.model import CLIP
    from clip_lightning.tracking.costs import best_device, image_latency, parameter_counts

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
    same command again goes on: pairs that are finished are not trained again.

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
    count = given.get("seeds", 1)
    if not isinstance(count, int) or count < 1:
        raise UserError(f"--seeds {count}: expected 1 or more")
    if not any(re.match(r"(--config|-c)(=|$)", word) for word in options):
        options = [f"--config={DEFAULT_CONFIG}", *options]
    _train(images, texts, options, count, Path(given["out"]) if "out" in given else None, json)


def _train(
    images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None, json: bool
) -> None:
    from clip_lightning.backbones import Backbones
    from clip_lightning.tracking.compare import compared

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
    configs = content.pop("config", None) or []
    words = [f"--config={name}" for name in ([configs] if isinstance(configs, str) else configs)]
    rest = {name: value for name, value in content.items() if name not in own}
    return {name: content[name] for name in own if name in content}, [*words, *_words(rest)]


def _words(options: dict[str, Any], prefix: str = "--") -> list[str]:
    """Options of `fit`, nested or dotted, as words; a class with its arguments is one value."""
    words = []
    for name, value in options.items():
        if isinstance(value, dict) and "class_path" not in value:
            words += _words(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json_format.dumps(value)
            words.append(f"{prefix}{name}={text}")
    return words


def _names(given: Any, option: str) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given or []
    names = list(dict.fromkeys(str(name).strip() for name in names))
    if not names or not all(names):
        example = "pypi:efficientnet-lite0,resnet18" if option == "image_towers" else "pypi:minilm-l6"
        raise UserError(f"--{option}: expected names separated by commas, for example {example}")
    return names


def _finish(comparison: Comparison, out: Path, json: bool) -> None:
    """Write everything, warn, and print the table."""
    from clip_lightning.tracking.comparison_pages import write_comparison
    from clip_lightning.tracking.run_records import make_folder

    write_comparison(comparison, make_folder(out))
    for warning in comparison.warnings:
        _say(f"WARNING: {warning}")
    if json:
        record = comparison.as_dict() | {"folder": str(out)}
        print(json_format.dumps(record, ensure_ascii=False, default=str))
        return
    _print_tables(comparison)
    print(f"comparison: {out / 'index.html'}")


def _print_tables(comparison: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from clip_lightning.tracking.compare import data_name, option_text, shown

    values = [name for name in TERMINAL if name in comparison.columns()]
    for rows in comparison.data_sets:
        title = data_name(rows[0].digest) if len(comparison.data_sets) > 1 else None
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("rank", justify="right")
        table.add_column("towers", overflow="fold")
        for name in [*comparison.options, *(TERMINAL[name] for name in values)]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            settings = (option_text(row.options[name]) for name in comparison.options)
            table.add_row(str(row.rank), row.name, *settings, *(shown(row, name) for name in values))
        Console(markup=False).print(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
