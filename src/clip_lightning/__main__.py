"""Runs a command; modules of commands are imported only when they are called."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator

from clip_lightning import __version__
from clip_lightning.commands import COMMANDS
from clip_lightning.cpu import keep_freed_memory
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line, public

USAGE = """usage: clip-lightning COMMAND [options]

Train and use contrastive image-text models with any timm image tower and any Hugging Face text tower.

commands:
{}

With -q or --quiet, every command prints only its results and errors.
Run clip-lightning COMMAND --help to list the options of a command.
To get started, run clip-lightning fit --config quickstart.
"""


def run_process() -> int:
    """Run the command of this process, which then ends at once.

    Python would free its memory object by object for two seconds. Functions that commands and their modules
    have registered with `atexit` are called as usual.
    """
    status = 1

    def leave() -> None:
        _flush_files()
        os._exit(status)

    atexit.register(leave)  # the first one to be registered is called last
    status = main()
    return status


def _flush_files() -> None:
    """Write what is in the buffers of open files, such as those of callbacks, as Python does when it ends."""
    kinds = io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom
    for thing in gc.get_objects():
        if issubclass(type(thing), kinds):  # `isinstance` makes some objects warn, as it reads an attribute
            with contextlib.suppress(OSError, ValueError):  # it is closed, for example
                thing.flush()


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the arguments after `clip-lightning`; by default, those of the process.

    Returns:
        Exit status: 0 for success, 1 for failure, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM.
    """
    given = sys.argv[1:] if args is None else args
    args = [arg for arg in given if arg not in ("-q", "--quiet")]
    if not args or args[0] in ("-h", "--help", "--version"):
        listed = "\n".join(f"  {name:<17}  {text}" for name, (_, text) in COMMANDS.items())
        print(__version__ if args[:1] == ["--version"] else USAGE.format(listed))
        return 0 if args else 2
    if args[0] not in COMMANDS:
        known = [*COMMANDS, "--version", "--help"]
        similar = {"train": ["fit"], "predict": ["classify"]}.get(args[0])  # names in other programs
        similar = similar or difflib.get_close_matches(args[0], known, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else "clip-lightning --help lists the commands"
        return _fail(f"unknown command {args[0]!r}; {remedy}")
    _prepare()
    try:
        with _without_stderr() if len(args) < len(given) else contextlib.nullcontext():
            _run(args)
            print(end="", flush=True)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as a pipe to `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, for example
        file = f"{error.filename} cannot be read or written" if error.filename else "a file operation failed"
        return _fail(f"{file} ({error.strerror or error}); check the path, its permissions and the disk", 1)
    except SystemExit as stop:
        return _fail(stop.code) if isinstance(stop.code, str) else _status(stop)
    return 0


def _prepare() -> None:
    """Change settings of this process and its children that all commands need."""
    keep_freed_memory()
    if os.getcwd() not in sys.path:  # for `--model.loss myloss.Focal`; console scripts do not add it
        sys.path.append(os.getcwd())  # last, so that files there cannot replace packages
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals are not UTF-8
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B does not accept an empty value
    # tqdm writes a line every half minute to a file or a pipe, and fewer frames to a terminal
    line = {"MININTERVAL": "30", "DELAY": "2", "BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt} in {elapsed}\n"}
    for name, value in ({"MININTERVAL": "1"} if sys.stderr.isatty() else line).items():
        os.environ.setdefault(f"TQDM_{name}", value)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what this process and its children write to stderr."""
    os.environ["WANDB_SILENT"] = "true"  # W&B also writes when Python exits
    original = os.dup(2)
    nowhere = open(os.devnull, "w", errors="replace")
    atexit.register(nowhere.close)  # not before: loggers write to it until Python exits
    os.dup2(nowhere.fileno(), 2)  # of child processes
    try:
        with contextlib.redirect_stderr(nowhere):
            yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _run(args: list[str]) -> None:
    from clip_lightning.arguments import checked_arguments

    args = checked_arguments(args)
    if args[0] in ("fit", "validate", "test"):  # before importing torch, which takes seconds
        from clip_lightning.commands.help import check_options, print_help

        if {"-h", "--help"} & {*args[1:]}:
            print_help(args[0], everything=args[-1] == "all")
            return
        check_options(args[1:])
    gc.disable()  # which saves a second or two
    module = importlib.import_module(f"clip_lightning.{COMMANDS[args[0]][0]}")
    gc.freeze()  # what was imported stays
    gc.enable()
    try:
        module.run(args)
    finally:
        gc.unfreeze()  # else bindings report leaks when Python exits


def _fail(message: str, status: int = 2) -> int:
    print(f"clip-lightning: error: {one_line(public(message))}", file=sys.stderr)
    return status


def _status(stop: SystemExit) -> int:
    """Return the exit status; Lightning exits with 1 after Ctrl-C and with 0 after SIGTERM.

    Only rank 0 returns 143, because `srun --kill-on-bad-exit` would terminate other ranks while they save.
    """
    if isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    if type(stop).__name__ == "SIGTERMException":
        ranks = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")  # of torchrun, SLURM and Lightning
        return 143 if all(os.environ.get(name, "0") == "0" for name in ranks) else 0
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(run_process())
