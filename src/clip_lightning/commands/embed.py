"""`clip-lightning embed MODEL DATA --out FOLDER`: embeddings of pictures and captions as sharded files."""

from __future__ import annotations

import contextlib
import json as json_module
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError
from clip_lightning.search.plan import Plan, data_digest
from clip_lightning.terminal import one_line

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP
    from clip_lightning.search.embeddings import Record, Store

MOST_NAMED = 5
# Warnings of Lightning that say nothing to the user of a command.
_QUIET = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*does not have many workers.*",
    ".*module\\(s\\) in eval mode.*",
    ".*across ranks is zero.*",
)


def run(args: list[str]) -> None:
    """Run `embed` with the words of the command line, the command first."""
    run_functions(embed, args, positional=True)


def embed(
    model: str,
    data: Path,
    *,
    out: Path,
    what: Literal["images", "captions", "both"] = "images",
    format: Literal["npy", "parquet"] = "npy",
    shard_size: int = 4096,
    batch_size: int = 64,
    num_workers: int | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    json: bool = False,
) -> None:
    """Write embeddings of pictures, of captions or of both, as float32 of unit length.

    A command that was stopped goes on when it is given again; finished shards are kept. Broken pictures are
    skipped and listed in broken.json. Several processes, also on several machines that share the folder,
    write whole shards each, and the same files as one process: --devices 2, torchrun, or srun.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME.
        data: a folder of pictures, searched with its subfolders, or a captioned data set, as for
            fit --data.root.
        out: folder of the embeddings.
        what: images, captions, or both.
        format: npy, with the rows' paths and captions beside it as JSON lines, or parquet with all in one.
        shard_size: rows in a file; one process writes it, so give a smaller one to keep many busy.
        batch_size: rows that the towers see at once.
        num_workers: processes that read pictures, for each device; one for each usable core by default, at
            most 8.
        devices: GPUs, or processes without one, on each machine; by default all GPUs, one process without,
            and under torchrun what it has started.
        num_nodes: machines; by default one, and under torchrun what it has started.
        precision: that the towers run in.
        json: print one JSON object instead.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("devices", devices)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--num_workers {num_workers}: expected 0 or more")
    from clip_lightning.cores import cores
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.identity import location, model_identity
    from clip_lightning.search.embeddings import Store
    from clip_lightning.search.images import find_pictures

    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers tokenise, one core each
    pictures, left_out = find_pictures(data)
    clip = CLIP.from_pretrained(model)
    captions = [(path, text) for path, texts in pictures.items() for text in texts]
    if what != "images" and not captions:
        raise UserError(f"--what {what}: {data} has no captions; give --what images, or a captioned data set")
    plan = Plan(
        model=location(model),
        identity=model_identity(clip),
        source=str(data.resolve()),
        digest=data_digest(data, pictures),
        width=clip.embed_images([]).shape[1],
        images=list(pictures.items()) if what != "captions" else [],
        captions=captions if what != "images" else [],
        format=format,
        shard_size=shard_size,
        precision=precision,
    )
    store = Store(out, plan)
    workers = min(8, cores()) if num_workers is None else num_workers
    records = _predict(clip, store, batch_size, workers, left_out, _where(devices, num_nodes))
    if records is not None:
        _report(store, records, left_out, time.perf_counter() - started, json)


def _where(devices: int | None, num_nodes: int | None) -> dict[str, Any]:
    """The Trainer's words for where to run; torchrun says it in the environment."""
    local, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE")
    return {
        "devices": devices or (int(local) if local else "auto"),
        "num_nodes": num_nodes or (int(nodes) if nodes else 1),
    }


def _predict(
    clip: CLIP,
    store: Store,
    batch_size: int,
    workers: int,
    left_out: Mapping[str, str],
    where: Mapping[str, Any],
) -> dict[str, Record] | None:
    """Write the shards that are missing; their records in the first process, None in the others."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning.pytorch import Trainer

    from clip_lightning.search.predict import Embedder, ShardData

    store.check()
    first = rank_zero_only.rank == 0
    with store.writing() if first else contextlib.nullcontext(), warnings.catch_warnings():
        for message in _QUIET:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        done = store.finished()
        if len(done) < len(store.plan.shards()):
            if done and first:
                print(f"{len(done)} of {len(store.plan.shards())} shards are there", file=sys.stderr)
            trainer = Trainer(
                **where,
                precision=store.plan.precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,  # ranks own whole shards
                default_root_dir=store.root,
            )
            shards = ShardData(store, list(done), clip, batch_size, workers)
            trainer.predict(Embedder(clip, store), shards, return_predictions=False)
            trainer.strategy.barrier()
            first = trainer.is_global_zero
        return store.finish(left_out) if first else None


def _report(
    store: Store, records: Mapping[str, Record], left_out: Mapping[str, str], seconds: float, json: bool
) -> None:
    broken = dict(left_out)
    for record in records.values():
        broken |= record.broken
    for path, reason in list(broken.items())[:MOST_NAMED]:
        print(one_line(f"left out {path}: {reason}"), file=sys.stderr)
    rows = {
        kind: sum(record.rows for name, record in records.items() if name.startswith(kind))
        for kind in ("images", "captions")
    }
    about = {"out": str(store.root.resolve()), "model": store.plan.model, **rows, "broken": len(broken)}
    about |= {"width": store.plan.width, "shards": len(records), "seconds": round(seconds, 1)}
    if json:
        print(json_module.dumps(about))
    else:
        said = " and ".join(f"{count:,} {kind}" for kind, count in rows.items() if count)
        print(f"{said or 'nothing'} in {len(records)} shards, {len(broken)} broken: {store.root}")
