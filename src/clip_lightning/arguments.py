"""The command line: functions as commands, packaged configurations, error messages of one line."""

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
    """For parsers: options have their complete names, and an error is one line with status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the arguments, and exit with status 2."""
        line = " ".join(public(message).split())
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        print(f"clip-lightning: error: {_plain(line)}{_suggestion(line, known)}", file=sys.stderr)
        sys.exit(2)


class Parser(PlainErrors, jsonargparse.ArgumentParser):
    """The parser of commands that are typed functions."""


def run_functions(functions: Any, args: list[str], *, positional: bool = False) -> None:
    """Call the function, or the one that the second argument names, with what the arguments give.

    Args:
        functions: a command, or its subcommands by name; their signatures and docstrings are the help.
        args: of the command line, the command first; `--json` needs no value.
        positional: whether parameters without a default are given without their names.
    """
    jsonargparse.auto_cli(
        functions,
        args=with_json_value(args[1:]),
        prog=f"clip-lightning {args[0]}",
        as_positional=positional,
        parser_class=Parser,
    )


def with_json_value(args: Sequence[str]) -> list[str]:
    """Return the arguments with `--json`, `--json true` and `--json false` as one argument each."""
    found: list[str] = []
    for arg in args:
        if found[-1:] == ["--json=true"] and arg in ("true", "false"):
            found[-1] = f"--json={arg}"
        else:
            found.append("--json=true" if arg == "--json" else arg)
    return found


def own_words(args: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments of a command into its own and those that it passes to `fit`.

    Args:
        args: without the command.
        names: of its own options, without hyphens. Each takes a value, except that `--json` needs none.

    Returns:
        Its own options with their values, `--help` among them, and the other arguments.

    Raises:
        UserError: an option of neither resembles one of its own.
    """
    own: list[str] = []
    others: list[str] = []
    left = with_json_value(args)
    while left:
        arg = left.pop(0)
        name, equals, _ = arg.partition("=")
        if name in ("-h", "--help") or (name.startswith("--") and name[2:] in names):
            own.append(arg)
            if left and not equals and name[2:] in names and not left[0].startswith("--"):
                own.append(left.pop(0))
        elif name.startswith("--") and "." not in name and (near := near_options(name[2:], names)):
            raise UserError(f"unknown option {name}; did you mean --{near[0]}?")
        else:
            others.append(arg)
    return own, others


def with_home(text: str) -> str:
    """Replace `~` by the home folder at the start of every path in an argument or a value.

    The shell does so only for arguments of their own, not for `--data.root=~/photos`, `random:~/bert`, lists
    or values in a configuration.
    """
    return re.sub(r"(?:^|(?<=[=:,\[{\"']))~(?=/|$)", lambda _: os.path.expanduser("~"), text)


def checked_arguments(args: list[str]) -> list[str]:
    """Return the arguments with `with_home`, none of which may be empty: that would mean the current folder.

    Raises:
        UserError: one is empty, as an unset variable of the shell is.
    """
    for before, arg in zip(["", *args], args, strict=False):
        name, _, value = arg.partition("=")
        if not arg or (name.startswith("--") and name != arg and not value):
            option = name or (before if before.startswith("--") and "=" not in before else "an argument")
            raise UserError(f"{option} is empty; give a value, or leave it out (is a shell variable unset?)")
    return [*map(with_home, args)]


def changed_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of a configuration with `change` applied to every string in it, at any depth."""
    if isinstance(value, dict):
        return {changed_strings(key, change): changed_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed_strings(inner, change) for inner in value]
    return type(value)(change(str(value))) if isinstance(value, str | Path) else value


def _plain(line: str) -> str:
    """Rewrite a message of jsonargparse without the names of Python's types."""
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


def _suggestion(line: str, known: Sequence[str]) -> str:
    """Name options that resemble one which the line calls unknown."""
    for word in line.split():
        bare = word.strip("\"'`,.;:")
        name = bare.lstrip("-").partition("=")[0]
        if name in known or not (bare.startswith("--") or "." in name or "_" in name):
            continue
        if near := near_options(name, known):
            return f"; did you mean {' or '.join(f'--{option}' for option in near)}?"
    return ""


def near_options(name: str, known: Sequence[str]) -> list[str]:
    """Return the option that ends with the name (`lr`), or two that begin or end with it or resemble it."""
    if parts := [option for option in known if option.endswith(f".{name}")]:
        return parts[:1]
    begun = [option for option in known if len(name) > 2 and option.startswith(name)]
    ended = [option for option in known if len(name) > 2 and option.endswith(f"_{name}")]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    return list(dict.fromkeys([*begun, *ended, *near]))[:2]


def named_configs(args: list[str]) -> list[str]:
    """Let `--config heads` mean the packaged `configs/heads.yaml`, unless a file has that name."""
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=")
        if equals and option in ("--config", "-c"):
            arg = f"{option}={_config_path(value)}"
        elif before in ("--config", "-c"):
            arg = _config_path(arg)
        found.append(arg)
    return found


def with_logger_folder(args: list[str]) -> list[str]:
    """Give `--trainer.logger CSVLogger` the folder that it asks for: that of the run."""
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        found.append(arg)
        name = arg if before == "--trainer.logger" else arg.partition("--trainer.logger=")[2]
        if name.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger"):
            found.append("--trainer.logger.save_dir=.")
    return found


def _config_path(name: str) -> str:
    path = packaged_config(name)
    try:
        yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {name} is not YAML: {error}") from error
    return path


def packaged_config(name: str, kind: str = "") -> str:
    """Return the file of this name, or else the packaged configuration.

    Args:
        name: a file, or the name of a packaged configuration.
        kind: folder of the packaged configurations, below `configs`.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return name
    found = packaged_configs(kind)
    stem = name.removesuffix(".yaml")
    if stem not in found:
        raise UserError(f"no configuration {name!r}: expected a file, or one of {', '.join(found)}")
    return str(found[stem])


def packaged_configs(kind: str = "") -> dict[str, Path]:
    """Return the packaged configurations by name: of `fit`, or those in a folder below."""
    here = Path(__file__).parent
    folders = [root / kind for root in (here / "configs", here.parents[1] / "configs")]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def error_within(error: ValueError) -> str | None:
    """Return our own message within what jsonargparse prints of an option of several types, if there is one.

    Or name the package that a logger or a callback of Lightning's needs.
    """
    if missing := re.findall(r"Requirement '([^']+)' not met", str(error)):
        names = " or ".join(dict.fromkeys(missing))
        return f"--trainer: {names} is not installed; pip install '{missing[-1]}'"
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return next((line for line in lines if line.startswith("--")), None)
