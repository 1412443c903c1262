"""Runs a search: checks everything that can be known before the first trial, trains, and reports."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from jsonargparse import Namespace
from optuna.trial import TrialState

from clip_lightning.allocator import keep_freed_memory
from clip_lightning.cores import cores
from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.sources import find_source, read_source
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.run_records import flat
from clip_lightning.experiments.sweeps.file import SweepFile, option_arguments
from clip_lightning.experiments.sweeps.report import draw_plots, print_table, summarize, write_tables
from clip_lightning.experiments.sweeps.study import Worker, count_finished, open_study
from clip_lightning.files import write_atomically
from clip_lightning.training.fitting import Rehearsal, check_validates, rehearse


def search(
    file: SweepFile,
    given: list[str],
    trials: int | None,
    parallel: int,
    study: str | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Search, then write and print the results. `sweep --help` describes the arguments.

    Raises:
        UserError: an argument or the data cannot be used, or too few trials have finished.
        SystemExit: `fit` does not accept an option, which was printed.
        KeyboardInterrupt: Ctrl-C, after the running trials were saved.
    """
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # it is in every config
    os.environ.setdefault("WANDB_SILENT", "true")
    arguments, name = [*file.base, *given], study or file.name
    rehearsal = _rehearse_ends(file, arguments)
    config = rehearsal.config["fit"]
    wanted = min(trials or file.run_cap or math.inf, file.points)
    if wanted == math.inf:
        raise UserError("--trials N: how many? The search space is infinite, and the file has no run_cap")
    folder = Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name))
    settings = _shared_settings(file, rehearsal)
    folder.mkdir(parents=True, exist_ok=True)
    found = open_study(file, name, storage or f"sqlite:///{(folder / 'study.db').resolve()}")
    _begin(found, file.identity | settings, None if file.method == "grid" else base_point(file, arguments))
    print(f"search {name}: {wanted} trials in {folder}", file=sys.stderr)
    failed = {trial.number for trial in found.trials if trial.state == TrialState.FAIL}
    for_logger = _logger_arguments(config, name)
    worker = Worker(file, found, failed, (*for_logger, *arguments), folder, int(wanted))
    try:
        _work(worker, parallel)
    finally:  # also after Ctrl-C, and when too many trials fail
        report = summarize(file, found, folder)
        if best := report["best"]:
            chosen = rehearse(
                [*arguments, *file.arguments(found.trials[best["trial"]].params)]
            ).config_to_save
            head = (
                f"# Trial {best['trial']} of the search {name}: {file.metric} {best['value']:.2f}, the best"
            )
            command = f"# command:  clip-lightning fit --config {folder / 'best.yaml'}"
            write_atomically(folder / "best.yaml", f"{head}\n{command}\n{chosen}".encode())
        write_tables(file, report, folder)
        draw_plots(file, found, folder)
        if as_json:
            print(json.dumps(report, ensure_ascii=False))
        else:
            print_table(file, report)
    finished = count_finished(file, found)
    if finished == file.points:
        print(f"the search space is exhausted: all {finished} points have been tried", file=sys.stderr)
    least = wanted if file.method == "grid" else 1
    if not any(row["metrics"] for row in report["trials"]):  # all trials have diverged
        finished = 0
    if finished < least:
        wrong = [row for row in report["trials"] if row["error"]]
        last = max(wrong, key=lambda row: row["trial"], default=None)
        why = f"; trial {last['trial']} {last['state']}: {last['error']}" if last else ""
        raise RunFailed(f"{finished} of {least} trials finished{why}")


def _rehearse_ends(file: SweepFile, arguments: list[str]) -> Rehearsal:
    """Let `fit` parse every choice and both ends of every range, and return the last rehearsal."""
    ends = {one.name: one.ends() for one in file.parameters}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {name: values[min(row, len(values) - 1)] for name, values in ends.items()}
        rehearsal = rehearse([*arguments, *file.arguments(drawn)])
        check_validates(rehearsal.config["fit"])
    return rehearsal


def base_point(file: SweepFile, arguments: list[str]) -> dict[str, Any] | None:
    """Return what to draw for the options as they are without the search; None if it cannot be drawn."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = _options(rehearse([*arguments, *file.arguments({})]))
        return {one.name: one.drawn(options[_plain(one.name)]) for one in file.parameters}
    except (LookupError, SystemExit):  # the latter if the arguments are incomplete without the parameters
        return None


def _shared_settings(file: SweepFile, rehearsal: Rehearsal) -> dict[str, Any]:
    """Return the options that all trials share, and the digest of the data, which is read for it."""
    config, varied = rehearsal.config["fit"], {_plain(one.name) for one in file.parameters}
    options = settings_of(_options(rehearsal))
    options |= {f"model.{kind}_tower": config.model[f"{kind}_tower"] for kind in ("image", "text")}
    shared = {name: value for name, value in options.items() if _plain(name) not in varied}
    shared = {name: value for name, value in shared.items() if not name.startswith("trainer.callbacks")}
    data, read = config.data, ReadOptions(**config.data.read)
    source = find_source(data.root, scenes=data.dataset == "scenes", read=read)
    source.fetch()
    return shared | {"data": read_source(source, data.dataset, read).digest()}


def _begin(study: optuna.Study, identity: dict[str, Any], first: dict[str, Any] | None) -> None:
    """Give a new study its identity and first point; refuse a study whose trials would not be comparable."""
    identity = json.loads(json.dumps(identity, default=str))
    begun = study.user_attrs.get("identity", identity)
    if changed := [key for key in begun | identity if begun.get(key) != identity.get(key)]:
        raise UserError(
            f"the study {study.study_name!r} was begun with other {', '.join(sorted(changed))}; "
            "give --study NAME to begin another"
        )
    study.set_user_attr("identity", identity)
    if first is not None and not study.trials:
        study.enqueue_trial(first)


def _options(rehearsal: Rehearsal) -> dict[str, Any]:
    return flat(yaml.safe_load(rehearsal.config_to_save))


def _plain(name: str) -> str:
    """Return an option's name as it is in a flat configuration."""
    return name.replace(".init_args", "")


def _logger_arguments(config: Namespace, name: str) -> list[str]:
    """Return arguments that put the trials' W&B runs into one group, and log no artifact of every model."""
    logger = config.trainer.logger
    if not isinstance(logger, Namespace) or not logger.class_path.endswith(".RunLogger"):
        return []
    group = {} if logger.init_args.group else {"trainer.logger.init_args.group": f"sweep-{name}"}
    return option_arguments(group | {"trainer.logger.init_args.log_model": False})


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
    """Work in another process, apart from the terminal, so that Ctrl-C reaches it once: from `_work`."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    keep_freed_memory()
    try:
        worker.work()
    except UserError:  # the first process stops for the same reason
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
