"""`clip-lightning configs`, `env` and `completion` print configurations, versions and a shell script."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from clip_lightning import __version__
from clip_lightning.arguments import packaged_configs, print_result, run_functions
from clip_lightning.commands import COMMANDS
from clip_lightning.commands.help import read_options
from clip_lightning.cpu import cores
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

PACKAGES = ("torch", "torchvision", "lightning", "timm", "transformers", "wandb", "jsonargparse", "optuna")
OPTIONAL = ("faiss-cpu", "starlette", "peft", "open_clip_torch", "onnxruntime", "datasets")
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_BASE_URL", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
SCRIPT = """_clip_lightning() {{
    local words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        words=""
        case "${{COMP_WORDS[1]}}" in fit|validate|test|sweep|compare-backbones) words="{options}";; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
complete -o default -F _clip_lightning clip-lightning"""


def run(args: list[str]) -> None:
    """Run `configs`, `env` or `completion` with the arguments of the command line, the command first."""
    run_functions({"configs": configs, "env": env, "completion": completion}[args[0]], args)


def configs(json: bool = False) -> None:
    """List the packaged configurations for `fit --config NAME` with their measured times and scores.

    Args:
        json: print one JSON object instead.
    """
    described, lines = {}, []
    for name, path in packaged_configs().items():
        comments = path.read_text(encoding="utf-8").splitlines()
        about, *facts = (line.removeprefix("# ") for line in comments if line.startswith("#"))
        facts_of = {key: value.strip() for key, _, value in (fact.partition(":") for fact in facts)}
        described[name] = {"about": about, **facts_of}
        lines += [f"{name}: {about}", *(f"    {key + ':':<10}{value}" for key, value in facts_of.items())]
    print_result(described, "\n".join(lines), json)


def env(json: bool = False) -> None:
    """Print versions, devices and folders for bug reports.

    Args:
        json: print one JSON object instead.
    """
    import torch

    values = {
        "clip-lightning": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "cores": str(cores()),
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
        **{name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "cache": str(cache_folder("").resolve()),
        **{name: public(os.environ[name]) for name in VARIABLES if name in os.environ},
    }
    print_result(values, "\n".join(f"{name:<16}{value}" for name, value in values.items()), json)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def completion() -> None:
    """Print a completion script for bash or zsh; add `eval "$(clip-lightning completion)"` to ~/.bashrc."""
    options = " ".join(f"--{name}" for name in read_options() if not name.endswith(".*"))
    print(SCRIPT.format(commands=" ".join(COMMANDS), options=options))
