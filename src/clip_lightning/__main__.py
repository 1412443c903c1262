"""The command table; a command's module is imported only when it is called."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
from types import ModuleType

COMMANDS = {
    "fit": ("clip_lightning.training.cli", "train a model, or go on with a run (--ckpt_path last)"),
    "validate": ("clip_lightning.training.cli", "score a checkpoint on the validation split"),
    "test": ("clip_lightning.training.cli", "score a checkpoint on the test split"),
    "data": ("clip_lightning.commands.data", "check captioned pictures, or upload them as a W&B artifact"),
    "compare": ("clip_lightning.commands.compare", "rank finished runs, from their folders or a W&B project"),
    "compare-backbones": (
        "clip_lightning.commands.compare",
        "train every pair of image and text towers, and rank them",
    ),
    "sweep": ("clip_lightning.commands.sweep", "search hyperparameters as a W&B sweep file says"),
    "index": ("clip_lightning.commands.search", "make an index of pictures, or bring one up to date"),
    "search": ("clip_lightning.commands.search", "find pictures in an index, by a sentence or a picture"),
    "app": ("clip_lightning.commands.app", "search pictures on a page in the browser"),
    "evaluate": ("clip_lightning.commands.evaluate", "retrieval, zero-shot classification or a linear probe"),
    "classify": ("clip_lightning.commands.classify", "say which labels fit a picture"),
    "embed": (
        "clip_lightning.commands.embed",
        "write embeddings of pictures and captions as sharded files",
    ),
    "export": (
        "clip_lightning.commands.export",
        "write a model as a bundle, as ONNX, for open_clip, or to the hub",
    ),
    "cache": ("clip_lightning.commands.cache", "list or prune the cached features of frozen towers"),
}
# Which process of a run this is, as torchrun, SLURM and Lightning say it.
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
        args: the words after `clip-lightning`; those of the process by default.

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
        return _fail(f"unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}")
    from clip_lightning.allocator import keep_freed_memory
    from clip_lightning.arguments import checked_arguments
    from clip_lightning.errors import UserError

    keep_freed_memory()
    if os.getcwd() not in sys.path:  # the console script's lacks it: `--model.loss myloss.Focal`
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of a package
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # results hold letters that not every terminal knows
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # empty, which W&B refuses
    try:
        args = checked_arguments(args)
        _imported(COMMANDS[args[0]][0]).run(args)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return _status(stop)
    return 0


def _imported(module: str) -> ModuleType:
    """The module of a command; what it imports is no garbage, and to look for some takes a second or two."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return _USAGE.format(
        commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    )


def _fail(message: str, status: int = 2) -> int:
    from clip_lightning.terminal import one_line, public

    print(f"clip-lightning: error: {one_line(public(message))}", file=sys.stderr)
    return status


def _status(stop: SystemExit) -> int:
    """Lightning leaves with 1 after Ctrl-C and 0 after SIGTERM; say which it was.

    Of several processes the first says it. `srun --kill-on-bad-exit` would else end it while it saves.
    """
    if isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    if type(stop).__name__ == "SIGTERMException":
        return 143 if all(os.environ.get(name, "0") == "0" for name in _RANKS) else 0
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
