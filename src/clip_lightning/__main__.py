"""Runs a command; modules of commands are imported only when they are called."""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import sys

from clip_lightning import __version__
from clip_lightning.allocator import keep_freed_memory
from clip_lightning.commands import COMMANDS
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line, public

# Variables with the rank of a process, as set by torchrun, SLURM and Lightning.
_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the arguments after `clip-lightning`; by default, those of the process.

    Returns:
        Exit status: 0 for success, 1 for failure, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        return _fail(_unknown(args[0]))
    keep_freed_memory()
    _set_progress_bars()
    if os.getcwd() not in sys.path:  # for `--model.loss myloss.Focal`; console scripts do not add it
        sys.path.append(os.getcwd())  # last, so that files there cannot replace packages
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals are not UTF-8
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B does not accept an empty value
    try:
        from clip_lightning.arguments import checked_arguments

        args = checked_arguments(args)
        if args[0] in ("fit", "validate", "test"):  # before importing torch, which takes seconds
            from clip_lightning.commands.help import check_options, print_help

            if {"-h", "--help"} & {*args[1:]}:
                print_help(args[0], everything=args[-1] == "all")
                return 0
            check_options(args[1:])
        gc.disable()  # which saves a second or two
        module = importlib.import_module(f"clip_lightning.{COMMANDS[args[0]][0]}")
        gc.enable()
        gc.freeze()  # the end of the process would look at a million objects
        module.run(args)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as a pipe to `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:
        return _status(stop)
    return 0


def _set_progress_bars() -> None:
    """Let tqdm write a line every half minute if stderr is a file or a pipe, and fewer frames otherwise."""
    line = {"MININTERVAL": "30", "DELAY": "2", "BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt} in {elapsed}\n"}
    for name, value in ({"MININTERVAL": "1"} if sys.stderr.isatty() else line).items():
        os.environ.setdefault(f"TQDM_{name}", value)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: clip-lightning COMMAND [options]

Train and use contrastive image-text models with any timm image tower and any Hugging Face text tower.

commands:
{commands}

Run clip-lightning COMMAND --help to list the options of a command.
To get started, run clip-lightning fit --config quickstart.
"""


def _unknown(command: str) -> str:
    known = [*COMMANDS, "--version", "--help"]
    names = {"train": "fit", "predict": "classify"}
    similar = [names[command]] if command in names else difflib.get_close_matches(command, known, n=1)
    expected = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(known)}"
    return f"unknown {'option' if command.startswith('-') else 'command'} {command!r}; {expected}"


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
        return 143 if all(os.environ.get(name, "0") == "0" for name in _RANKS) else 0
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
