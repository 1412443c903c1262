"""The table of commands (name, module and description), and what the argument MODEL may be."""

from __future__ import annotations

COMMANDS = {
    "fit": ("training.cli", "train a model, or resume a run (--ckpt_path last)"),
    "validate": ("training.cli", "score a checkpoint on the validation split"),
    "test": ("training.cli", "score a checkpoint on the test split"),
    "data": ("commands.data", "check or audit captioned images, write tars, or upload to W&B"),
    "compare": ("commands.compare", "rank finished runs from their folders or a W&B project"),
    "compare-backbones": ("commands.compare", "train and rank every pair of image and text towers"),
    "sweep": ("commands.sweep", "search hyperparameters with a W&B sweep file"),
    "index": ("commands.embed", "build or update a search index of images"),
    "search": ("commands.search", "find images in an index with a sentence or an image"),
    "app": ("commands.app", "search images in the browser"),
    "evaluate": ("commands.evaluate", "measure retrieval, zero-shot classification or a linear probe"),
    "classify": ("commands.classify", "choose the label that fits an image"),
    "embed": ("commands.embed", "write embeddings of images and captions to sharded files"),
    "export": ("commands.export", "export a model as a bundle, to ONNX, to open_clip, or to the hub"),
    "merge": ("commands.merge", "average a model and what was trained from it, to forget less"),
    "configs": ("commands.info", "list the packaged configurations with their times and scores"),
    "env": ("commands.info", "print versions, devices and folders for bug reports"),
    "completion": ("commands.info", "print a completion script for bash or zsh"),
    "cache": ("commands.cache", "list or prune the cached features of frozen towers"),
}

# What MODEL may be; the docstrings of `export` and `evaluate`, which are their help, repeat it.
MODEL = "a bundle, a run folder, a checkpoint, a Hugging Face hub id, or wandb:ENTITY/PROJECT/NAME:ALIAS"
