"""`clip-lightning cache list|prune`: what the feature cache holds, and making room."""

from __future__ import annotations

import json
import time
from pathlib import Path

from clip_lightning.arguments import run_functions
from clip_lightning.data.features import CacheEntry, FeatureCache, default_cache
from clip_lightning.errors import UserError


def run(args: list[str]) -> None:
    """Run `cache` with the words of the command line."""
    run_functions({"list": list_entries, "prune": prune}, args)


def list_entries(folder: Path | None = None, json: bool = False) -> None:
    """List the entries, the most recently used first.

    Args:
        folder: the cache; the default one if not given.
        json: print one JSON object instead.
    """
    _show(_cache(folder).entries(), "entries", json)


def prune(keep_gb: float, folder: Path | None = None, json: bool = False) -> None:
    """Remove the least recently used entries.

    Args:
        keep_gb: gigabytes (10^9 bytes) that may stay; 0 removes everything.
        folder: the cache; the default one if not given.
        json: print one JSON object instead.
    """
    if not keep_gb >= 0:
        raise UserError(f"--keep_gb {keep_gb:g}: expected 0 or more gigabytes")
    _show(_cache(folder).prune(keep_gb * 1e9), "removed", json)


def _cache(folder: Path | None) -> FeatureCache:
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--folder {folder}: no such folder; leave it out for the default one, {default_cache()}"
        )
    return FeatureCache(folder or default_cache())


def _show(entries: list[CacheEntry], title: str, as_json: bool) -> None:
    rows = [
        {
            "folder": str(entry.path),
            "kind": entry.key.get("kind", "unknown"),
            "view": entry.key.get("view"),
            "tower": entry.key.get("name", ""),
            "rows": entry.rows,
            "bytes": entry.bytes,
            "last_used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
        }
        for entry in entries
    ]
    if as_json:
        print(json.dumps({title: rows, "bytes": sum(entry.bytes for entry in entries)}))
        return
    for row in rows:
        view = "" if row["view"] is None else f" view {row['view']}"
        print(
            f"{row['last_used']}  {row['bytes'] / 1e6:8.1f} MB  {row['rows']:>9} rows  "
            f"{row['kind']}{view}  {row['tower']}  {row['folder']}"
        )
    print(f"{len(rows)} {title}, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB")
