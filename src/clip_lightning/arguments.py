"""The command line: functions as commands, packaged configurations, and one-line error messages."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.terminal import json_line, public

# Names of types in the messages of jsonargparse, for the user.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "dot import path": "the name of a class",
    "PositiveInt": "a whole number of 1 or more",
    "NonNegativeInt": "a whole number of 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of 0 or more",
    "OpenUnitInterval": "a fraction above 0 and below 1",
}


class PlainErrors:
    """A mixin for parsers that disables abbreviations and reports errors in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the error and a suggestion; jsonargparse catches a ValueError to try another type."""
        line = " ".join(public(message).split())
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        words = [word.strip("\"'`,.;:") for word in line.split()]
        names = [word.lstrip("-").partition("=")[0] for word in words if re.search(r"^--|[._]", word)]
        questions = (suggestion(name, known) for name in names if name not in known)
        raise SystemExit("; ".join([plain_message(line), *filter(None, questions)][:2]))


class Parser(PlainErrors, jsonargparse.ArgumentParser):
    """The parser of commands that are implemented as functions."""

    @classmethod
    def of_function(
        cls, command: str, function: Callable[..., Any], skip: set[str | int], usage: str | None = None
    ) -> Parser:
        """Return a parser with the options and the help of a function, without the parameters `skip`."""
        about = (inspect.getdoc(function) or "").partition("\n\nArgs")[0]
        parser = cls(prog=f"clip-lightning {command}", description=about, usage=usage)
        parser.add_function_arguments(function, as_group=False, skip=skip)
        return parser


def run_functions(functions: Any, args: list[str]) -> None:
    """Call a command, or the one of several that the second argument names; their docstrings are the help."""
    jsonargparse.auto_cli(
        functions, args=args[1:], prog=f"clip-lightning {args[0]}", as_positional=True, parser_class=Parser
    )


def print_result(record: Any, text: str, as_json: bool) -> None:
    """Print the result of a command: as one JSON object with `--json`, otherwise as text."""
    print(json_line(record) if as_json else text)


def check_folder(out: Path | None, data: str) -> None:
    """Refuse a file, the folder of the data, or one that cannot be written, before anything is computed."""
    if out is None:
        return
    if out.exists() and any(os.path.exists(name) and out.samefile(name) for name in (data, *data.split(","))):
        raise UserError(
            f"--out {out} is the folder of the data, where the results could be taken for a table of "
            "captions; give another folder"
        )
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder")
    existing = next(filter(Path.exists, (out.absolute(), *out.absolute().parents)))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another folder") from error


def own_arguments(args: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments into those of the options with these names, and those to pass to `fit`."""
    own: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for arg in rest:
        name = arg.partition("=")[0].removeprefix("--")
        if arg in ("-h", "--help"):
            own.append(arg)
        elif arg.startswith("--") and name in names:
            own += [arg] if "=" in arg else [arg, *islice(rest, 1)]
        else:
            if arg.startswith("--") and "." not in name and (question := suggestion(name, names)):
                raise UserError(f"unknown option --{name}; {question}")
            others.append(arg)
    return own, others


def with_home(text: str) -> str:
    """Replace `~` by the home folder also where the shell does not: after `=`, and in lists and files."""
    return re.sub(r"(?:^|(?<=[=:,\[{\"']))~(?=/|$)", lambda _: os.path.expanduser("~"), text)


def checked_arguments(args: list[str]) -> list[str]:
    """Expand home folders, give `--json` its value, and refuse empty arguments and broken text."""
    result: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        name, equals, value = arg.partition("=")
        if not arg or (name.startswith("--") and equals and not value):
            given = name or f"the argument after {before}"
            raise UserError(f"{given} is empty; give a value, or leave it out (is a shell variable unset?)")
        if arg.encode(errors="replace").decode() != arg and not os.path.exists(value or arg):
            raise UserError(f"the argument {arg!r} is not UTF-8 text; write it in a UTF-8 terminal")
        if arg in ("true", "false") and before in ("--json", "--open"):
            result[-1] = f"{before}={arg}"
        else:
            result.append(f"{arg}=true" if arg in ("--json", "--open") else with_home(arg))
    return result


