"""One search from the words of `sweep` to its result: on W&B's server, or on Optuna."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from clip_lightning.cli import rehearse
from clip_lightning.data.formats import read_captions
from clip_lightning.data.origin import find_origin
from clip_lightning.errors import UserError
from clip_lightning.tracking.compare import settings_of
from clip_lightning.tracking.run_records import flat
from clip_lightning.tuning import online
from clip_lightning.tuning.file import SweepFile, option_words, read_sweep
from clip_lightning.tuning.report import Report, shown
from clip_lightning.tuning.study import Search, TooManyFailures, open_study, try_failed_again, work

SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Of the command; see `sweep --help`."""

    file: str
    words: tuple[str, ...]
    trials: int | None
    parallel: int
    study: str | None
    storage: str | None
    sweep_id: str | None
    json: bool


def search(options: Options) -> None:
    """Search, write what was found and print it.

    Raises:
        UserError: what was asked for cannot be done.
        SystemExit: the options of `fit` are wrong, which was said; or too many trials failed.
        KeyboardInterrupt: Ctrl-C, after the trials in hand were saved.
    """
    for name in ("trials", "parallel"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name} {given}: expected 1 or more")
    if options.storage and options.sweep_id:
        raise UserError("--storage is Optuna's and --sweep_id is W&B's; give one of them")
    file = read_sweep(options.file)
    words = [*file.base, *options.words]
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # it is in every config
    config = check(file, words)
    name = options.study or file.name
    plan = Search(
        file=file,
        words=(*_quiet_logger(config, name), *words),
        folder=Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name)),
        study=name,
        storage=options.storage,
        trials=options.trials or 1 if options.sweep_id else _wanted(file, options.trials),
        parallel=options.parallel,
        settings=_settings(file, words, config),
    )
    print(f"search {name}: {plan.folder}", file=sys.stderr)

    def tell(report: Report) -> None:
        report.write(lambda drawn: [*words, *file.words(drawn)])
        if options.json:
            print(json.dumps(report.summary(), ensure_ascii=False))
        else:
            show(report)

    if _goes_online(config, options):
        report = _online(plan, config, options)
        tell(report)
    else:
        study = open_study(plan, base_point(plan.file, list(plan.words)))
        if file.method == "grid":
            try_failed_again(study)
        report = Report(plan.file, plan.folder, study)
        try:
            _share(plan, work, plan)
        finally:  # also what there is after Ctrl-C, and when too many trials fail
            tell(report)
    failed = [row for row in report.rows() if row["state"] == "failed"]
    if failed and (report.best is None or file.method == "grid"):
        print(
            f"clip-lightning: error: trial {failed[-1]['trial']} failed: {failed[-1]['error']}",
            file=sys.stderr,
        )
        sys.exit(1)


def _settings(file: SweepFile, words: list[str], config: Namespace) -> dict[str, Any]:
    """What all trials have in common, and the data, which is read to see whether it can be."""
    rehearsal = rehearse([*words, *file.words({one.label: one.ends()[0] for one in file.parameters})])
    varied = {one.name.replace(".init_args", "") for one in file.parameters}
    options = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
    options |= {f"model.{kind}_tower": config.model[f"{kind}_tower"] for kind in ("image", "text")}
    shared = {
        name: value
        for name, value in options.items()
        if name.replace(".init_args", "") not in varied and not name.startswith("trainer.callbacks")
    }
    return shared | {"data": _data_digest(config.data)}


def _data_digest(options: Namespace) -> str:
    names = ("artifact", "url", "sha256", "hub", "hub_image", "hub_captions")
    scenes = options.dataset == "scenes"
    root = None if options.root is None else Path(options.root)
    origin = find_origin(root=root, scenes=scenes, **{name: options[name] for name in names})
    origin.fetch()
    return read_captions(origin.folder(), "captions" if scenes else options.dataset).digest()


def check(file: SweepFile, words: list[str]) -> Namespace:
    """Let `fit` understand every choice, and both ends of every range, before anything begins.

    Returns:
        The options of `fit` in one of the trials.

    Raises:
        SystemExit: it does not understand some, which was said.
    """
    ends = {one.label: one.ends() for one in file.parameters}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {label: values[min(row, len(values) - 1)] for label, values in ends.items()}
        config = rehearse([*words, *file.words(drawn)]).config["fit"]
    return config


