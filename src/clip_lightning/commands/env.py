"""`clip-lightning env`: what a bug report needs to say of this machine."""

from __future__ import annotations

import json as json_format
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from clip_lightning import __version__
from clip_lightning.arguments import run_functions
from clip_lightning.cores import cores
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

PACKAGES = ("torch", "torchvision", "lightning", "timm", "transformers", "wandb", "jsonargparse", "optuna")
OPTIONAL = ("faiss-cpu", "starlette", "peft", "open_clip_torch", "onnxruntime", "datasets")
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_BASE_URL", "XDG_CACHE_HOME", "OMP_NUM_THREADS")


def run(args: list[str]) -> None:
    """Run `env` with the arguments of the command line."""
    run_functions(env, args)


def env(json: bool = False) -> None:
    """Print versions, devices and folders, for bug reports.

    Args:
        json: print one JSON object instead.
    """
    import torch

    found = {
        "clip-lightning": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "cores": f"{cores()} usable of {os.cpu_count()}",
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
        **{name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "cache": str(cache_folder("").resolve()),
        **{name: public(os.environ[name]) for name in VARIABLES if name in os.environ},
    }
    if json:
        print(json_format.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<16}{value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
