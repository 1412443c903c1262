"""Complaints about the command line: one line, in plain words, with near names."""

from __future__ import annotations

import difflib
import re
import sys
from typing import NoReturn

import jsonargparse


def complain(parser: jsonargparse.ArgumentParser, message: str) -> NoReturn:
    """Print what is wrong with the words given to `parser`, and leave with status 2."""
    line = " ".join(message.split())
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