def base_point(file: SweepFile, words: list[str]) -> dict[str, Any] | None:
    """What to draw so that a trial is what the words are without the search; None if that cannot be drawn."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = rehearse([*words, *file.words({})]).config["fit"]
    except SystemExit:  # they are not complete without the parameters
        return None
    point = {}
    for one in file.parameters:
        drawn = one.drawn(_option(config, one.name))
        if drawn is None:
            return None
        point[one.label] = drawn
    return point


def _option(config: Namespace, name: str) -> Any:
    """The value of an option, also of a class's argument without `init_args` in its name."""
    value: Any = config
    for part in name.split("."):
        if isinstance(value, Namespace) and part not in value and "init_args" in value:
            value = value["init_args"]
        if not isinstance(value, Namespace) or part not in value:
            return None
        value = value[part]
    return value


def _wanted(file: SweepFile, given: int | None) -> int:
    wanted = given or file.run_cap
    if file.method == "grid":
        points = 1
        for one in file.parameters:
            points *= len(one.every())
        return min(points, wanted or points)
    if wanted is None:
        raise UserError(f"--trials N: how many? Method {file.method} has no end, and the file has no run_cap")
    return wanted


def _run_logger(config: Namespace) -> Namespace | None:
    """The settings of our W&B logger, if it is the run's."""
    logger = config.trainer.logger
    ours = isinstance(logger, Namespace) and logger.class_path.endswith(".RunLogger")
    return logger.init_args if ours else None


def _quiet_logger(config: Namespace, name: str) -> list[str]:
    """Words that put the trials' W&B runs into one group, without an artifact of every model."""
    logger = _run_logger(config)
    if logger is None:
        return []
    group = {} if logger.group else {"trainer.logger.init_args.group": f"sweep-{name}"}
    return option_words(group | {"trainer.logger.init_args.log_model": False})


def _goes_online(config: Namespace, options: Options) -> bool:
    from clip_lightning.tracking.sweeps import is_online

    logger = _run_logger(config)
    possible = logger is not None and is_online(logger.offline)
    if options.sweep_id and not possible:
        raise UserError(
            f"--sweep_id {options.sweep_id}: joining needs W&B online, with an API key and our own logger"
        )
    return possible and options.storage is None


def _online(plan: Search, config: Namespace, options: Options) -> Report:
    logger = _run_logger(config)
    assert logger is not None
    joined = options.sweep_id or online.create(plan, options.words, logger.entity, logger.project)
    print(f"sweep {joined}; from other machines: wandb agent {joined}", file=sys.stderr)
    _share(plan, online.work, plan, joined, options.trials if options.sweep_id else None)
    return Report(plan.file, plan.folder, online.as_study(plan, joined))


def _share(plan: Search, worker: Callable[..., None], *arguments: Any) -> None:
    """Run the worker in this process and, side by side, in others.

    Raises:
        SystemExit: too many trials failed, which was said.
    """
    processes = []
    if plan.parallel > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // plan.parallel)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the others' as they start
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=_in_process, args=(worker, arguments)) for _ in range(plan.parallel - 1)
        ]
    for process in processes:
        process.start()
    try:
        worker(*arguments)
    except TooManyFailures as error:
        print(f"clip-lightning: error: the search stops, {error}", file=sys.stderr)
        sys.exit(1)
    except BaseException:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process in processes:
            process.join()


def _in_process(worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What another worker's process does."""
    from clip_lightning.allocator import keep_freed_memory

    keep_freed_memory()
    try:
        worker(*arguments)
    except TooManyFailures:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def show(report: Report) -> None:
    """Print the best trials."""
    rows = report.rows()
    short = report.file.short_names()
    table = Table(title=f"search {report.study.study_name}, {len(rows)} trials", title_justify="left")
    for column in ("trial", "state", report.file.metric, "seconds", "options"):
        right = column not in ("state", "options")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "options")
    for row in rows[:SHOWN]:
        options = [f"{short[name]} {shown(value)}" for name, value in row["parameters"].items()]
        numbers = [shown(row["value"], ".2f"), shown(row["seconds"], ".0f")]
        table.add_row(str(row["trial"]), row["state"], *numbers, ", ".join(options))
    console = Console()
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more in {report.folder / 'trials.md'}")
    if report.best is not None:
        console.print(f"best: clip-lightning fit --config {report.folder / 'best.yaml'}", soft_wrap=True)