def changed_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in a configuration value, at any depth."""
    if isinstance(value, dict):
        return {changed_strings(key, change): changed_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed_strings(inner, change) for inner in value]
    return type(value)(change(str(value))) if isinstance(value, str | Path) else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to dotted names, and a class to its name and its arguments.

    {"loss": {"class_path": "a.SigLIP", "init_args": {"x": 1}}} → {"loss": "SigLIP", "loss.x": 1}
    """
    options: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
            options[name] = value["class_path"].rpartition(".")[2]
            value = value.get("init_args") or {}
        options |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return options


def plain_message(line: str) -> str:
    """Rewrite a message of jsonargparse without names of Python types."""
    if found := re.fullmatch(r"the following arguments are required: (.*)", line):
        names = (re.sub(r"^[\w-]+\.", "", name.strip()) for name in found[1].split(","))  # of a subcommand
        return f"missing: {', '.join(names)}; --help shows the arguments of each command"
    line = re.sub(r'^Parser key "([^"]+)":', r"--\1:", line)
    subject, _, rest = line.partition(": ")
    if found := re.search(r"Problem with given class_path '([^']+)': (.*?) - Expected ", rest):
        absent = found[2].startswith(("No module named", "module "))
        return f"{subject}: {f'cannot import {found[1]}' if absent else found[1]}: {found[2]}"
    given = re.search(r"(?:Got value|Given value): (.*)$", rest)
    given = given or re.fullmatch(r"Not of type \w+: (?:.*: )?'?(.*?)'?(?: does not conform .*)?", rest)
    if given and (found := re.search(r"Import path does not correspond to a subclass of (\w+)", rest)):
        return f"{subject}: {given[1]} is not a {found[1]}"
    types = r"(?:Expected an?|Not of type) (typing\.Literal\[.*?\]|<class '.*?'>|dot import path|\w+(?=:))"
    expected = " or ".join(map(_kind, re.findall(types, rest)))
    return f"{subject}: expected {expected}, got {given[1]}" if given and expected else line


def _kind(expected: str) -> str:
    if expected.startswith("typing.Literal["):
        return " or ".join(re.findall(r"[\w.+-]+", expected.removeprefix("typing.Literal[")))
    name = expected.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _KINDS.get(name, name)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Ask for the option that ends with `.NAME`, or for up to two that resemble the name."""
    exact = [option for option in known if option.endswith(f".{name}")][:1]
    longer = [o for o in known if len(name) > 2 and (o.startswith(name) or o.endswith(f"_{name}"))]
    similar = [*longer, *difflib.get_close_matches(name, known, n=2, cutoff=0.75)]
    two = [f"--{option}" for option in dict.fromkeys(exact or similar)][:2]
    return f"did you mean {' or '.join(two)}?" if two else ""


def with_full_values(args: list[str]) -> list[str]:
    """Resolve `--config heads` to the packaged file, and add the folder that loggers of Lightning require."""
    result = []
    for before, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=")
        if not equals:
            option, value = before, arg
        if option in ("--config", "-c"):
            value = packaged_config(value)
            with as_user_error(f"--config {value} is not valid YAML", "correct the file"):
                content = yaml.safe_load(Path(value).read_text())
            if not isinstance(content, dict):
                raise UserError(f"--config {value} has no options; give a YAML file with options of fit")
        elif option == "--trainer.logger" and value.endswith(("CSVLogger", "TensorBoardLogger")):
            value = json.dumps({"class_path": value, "init_args": {"save_dir": "."}})
        result.append(f"{option}={value}" if equals else value)
    return result


def packaged_config(name: str, kind: str = "") -> str:
    """Return the path of a file, or of a packaged configuration in the subfolder `kind`."""
    if Path(name).is_file():
        return name
    configs = packaged_configs(kind)
    stem = name.removesuffix(".yaml")
    if stem not in configs:
        raise UserError(f"no configuration {name!r}: expected a file, or one of {', '.join(configs)}")
    return str(configs[stem])


def packaged_configs(kind: str = "") -> dict[str, Path]:
    """Return the packaged configurations of `fit`, or those in a subfolder, by name."""
    here = Path(__file__).parent
    folders = (here / "configs" / kind, here.parents[1] / "configs" / kind)  # of a wheel, and a checkout
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def error_within(error: ValueError) -> str | None:
    """Return the message of a `UserError` in one of jsonargparse, or how to install what Lightning needs."""
    if missing := re.findall(r"Requirement '([^']+)' not met", str(error)):
        names = " or ".join(dict.fromkeys(missing))
        return f"--trainer: {names} is not installed; pip install '{missing[-1]}'"
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    return next((line for line in lines if line.startswith("--")), None)
