"""The command table; a command's module is imported only when it is called."""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import sys
from types import ModuleType

COMMANDS = {
    "fit": ("training.cli", "train a model, or resume a run (--ckpt_path last)"),
    "validate": ("training.cli", "score a checkpoint on the validation split"),
    "test": ("training.cli", "score a checkpoint on the test split"),
    "data": ("commands.data", "check captioned images, convert them to tars, or upload them to W&B"),
    "compare": ("commands.compare", "rank finished runs, from their folders or a W&B project"),
    "compare-backbones": ("commands.compare", "train every pair of image and text towers, and rank them"),
    "sweep": ("commands.sweep", "search hyperparameters with a W&B sweep file"),
    "index": ("commands.search", "build a search index of images, or update one"),
    "search": ("commands.search", "find images in an index by a sentence or an image"),
    "app": ("commands.app", "search images on a page in the browser"),
    "evaluate": ("commands.evaluate", "retrieval, zero-shot classification or a linear probe"),
    "classify": ("commands.classify", "choose the label that fits an image"),
    "embed": ("commands.embed", "write embeddings of images and captions as sharded files"),
    "export": ("commands.export", "write a model as a bundle, as ONNX, for open_clip, or to the hub"),
    "configs": ("commands.configs", "list the packaged configurations, with their times and scores"),
    "env": ("commands.env", "print versions, devices and folders, for bug reports"),
    "completion": ("commands.completion", "print a completion script for bash or zsh"),
    "cache": ("commands.cache", "list or prune the cached features of frozen towers"),
}
# Which process of a run this is, as set by torchrun, SLURM and Lightning.
_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
_USAGE = """usage: clip-lightning COMMAND [options]

Any timm image tower and any Hugging Face text tower as a contrastive image-text model.

commands:
{commands}

clip-lightning COMMAND --help lists the options of a command.
First steps: clip-lightning fit --config quickstart
"""


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the arguments after `clip-lightning`; those of the process by default.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        from clip_lightning import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        return _fail(_unknown(args[0]))
    from clip_lightning.allocator import keep_freed_memory
    from clip_lightning.arguments import checked_arguments
    from clip_lightning.errors import UserError

    keep_freed_memory()
    if os.getcwd() not in sys.path:  # the console script lacks it: `--model.loss myloss.Focal`
        sys.path.append(os.getcwd())  # last, so that no file there replaces a package
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # results have letters that not every terminal knows
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B refuses an empty one
    try:
        args = checked_arguments(args)
        if args[0] in ("fit", "validate", "test"):  # before torch is imported, which takes seconds
            from clip_lightning.commands.help import check_options, print_help

            if {"-h", "--help"} & {*args[1:]}:
                print_help(args[0], everything=args[-1] == "all")
                return 0
            check_options(args[1:])
        _imported(f"clip_lightning.{COMMANDS[args[0]][0]}").run(args)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of a pipe to `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:
        return _status(stop)
    return 0


def _imported(module: str) -> ModuleType:
    """Import without the garbage collector, which would take a second or two and find nothing."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = (f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return _USAGE.format(commands="\n".join(commands))


def _unknown(command: str) -> str:
    option = command.startswith("-")
    known = ["--version", "--help"] if option else list(COMMANDS)
    near = {"train": "fit", "predict": "classify"}.get(command)
    near = near or next(iter(difflib.get_close_matches(command, known, n=1)), None)
    expected = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown {'option' if option else 'command'} {command!r}; {expected}"


def _fail(message: str, status: int = 2) -> int:
    from clip_lightning.terminal import one_line, public

    print(f"clip-lightning: error: {one_line(public(message))}", file=sys.stderr)
    return status


def _status(stop: SystemExit) -> int:
    """Return the status of an exit; Lightning itself exits with 1 after Ctrl-C and 0 after SIGTERM.

    Of several processes only the first returns 143: `srun --kill-on-bad-exit` would end the others, which may
    still be saving.
    """
    if isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    if type(stop).__name__ == "SIGTERMException":
        return 143 if all(os.environ.get(name, "0") == "0" for name in _RANKS) else 0
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
