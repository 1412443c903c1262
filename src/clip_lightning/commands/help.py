"""Print `fit --help` and check the options of `fit` with a table, without importing torch.

`options.tsv`, next to this file, has one line per option: name, default, help. A name that ends with `.*`
stands for the options of a class that the user chooses. `make options` generates the table from the code.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from clip_lightning.arguments import packaged_configs, suggestion
from clip_lightning.errors import UserError

TABLE = Path(__file__).with_name("options.tsv")
# Lightning's own options that are shown without `all`.
OF_LIGHTNING = (
    *("max_epochs", "max_time", "devices", "num_nodes", "strategy", "accelerator", "precision", "logger"),
    *("accumulate_grad_batches", "default_root_dir", "callbacks", "monitor", "patience"),
)
RARE = (
    *("verbose", "weights_only", "print_config", "data.records", "predictions.seed", "predictions.folder"),
    *("model.teacher_options.weight", "model.teacher_options.temperature", "model.optimizer.betas"),
)


def read_options() -> dict[str, tuple[str, str]]:
    """Return (default, help) of every option, by name."""
    lines = (line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines())
    return {name: (default, text) for name, default, text in lines}


def print_help(command: str, *, everything: bool) -> None:
    """Print the options of `fit`, `validate` or `test`, our own first."""
    print(
        f"usage: clip-lightning {command} [--config NAME ...] [--OPTION VALUE ...]\n\n"
        f"--config takes a YAML file or one of {', '.join(packaged_configs())}.\n"
        "If you give several, later ones override earlier ones, and options override all of them.\n"
    )
    options = read_options()
    width = min(shutil.get_terminal_size().columns, 120)
    for name, (default, text) in options.items():
        group, last = name.split(".")[0], name.split(".")[-1]
        if last == "*":
            continue
        if everything:
            print(f"--{name}{f' (default: {default})' if default else ''}")
            print(textwrap.indent(textwrap.fill(text, width - 6), "      "))
        elif last in OF_LIGHTNING or (
            group not in ("trainer", "early_stopping")
            and name not in RARE
            and f"{name.removesuffix(last)}*" not in options  # options of a class
        ):
            option = f"{name} [{default}]" if 0 < len(default) < 10 else name
            text = textwrap.shorten(text, max(width - 4 - max(len(option) + 1, 42), 30), placeholder=" …")
            print(f"  --{option:<41} {text}")
    if not everything:
        print(f"\nclip-lightning {command} --help all prints all options in full, including the Trainer's.")


def check_options(args: Sequence[str]) -> None:
    """Refuse an option that neither is in the table nor belongs to a class, before slow imports."""
    options = read_options()
    names = [name for name in options if not name.endswith(".*")]
    classes = tuple(name[:-1] for name in options if name.endswith(".*"))
    groups = {name.rpartition(".")[0] for name in names}
    for arg in args:
        name = arg.partition("=")[0].removeprefix("--").removesuffix("+")
        if not arg.startswith("--") or name in options or name in groups or name.startswith(classes):
            continue
        remedy = suggestion(name, names) or "clip-lightning fit --help all lists the options"
        raise UserError(f"unknown option --{name}; {remedy}")
