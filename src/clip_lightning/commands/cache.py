"""`clip-lightning cache list|prune` lists the entries of the feature cache or removes old ones."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeFloat

from clip_lightning.arguments import print_result, run_functions
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder

if TYPE_CHECKING:  # not with postponed annotations: to resolve those, jsonargparse would import these
    from clip_lightning.data.features import CacheEntry, FeatureCache


def list_entries(folder: Path | None = None, json: bool = False) -> None:
    """List the cache entries, the most recently used first.

    Args:
        folder: the cache folder; by default the one that `fit` uses.
        json: print one JSON object instead.
    """
    _show(_cache(folder).entries(), "entries", json)


def prune(*, keep_gb: NonNegativeFloat, folder: Path | None = None, json: bool = False) -> None:
    """Remove the least recently used cache entries.

    Args:
        keep_gb: gigabytes (10^9 bytes) to keep; 0 removes everything.
        folder: the cache folder; by default the one that `fit` uses.
        json: print one JSON object instead.
    """
    _show(_cache(folder).prune(keep_gb * 1e9), "removed", json)


def _cache(folder: Path | None) -> "FeatureCache":
    from clip_lightning.data.features import FeatureCache

    default = cache_folder("features")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder} does not exist; omit it to use the default folder, {default}")
    return FeatureCache(folder or default)


def _show(entries: "list[CacheEntry]", title: str, as_json: bool) -> None:
    rows, lines = [], []
    for entry in entries:
        kind, view, tower = entry.key.get("kind", "unknown"), entry.key.get("view"), entry.key.get("name", "")
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        row = {"folder": str(entry.path), "kind": kind, "view": view, "tower": tower}
        rows.append({**row, "rows": entry.rows, "bytes": entry.bytes, "last_used": used})
        size = f"{entry.bytes / 1e6:8.1f} MB {entry.rows:>9} rows"
        lines.append(f"{used} {size} {kind}{'' if view is None else f' {view}'} {tower}")
    total = sum(entry.bytes for entry in entries)
    lines.append(f"{len(rows)} {title}, {total / 1e6:.1f} MB; --json prints the folder of each")
    print_result({title: rows, "bytes": total}, "\n".join(lines), as_json)


run = partial(run_functions, {"list": list_entries, "prune": prune})
