"""`clip-lightning configs`: the packaged configurations."""

from __future__ import annotations

import json as json_format

from clip_lightning.arguments import packaged_configs, run_functions


def run(args: list[str]) -> None:
    """Run `configs` with the arguments of the command line."""
    run_functions(configs, args)


def configs(json: bool = False) -> None:
    """List the packaged configurations for `fit --config NAME`, with the times and scores that were measured.

    Args:
        json: print one JSON object instead.
    """
    found = {}
    for name, path in packaged_configs().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        about, *facts = (line.removeprefix("# ") for line in lines if line.startswith("#"))
        named = (fact.partition(":") for fact in facts)
        found[name] = {"about": about} | {key: value.strip() for key, _, value in named}
    if json:
        print(json_format.dumps(found, ensure_ascii=False))
        return
    for name, facts_of in found.items():
        print(f"{name}: {facts_of.pop('about')}")
        for key, value in facts_of.items():
            print(f"    {key + ':':<10}{value}")
