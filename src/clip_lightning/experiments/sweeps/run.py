"""Runs a search: checks the options before the first trial, trains, and writes a report."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from optuna.trial import TrialState

from clip_lightning.allocator import keep_freed_memory
from clip_lightning.cores import cores
from clip_lightning.data.captions import Splits
from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.sources import find_source, read_source
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.experiments.backbones import group_arguments
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.run_records import flat
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.sweeps.report import draw_plots, print_table, summarize, write_tables
from clip_lightning.experiments.sweeps.study import FINISHED, Worker, open_study, points_of
from clip_lightning.files import write_atomically
from clip_lightning.terminal import one_line
from clip_lightning.training.fitting import Rehearsal, rehearse


def search(
    file: SweepFile,
    given: list[str],
    trials: int | None,
    parallel: int,
    study: str | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Search, then write and print the results; see `sweep --help` for the arguments.

    Raises:
        UserError: an argument or the data cannot be used, or too few trials have finished.
        SystemExit: `fit` rejected an option, and printed the reason.
        KeyboardInterrupt: Ctrl-C, after the running trials were saved.
    """
    arguments, name = [*file.base, *given], study or file.name
    rehearsal = _rehearse_ends(file, arguments)
    config = rehearsal.config["fit"]
    wanted = min(trials or file.run_cap or math.inf, file.points)
    if wanted == math.inf:
        raise UserError("the search space is infinite, and the file has no run_cap; set --trials N")
    folder = Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name))
    group = group_arguments(config, f"sweep-{name}")
    of_trials = [*group, *(["--trainer.logger.log_model=false"] if group else []), *arguments]
    settings = _shared_settings(file, rehearsal)
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_study(file, name, storage or f"sqlite:///{(folder / 'study.db').resolve()}", settings)
    if file.method != "grid" and not opened.trials and (first := base_point(file, arguments)):
        opened.enqueue_trial(first)
    print(f"search {name}: {wanted} trials in {folder}", file=sys.stderr)
    failed = {trial.number for trial in opened.trials if trial.state == TrialState.FAIL}
    try:
        _work(Worker(file, opened, failed, of_trials, folder, int(wanted)), parallel)
    finally:  # also after Ctrl-C, or if too many trials fail
        report = summarize(file, opened, folder)
        if best := report["best"]:
            value = f"{file.metric} {best['value']:.2f}"
            head = f"# Trial {best['trial']} of the search {name}: {value}, the best\n"
            head += f"# command:  clip-lightning fit --config {report['best_config']}\n"
            chosen = rehearse([*arguments, *file.arguments(opened.trials[best["trial"]].params)])
            write_atomically(folder / "best.yaml", (head + chosen.config_to_save).encode())
        write_tables(file, report, folder)
        draw_plots(file, opened, folder)
        if as_json:
            print(json.dumps(report, ensure_ascii=False))
        else:
            print_table(file, report)
    finished = len(points_of(file, opened.get_trials(states=FINISHED)))
    if not any(row["metrics"] for row in report["trials"]):  # all trials diverged
        finished = 0
    if finished == file.points:
        print(f"the search space is exhausted: all {finished} points have been tried", file=sys.stderr)
    least = wanted if file.method == "grid" else 1
    if finished < least:
        failures = [row for row in report["trials"] if row["error"]]
        last = max(failures, key=lambda row: row["trial"], default=None)
        reason = f"; trial {last['trial']} {last['state']}: {last['error']}" if last else ""
        raise RunFailed(f"{finished} of {least} trials finished{reason}")


def _rehearse_ends(file: SweepFile, arguments: list[str]) -> Rehearsal:
    """Let `fit` parse every choice and both ends of every range, and return the last rehearsal."""
    ends = {one.name: one.ends() for one in file.parameters}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {name: values[min(row, len(values) - 1)] for name, values in ends.items()}
        rehearsal = rehearse([*arguments, *file.arguments(drawn)])
    return rehearsal


def base_point(file: SweepFile, arguments: list[str]) -> dict[str, Any] | None:
    """Return what to draw for the options without the search, or None if the search space lacks them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = _options(rehearse([*arguments, *file.arguments({})]))
        return {one.name: one.drawn(options[_plain(one.name)]) for one in file.parameters}
    except (LookupError, SystemExit):  # the latter if the arguments are incomplete without the parameters
        return None


def _shared_settings(file: SweepFile, rehearsal: Rehearsal) -> dict[str, Any]:
    """Read the data, and return the options that all trials have in common, with the digest of the data."""
    config, varied = rehearsal.config["fit"], {_plain(one.name) for one in file.parameters}
    options = settings_of(_options(rehearsal))
    options |= {f"model.{kind}_tower": config.model[f"{kind}_tower"] for kind in ("image", "text")}
    own = {*varied, *(name for name in options if name.startswith("trainer.callbacks"))}
    shared = {name: value for name, value in options.items() if name not in own}
    reading = config.data.read.as_dict()
    read = ReadOptions(**reading | {"splits": Splits(**reading["splits"])})
    source = find_source(config.data.root, read)
    source.fetch()
    captions = read_source(source, read)
    for line in (captions.summary(), *(f"warning: {line}" for line in captions.warnings)):
        print(one_line(line), file=sys.stderr)
    return shared | {"data": captions.digest()}


def _options(rehearsal: Rehearsal) -> dict[str, Any]:
    return flat(yaml.safe_load(rehearsal.config_to_save))


def _plain(name: str) -> str:
    """Return the name of an option in a flat configuration."""
    return name.replace(".init_args", "")


def _work(worker: Worker, parallel: int) -> None:
    """Train trials in this process and, if the search is parallel, in others."""
    processes = []
    if parallel > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // parallel)))  # for the others
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=_work_beside, args=(worker,)) for _ in range(1, parallel)]
    for process in processes:
        process.start()
    try:
        worker.work()
    except BaseException:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process in processes:
            process.join()


def _work_beside(worker: Worker) -> None:
    """Work in another process group, so that Ctrl-C reaches this process only through `_work`."""
    os.setpgrp()
    keep_freed_memory()
    try:
        worker.work()
    except (UserError, KeyboardInterrupt):  # the first process stops for the same reason
        sys.exit(1)
