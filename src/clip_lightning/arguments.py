"""The words of the command line: functions as commands, packaged configurations, one-line complaints."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from clip_lightning.errors import UserError
from clip_lightning.terminal import public


class PlainErrors:
    """For parsers: whole option names only, and complaints of one line with status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with status 2."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        complain(parser, message)


class Parser(PlainErrors, jsonargparse.ArgumentParser):
    """The parser of commands that are typed functions."""


def run_functions(functions: Any, words: list[str], *, positional: bool = False) -> None:
    """Call the function, or the one that the second word names, with what the words say.

    Args:
        functions: a command, or its subcommands by name; their signatures and docstrings are the help.
        words: of the command line, the command first; `--json` needs no value.
        positional: whether parameters without a default are given without their names.
    """
    jsonargparse.auto_cli(
        functions,
        args=["--json=true" if word == "--json" else word for word in words[1:]],
        prog=f"clip-lightning {words[0]}",
        as_positional=positional,
        parser_class=Parser,
    )


def own_words(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command's words into its own and those that it hands on, to `fit`.

    Args:
        words: without the command.
        names: of its own options, without hyphens. Each takes a value, except that `--json` needs none.

    Returns:
        Its own options with their values, `--help` among them, and the other words.

    Raises:
        UserError: an option of neither resembles one of its own.
    """
    own: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--json":
            given = left.pop(0) if left[:1] in (["true"], ["false"]) else "true"
            own.append(f"--json={given}")
        elif name.startswith("--") and name[2:] in names:
            own.append(word)
            if left and not equals and not left[0].startswith("--"):
                own.append(left.pop(0))
        elif word in ("-h", "--help"):
            own.append(word)
        else:
            _refuse_misspelt(name, names)
            others.append(word)
    return own, others


def _refuse_misspelt(option: str, names: Sequence[str]) -> None:
    if option.startswith("--") and "." not in option:
        for near in difflib.get_close_matches(option[2:], names, n=1, cutoff=0.75):
            raise UserError(f"unknown option {option}; did you mean --{near}?")


def with_home(text: str) -> str:
    """Replace `~` by the home folder at the start of every path in an argument or a value.

    The shell does so only for arguments of their own, not for `--data.root=~/photos`, `random:~/bert`, lists
    or what a configuration holds.
    """
    return re.sub(r"(?:^|(?<=[=:,\[{\"']))~(?=/|$)", lambda _: os.path.expanduser("~"), text)


def checked_arguments(args: list[str]) -> list[str]:
    """Return the arguments with `with_home`, none of which may be empty: that would mean the current folder.

    Raises:
        UserError: one is empty, as an unset variable of the shell is.
    """
    for before, word in zip(["", *args], args, strict=False):
        name, _, value = word.partition("=")
        if not word or (name.startswith("--") and name != word and not value):
            option = name or (before if before.startswith("--") and "=" not in before else "an argument")
            raise UserError(f"{option} is empty; give a value, or leave it out (is a shell variable unset?)")
    return [*map(with_home, args)]


def changed_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of a configuration with every string in it, at any depth, as `change` makes it."""
    if isinstance(value, dict):
        return {changed_strings(key, change): changed_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed_strings(inner, change) for inner in value]
    return type(value)(change(str(value))) if isinstance(value, str | Path) else value


def complain(parser: jsonargparse.ArgumentParser, message: str) -> NoReturn:
    """Print what is wrong with the words given to `parser`, and leave with status 2."""
    line = " ".join(public(message).split())
    print(f"clip-lightning: error: {_plain(line)}{_near_option(parser, line)}", file=sys.stderr)
    sys.exit(2)


def _plain(line: str) -> str:
    """Jsonargparse's sentence without the names of Python's types."""
    if found := re.fullmatch(r"the following arguments are required: (.*)", line):
        names = (name.strip().removeprefix("fit.") for name in found[1].split(","))
        names = (re.sub(r"^(validate|test|list|prune)\.", "", name) for name in names)
        return f"missing: {', '.join(f'--{name}' for name in names)}; give it, or a --config that has it"
    line = re.sub(r'^Parser key "([^"]+)":', r"--\1:", line)
    subject, _, rest = line.partition(": ")
    given = re.search(r"(?:Got value|Given value): (.*)$", rest)
    expected = re.findall(r"Expected an? (typing\.Literal\[.*?\]|<class '.*?'>|dot import path)", rest)
    if not given or not expected:
        return line
    return f"{subject}: expected {' or '.join(map(_kind, expected))}, got {given[1]}"


def _kind(expected: str) -> str:
    if expected.startswith("typing.Literal["):
        return " or ".join(re.findall(r"[\w.+-]+", expected.removeprefix("typing.Literal[")))
    if expected.startswith("dot"):
        return "the name of a class"
    name = expected.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}
    return kinds.get(name, name)


def _near_option(parser: jsonargparse.ArgumentParser, line: str) -> str:
    """Names of options that resemble one which the line calls unknown."""
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    for word in line.split():
        bare = word.strip("\"'`,.;:")
        name = bare.lstrip("-").partition("=")[0]
        if name in known or not (bare.startswith("--") or "." in name or "_" in name):
            continue
        begun = [option for option in known if option.startswith(name)] if len(name) > 2 else []
        near = dict.fromkeys([*begun, *difflib.get_close_matches(name, known, n=2, cutoff=0.75)])
        if near:
            return f"; did you mean {' or '.join('--' + name for name in list(near)[:2])}?"
    return ""


def named_configs(args: list[str]) -> list[str]:
    """Let `--config heads` mean the packaged `configs/heads.yaml`, unless a file has that name."""
    found = []
    for before, word in zip(["", *args], args, strict=False):
        option, equals, value = word.partition("=")
        if equals and option in ("--config", "-c"):
            word = f"{option}={_config_path(value)}"
        elif before in ("--config", "-c"):
            word = _config_path(word)
        found.append(word)
    return found


def with_logger_folder(args: list[str]) -> list[str]:
    """Let `--trainer.logger CSVLogger` do without the folder it asks for: that is the run's."""
    found = []
    for before, word in zip(["", *args], args, strict=False):
        found.append(word)
        name = word.removeprefix("--trainer.logger=") if before != "--trainer.logger" else word
        chosen = before == "--trainer.logger" or word.startswith("--trainer.logger=")
        if chosen and name.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger"):
            found.append("--trainer.logger.save_dir=.")
    return found


def _config_path(name: str) -> str:
    path = packaged_config(name)
    try:
        yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {name} is no YAML: {error}") from error
    return path


def packaged_config(name: str, kind: str = "") -> str:
    """The file of this name, else the packaged configuration, of the kind whose folder is named.

    Raises:
        UserError: there is neither; names those that there are.
    """
    if Path(name).is_file():
        return name
    here = Path(__file__).parent
    folders = [root / kind for root in (here / "configs", here.parents[1] / "configs")]
    for folder in folders:
        for file in (folder / name, folder / f"{name}.yaml"):
            if file.is_file():
                return str(file)
    known = sorted(file.stem for folder in folders for file in folder.glob("*.yaml"))
    raise UserError(f"no configuration {name!r}: expected a file, or one of {', '.join(known)}")


def complaint_within(error: ValueError) -> str | None:
    """Our own complaint within what jsonargparse says of an option of several types, if there is one."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return next((line for line in lines if line.startswith("--")), None)
