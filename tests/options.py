"""Generates the table of the options of `fit`, and docs/options.md: `python tests/options.py`."""

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
    "trainer.strategy": "ddp, auto, or another of Lightning's.",
    "trainer.devices": "number of devices, or a list of them; auto takes all.",
    "trainer.num_nodes": "number of machines.",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed; by default bf16-mixed on a GPU that has it.",
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
    """(default, help) of each option, in the order of the page."""
    found = {"verbose": ("", OWN_HELP["verbose"])}
    skipped = ("Path to a configuration file.", "show this help message and exit")
    for action in fit_actions():
        name, default = action.dest, action.default
        if name.endswith(".help"):
            found[f"{name.removesuffix('.help')}.*"] = ("", "options of the class")
        elif f"--{name}" in action.option_strings and action.help not in skipped:
            shown = default not in (None, "==SUPPRESS==", {}, (), []) and name != "trainer.logger"
            text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join((action.help or "").split()))
            text = re.sub(r"\s*Default: .*$", "", text.replace("``", "`"))
            found[name] = (str(default) if shown else "", OWN_HELP.get(name, text))
    order = "config ckpt_path data model seed_everything checkpoint predictions zero_shot".split()
    order += ["early_stopping", "trainer", "print_config"]  # others come last
    groups = {name: name.split(".")[0] for name in found}
    return {name: found[name] for name in sorted(found, key=lambda n: [*order, groups[n]].index(groups[n]))}


def table() -> str:
    return "".join(f"{name}\t{default}\t{text}\n" for name, (default, text) in rows().items())


def document() -> str:
    lines = (
        (f"`--{name}`", *(cell.replace("|", "\\|") for cell in cells))
        for name, cells in rows().items()
        if not name.endswith(".*")
    )
    return INTRODUCTION + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    DOC.write_text(document(), encoding="utf-8")
