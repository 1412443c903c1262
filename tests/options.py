"""Generates the table of the options of `fit`, and docs/options.md: `python tests/options.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

from jsonargparse import ArgumentParser

from clip_lightning.commands.help import TABLE
from clip_lightning.data.images import Augmentation
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.tracking.logger import RunLogger
from clip_lightning.training import cli
from clip_lightning.training.losses import InfoNCE

DOC = Path(__file__).resolve().parents[1] / "docs" / "options.md"
CLASSES = {
    "model.lora": LoRAConfig,
    "model.loss": InfoNCE,
    "data.augmentation": Augmentation,
    "trainer.logger": RunLogger,
}
OWN_HELP = {
    "config": "a YAML file, or the name of a packaged configuration; several overlay each other.",
    "print_config": "print the complete configuration and exit.",
    "seed_everything": "seed of everything random.",
    "ckpt_path": "last: resume the newest run; auto: the same, or start one; or a checkpoint.",
    "weights_only": "ignored: checkpoints are always read as weights only.",
    "verbose": "print the scores (validate and test).",
    "trainer.logger": "where metrics go: RunLogger (W&B), CSVLogger, another class path, or false.",
    "trainer.accelerator": "cpu, gpu, mps, tpu; auto takes what is there.",
    "trainer.strategy": "ddp, fsdp (sharded), auto, or another of Lightning's.",
    "trainer.devices": "number of devices, or a list of them; auto takes all.",
    "trainer.num_nodes": "number of machines.",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed.",
    "trainer.callbacks": "class paths of further callbacks.",
    "trainer.max_epochs": "epochs to train.",
    "trainer.max_time": "time to train, as DD:HH:MM:SS.",
    "trainer.accumulate_grad_batches": "batches per optimizer step, each with its own negatives.",
    "trainer.default_root_dir": "folder of the runs.",
    "early_stopping.monitor": "the metric that ends training if it stops improving.",
    "early_stopping.patience": "validations without improvement after which training ends.",
}
INTRODUCTION = """# Options of fit

`clip-lightning fit --help` prints the ones that are used most. Give an option on the command line as
`--data.batch_size 64`, or in a YAML file for `--config`. `validate` and `test` take the same options.
This table is generated from the code by `make options`.

| option | default | meaning |
|---|---|---|
"""


class Parsed(Exception):
    """The parser is complete."""


def fit_actions() -> list[Any]:
    """The options of `fit` as argparse has them, and those of the classes that are chosen most."""

    def stop(parser: Any, *_: Any, **__: Any) -> None:
        raise Parsed(parser)

    with mock.patch.object(cli.Parser, "parse_args", stop):
        try:
            cli.RunCLI(["fit"])
        except Parsed as parsed:
            actions = list(parsed.args[0]._subcommands_action._name_parser_map["fit"]._actions)
    for name, kind in CLASSES.items():
        parser = ArgumentParser()
        parser.add_class_arguments(kind, name)
        actions += [action for action in parser._actions if action.dest.startswith(f"{name}.")]
    return actions


def rows() -> dict[str, tuple[str, str]]:
    """(default, help) of each option."""
    found = {"verbose": ("", "")}
    for action in fit_actions():
        name = action.dest
        if f"--{name}" not in action.option_strings and name != "config":
            continue
        if name.endswith(".help"):
            found[f"{name.removesuffix('.help')}.*"] = ("", "options of the class")
        elif name != "help":
            default = action.default
            shown = (
                "" if default in (None, "==SUPPRESS==", {}, ()) or name == "trainer.logger" else str(default)
            )
            if action.help == "Path to a configuration file.":
                continue
            text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join((action.help or "").split()))
            found[name] = (shown, re.sub(r"\s*Default: .*$", "", text.replace("``", "`")))
    return {name: (default, OWN_HELP.get(name, text)) for name, (default, text) in found.items()}


def table() -> str:
    order = ("config", "ckpt_path", "data", "model", "seed_everything", "checkpoint")
    order += ("predictions", "zero_shot", "early_stopping", "trainer", "print_config")
    found = rows()
    names = sorted(found, key=lambda name: [*order, name.split(".")[0]].index(name.split(".")[0]))
    return "".join(f"{name}\t{found[name][0]}\t{found[name][1]}\n" for name in names)


def document() -> str:
    lines = (line.split("\t") for line in table().splitlines())
    shown = [
        [cell.replace("|", "\\|") for cell in (f"`--{name}`", default, text)]
        for name, default, text in lines
        if not name.endswith(".*")
    ]
    return INTRODUCTION + "".join(f"| {' | '.join(line)} |\n" for line in shown)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    DOC.write_text(document(), encoding="utf-8")
