"""One search from the words of `sweep` to its result: on W&B's server, or on Optuna."""

from __future__ import annotations

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

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from clip_lightning.cores import cores
from clip_lightning.errors import UserError
from clip_lightning.experiments.sweeps import online
from clip_lightning.experiments.sweeps.checks import base_point, check, shared_settings, wanted_trials
from clip_lightning.experiments.sweeps.file import option_words, read_sweep
from clip_lightning.experiments.sweeps.queue import try_failed_again
from clip_lightning.experiments.sweeps.report import Report, shown
from clip_lightning.experiments.sweeps.study import Search, TooManyFailures, open_study, work

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
        SystemExit: the options of `fit` are wrong, or trials that were wanted are missing, which was said.
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
    trial = check(file, words)
    config = trial.config["fit"]
    name = options.study or file.name
    plan = Search(
        file=file,
        words=(*_quiet_logger(config, name), *words),
        folder=Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name)),
        study=name,
        storage=options.storage,
        # a sweep that is joined ends where it was made to
        trials=1 if options.sweep_id else wanted_trials(file, options.trials),
        parallel=options.parallel,
        settings=shared_settings(file, trial),
    )
    goes_online = _goes_online(config, options)
    print(f"search {name}: {plan.folder}", file=sys.stderr)

    def tell(report: Report) -> None:
        report.write(lambda drawn: [*words, *file.words(drawn)])
        if options.json:
            print(json.dumps(report.summary(), ensure_ascii=False))
        else:
            show(report)

    (_online if goes_online else _offline)(plan, config, options, tell)


def _offline(plan: Search, config: Namespace, options: Options, tell: Callable[[Report], None]) -> None:
    if _run_logger(config) is not None:
        from clip_lightning.experiments.sweeps.wandb_sweep import silence

        silence()
    study = open_study(plan, base_point(plan.file, list(plan.words)))
    is_grid = plan.file.method == "grid"
    if is_grid:
        try_failed_again(study)
    report = Report(plan.file, plan.folder, study)
    try:
        _share(plan, work, plan)
    finally:  # also what there is after Ctrl-C, and when too many trials fail
        tell(report)
    _expect(report, plan.trials if is_grid else 1)


def _online(plan: Search, config: Namespace, options: Options, tell: Callable[[Report], None]) -> None:
    logger = _run_logger(config)
    assert logger is not None
    sweep = options.sweep_id or online.begin(plan, options.words, logger.entity, logger.project)
    try:
        if options.sweep_id or online.has_work(sweep):
            print(f"sweep {sweep}; from other machines: wandb agent {sweep}", file=sys.stderr)
            _share(plan, online.work, plan, sweep, options.trials if options.sweep_id else None)
        else:
            print(f"sweep {sweep} has ended on W&B's server; its runs:", file=sys.stderr)
    except KeyboardInterrupt:
        tell(Report(plan.file, plan.folder, online.as_study(plan, sweep)))
        raise
    report = Report(plan.file, plan.folder, online.as_study(plan, sweep))
    tell(report)
    _expect(report, 1)


def _expect(report: Report, wanted: int) -> None:
    """Leave with status 1 where fewer trials have finished, and say why the last one has not."""
    rows = report.rows()
    finished = sum(row["state"] in ("finished", "stopped early") for row in rows)
    if finished >= wanted:
        return
    failed = max((row for row in rows if row["error"]), key=lambda row: row["trial"], default=None)
    why = f"; trial {failed['trial']} failed: {failed['error']}" if failed else ""
    print(f"clip-lightning: error: {finished} of {wanted} trials finished{why}", file=sys.stderr)
    sys.exit(1)


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
    from clip_lightning.experiments.sweeps.wandb_sweep import is_online

    logger = _run_logger(config)
    possible = logger is not None and is_online(logger.offline)
    if options.sweep_id and not possible:
        raise UserError(
            f"--sweep_id {options.sweep_id}: joining needs W&B online, with an API key and our own logger"
        )
    return possible and options.storage is None


def _share(plan: Search, worker: Callable[..., None], *arguments: Any) -> None:
    """Run the worker in this process and, side by side, in others.

    Raises:
        SystemExit: too many trials failed, which was said.
    """
    processes = []
    if plan.parallel > 1:
        threads = max(1, cores() // plan.parallel)
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
    """What another worker's process does; away from the terminal, whose Ctrl-C is handed on to it once."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
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
